"""The comparison that folding and `check` stand on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from filterwise.verify import (
    evaluating,
    first_difference,
    relative_difference,
    seeded_input,
    tolerance,
    widened,
)

NAN, INF = math.nan, math.inf


@dataclass
class Output:
    logits: torch.Tensor
    label: str = "x"


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ([4.0, -8.0], [4.0, -8.0], 0.0),
        ([4.0, -8.0], [4.0, -6.0], 0.25),
        ([4.0, 0.0], [5.0, 0.0], 0.25),
        ([NAN, INF, 2.0], [NAN, INF, 1.0], 0.5),
        ([1.0, NAN], [1.0, 1.0], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([0.0], [1e-3], 1e-3 / torch.finfo(torch.float64).tiny),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_relative_difference(expected: list[float], found: list[float], difference: float) -> None:
    one, other = (torch.tensor(values, dtype=torch.float64) for values in (expected, found))
    assert relative_difference(one, other) == pytest.approx(difference)


def test_nested_outputs_are_compared_part_by_part() -> None:
    one, two = torch.ones(3), torch.full((3,), 100.0)
    assert relative_difference(
        {"a": [one, (two, 3)]}, {"a": [one, (two + 10, 4)]}
    ) == pytest.approx(0.1)
    assert relative_difference([one, two], [one]) == INF
    assert relative_difference(Output(one), Output(one * 1.5)) == pytest.approx(0.5)
    assert relative_difference([torch.tensor([1])], [torch.tensor([2])]) == 0


def test_tolerances() -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    assert [tolerance(dtype) for dtype in dtypes] == [1e-9, 1e-4, 2e-2, 2e-2]


@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("dilation", [1, 3])
def test_seeded_input_fits_every_geometry(
    kernel: int, padding: int, stride: int, dilation: int
) -> None:
    options = {"padding": padding, "stride": stride, "dilation": dilation}
    layers = [nn.ConvTranspose2d(2, 3, kernel, **options)]
    layers += [
        nn.Conv2d(2, 3, kernel, padding_mode=mode, **options)
        for mode in ("zeros", "reflect", "replicate", "circular")
    ]
    for layer in layers:
        x = seeded_input(layer)
        assert x is not None
        assert layer(x).numel() > 0
        assert torch.equal(x, seeded_input(layer))
    assert seeded_input(nn.ReLU()) is None


def test_evaluating_puts_modes_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    state = torch.get_rng_state()

    def fail() -> None:
        with evaluating(model):
            assert not any(part.training for part in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [part.training for part in model.modules()] == [True, True, False, False]
    assert torch.equal(torch.get_rng_state(), state)


def test_first_difference_names_the_inner_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), nn.ReLU())
    other = widened(model).float()
    x = (torch.randn(2, 3),)
    assert first_difference(model, other, x, 1e-6) is None
    with torch.no_grad():
        other[1][1].bias += 1
    assert first_difference(model, other, x, 1e-6) == "1.1"
    assert first_difference(model, other, x, 1e-6, leave_out={"1.1"}) == "1"
    assert not any(part._forward_hooks for part in (*model.modules(), *other.modules()))
