"""Head-room in float16: the figures, and the form that has more of it and computes the same."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise.errors import CheckpointWarning, ConversionError
from support.compare import assert_close, relative_error
from support.fingerprint import fingerprint

NORMS = {
    "bn": lambda: nn.BatchNorm2d(16),
    "bn without affine": lambda: nn.BatchNorm2d(16, affine=False),
    "gn": lambda: nn.GroupNorm(4, 16),
    "ln": lambda: nn.GroupNorm(1, 16),
    "in": lambda: nn.InstanceNorm2d(16, affine=True),
    "in with statistics": lambda: nn.InstanceNorm2d(16, track_running_stats=True),
}


def make(norm: nn.Module, recipe: str = "keep+ws", layer: nn.Module | None = None) -> nn.Module:
    layer = layer or nn.Conv2d(32, 16, 3, padding=1, bias=False)
    model = nn.Sequential(
        layer, norm, nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False), nn.GroupNorm(2, 8)
    )
    for part in model:
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    fw.convert_(model, recipe, select=["0", "3"])
    return model.double()


def faint(*shape: int) -> torch.Tensor:
    """Return an input so small that the norms' eps matters."""
    return torch.randn(*shape, dtype=torch.float64) * 1e-3


def largest(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max())


def test_filters_are_as_long_as_the_formula_says() -> None:
    layer = nn.Conv2d(256, 8, 4, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    model = nn.Sequential(layer, nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3))
    plain = fw.headroom_report(model)[0]
    assert (plain.method, plain.fan_in) == (None, 4096)
    assert plain.length == pytest.approx(1, abs=0.05)
    fw.convert_(model, "keep+ws", select="0")
    row = fw.headroom_report(model)[0]
    # sqrt(n / 2), less the eps of 1e-5 beside a deviation of sqrt(2 / n).
    assert row.length == pytest.approx((4096 / 2) ** 0.5, rel=1e-3)
    assert (row.layer, row.norm, row.largest, row.room) == ("0", "1", None, None)
    assert "45.2 times a He layer's" in str(fw.headroom_report(model))


def test_the_largest_output_is_that_of_the_run() -> None:
    model = make(nn.BatchNorm2d(16)).float()
    x = torch.randn(2, 32, 6, 6)
    seen: list[float] = []
    handle = model[0].register_forward_hook(lambda _m, _i, y: seen.append(largest(y)))
    model(x)
    handle.remove()
    before = fingerprint(model)
    report = fw.headroom_report(model, input=x)
    assert fingerprint(model) == before
    assert report[0].largest == pytest.approx(seen[0])
    assert report[0].room == pytest.approx(65504 / seen[0])
    # In half precision too, where the run itself would overflow.
    half = copy.deepcopy(model).half()
    wide = fw.headroom_report(half, input=(x * 1e4).clamp(-6e4, 6e4).half())
    assert wide[0].largest is not None
    assert wide[0].largest > 65504
    assert "65504" in str(wide)
    with pytest.raises(ValueError, match="does not run on the input"):
        fw.headroom_report(model, input=torch.randn(2, 5, 6, 6))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_the_other_form_computes_the_same(kind: str, training: bool) -> None:
    model = make(NORMS[kind]())
    model.train(training)
    other = copy.deepcopy(model)
    report = fw.rescale_(other)
    assert report.converted == ["0", "3"]
    assert other[0].weight.equal(model[0].weight)
    assert other[1].eps == pytest.approx(1e-5 / (32 * 9))
    x = faint(4, 32, 6, 6)
    for _ in range(3):  # running statistics move on
        expected, found = model(x), other(x)
        assert_close(found, expected, absolute=1e-9 * largest(expected), what=kind)
    assert fw.headroom_report(other)[0].length == pytest.approx(0.5**0.5, rel=1e-3)
    # An eps left as it was would be seen.
    other[1].eps = 1e-5
    assert relative_error(other[:2](x), model[:2](x)) > 1e-3


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(32, 16, 3, bias=False), nn.GroupNorm(4, 16), (4, 32, 9)),
        (nn.Conv3d(8, 16, 3, bias=False, groups=2), nn.BatchNorm3d(16), (4, 8, 4, 4, 4)),
        (nn.ConvTranspose2d(32, 16, 3, groups=2, bias=False), nn.BatchNorm2d(16), (4, 32, 4, 4)),
        (nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), (8, 64)),
        (nn.Conv2d(32, 16, 3), nn.BatchNorm2d(16), (4, 32, 4, 4)),
    ],
)
def test_every_host(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer, norm)
    fw.convert_(model, "keep+ws", select="0")
    model.double()
    other = copy.deepcopy(model)
    assert fw.rescale_(other).converted == ["0"]
    x = faint(*shape)
    for mode in (True, False):
        expected = model.train(mode)(x)
        assert_close(other.train(mode)(x), expected, absolute=1e-9 * largest(expected))


