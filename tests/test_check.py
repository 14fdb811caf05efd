"""What `check` finds, what it leaves alone, and that it changes nothing."""

from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from filterwise.check import check
from filterwise.convert import convert_
from filterwise.errors import FilterwiseWarning
from filterwise.findings import Finding, findings_text
from filterwise.fold import fold
from filterwise.recipe import Recipe
from support.fingerprint import fingerprint


def make_net(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(torch.relu(self.one(torch.relu(x))))


def make_residual(blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        *[Block(16) for _ in range(blocks)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def make(recipe: str | Recipe, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = make_net() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterwiseWarning)
        convert_(model, recipe, **options)
    return model


def seen(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.layer) for finding in findings]


@pytest.mark.parametrize(
    "recipe", ["bn", "bn+ws", "gn+ws", "gn+centered", "wa", "pws", "wn", "sws"]
)
@pytest.mark.parametrize("given", [False, True])
def test_sound_model_has_a_clean_bill(recipe: str, given: bool) -> None:
    model = make(recipe)
    options = {"input": torch.randn(8, 3, 6, 6)} if given else {}
    assert check(model, batch_size=64, lr=0.1, **options) == []


def test_layer_that_nothing_normalizes() -> None:
    # Every converted layer: an error; some of them: a warning each.
    model = make("ws")
    findings = check(model)
    assert seen(findings) == [("error", "0"), ("error", "3")]
    assert "nothing normalizes the output" in findings[0].what
    # Standard deviation 1 over n weights is norm sqrt(n): 5.2 at n = 27.
    assert "norm 5.2" in findings[0].why
    assert '"gn+ws"' in findings[0].fix
    mixed = nn.Sequential(*make_net()[:6], nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    findings = check(make("gn+ws", mixed))
    assert seen(findings) == [("warning", "6")]
    assert 'exclude="6"' in findings[0].fix


def test_norm_fused_away_behind_a_converted_layer() -> None:
    model = make("bn+ws")
    model[4] = nn.Identity()
    (finding,) = check(model)
    assert (finding.level, finding.layer) == ("warning", "3")
    assert "An Identity follows it: if a BatchNorm was fused into the raw weight" in finding.fix


class Untraceable(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if float(input.sum()) < math.inf else -input)


def test_guessed_order_is_a_note_until_there_is_an_input() -> None:
    model = make("ws", Untraceable(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    assert [finding.level for finding in check(model)] == ["note"]
    assert [finding.level for finding in check(model, input=torch.ones(1, 3, 6, 6))] == ["error"]


@pytest.mark.parametrize("recipe", ["gn+ws", "wa", "gn+centered", "equinorm"])
def test_constant_filters_are_named(recipe: str) -> None:
    model = make(recipe)
    with torch.no_grad():
        model[3].weight[5] = 0.3
        model[3].weight[9] = 0.0
    (finding,) = check(model)
    assert (finding.level, finding.layer) == ("warning", "3")
    assert finding.what == "2 of 16 filters are constant (5, 9)"


def test_uncentred_method_minds_zero_filters_alone() -> None:
    model = make("wn")
    with torch.no_grad():
        model[3].weight[5] = 0.3
        model[3].weight[9] = 0.0
    finding, note = check(model)
    assert "1 of 16 filters are constant (9)" in finding.what
    assert (note.level, note.layer) == ("note", "3")
    assert "1 of 16 filters have weights of one sign (5)" in note.what


def test_transposed_filters_are_counted_by_output_channel() -> None:
    model = make("wa", nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 3, 3)))
    with torch.no_grad():
        model[0].weight[4:, 1] = 2.0  # the second group's channel 1: output channel 3 + 1
    (finding,) = check(model)
    assert finding.what == "1 of 6 filters are constant (4)"


def test_damage_is_found_in_any_tensor() -> None:
    model = make("bn+wa")
    with torch.no_grad():
        model[0].weight[2, 1] = math.nan
        model[1].running_var[3] = math.inf
        model[8].bias[0] = -math.inf
        model[3].gain[1] = math.nan
    findings = check(model)
    assert seen(findings) == [
        ("error", "0.weight"),
        ("error", "1.running_var"),
        ("error", "3.gain"),
        ("error", "8.bias"),
    ]
    assert findings[0].what == "holds 9 NaN and 0 infinite values of 432"
    assert findings[3].what == "holds 0 NaN and 1 infinite values of 5"


def test_large_finite_values_are_no_damage() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3e38)
    assert check(model) == []


# Residual branches


def test_deep_norm_free_residual_net_without_branch_gains() -> None:
    model = make("wa", make_residual(24))
    (finding,) = check(model)
    assert (finding.level, finding.layer) == ("error", "1.two")
    assert "24 residual branches" in finding.what
    # Each branch adds (1 - 1/pi)^2 of the trunk's second moment: 1.4647^24 = 9.5e3.
    assert "9.5e+03-fold" in finding.why
    assert "initialize_(model, 'branch')" in finding.fix


@pytest.mark.parametrize(
    ("recipe", "blocks", "level"),
    [("wa", 8, "warning"), ("wa", 4, None), ("wa(constant=preserving)", 10, "error"),
     ("gn+ws", 24, None), ("pws(gamma=none)", 24, "error"), ("sws", 10, "error")],
)  # fmt: skip
def test_level_follows_the_growth(recipe: str, blocks: int, level: str | None) -> None:
    model = make_residual(blocks)
    if recipe == "gn+ws":
        for block in model[1:-3]:
            block.two = nn.Sequential(block.two, nn.BatchNorm2d(16))
            block.one = nn.Sequential(block.one, nn.BatchNorm2d(16))
        model[0] = nn.Sequential(model[0], nn.BatchNorm2d(16))
    findings = check(make(recipe, model))
    assert [finding.level for finding in findings] == ([] if level is None else [level])


def test_branch_gains_that_were_set_or_trained_are_believed() -> None:
    model = make("wa", make_residual(24))
    for gain in (24**-0.5, 0.97):
        with torch.no_grad():
            for block in model[1:-3]:
                block.two.gain.fill_(gain)
        assert check(model) == []


# Batch size, learning rate, dtype


def test_batch_norm_at_small_batches() -> None:
    model = make("bn+ws")
    for size, level in ((1, "error"), (2, "warning"), (4, "warning"), (5, None), (64, None)):
        findings = check(model, batch_size=size)
        assert seen(findings) == ([] if level is None else [(level, "1")])
        if level:
            assert findings[0].what == f"2 BatchNorms see {size} samples a forward"
    assert check(make("gn+ws"), batch_size=1) == []
    ops = pytest.importorskip("torchvision.ops")
    assert check(nn.Sequential(ops.FrozenBatchNorm2d(3)), batch_size=1) == []


def test_batch_size_comes_from_the_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 6, 6), torch.zeros(4))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    assert seen(check(make("bn+ws"), loader=loader)) == [("warning", "1")]
    assert check(make("bn+ws"), loader=loader, batch_size=32) == []


