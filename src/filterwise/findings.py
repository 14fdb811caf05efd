"""Findings, and those that a converted layer's weights alone give away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.utils.parametrize import is_parametrized

from filterwise.host import gain_of, offset_of, state_of
from filterwise.identify import examine, subject_of
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.method import WeightMethod
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from filterwise.kernel import Family
    from filterwise.methods.method import MethodInfo

__all__ = [
    "LEVELS",
    "Finding",
    "effective_matrix",
    "findings_text",
    "foreign_findings",
    "in_words",
    "nonfinite",
    "raw_matrix",
    "share_left",
    "weight_findings",
]

LEVELS = ("error", "warning", "note")
LEAST_LEFT = 0.25  # of the nominal variance; below, three such layers leave less than 2 %
NAMED = 5
SIGNED_FAN_IN = 16  # with fewer weights one sign comes by chance


@dataclass(frozen=True)
class Finding:
    """Something in a model that a person should know of.

    Attributes:
        level: ``error``: it will not train, or the result is wrong. ``warning``: probably harmful.
            ``note``: good to know.
        layer: Dotted name of the module it was found at; empty for the model itself.
        what: What was found, with its figures.
        why: Why that matters.
        fix: What to do.
    """

    level: Literal["error", "warning", "note"]
    layer: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        """Return three lines: what and where, why, and what to do."""
        where = self.layer or "the model"
        pad = " " * 9
        return f"{self.level:<8} {where}: {self.what}\n{pad}why: {self.why}\n{pad}fix: {self.fix}"


def findings_text(findings: Sequence[Finding]) -> str:
    """Lay out findings, and a line that counts them."""
    if not findings:
        return "no findings"
    counts = [(level, sum(one.level == level for one in findings)) for level in LEVELS]
    words = [f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts if count]
    return "\n\n".join([*map(str, findings), ", ".join(words)])


def in_words(numbers: Sequence[int]) -> str:
    """Return the first few numbers, and that there are more."""
    shown = ", ".join(map(str, numbers[:NAMED]))
    return f"{shown}, ..." if len(numbers) > NAMED else shown


def raw_matrix(module: nn.Module) -> Tensor:
    """Return a converted layer's raw weight as a filter matrix, in float32 or wider."""
    state = state_of(module)
    return _wide(state.layout.matrix(getattr(module, state.parameter).detach()))


def effective_matrix(module: nn.Module) -> Tensor | None:
    """Return a converted layer's effective weight likewise; None where that is not known."""
    state = state_of(module)
    method = state.method
    raw = getattr(module, state.parameter)
    if not isinstance(method, WeightMethod) or raw.is_meta or not raw.numel():
        return None
    with torch.no_grad():
        effective = method.effective(
            raw, state.layout, gain_of(module), offset_of(module), state.kernel
        )
    return _wide(state.layout.matrix(effective))


def _wide(matrix: Tensor) -> Tensor:
    if matrix.device.type == "mps":
        return matrix.to(torch.float32)
    return matrix.to(torch.float64)


def foreign_findings(model: nn.Module) -> Iterator[Finding]:
    """Find layers of other libraries that normalize their weight, one finding a class."""
    found: dict[type[nn.Module], tuple[str, MethodInfo, str]] = {}
    count: dict[type[nn.Module], int] = {}
    for name, module in model.named_modules():
        # torch gives every parametrized layer a class of its own.
        kind = type(module) if not is_parametrized(module) else type(module).__bases__[0]
        subject = subject_of(module)
        if subject is None:
            continue
        if kind not in count:
            examined = examine(module, subject)
            if examined.match is None or examined.match.info is None:
                continue
            info = examined.match.info
            found[kind] = name, info, examined.problem or examined.match.fault
        count[kind] = count.get(kind, 0) + 1
    for kind, (name, info, fault) in found.items():
        options = ", ".join(f"{option}={value}" for option, value in info.options.items())
        layers = (
            "1 layer normalizes its weight"
            if count[kind] == 1
            else (f"{count[kind]} layers normalize their weight")
        )
        yield Finding(
            "warning" if fault else "note",
            name,
            f"{layers} in {kind.__name__}'s own code: {info.formula} ({options}; {info.source})",
            fault
            or "a norm fused into such a layer is silently taken out again, and defer, kept"
            " weights and fold do not reach it",
            "train it as it is only to go on with a checkpoint; convert_ has the right formulas"
            if fault
            else "adopt_(model) makes filterwise layers of them: same outputs, same checkpoints",
        )


