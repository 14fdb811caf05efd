"""Other libraries' standardized layers, turned into filterwise layers that compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from filterwise import checkpoint, host
from filterwise.adopt.adoption import Candidate, adopt_layer, candidates
from filterwise.errors import ConversionError
from filterwise.filters import check_module
from filterwise.guard import guard, unguard
from filterwise.report import Report, Row
from filterwise.selection import why_not_changed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adopt_"]

UNCHANGED = "The model is unchanged."
NAMED = 3


def adopt_(model: nn.Module) -> Report:
    """Turn other libraries' standardized layers into filterwise layers, in place.

    Outputs stay the same, and so do parameters: the same objects, under the same names and in the
    same shapes (a gain of (O, 1, 1, 1), buffers ``weight_gamma`` and ``weight_beta``), so that
    checkpoints of the other library load and are written as before. After that the model folds,
    defers, exports and is checked like any other; `unconvert_` gives every layer its own class
    back.

    A layer is recognized by its numbers and not by its name: a copy is run on seeded weights
    (`identify`), and adopted copies must compute the same before anything is changed. That covers
    timm's ``StdConv2d`` and ``ScaledStdConv2d`` with their SAME variants, mmcv's ``ConvWS2d`` and
    ``ConvAWS2d``, transformers' ``WeightStandardizedConv2d``, nfnets-pytorch's ``WSConv``,
    Composer's parametrization, torch's ``weight_norm`` (both forms, whatever its axis), and copies
    of these.

    Where torch holds the raw weight under another name (``weight_norm``, Composer) the layer's
    attributes become ``weight`` and ``gain``: ``load_state_dict`` takes the old keys, too, and
    ``state_dict`` writes the plain ones.

    Args:
        model: Any model that is not wrapped (DDP, FSDP, compile); it may be on the meta device.

    Returns:
        A row ``convert`` for each adopted layer. A model with nothing to adopt comes back as it was
        with an empty report, so that code which loads models may always call this.

    Raises:
        ConversionError: If a layer that normalizes its weight, by its numbers or its name, computes
            what no method computes, or the model is wrapped. The model is unchanged.

    Example:
        >>> import torch
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> model = torch.nn.Sequential(weight_norm(torch.nn.Conv1d(4, 8, 3)))
        >>> adopt_(model)[0].method
        'wn'
        >>> list(model.state_dict())
        ['0.bias', '0.weight', '0.gain']
    """
    check_module(model)
    found = list(candidates(model))
    adopted = [one for one in found if one.method is not None]
    refused = [one for one in found if one.method is None and one.is_foreign]
    other = [one for one in found if not one.is_foreign]
    if refused:
        first, more = refused[0], len(refused) - 1
        others = f" {more} more cannot be adopted, either." if more else ""
        raise ConversionError(
            f"{_where(first)} cannot be adopted: {first.words}.{others} To adopt the rest of the"
            f" model, call adopt_ on its submodules. {UNCHANGED}"
        )
    if adopted and (reason := why_not_changed(model)):
        raise ConversionError(f"the model ({type(model).__name__}) {reason}. {UNCHANGED}")
    rows = [_row(one) for one in adopted]
    _apply(model, adopted)
    return Report(rows, _notes(adopted, other), verb="adopted")


def _where(one: Candidate) -> str:
    kind = type(one.module).__name__
    return f"{one.name} ({kind})" if one.name else f"the model ({kind})"


def _row(one: Candidate) -> Row:
    assert one.layout is not None
    weight = one.subject.raw_weight(one.module)
    return Row(
        one.name,
        type(one.module).__name__,
        "convert",
        str(one.method),
        f"{one.words}; folds to {one.plain.__name__}",
        one.layout.fan_in(weight.shape),
        one.layout.filters(weight.shape),
    )


def _apply(model: nn.Module, adopted: list[Candidate]) -> None:
    """Adopt all layers, or none."""
    done: list[Candidate] = []
    try:
        for one in adopted:
            done.append(one)
            adopt_layer(one)
        if adopted:
            checkpoint.remove_load_hook(model)
            checkpoint.add_load_hook(model)
            guard(model)
    except BaseException:
        for one in reversed(done):
            if host.is_converted(one.module):
                host.uninstall(one.module)
        if not any(host.converted(model)):
            checkpoint.remove_load_hook(model)
            unguard(model)
        raise


def _notes(adopted: list[Candidate], other: list[Candidate]) -> list[str]:
    notes = []
    renamed = [one for one in adopted if one.subject.form != "class"]
    if renamed:
        old = ", ".join(sorted({one.subject.raw.rpartition(".")[2] for one in renamed}))
        notes.append(
            f"{len(renamed)} layers had their raw weight under another key ({old}): it is weight"
            " now, with gain beside it where there is one. Loading takes the old keys, too; saving"
            " writes the plain ones. .weight is the raw weight, no longer the effective one."
        )
    if other:
        names = ", ".join(_where(one) for one in other[:NAMED])
        more = ", ..." if len(other) > NAMED else ""
        notes.append(
            f"{len(other)} layers were left alone, which have a forward or a parametrization of"
            f" their own and compute no published formula: {names}{more}."
        )
    return notes