def test_large_learning_rate_without_norms() -> None:
    assert seen(check(make("wa"), lr=0.3)) == [("warning", "0")]
    assert check(make("wa"), lr=0.1) == []
    assert check(make("gn+ws"), lr=0.3) == []


@pytest.mark.parametrize(
    ("gamma", "lr", "found"),
    [("1e-5", 1e-2, True), ("1e-4", 1e-2, True), ("1e-4", 1e-3, False), ("none", 1e-4, True),
     ("relative", 0.1, False)],
)  # fmt: skip
def test_gamma_that_bounds_the_step_too_little(gamma: str, lr: float, found: bool) -> None:
    # Bound lr * 2/(n gamma), largest in the stem of n = 27: 74, 7.4, 0.74, infinite, 1.
    findings = check(make(f"pws(gamma={gamma})"), lr=lr)
    assert seen(findings) == ([("warning", "0")] if found else [])


def test_gamma_and_eps_that_dwarf_the_weights() -> None:
    # He's variance is 2/n: 0.014 at n = 144; gamma of 1 leaves 1.4 % of it.
    model = make("pws(gamma=1.0)")
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.normal_(0, math.sqrt(2 / layer.weight[0].numel()))
    findings = check(model)
    assert seen(findings) == [("warning", "0"), ("warning", "3")]
    assert "gamma = 1 dwarfs the raw weights' variance of 0.01" in findings[1].what
    assert "leaves 1." in findings[1].what
    with torch.no_grad():
        small = make("gn+ws")
        small[3].weight.mul_(1e-5)
    (finding,) = check(small)
    assert "eps = 1e-05 dwarfs the raw weights' standard deviation" in finding.what
    floor = make("sws")
    with torch.no_grad():
        floor[0].weight.mul_(1e-3)
    (finding,) = check(floor)
    assert finding.layer == "0"
    assert check(make("gn+ws(eps=0)", None)) == []


