"""Folding: what comes out is plain, independent of the original, and computes the same."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import filterwise as fw
from filterwise.convert import convert_
from filterwise.errors import FilterwiseWarning, FoldError
from filterwise.fold import fold, fold_report
from filterwise.host import converted, effective_weight, is_converted
from filterwise.recipe import Recipe
from support.compare import assert_close, assert_same, relative_error
from support.fingerprint import fingerprint

RECIPES = (
    "gn+ws",
    "gn+ws(affine=true)",
    "wa",
    "pws",
    "wn",
    "cwn",
    "gn+centered",
    "sws",
    "equinorm",
)
WEIGHT_HOSTS = (
    (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    (lambda: nn.Conv2d(6, 8, (3, 5), stride=2, padding="valid", dilation=2, groups=2),
     (2, 6, 16, 16)),
    (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), (2, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, 5, padding=4, padding_mode="replicate"), (2, 6, 7, 7)),
    (lambda: nn.Conv3d(6, 8, 2), (2, 6, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(6, 8, 4, stride=2, padding=3), (2, 6, 9)),
    (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
     (2, 6, 5, 5)),
    (lambda: nn.ConvTranspose3d(6, 8, 2, groups=2, bias=False), (2, 6, 3, 3, 3)),
    (lambda: nn.Linear(16, 8), (2, 16)),
)  # fmt: skip


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def perturb(model: nn.Module) -> nn.Module:
    """Move everything off its initial value, running statistics too; return in evaluation mode."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "running_var" in name or "input_mean" in name:
                tensor.uniform_(0.3, 2.0)
            elif tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape).to(tensor.dtype))
            else:
                tensor.fill_(7)
    return model.eval()


def make(recipe: str | Recipe, model: nn.Module | None = None, select: object = None) -> nn.Module:
    model = make_net() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        convert_(model, recipe, select=select)  # pyright: ignore[reportArgumentType]
    return perturb(model)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("recipe", RECIPES)
def test_folded_model_is_plain_and_equal_to_the_bit(recipe: str) -> None:
    model = make(recipe)
    x = torch.rand(4, 3, 9, 9)
    before = fingerprint(model)
    plain = fold(model)
    assert fingerprint(model) == before
    assert torch.equal(run(plain, x), run(model, x))
    assert not any(
        is_converted(m) or type(m).__module__.startswith("filterwise") for m in plain.modules()
    )
    assert [type(m) for m in plain if isinstance(m, nn.Conv2d)] == [nn.Conv2d, nn.Conv2d]
    assert set(plain.state_dict()) == {
        key for key in model.state_dict() if key.rpartition(".")[2] in ("weight", "bias")
    }
    for name, layer in converted(model):
        assert_same(plain.get_submodule(name).weight, effective_weight(layer), name)
    assert storages(model).isdisjoint(storages(plain))
    assert type(pickle.loads(pickle.dumps(plain))[0]) is nn.Conv2d


