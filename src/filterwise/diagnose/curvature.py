"""Curvature of the loss: Hessian norms, the largest eigenvalue, a slice of the landscape.

All of it runs on copies, in the model's own mode, with the random numbers put back afterwards.
The loss is given as a function of a callable that computes what the model computes, for example
``lambda model: cross_entropy(model(x), labels)``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from filterwise.diagnose.layers import chosen_layers, inner, refuse
from filterwise.diagnose.trace import as_records
from filterwise.host import gain_of, inputs_of, offset_of, state_of
from filterwise.keeping import compute
from filterwise.kernel.function import standardize
from filterwise.merge import fold_layers
from filterwise.methods.method import WeightMethod
from filterwise.verify import random_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from filterwise.diagnose.layers import Layer, Layers
    from filterwise.diagnose.trace import Found

    LossFunction = Callable[[Callable[..., Any]], Tensor]

__all__ = ["hessian", "landscape", "largest_eigenvalue"]


class _Loss:
    """The loss as a function of some layers' effective weights; all others are constants."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        with torch.inference_mode(False):
            self._plain = copy.deepcopy(model)
        fold_layers(self._plain)
        self._plain.requires_grad_(False)
        self._loss = loss
        self._model = model

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Record a graph, and leave the random states as they were."""
        with torch.inference_mode(False), torch.enable_grad(), random_states(self._model):
            yield

    def __call__(self, weights: dict[str, Tensor]) -> Tensor:
        def model(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self._plain, weights, args, kwargs)

        value = self._loss(model)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise ValueError(f"loss must return one number as a tensor, got {value!r:.80}")
        return value.reshape(())


def _effective(layer: Layer, weight: Tensor) -> Tensor:
    """Return a layer's effective weight as a function of a raw weight."""
    if not layer.is_converted:
        return weight
    how = state_of(layer.module).computation._replace(kernel="eager")
    rest = [tensor.detach() for tensor in inputs_of(layer.module)[1:]]
    return compute(how, (weight, *rest))


def _centred_start(layer: Layer) -> Tensor:
    """Return the point at which the Hessian is taken: the centred filters where the layer centres.

    Elsewhere the raw weight, and the Hessian with respect to centred weights is the one that
    centring would leave.
    """
    weight = layer.weight.detach()
    if not _centres(layer):
        return weight.clone()
    matrix = layer.layout.matrix(weight)
    shifted = matrix - matrix[:, :1]
    return layer.layout.fill(shifted - shifted.mean(1, keepdim=True), weight).contiguous()


def _centres(layer: Layer) -> bool:
    if not layer.is_converted:
        return False
    method = state_of(layer.module).method
    return isinstance(method, WeightMethod) and not method.cells and method.centred


def _of_centred(layer: Layer, free: Tensor) -> Tensor:
    """Return the effective weight as a function of filters that need not be centred.

    The division stays, by the mean square of what enters it (WS Eq. 6).
    """
    if not _centres(layer):
        return _effective(layer, free)
    method = state_of(layer.module).method
    assert isinstance(method, WeightMethod)
    family = method.family(layer.layout.fan_in(free.shape))
    family = dataclasses.replace(family, centre=False, moment="raw")
    parts = [
        None if one is None else one.detach()
        for one in (gain_of(layer.module), offset_of(layer.module))
    ]
    return standardize(free, family, layer.layout, *parts, kernel="eager")