def nonfinite(name: str, module: nn.Module) -> Iterator[Finding]:
    """Find NaN and infinity in a module's own parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    for key, tensor in own.items():
        if tensor is None or tensor.is_meta or not tensor.is_floating_point():
            continue
        # One sum is a cheap first look: a finite one has no NaN and no infinity in it.
        if tensor.detach().sum(dtype=torch.float32).isfinite():
            continue
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or infinite:
            yield Finding(
                "error",
                f"{name}.{key}".lstrip("."),
                f"holds {nan} NaN and {infinite} infinite values of {tensor.numel()}",
                "whatever reads it becomes NaN, and training cannot undo that",
                "load the last good checkpoint, then look for the step that did it (learning rate,"
                " loss scale, a division)",
            )


def weight_findings(name: str, module: nn.Module) -> Iterator[Finding]:
    """Find what is wrong with the filters of one converted layer."""
    state = state_of(module)
    if getattr(module, state.parameter).is_meta:
        return
    matrix = raw_matrix(module)
    finite = matrix.isfinite().all(1)
    method = state.method
    flat = (
        matrix.amax(1) == matrix.amin(1)
        if method.centred or method.uses_input
        else matrix.abs().amax(1) == 0
    )
    yield from _flat_filters(
        name, str(method), (flat & finite).nonzero().flatten().tolist(), len(matrix)
    )
    one_sign = (matrix.amin(1) > 0) | (matrix.amax(1) < 0)
    signed = (one_sign & finite & ~flat).nonzero().flatten().tolist()
    if isinstance(method, EquilibriumNormalization):
        if method.single_pass:
            yield from _one_signed(name, signed, len(matrix))
    elif not method.centred and matrix.shape[1] >= SIGNED_FAN_IN:
        yield from _constant_channels(name, signed, len(matrix))
    if isinstance(method, WeightMethod) and not method.cells:
        rows = matrix[finite & ~flat]
        gamma = "gamma" if isinstance(method, ParametricWeightStandardization) else "eps"
        if len(rows):
            yield from _damped(name, gamma, method.family(matrix.shape[1]), rows)


def _flat_filters(name: str, method: str, flat: list[int], filters: int) -> Iterator[Finding]:
    if flat:
        yield Finding(
            "warning",
            name,
            f"{len(flat)} of {filters} filters are constant ({in_words(flat)})",
            f"{method} makes a constant filter zero, so these output channels carry nothing",
            "give them random values (initialize_(model, 'kaiming')), or leave the layer out if it"
            " is zero on purpose: a normalized weight cannot start a branch at zero, a gain can",
        )


def _one_signed(name: str, signed: list[int], filters: int) -> Iterator[Finding]:
    if signed:
        yield Finding(
            "warning",
            name,
            f"{len(signed)} of {filters} filters have weights of one sign ({in_words(signed)})",
            "the single pass has no positive part for them and takes the two-pass divisor",
            "initialize_(model, 'balanced') before training, or equinorm(single_pass=false)",
        )


def _constant_channels(name: str, signed: list[int], filters: int) -> Iterator[Finding]:
    if signed:
        yield Finding(
            "note",
            name,
            f"{len(signed)} of {filters} filters have weights of one sign ({in_words(signed)})",
            "behind a ReLU such a filter adds up its inputs: its channel is a large constant, or"
            " dead where the weights are negative",
            'a method that centres filters ("wa", "gn+ws"), or initialize_(model, "kaiming")',
        )


def _damped(name: str, word: str, family: Family, rows: Tensor) -> Iterator[Finding]:
    """Find an eps or gamma beside which the weights' own second moment is small."""
    fan_in = rows.shape[1]
    moment = (
        rows.var(1, correction=family.ddof) if family.moment == "central" else rows.square().mean(1)
    )
    if family.moment == "raw" and family.ddof:
        moment = moment * fan_in / (fan_in - 1)
    left = float(share_left(family, moment).median())
    if left >= LEAST_LEFT:
        return
    unit = "standard deviation" if family.scale == "outside" else "variance"
    median = float(moment.median())
    size = math.sqrt(median) if family.scale == "outside" else median
    yield Finding(
        "warning",
        name,
        f"{word} = {family.eps:.2g} dwarfs the raw weights' {unit} of {size:.2g} (median), which"
        f" leaves {100 * left:.2g} % of the nominal variance",
        "every such layer damps the signal by that factor on top of the one before it",
        "pws(gamma=0.1*2/n) leaves 91 % in every layer at He's scale"
        if word == "gamma"
        else "take a smaller eps, or bring the raw weights to He's scale"
        " (initialize_(model, 'kaiming'))",
    )


def share_left(family: Family, moment: Tensor) -> Tensor:
    """Return the share of the nominal variance that eps leaves, per filter."""
    if family.scale == "root":
        return moment / (moment + family.eps)
    if family.scale == "outside":
        return (moment.sqrt() / (moment.sqrt() + family.eps)).square()
    if family.scale == "max":
        return moment / moment.clamp_min(family.eps)
    return torch.ones_like(moment)