def filter_of(layer: nn.Module, weight: torch.Tensor, o: int) -> torch.Tensor:
    """Return the weights that feed output channel o, by the specification's table."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight[o]
    q, j = divmod(o, layer.out_channels // layer.groups)
    inputs = layer.in_channels // layer.groups
    return weight[q * inputs : (q + 1) * inputs, j]


@pytest.mark.parametrize("host", range(len(WEIGHT_HOSTS)))
@pytest.mark.parametrize("recipe", ["ws", "wa"])
def test_every_host_against_the_formula(recipe: str, host: int) -> None:
    build, shape = WEIGHT_HOSTS[host]
    plain = build().double()
    model = nn.Sequential(copy.deepcopy(plain), nn.ReLU())
    model = make(recipe, model, "*")
    layer, folded = model[0], fold(model)[0]
    report = fold_report(model)
    assert report[0].difference == 0
    raw, gain = layer.weight.detach(), getattr(layer, "gain", torch.ones(8).double()).detach()
    for o in range(8):
        rows, found = filter_of(layer, raw, o), filter_of(layer, folded.weight, o)
        centred = rows - rows.mean()
        n, sigma = rows.numel(), centred.square().mean().sqrt()
        expected = centred / (sigma + 1e-5)
        if recipe == "wa":
            expected = gain[o] * centred / torch.sqrt(n / 2 * (sigma**2 + 1e-10))
        assert_close(found, expected, relative=1e-11, absolute=1e-14)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(run(folded, x), run(layer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_strides_flags_and_modes_survive(dtype: torch.dtype) -> None:
    model = make("pws").to(dtype, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model.train()
    model[2].eval()
    plain = fold(model)
    assert plain[0].weight.dtype == dtype
    assert plain[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain[0].weight.requires_grad
    assert plain[3].weight.requires_grad
    assert plain[3].weight.is_leaf
    assert [m.training for m in plain.modules()] == [m.training for m in model.modules()]
    for old, new in zip(model.modules(), plain.modules(), strict=True):
        assert old is not new


def test_nothing_of_the_callers_changes() -> None:
    model = make("bn+ws")
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before, state = fingerprint(model), torch.get_rng_state()
    fold(model, bn=True)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    assert torch.is_grad_enabled()


def test_loading_hook_is_gone_and_others_stay() -> None:
    model = make("wa")
    seen = []
    model.register_load_state_dict_post_hook(lambda *_: seen.append("mine"))
    plain = fold(model)
    assert len(model._load_state_dict_post_hooks) == 2
    assert len(plain._load_state_dict_post_hooks) == 1
    plain.load_state_dict(make_plain_state())
    assert seen == ["mine"]
    assert "filterwise" not in plain.state_dict()._metadata["0"]


def make_plain_state() -> dict[str, torch.Tensor]:
    model = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        convert_(model, "none")
    return model.state_dict()


def test_folding_a_folded_model_changes_nothing_and_says_so() -> None:
    plain = fold(make("wa"))
    with pytest.warns(FilterwiseWarning, match="nothing to fold: no layer of the model is conv"):
        again = fold(plain)
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one is not other
        assert torch.equal(one, other)


def test_nothing_to_fold_or_merge_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).eval()
    with pytest.warns(FilterwiseWarning, match="and no BatchNorm can be merged"):
        fold(model, bn=True)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.second.weight = self.first.weight
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.again(self.second(self.first(x))))


@pytest.mark.parametrize(("recipe", "shared"), [("ws", True), ("wa", False)])
def test_layers_on_one_raw_weight(recipe: str, shared: bool) -> None:
    model = Reused()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        convert_(model, recipe, select=["first", "second"])
    perturb(model)
    x = torch.randn(2, 4, 5, 5)
    plain = fold(model, example_input=x)
    assert plain.again is plain.first
    # One weight without gains is one weight still; with gains each layer has its own.
    assert (plain.first.weight is plain.second.weight) is shared
    assert torch.equal(plain.other.weight, model.first.weight)
    assert plain.other.weight is not plain.first.weight
    assert torch.equal(run(plain, x), run(model, x))
    assert_same(plain.second.weight, effective_weight(model.second))
    assert [row.layer for row in fold_report(model)] == ["first", "second"]


def test_foreign_class_comes_back() -> None:
    layers = pytest.importorskip("timm.layers")
    model = make("wa", nn.Sequential(layers.Conv2dSame(3, 8, 3, stride=2), nn.ReLU()), "*")
    plain = fold(model)
    assert type(plain[0]) is layers.Conv2dSame
    x = torch.randn(2, 3, 7, 7)
    assert torch.equal(run(plain, x), run(model, x))


class Mixing(nn.Module):
    """A layer whose weight has another name, called with two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 20))

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * functional.linear(x, self.matrix)


class MixingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = Mixing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixing(x, 2.0)


def test_named_weight_is_folded_and_compared_end_to_end() -> None:
    model = make("wa", MixingNet(), "mixing.matrix")
    x = torch.randn(3, 20)
    plain = fold(model, example_input=x)
    assert type(plain.mixing) is Mixing
    assert torch.equal(run(plain, x), run(model, x))
    report = fold_report(model)
    assert report[0].layer == "mixing.matrix"
    assert report[0].difference is None
    assert "give example_input" in report[0].reason
    assert report.largest is None
    assert fold_report(model, example_input=x).end_to_end == 0


# BatchNorm


