"""What a signal is: a named number per layer, filter or channel, with formula, cost and source."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

__all__ = ["Group", "Signal", "SignalInfo", "chosen", "table"]

Group = Literal["weights", "gradients", "activations"]


@dataclass(frozen=True)
class SignalInfo:
    """What a signal is.

    Attributes:
        name: As in records and in ``signals=``.
        group: ``weights``, ``gradients`` or ``activations``.
        per: Of what there is one value: ``layer``, ``filter`` (an output channel of the weight) or
            ``channel`` (of the layer's output).
        formula: How it is computed, W the raw filter of length n, G the gradient of the effective
            one.
        cost: What a recorded step pays beside what all signals of the group share: passes over the
            layer's weights, or over its activations.
        source: Where it comes from.
        default: Whether it is recorded when no signals are named.
    """

    name: str
    group: Group
    per: Literal["layer", "filter", "channel"]
    formula: str
    cost: str
    source: str
    default: bool


@dataclass(frozen=True)
class Signal:
    """A signal, and the function that computes it from what a layer offers.

    Attributes:
        info: What it is.
        compute: Takes the layer's view; returns a tensor, or None where it is not defined: no
            gradient came, no learning rate is known.
    """

    info: SignalInfo
    compute: Callable[[Any], Tensor | None]


def table(
    group: Group, per: str, rows: Iterable[tuple[str, Callable[[Any], Tensor | None], str, str]]
) -> list[Signal]:
    """Make signals of rows of name, function, cost and source; the formula is the docstring.

    A name with ``*`` in front is not recorded unless it is asked for.
    """
    made = []
    for name, compute, cost, source in rows:
        formula = " ".join((compute.__doc__ or "").split())
        info = SignalInfo(
            name.lstrip("*"),
            group,
            per,  # pyright: ignore[reportArgumentType]
            formula,
            cost,
            source,
            not name.startswith("*"),
        )
        made.append(Signal(info, compute))
    return made


def chosen(known: Mapping[str, Signal], names: str | Iterable[str] | None) -> list[Signal]:
    """Return the signals that are named, by their own name or by their group's.

    Raises:
        ValueError: If there is none of such a name.
        TypeError: If it is no text.
    """
    if names is None:
        return [one for one in known.values() if one.info.default]
    wanted: dict[str, Signal] = {}
    groups = list(dict.fromkeys(one.info.group for one in known.values()))
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str):
            raise TypeError(f"signals must be names, got {name!r}")
        if name in groups:
            of_group = [one for one in known.values() if one.info.group == name]
            wanted |= {one.info.name: one for one in of_group if one.info.default}
        elif name in known:
            wanted[name] = known[name]
        else:
            near = get_close_matches(name, [*known, *groups], n=3)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ValueError(
                f"there is no signal {name!r}.{hint} filterwise.diagnose.signals() lists them;"
                f" {', '.join(groups)} name all of a group."
            )
    return [one for name, one in known.items() if name in wanted]
