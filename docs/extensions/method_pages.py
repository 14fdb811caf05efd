"""A table of all methods and a page for each, from the registry and the docstrings."""

from __future__ import annotations

import dataclasses
import inspect

import torch
from tables import table as markdown_table
from torch import nn

import filterwise as fw
from filterwise.filters import FilterLayout, layout_of
from filterwise.methods.method import Method, WeightMethod
from filterwise.methods.registry import METHODS

EXAMPLE = torch.tensor([[1.0, 3.0, 5.0, 7.0]])


def table() -> str:
    """Return the table of methods, one line each."""
    rows = [
        (
            f"[`{info.name}`](../generated/methods/{info.name}.md)",
            info.title,
            f"`{info.formula}`",
            "yes" if info.needs_norm else "no",
            info.source,
        )
        for info in fw.methods()
    ]
    return markdown_table(("recipe", "method", "effective weight", "needs a norm", "source"), rows)


def pages() -> dict[str, str]:
    """Return a page in Markdown for each method, by its name in recipes."""
    return {name: _page(kind) for name, kind in METHODS.items()}


def _page(kind: type[Method]) -> str:
    parts = [
        f"# {kind.title}: `{kind.name}`",
        f"Effective weight: `{kind.formula}`",
        markdown_table(("", ""), _facts(kind)).rstrip(),
        _example(kind),
        _presets(kind),
        f"```{{eval-rst}}\n.. autoclass:: filterwise.{kind.__name__}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(kind: type[Method]) -> list[tuple[str, str]]:
    method = _default(kind)
    writable = kind.name != "ews"
    recipe = f"gn+{kind.name}" if kind.needs_norm else kind.name
    as_written = f"`{recipe}`" if writable else f"`Recipe('gn', {kind.__name__}(label=...))`"
    norm = "not needed"
    if kind.needs_norm:
        norm = "needed after each converted layer; `check` and the report name layers without one"
    return [
        ("recipe", as_written),
        ("activation norm", norm),
        ("gain", _gain(kind, method)),
        ("function at the start", _start(method)),
        ("mean of an effective filter", "zero" if method.centred else "not zero in general"),
        ("depends on the input", "yes" if kind.uses_input else "no"),
        ("[`defer`](../../guide/train.md)", _deferral(kind)),
        ("cost in training", _cost(kind)),
        ("cost in evaluation and when folded", _cost_in_evaluation(kind)),
        ("transposed convolutions", _transposed(method)),
        ("refused", "filters of one weight (fan-in 1)"),
        ("source", kind.source),
    ]


def _default(kind: type[Method]) -> Method:
    needed = [
        field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
    ]
    return kind(**{name: [0] for name in needed})


def _gain(kind: type[Method], method: Method) -> str:
    names = {field.name for field in dataclasses.fields(kind)}
    if not method.has_gain:
        return "one per filter with `affine=true`" if "affine" in names else "none"
    text = "one learnable number per filter, without weight decay in `param_groups`"
    if "learn_gain" in names:
        return text + "; a buffer with `learn_gain=false`"
    return text + ("; none with `affine=false`" if "affine" in names else "")


def _start(method: Method) -> str:
    if method.starts_plain:
        return "that of the plain layer"
    return "another than the plain layer's: `convert_` changes what the model computes"


def _deferral(kind: type[Method]) -> str:
    if kind.uses_input:
        return "takes no part: the effective weight depends on the micro-batch"
    return "the normalization runs once an optimizer step"


def _cost(kind: type[Method]) -> str:
    if kind.uses_input:
        return "the mean of the input and the normalization, at every forward"
    return "the normalization of every converted weight, once a forward, or once a step in `defer`"


def _cost_in_evaluation(kind: type[Method]) -> str:
    if kind.uses_input:
        return "folded: nothing; the running mean stands for the input"
    return "folded: nothing; else one copy of the converted weights is kept between forwards"


def _transposed(method: Method) -> str:
    layer = nn.ConvTranspose2d(8, 8, 3)
    layout: FilterLayout = layout_of(layer)
    refused = method.refuses(tuple(layer.weight.shape), layout)
    return "refused" if refused else "by output channel, groups included"


def _example(kind: type[Method]) -> str:
    """Return what the pure function gives for one small filter; it is computed here."""
    found = [
        function
        for name, function in inspect.getmembers(fw.functional, inspect.isfunction)
        if name in fw.functional.__all__ and _words(name) == _words(kind.__name__)
    ]
    if not found or not issubclass(kind, WeightMethod) or kind.name == "ews":
        return ""
    name = found[0].__name__
    values = ", ".join(f"{value:.4f}" for value in found[0](EXAMPLE).flatten().tolist())
    return (
        f"The filter (1, 3, 5, 7) becomes ({values}), as\n"
        f"`fw.functional.{name}(torch.tensor([[1.0, 3.0, 5.0, 7.0]]))` computes it."
    )


def _words(name: str) -> str:
    return name.replace("_", "").lower()


def _presets(kind: type[Method]) -> str:
    if not kind.presets:
        return ""
    rows = [
        (f"`{kind.name}(like={name})`", f"`{kind(**options)}`")
        for name, options in kind.presets.items()
    ]
    return (
        "Presets, by the name of whose published code it is"
        " ([what they differ in](../../reference/numerics.md)):\n\n"
        + markdown_table(("preset", "what is computed"), rows).rstrip()
    )