def _probes(like: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Yield vectors of random signs; the basis itself, where that needs no more of them."""
    size = like.numel()
    if size <= count:
        for place in range(size):
            unit = torch.zeros(size, dtype=like.dtype, device=like.device)
            unit[place] = 1
            yield unit.view_as(like)
        return
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        signs = torch.randint(0, 2, like.shape, generator=generator)
        yield (2 * signs - 1).to(like)


def hessian(
    model: nn.Module,
    loss: LossFunction,
    *,
    layers: Layers | None = None,
    probes: int = 32,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the size of each layer's Hessian with respect to raw and to centred weights.

    ``Hd`` is the Hessian of the loss with respect to the layer's centred filters, as free numbers;
    the division by the standard deviation, where the method has one, is part of the loss. ``H = J
    Hd J`` with ``J = I - 11'/n`` on each filter is the one with respect to the raw filters (WS Eqs.
    17 to 19, corrected). Where the layer does not centre, ``Hd`` is its Hessian as it is, and ``H``
    what centring would leave of it.

    Estimated by Hutchinson's method, ``E|Hd v|^2 = |Hd|_F^2`` for random signs v; exact where the
    layer has no more weights than there are probes.

    Cost: for each layer a forward and a backward with graph, and three backwards through both for
    every two probes.

    Args:
        model: The model; it is copied.
        loss: Returns one number; it is given a callable that computes as the model does.
        layers: As in `record`.
        probes: Random vectors a layer.
        seed: Of the vectors.

    Returns:
        Records with, for each layer, ``hessian_norm_centred`` (``|Hd|_F``), ``hessian_norm``
        (``|H|_F``), ``hessian_reduction`` (``1 - |H|_F^2/|Hd|_F^2``, Eq. 19), and
        ``hessian_norm_error``, the standard error of ``|H|_F`` (0 where it is exact).

    Raises:
        ValueError: If `probes` is below 2, or the loss is not one number.
    """
    if probes < 2:
        raise ValueError(f"probes must be >= 2, got {probes!r}")
    root, _ = inner(model)
    refuse(root)
    function = _Loss(root, loss)
    found: list[Found] = []
    for layer in chosen_layers(root, layers):
        with function.differentiable():
            free = _centred_start(layer).requires_grad_()
            value = function({layer.path: _of_centred(layer, free)})
            (slope,) = torch.autograd.grad(value, free, create_graph=True)
            found_squares = list(_squares(layer, slope, free, probes, seed))
        squares = torch.tensor(found_squares, dtype=torch.float64)
        exact = free.numel() <= probes
        whole, centred = squares.sum(0) if exact else squares.mean(0)
        spread = squares[:, 1].std() / math.sqrt(len(squares))
        norm = centred.clamp_min(0).sqrt()
        error = torch.zeros(()) if exact or not norm else spread / (2 * norm)
        found += [
            (layer.name, "hessian_norm_centred", whole.sqrt()),
            (layer.name, "hessian_norm", norm),
            (layer.name, "hessian_reduction", 1 - centred / whole),
            (layer.name, "hessian_norm_error", error),
        ]
    return as_records(found)


def _squares(
    layer: Layer, slope: Tensor, at: Tensor, probes: int, seed: int
) -> Iterator[tuple[float, float]]:
    """Yield ``|Hd v|^2`` and ``|J Hd J v|^2`` for each probe."""
    if not slope.requires_grad:  # the loss is linear in the weight
        yield from [(0.0, 0.0)] * 2
        return
    layout = layer.layout

    def product(vector: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(slope, at, vector, retain_graph=True)
        return found

    for vector in _probes(at, probes, seed):
        matrix = layout.matrix(vector)
        tangent = layout.fill(matrix - matrix.mean(1, keepdim=True), at)
        image = layout.matrix(product(tangent))
        image = image - image.mean(1, keepdim=True)
        yield float(product(vector).square().sum()), float(image.square().sum())


def largest_eigenvalue(
    model: nn.Module,
    loss: LossFunction,
    *,
    layers: Layers | None = None,
    steps: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the largest eigenvalue of the Hessian with respect to all chosen raw weights together.

    By Lanczos' method with full orthogonalization. Gains, biases and norms are held.

    Cost: a forward and a backward with graph, and two backwards a step; as many copies of the
    chosen weights as there are steps.

    Args:
        model: The model; it is copied.
        loss: As in `hessian`.
        layers: As in `record`.
        steps: Steps of Lanczos at most; fewer if the space is exhausted.
        seed: Of the first vector.

    Returns:
        Two records of the whole model (``layer`` is empty): ``hessian_largest_eigenvalue``, and
        ``hessian_eigenvalue_residual``, ``|H v - lambda v|``: an eigenvalue lies within so much.

    Raises:
        ValueError: If `steps` is below 1, or the loss is not one number.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps!r}")
    root, _ = inner(model)
    refuse(root)
    function = _Loss(root, loss)
    watched = chosen_layers(root, layers)
    with function.differentiable():
        raws = [one.weight.detach().clone().requires_grad_() for one in watched]
        pairs = list(zip(watched, raws, strict=True))
        value = function({one.path: _effective(one, raw) for one, raw in pairs})
        slopes = torch.autograd.grad(value, raws, create_graph=True)
        slope = torch.cat([one.flatten() for one in slopes])

        def product(vector: Tensor) -> Tensor:
            if not slope.requires_grad:
                return torch.zeros_like(vector)
            parts = torch.autograd.grad(
                slope, raws, vector, retain_graph=True, materialize_grads=True
            )
            return torch.cat([one.flatten() for one in parts])

        largest, residual = _lanczos(product, slope.detach(), steps, seed)
    return as_records(
        [
            ("", "hessian_largest_eigenvalue", largest),
            ("", "hessian_eigenvalue_residual", residual),
        ]
    )


def _lanczos(
    product: Callable[[Tensor], Tensor], like: Tensor, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    vector = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(steps, like.numel())):
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # once leaves what rounding has put back
            for one in basis:
                image = image - (image @ one) * one
        size = float(image.norm())
        off.append(size)
        if size <= 1e-6 * max(map(abs, diagonal)):
            break
        basis.append(image / size)
    count = len(diagonal)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    between = torch.tensor(off[: count - 1], dtype=torch.float64)
    small += torch.diag(between, 1) + torch.diag(between, -1)
    values, vectors = torch.linalg.eigh(small)
    return values[-1], off[-1] * vectors[-1, -1].abs()


def landscape(
    model: nn.Module,
    loss: LossFunction,
    *,
    layers: Layers | None = None,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the loss on a plane through the weights, along two filter-normalized directions.

    Both directions are normal numbers, each filter of them scaled to the norm of the model's own
    filter; everything that is no chosen weight stays (Li et al. 2018, "Visualizing the loss
    landscape of neural nets"). Raw weights are moved, so scale-invariant filters turn.

    Cost: ``points * points`` forwards, and three copies of the chosen weights.

    Args:
        model: The model; it is copied.
        loss: As in `hessian`.
        layers: As in `record`.
        span: The plane reaches from ``-span`` to ``span`` along both.
        points: Along each.
        seed: Of the directions.

    Returns:
        Records with ``first``, ``second`` (the place) and ``loss``.

    Raises:
        ValueError: If `points` is below 1 or `span` not above 0.
    """
    if points < 1 or not span > 0:
        raise ValueError(f"points must be >= 1 and span above 0, got {points!r} and {span!r}")
    root, _ = inner(model)
    refuse(root)
    with torch.inference_mode(False):
        moved = copy.deepcopy(root)
    targets = chosen_layers(moved, layers)
    centres = [one.weight.detach().clone() for one in targets]
    generator = torch.Generator().manual_seed(seed)
    planes = [_directions(targets, generator) for _ in range(2)]
    places = torch.linspace(-span, span, points, dtype=torch.float64).tolist() or [0.0]
    found = []
    for first in places if points > 1 else [0.0]:
        for second in places if points > 1 else [0.0]:
            with random_states(root), torch.inference_mode(False), torch.no_grad():
                for target, centre, one, other in zip(targets, centres, *planes, strict=True):
                    target.weight.copy_(centre + first * one + second * other)
                found.append({"first": first, "second": second, "loss": float(loss(moved))})
    return found


def _directions(targets: Sequence[Layer], generator: torch.Generator) -> list[Tensor]:
    found = []
    for target in targets:
        weight = target.weight.detach()
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        rows, own = target.layout.matrix(drawn), target.layout.matrix(weight)
        scale = own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
        found.append(target.layout.fill(rows * scale, weight))
    return found