def merged_by_hand(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    weight = effective_weight(layer) if is_converted(layer) else layer.weight
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias
    return (
        weight * scale[:, None, None, None],
        norm.bias + (bias - norm.running_mean) * scale,
    )


@pytest.mark.parametrize("recipe", ["bn+ws", "keep+wa", "bn+equinorm", "bn"])
def test_batch_norm_goes_into_the_layer_before_it(recipe: str) -> None:
    model = make(recipe).double()
    x = torch.rand(4, 3, 9, 9, dtype=torch.float64)
    plain = fold(model, bn=True)
    assert relative_error(run(plain, x), run(model, x)) < 1e-13
    for conv, norm in ((0, 1), (3, 4)):
        weight, bias = merged_by_hand(model[conv], model[norm])
        assert_close(plain[conv].weight, weight, relative=1e-12)
        assert_close(plain[conv].bias, bias, relative=1e-12, absolute=1e-14)
        assert type(plain[norm]) is nn.Identity
        assert isinstance(plain[conv].bias, nn.Parameter)
    report = fold_report(model, bn=True, example_input=x)
    norms = [row for row in report if row.kind == "BatchNorm2d"]
    assert [(row.layer, row.action, row.reason) for row in norms] == [
        ("1", "merge", "into 0"),
        ("4", "merge", "into 3"),
    ]
    assert report.end_to_end is not None
    assert report.end_to_end < 1e-12
    assert storages(model).isdisjoint(storages(plain))


def test_batch_norm_stays_unless_asked() -> None:
    model = make("bn+ws")
    plain = fold(model)
    assert type(plain[1]) is nn.BatchNorm2d
    row = fold_report(model)[1]
    assert (row.action, row.difference) == ("keep", None)
    assert "bn=True merges it" in row.reason
    assert torch.equal(run(plain, torch.ones(1, 3, 8, 8)), run(model, torch.ones(1, 3, 8, 8)))


def test_transposed_grouped_layer_takes_its_norm() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8))
    model = make("bn+ws", model, "0").double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert relative_error(run(fold(model, bn=True), x), run(model, x)) < 1e-13


def test_training_mode_is_refused_with_the_way_out() -> None:
    model = make("bn+ws").train()
    before = fingerprint(model)
    with pytest.raises(FoldError, match=r"1 \(BatchNorm2d\) is in training mode.*model\.eval\(\)"):
        fold(model, bn=True)
    assert fingerprint(model) == before
    fold(model)


def test_fused_activation_and_frozen_norm() -> None:
    layers = pytest.importorskip("timm.layers")
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        layers.BatchNormAct2d(8, act_layer=nn.SiLU),
        nn.Conv2d(8, 8, 3, bias=False),
        ops.FrozenBatchNorm2d(8),
    )
    model = make("keep+ws", model, ["0", "2"]).double().train()
    model[1].eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plain = fold(model, bn=True)
    assert relative_error(run(plain, x), run(model, x)) < 1e-12
    assert [row.action for row in fold_report(model, bn=True)] == ["fold", "merge"] * 2
    assert not any(isinstance(m, (nn.BatchNorm2d, ops.FrozenBatchNorm2d)) for m in plain.modules())
    assert any(isinstance(m, nn.SiLU) for m in plain.modules())