def test_half_precision_head_room() -> None:
    wide = nn.Sequential(nn.Conv2d(64, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    (finding,) = check(make("gn+ws", copy.deepcopy(wide).half()))
    # sqrt(n/2) = 17 at n = 576.
    assert (finding.level, finding.layer) == ("note", "0")
    assert "17 times as long" in finding.what
    assert check(make("gn+ws(scale=fan_in)", copy.deepcopy(wide).half())) == []
    assert check(make("gn+ws", wide.bfloat16())) == []


# EquiNorm


def test_equinorm_fed_without_a_positive_mean() -> None:
    model = make("equinorm")
    x = torch.randn(16, 3, 6, 6)
    x -= x.mean((0, 2, 3), keepdim=True)
    findings = check(model, input=x + torch.tensor([1.0, -1.0, 0.05])[:, None, None])
    assert seen(findings)[0] == ("error", "0")
    assert "without a positive mean" in findings[0].what
    # Normalized pictures: the means have one sign here, and are next to nothing.
    findings = check(model, input=x + 0.01)
    assert seen(findings)[0] == ("error", "0")
    assert "mean is 0.01 of its size" in findings[0].what
    assert check(model, input=torch.rand(16, 3, 6, 6)) == []
    assert check(model) == []


def test_equinorm_is_judged_by_its_running_mean_without_an_input() -> None:
    model = make("equinorm")
    with torch.no_grad():
        model[3].num_batches_tracked.fill_(9)
        model[3].input_mean.copy_(torch.linspace(-1, 1.01, 16))
    assert ("error", "3") in seen(check(model))


def test_equinorm_in_evaluation_without_a_batch() -> None:
    model = make("equinorm").eval()
    findings = check(model)
    assert seen(findings) == [("warning", "0"), ("warning", "3")]
    assert "has seen no training batch" in findings[0].what


def test_single_pass_minds_signs_and_weight() -> None:
    model = make("equinorm(single_pass=true)")
    with torch.no_grad():
        model[0].weight.normal_(0, 0.1)
        model[0].weight[7].abs_()
    findings = [one for one in check(model) if "one sign" in one.what]
    assert seen(findings) == [("warning", "0")]
    assert "1 of 16 filters have weights of one sign (7)" in findings[0].what
    with torch.no_grad():
        # Nearly one sign: the shift turns most of the filter negative, and P2/P1 passes 2.
        model[0].weight[7] += 0.2
        model[0].weight[7, 0, 0, 0] = -0.01
    findings = check(model, input=torch.rand(8, 3, 6, 6))
    assert any("weighs more than 2 after the single pass" in one.what for one in findings)
    two_pass = make("equinorm")
    two_pass[0].weight.data.copy_(model[0].weight)
    assert check(two_pass, input=torch.rand(8, 3, 6, 6)) == []


def test_synchronized_statistics_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("equinorm(synchronize=true)")
    # As one process of several: whatever asks the others fails here, where there are none.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert check(model, input=torch.rand(8, 3, 6, 6)) == []


# Runs


class ReadsBehind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.conv.weight)


def test_raw_weight_read_behind_the_layers_back() -> None:
    model = make("wa", nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), ReadsBehind()), select="*")
    assert check(model) == []
    (finding,) = check(model, input=torch.rand(2, 3, 8, 8))
    assert (finding.level, finding.layer) == ("error", "2.conv")
    assert "reads the raw weight" in finding.why