def test_training_goes_the_same_way() -> None:
    model = make(nn.BatchNorm2d(16))
    other = copy.deepcopy(model)
    start = model[0].weight.detach().clone()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model, other)]
    for step in range(6):
        if step == 2:  # in the middle, between two steps
            fw.rescale_(other)
        for net, optimizer in zip((model, other), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for micro in range(3):
                x = torch.randn(2, 32, 5, 5, dtype=torch.float64, generator=generator)
                with fw.defer(net, enabled=micro < 2):
                    net(x * 1e-2).square().mean().mul(1 + micro).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert_close(ours, theirs, absolute=1e-9 * largest(theirs), what=name)
    assert relative_error(start, model[0].weight) > 1e-3


def test_what_overflows_in_float16_no_longer_does() -> None:
    model = nn.Sequential(nn.Conv2d(512, 16, 3, bias=False), nn.GroupNorm(4, 16))
    fw.convert_(model, "keep+ws", select="0")
    x = torch.randn(2, 512, 4, 4) * 1000
    expected = model(x)
    assert not copy.deepcopy(model).half()(x.half()).isfinite().all()
    with torch.autocast("cpu", torch.float16):
        assert not model(x).isfinite().all()
        (finding,) = fw.check(model, input=x)
    assert (finding.level, finding.layer) == ("error", "0")
    assert "rescale_(model) gives 1 of them" in finding.fix
    fw.rescale_(model)
    half = copy.deepcopy(model).half()(x.half())
    assert relative_error(half.float(), expected) < 5e-3
    with torch.autocast("cpu", torch.float16):
        assert relative_error(model(x).float(), expected) < 5e-3
        assert fw.check(model, input=x) == []


def test_who_keeps_the_form_and_why() -> None:
    def reason(model: nn.Module) -> str:
        before = fingerprint(model)
        row = fw.rescale_(model)[0]
        assert row.action == "keep"
        assert fingerprint(model) == before
        return row.reason

    def pair(recipe: str, norm: nn.Module, **options: object) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(32, 16, 3, **options), norm)
        with warnings.catch_warnings(action="ignore"):
            fw.convert_(model, recipe, select="0")
        return model

    norm = nn.GroupNorm(4, 16)
    assert "learn at another rate before 1" in reason(pair("keep+ws", norm))
    frozen = pair("keep+ws", nn.GroupNorm(4, 16))
    frozen[0].bias.requires_grad_(False)
    assert fw.rescale_(copy.deepcopy(frozen)).converted == ["0"]
    assert reason(pair("keep+wa", norm)) == "wa does not bring filters to norm sqrt(n)"
    assert "norm 1 already" in reason(pair("keep+ws(scale=fan_in)", norm))
    assert "set its scale" in reason(pair("keep+ws(affine=true)", norm, bias=False))
    assert "no norm alone" in reason(pair("keep+ws", nn.Identity(), bias=False))
    whole = pair("keep+ws", nn.GroupNorm(4, 16), bias=False)
    whole[1].eps = None
    assert "no eps that can be scaled" in reason(whole)
    two = nn.Sequential(nn.Conv2d(32, 16, 3, bias=False), norm, nn.Conv2d(16, 16, 3), norm)
    fw.convert_(two, "keep+ws", select="0")
    assert "no norm alone" in reason(two)
    assert fw.rescale_(nn.Linear(3, 3)).notes == ("No layer of this model is converted.",)


class Squaring(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input * input)


def test_a_norm_that_does_more_is_found_by_trying() -> None:
    model = nn.Sequential(nn.Conv2d(32, 16, 3, bias=False), Squaring(16))
    fw.convert_(model, "keep+ws", select="0")
    assert "1 computes something else" in fw.rescale_(model)[0].reason


def test_an_open_window_is_refused() -> None:
    model = make(nn.GroupNorm(4, 16))
    x = faint(2, 32, 6, 6)
    with fw.defer(model):
        model(x).sum().backward()
        with pytest.raises(ConversionError, match="open window of defer"):
            fw.rescale_(model)
    with fw.defer(model, enabled=False):
        pass
    assert fw.rescale_(model).converted == ["0", "3"]


def test_kept_weights_follow() -> None:
    model = make(nn.BatchNorm2d(16)).eval()
    x = faint(2, 32, 6, 6)
    with torch.no_grad():
        expected = model(x)
        fw.rescale_(model)
        found = model(x)
    assert_close(found, expected, absolute=1e-9 * largest(expected))


def test_afterwards_it_folds_and_its_checkpoint_says_what_it_is() -> None:
    model = make(nn.BatchNorm2d(16))
    fw.rescale_(model)
    assert fw.describe(model) == {"0": "ws(scale=fan_in)", "3": "ws(scale=fan_in)"}
    model.eval()
    x = faint(2, 32, 6, 6)
    assert relative_error(fw.fold(model, bn=True, example_input=x)(x), model(x)) < 1e-9
    fresh = make(nn.BatchNorm2d(16))
    with pytest.warns(CheckpointWarning, match="scale fan_in -> unit"):
        fresh.load_state_dict(model.state_dict())
    again = make(nn.BatchNorm2d(16))
    fw.rescale_(again)
    again.load_state_dict(model.state_dict())
    assert_close(again.eval()(x), model(x))


def test_an_adopted_layer_too() -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    model = nn.Sequential(layers.StdConv2d(32, 16, 3), layers.GroupNormAct(16, 4)).double()
    x = faint(2, 32, 6, 6)
    expected = model(x)
    fw.adopt_(model)
    assert fw.rescale_(model).converted == ["0"]
    assert_close(model(x), expected, absolute=1e-9 * largest(expected))