class Odd(nn.Module):
    """Every reason for which a BatchNorm cannot be merged, in one net."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(4, 4, 1)
        self.norm_twice = nn.BatchNorm2d(4)
        self.split = nn.Conv2d(4, 4, 1)
        self.norm_split = nn.BatchNorm2d(4)
        self.untracked_conv = nn.Conv2d(4, 4, 1)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.hooked_conv = nn.Conv2d(4, 4, 1)
        self.hooked = nn.BatchNorm2d(4)
        self.early = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 4)
        self.late = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)
        self.hooked_conv.register_forward_hook(lambda _module, _input, output: output * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_twice(self.twice(self.twice(x)))
        y = self.split(x)
        x = self.norm_split(y) + y
        x = self.untracked(self.untracked_conv(x))
        x = self.hooked(self.hooked_conv(x))
        x = self.early(torch.relu(x))
        return self.late(self.linear(self.group(x).mean((2, 3))))


def test_what_cannot_be_merged_stays_with_the_reason() -> None:
    model = perturb(Odd()).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    with pytest.warns(FilterwiseWarning, match="nothing to fold"):
        report = fold_report(model, bn=True)
    reasons = {row.layer: row.reason for row in report}
    assert all(row.action == "keep" for row in report)
    assert list(reasons) == [
        "norm_twice", "norm_split", "untracked", "hooked", "early", "late", "group"
    ]  # fmt: skip
    for name in ("norm_twice", "norm_split", "early"):
        assert "no single convolution or linear layer" in reasons[name]
    assert "keeps no running statistics" in reasons["untracked"]
    assert "a hook sees what passes" in reasons["hooked"]
    assert "more than two axes; give example_input" in reasons["late"]
    assert "each sample's own" in reasons["group"]
    plain = fold(model, bn=True, example_input=x)
    assert type(plain.late) is nn.Identity
    assert relative_error(run(plain, x), run(model, x)) < 1e-13


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if float(x.sum()) == float(x.sum()) else x


def test_unknown_order_is_refused_and_an_example_helps() -> None:
    model = perturb(Untraceable())
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(FoldError, match=r"symbolic tracing failed.*example_input.*unchanged"):
        fold(model, bn=True)
    plain = fold(model, bn=True, example_input=x)
    assert type(plain.norm) is nn.Identity
    assert relative_error(run(plain, x), run(model, x)) < 1e-6


def test_tied_raw_weights_take_their_own_norms() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
                          nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double()  # fmt: skip
    model[2].weight = model[0].weight
    make("bn+ws", model, "*")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    plain = fold(model, bn=True)
    assert plain[0].weight is not plain[2].weight
    assert relative_error(run(plain, x), run(model, x)) < 1e-13


# Comparison


class ReadsBehind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.conv.weight)


def test_weight_read_behind_the_layers_back_is_found() -> None:
    model = make("wa", nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), ReadsBehind()), "*")
    before = fingerprint(model)
    fold(model)
    with pytest.raises(FoldError, match=r"first in 2\.conv \(Conv2d\).*raw \.weight.*unchanged"):
        fold(model, example_input=torch.randn(1, 4, 7, 7))
    assert fingerprint(model) == before


class KnowsItsClass(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * (2.0 if type(self) is KnowsItsClass else 1.0)


def test_layer_that_computes_something_else_is_named_with_the_figure() -> None:
    model = make("wa", nn.Sequential(nn.ReLU(), KnowsItsClass(3, 4, 3)), "*")
    with pytest.raises(FoldError, match=r"1 \(KnowsItsClass\).*difference 1 in float32, 1 in"):
        fold(model)


class NeedsMore(nn.Conv2d):
    def forward(self, input: torch.Tensor, factor: float) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input) * factor


def test_layer_that_cannot_run_alone_says_so() -> None:
    model = make("wa", nn.Sequential(NeedsMore(3, 4, 3)), "*")
    (row,) = fold_report(model)
    assert row.difference is None
    assert "not compared alone: TypeError" in row.reason


def test_rounding_is_told_from_error() -> None:
    # A bias and a running mean of 1e6 cancel: float32 keeps a digit or two of the difference.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    make("bn+ws", model, "0")
    with torch.no_grad():
        model[0].bias.add_(1e6)
        model[1].running_mean.add_(1e6)
    report = fold_report(model, bn=True, example_input=torch.randn(2, 3, 6, 6))
    assert report[0].difference is not None
    assert report[0].difference > 1e-4
    assert "rounding:" in report[0].reason
    assert any("differs by rounding" in note for note in report.notes)
    double = fold_report(model.double(), bn=True)
    assert double[0].difference is not None
    assert double[0].difference < 1e-9


def test_example_input_may_be_arguments_or_one_list() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, parts: list[torch.Tensor], scale: float = 1.0) -> dict[str, object]:
            return {"sum": [self.conv(part) * scale for part in parts], "n": len(parts)}

    model = make("wa", Sum(), "*")
    x = torch.randn(2, 2, 5, 5)
    assert fold_report(model, example_input=([x, x], 3.0)).end_to_end == 0
    assert fold_report(model, example_input=[x]).end_to_end == 0
    with pytest.raises(FoldError, match=r"does not run on example_input \(shapes \[\(1, 5\)\]\)"):
        fold(model, example_input=torch.zeros(1, 5))


def test_output_without_a_tensor_is_noted() -> None:
    class Count(nn.Sequential):
        def forward(self, input: torch.Tensor) -> int:
            return len(super().forward(input))

    report = fold_report(
        make("wa", Count(nn.Conv2d(2, 4, 3)), "*"), example_input=torch.ones(3, 2, 4, 4)
    )
    assert report.end_to_end is None
    assert any("no floating tensor" in note for note in report.notes)


def test_model_that_draws_numbers_is_compared_on_the_same_ones() -> None:
    class Noisy(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input + torch.randn_like(input))

    model = make("wa", Noisy(nn.Conv2d(2, 4, 3)), "*")
    state = torch.get_rng_state()
    assert fold_report(model, example_input=torch.ones(1, 2, 4, 4)).end_to_end == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_damage_is_passed_through() -> None:
    model = make("wa")
    with torch.no_grad():
        model[0].weight[3] = math.nan
    x = torch.randn(2, 3, 8, 8)
    plain = fold(model, example_input=x)
    assert "is not finite" in fold_report(model, example_input=x).notes[0]
    assert plain[0].weight[3].isnan().all()
    assert plain[0].weight[:3].isfinite().all()


# Modes and copies


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_result_holds_ordinary_tensors_in_any_mode(mode: type) -> None:
    with mode():
        plain = fold(make("bn+ws"), bn=True)
        inside = fold(make("wa"))
    for model in (plain, inside):
        assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
        model.train()(torch.randn(2, 3, 8, 8)).sum().backward()
        assert model[0].weight.grad is not None


def test_autocast_outside_does_not_reach_the_comparison() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = fold_report(make("bn+ws"), bn=True)
    assert report.largest is not None
    assert report.largest < 1e-5


def test_equinorm_without_a_batch_is_said() -> None:
    model = make_net()
    convert_(model, "equinorm")
    with pytest.warns(FilterwiseWarning, match="2 EquiNorm layers have seen no training batch"):
        plain = fold(model)
    x = torch.rand(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        assert torch.equal(run(plain.eval(), x), run(model.eval(), x))
        assert "input means of 1" in fold_report(model).notes[0]


def test_equinorm_folds_with_its_running_mean() -> None:
    model = make_net()
    convert_(model, "equinorm")
    for scale in (1.0, 3.0):
        model.train()(scale * torch.rand(4, 3, 9, 9))
    with torch.no_grad():
        model[0].gain.uniform_(0.5, 2.0)
        model[0].bias.normal_()
    plain = fold(model)
    layer = model[0]
    v = layer.input_mean.double()[None, :, None, None]
    w = layer.weight.detach().double()
    balanced = w - (v * w).sum((1, 2, 3), keepdim=True) / (9 * v.sum())
    expected = balanced / (v * balanced.clamp_min(0)).sum((1, 2, 3), keepdim=True)
    expected = expected * layer.gain.detach().double()[:, None, None, None]
    assert_close(plain[0].weight, expected, relative=1e-5, absolute=1e-7)
    assert_same(plain[0].bias, layer.bias)
    assert not hasattr(plain[0], "input_mean")


def test_meta_weights_and_uncopyable_models_are_refused() -> None:
    with torch.device("meta"):
        meta = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        convert_(meta, "wa", select="*")
    with pytest.raises(FoldError, match=r"0 \(.*Conv2d\) is on the meta device"):
        fold(meta)
    model = make("wa")
    model.kept = model[0].weight * 2
    with pytest.raises(FoldError, match=r"cannot be copied: RuntimeError.*unchanged"):
        fold(model)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        fold(3)  # pyright: ignore[reportArgumentType]


# Report


def test_report_reads_as_records_and_as_a_table(caplog: pytest.LogCaptureFixture) -> None:
    model = make("gn+ws")
    with caplog.at_level(logging.INFO, "filterwise"):
        result = fold(model)
        report = fold_report(model)
    assert isinstance(result, nn.Sequential)
    assert [record.getMessage() for record in caplog.records] == [str(report)] * 2
    assert report.to_dicts()[0] == {
        "layer": "0", "kind": "Conv2d", "action": "fold", "difference": 0.0, "reason": ""
    }  # fmt: skip
    assert len(report) == 4
    assert report.largest == 0
    lines = str(report).split("\n")
    assert lines[0].split() == ["layer", "kind", "what", "difference", "why"]
    assert lines[2].split()[:3] == ["1", "GroupNorm", "keep"]
    assert lines[6] == "2 folded, 0 norms merged, 2 norms kept; largest relative difference 0"


def test_report_of_the_model_that_is_a_layer() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with contextlib.suppress(fw.ConversionError), warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        convert_(layer, "wa", select=lambda *_: True)
    (row,) = fold_report(layer)
    assert row.action == "fold"
    assert type(fold(layer)) is nn.Conv2d