def test_overflow_names_the_first_layer() -> None:
    model = make("gn+ws").half()
    x = torch.full((2, 3, 6, 6), 3e4, dtype=torch.float16)
    findings = check(model, input=x)
    assert seen(findings) == [("error", "0"), ("error", "0")]
    assert "the output reaches" in findings[0].what
    assert "NaN or infinity on the input" in findings[1].what


def test_input_that_does_not_fit_is_a_finding() -> None:
    (finding,) = check(make("wa"), input=torch.rand(2, 4, 6, 6))
    assert (finding.level, finding.layer) == ("error", "")
    assert "does not run on the input: RuntimeError" in finding.what


class Drawing(nn.Module):
    """A model that draws from all three random states and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x + torch.randn_like(x) * random.random() * numpy.random.rand())


class Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(3, 6, 6) + random.random() + float(numpy.random.rand()), index


@pytest.mark.parametrize("recipe", ["bn+ws", "equinorm"])
def test_nothing_changes(recipe: str) -> None:
    model = make(recipe, Drawing()).train()
    model.net[1].eval()
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(Augmented(), 4, shuffle=True, generator=generator)
    x = torch.rand(4, 3, 6, 6)
    before = fingerprint(model)
    states = [torch.get_rng_state(), generator.get_state()]
    other = (random.getstate(), numpy.random.get_state()[1].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, loader=loader, lr=0.1)
        check(model, batch_size=1, input=x)
    assert fingerprint(model) == before
    assert model.calls == 0
    for state, now in zip(states, [torch.get_rng_state(), generator.get_state()], strict=True):
        assert torch.equal(state, now)
    assert random.getstate() == other[0]
    assert (numpy.random.get_state()[1] == other[1]).all()


def test_loader_of_batches_and_what_is_none() -> None:
    model = make("equinorm")
    x = torch.randn(16, 3, 6, 6)
    batches = [(x - x.mean((0, 2, 3), keepdim=True), torch.zeros(16))]
    assert check(model, loader=batches)[0].level == "error"
    with pytest.raises(ValueError, match="the loader is an iterator"):
        check(model, loader=iter(batches))
    with pytest.raises(ValueError, match="a batch of the loader is a dict"):
        check(model, loader=[{"x": x}])
    with pytest.raises(ValueError, match="a batch of the loader is a NoneType"):
        check(model, loader=[])


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": "1"}]
)
def test_wrong_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a number > 0, got"):
        check(make("wa"), **options)


def test_meta_model_is_looked_at_without_values() -> None:
    with torch.device("meta"):
        model = make_residual(24)
    assert check(make("wa", model)) == []
    with torch.device("meta"):
        model = make_net()
    assert seen(check(make("ws", model))) == [("error", "0"), ("error", "3")]


def test_plain_and_folded_models_are_fine() -> None:
    model = make("bn+ws").eval()
    assert check(make_net()) == []
    assert check(fold(model, bn=True), input=torch.rand(2, 3, 6, 6)) == []
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        check("model")  # pyright: ignore[reportArgumentType]


# Text


def test_findings_are_sorted_by_level_and_read_as_text() -> None:
    model = make("bn+ws")
    with torch.no_grad():
        model[0].weight[2] = 1.0
        model[8].bias[0] = math.nan
    findings = check(model, batch_size=2)
    assert seen(findings) == [("error", "8.bias"), ("warning", "0"), ("warning", "1")]
    text = findings_text(findings)
    assert text.startswith(
        "error    8.bias: holds 1 NaN and 0 infinite values of 5\n         why: "
    )
    assert text.endswith("\n\n1 error, 2 warnings")
    assert findings_text([]) == "no findings"
    whole = Finding("note", "", "what", "why", "fix")
    assert str(whole) == "note     the model: what\n         why: why\n         fix: fix"


# The first step


def make_labelled(norm: bool = False) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    layers[1:1] = [nn.BatchNorm2d(8)] if norm else []
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return net, [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,)))]


@pytest.mark.parametrize("recipe", [None, "wa", "wn"])
def test_a_first_step_that_turns_filters_too_far(recipe: str | None) -> None:
    net, batches = make_labelled()
    if recipe:
        make(recipe, net, select="[02]")
    reference = copy.deepcopy(net)
    (x, y), rate = batches[0], 40.0
    functional.cross_entropy(reference(x), y).backward()
    expected = {}
    for name, module in reference.named_children():
        if hasattr(module, "weight"):
            old = module.weight.detach().double().flatten(1)
            new = old - rate * module.weight.grad.double().flatten(1)
            if recipe == "wa" and name in "02":
                old, new = (one - one.mean(1, keepdim=True) for one in (old, new))
            cosine = functional.cosine_similarity(old, new, dim=1)
            expected[name] = float(torch.rad2deg(torch.acos(cosine)).median())
    before = fingerprint(net)
    found = [one for one in check(net, loader=batches, lr=rate) if "a first step" in one.what]
    assert fingerprint(net) == before
    turned = [one for one in found if "turns its filters by" in one.what]
    worst = max(expected, key=lambda name: expected[name])
    assert expected[worst] > 10
    assert [one.layer for one in turned] == [worst]
    assert f"by {expected[worst]:.3g} degrees" in turned[0].what
    shifts = [one for one in found if "shifts the average" in one.what]
    assert bool(shifts) == (recipe != "wa")
    assert not [one for one in check(net, loader=batches, lr=1e-3) if "a first step" in one.what]


def test_shift_of_a_first_step_is_its_definition() -> None:
    net, batches = make_labelled()
    (x, y), rate = batches[0], 60.0
    reference = copy.deepcopy(net)
    functional.cross_entropy(reference(x), y).backward()
    sums = {n: rate * reference[n].weight.grad.double().sum((1, 2, 3)) for n in (0, 2)}
    shift = max(float(one.var(correction=0)) for one in sums.values())
    (finding,) = [one for one in check(net, loader=batches, lr=rate) if "shifts" in one.what]
    assert f"over filters is {shift:.3g}" in finding.what
    assert finding.layer in ("0", "2")


def test_a_first_step_is_judged_where_its_loss_is_known() -> None:
    net, ((x, y),) = make_labelled(norm=True)
    kinds = [
        [(x, y.float())],
        [(x, y + 5)],
        [x],
        [(x, y, y)],
    ]
    for batches in kinds:
        assert check(net, loader=batches, lr=1e4) == []
    (finding,) = check(net, loader=[(x, y)], lr=1e4)
    assert "over the limit of 30" in finding.what
    assert 'or "gn+ws"' not in finding.fix


def test_one_signed_filters_of_a_method_that_does_not_centre() -> None:
    model = make("wn")
    with torch.no_grad():
        model[3].weight[4].abs_().add_(1e-3)
    (finding,) = check(model)
    assert (finding.level, finding.layer) == ("note", "3")
    assert "1 of 16 filters have weights of one sign (4)" in finding.what
    centred = make("wa")
    with torch.no_grad():
        centred[3].weight[4].abs_().add_(1e-3)
    assert check(centred) == []
