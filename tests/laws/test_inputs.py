"""Law 21: what the input, the batch and the resolution may and may not change."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise import host
from support.compare import assert_close, assert_same
from support.laws import host_law
from support.models import HostCase
from support.tolerances import OUTPUT


@host_law(
    21,
    rejects={"reads_the_input": "ws-Conv2d-f64", "reads_the_batch": "wa-Linear-f32"},
    dtypes=("f32", "f64"),
)
def test_law21_inputs(hosted: HostCase):
    """The effective weight is the same for every input; a sample's output alone as in a batch."""
    layer, x = hosted.layer(), hosted.x()
    first, second = (
        hosted.effective(layer, x),
        hosted.effective(layer, 2.0 * hosted.x(seed=1) - 1.0),
    )
    assert_same(second, first, "effective weight")
    out = layer(x)
    allowed = OUTPUT[hosted.dtype] * out.detach().double().abs().max()
    for i in range(len(x)):
        assert_close(layer(x[i : i + 1]), out[i : i + 1], absolute=allowed, what=f"sample {i}")


def test_law21_batch_norm_in_training_is_the_control():
    norm, x = nn.BatchNorm2d(4), torch.rand(4, 4, 5, 5)
    assert float((norm(x)[:1] - norm(x[:1])).detach().abs().max()) > 0.1


def layer_of(make, dtype=torch.float64, **options):
    """Return a layer converted to EquiNorm, with its statistics untouched."""
    layer = make().to(dtype)
    model = nn.Sequential(layer)
    fw.convert_(model, fw.EquilibriumNormalization(**options), select="0")
    return layer


EXACT_GEOMETRY = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 9)),
    "Conv2d": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
        (3, 4, 7, 8),
    ),
    "Conv2d[g=2]": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"),
        (3, 4, 7, 8),
    ),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 4, 5, 6)),
    "Linear": (lambda: nn.Linear(4, 6), (7, 5, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", EXACT_GEOMETRY)
def test_law21_training_balances_every_channel(name, dtype):
    """In the exact geometry each channel's batch mean is 0, to rounding of its std."""
    make, shape = EXACT_GEOMETRY[name]
    layer = layer_of(make, dtype)
    with torch.no_grad():
        layer.gain.mul_(1 + 0.3 * torch.randn(6))
        layer.bias.zero_()
    x = torch.rand(shape, dtype=torch.float64).to(dtype)
    out = layer(x).detach().double()
    out = out.movedim(-1 if name == "Linear" else 1, 0).flatten(1)
    assert_close(out.mean(1) / out.std(1), torch.zeros(6), absolute=OUTPUT[dtype], what="mean")


def test_law21_evaluation_depends_neither_on_the_batch_nor_on_the_resolution():
    layer = layer_of(lambda: nn.Conv2d(4, 6, 3))
    with torch.no_grad():
        for _ in range(3):
            layer(torch.rand(2, 4, 8, 8, dtype=torch.float64))
    layer.eval()
    mean = layer.input_mean.clone()
    x = torch.rand(6, 4, 12, 10, dtype=torch.float64)
    out = layer(x)
    assert_close(layer(x[2:3]), out[2:3], absolute=1e-12)
    assert_close(layer(x[..., :7, :5]), out[..., :5, :3], absolute=1e-12)
    assert_same(layer.input_mean, mean, "running mean")


def test_law21_the_running_mean():
    """The first training batch sets it; then (1 - m) v_run + m v, per element."""
    layer = layer_of(lambda: nn.Conv2d(3, 4, 3), momentum=0.3)
    expected = None
    for step, size in enumerate((6, 9, 5)):
        x = torch.rand(2, 3, size, size, dtype=torch.float64) + step
        mean = x.mean((0, 2, 3))
        expected = mean if expected is None else 0.7 * expected + 0.3 * mean
        layer(x)
    assert int(layer.num_batches_tracked) == 3
    assert_close(layer.input_mean, expected, relative=1e-13)


def test_law21_evaluation_before_any_batch_warns_once():
    layer = layer_of(lambda: nn.Conv2d(3, 4, 3)).eval()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    with pytest.warns(fw.FilterwiseWarning, match="no training batch"):
        layer(x)
    layer(x)


def test_law21_degenerate_inputs_are_finite_and_said_once():
    """Zero-mean inputs and dead channels (section 4.4): a warning, never an infinity."""
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    cases = {
        "zero-mean": x - torch.tensor([0.3, 0.5, 0.72]).double().view(1, 3, 1, 1),
        "all zero": torch.zeros_like(x),
    }
    for name, degenerate in cases.items():
        layer = layer_of(lambda: nn.Conv2d(3, 4, 3))
        degenerate.requires_grad_()
        with pytest.warns(fw.FilterwiseWarning):
            out = layer(degenerate)
        out.square().sum().backward()
        for found in (out, degenerate.grad, layer.weight.grad):
            assert found.isfinite().all(), name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(degenerate)


def test_law21_a_dead_group_gives_zero_and_leaves_the_other_alone():
    layer = layer_of(lambda: nn.Conv2d(4, 6, 3, groups=2))
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    x[:, :2] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        out = host.effective_weight(layer, x)
    assert not out[:3].any()
    assert out[3:].isfinite().all()
    assert out[3:].abs().amin() > 0
