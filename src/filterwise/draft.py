"""What a conversion will do to a model, worked out in full before anything is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from filterwise import norms
from filterwise.filters import CONVOLUTIONS, TRANSPOSED, check_module
from filterwise.graph import trace
from filterwise.host import base_class, converted, state_of
from filterwise.methods.weight_standardization import WeightStandardization
from filterwise.report import Report, Row
from filterwise.selection import WeightLayer, chooses, keep_reason, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filterwise.graph import Flow
    from filterwise.recipe import Recipe
    from filterwise.selection import Selector

__all__ = ["Draft", "draw"]

WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DDP: a gain added behind it would never be reduced",
    "FullyShardedDataParallel": "FSDP",
    "OptimizedModule": "torch.compile",
    "ScriptModule": "TorchScript",
    "RecursiveScriptModule": "TorchScript",
}


@dataclass
class Draft:
    """The plan of a conversion.

    Attributes:
        report: Rows and notes, as they will be returned.
        layers: Weight layers that get the recipe's method.
        norms: Norms and what will stand in their place.
        biases: Layers that get a bias of zeros, since a norm behind them is removed.
        unnormalized: What to warn of layers that nothing normalizes; empty if there is none.
        demands: Notes that ask for something to be done.
    """

    report: Report
    layers: list[WeightLayer] = field(default_factory=list)
    norms: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    biases: list[nn.Module] = field(default_factory=list)
    unnormalized: str = ""
    demands: list[str] = field(default_factory=list)


def draw(
    model: nn.Module,
    recipe: Recipe,
    select: Selector | None = None,
    exclude: Selector | None = None,
) -> Draft:
    """Work out what a conversion does, changing nothing and drawing no random number.

    Raises:
        ConversionError: If a pattern matches nothing.
        TypeError: If the model is no module, or a selector none of its forms.
    """
    check_module(model)
    reason = _whole_refusal(model)
    if reason:
        row = Row("", type(model).__name__, "refuse", reason=reason)
        return Draft(Report([row], [], str(recipe)))
    return _Drawing(model, recipe, select, exclude).draft()


def _whole_refusal(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        wrapper = WRAPPERS.get(type(module).__name__)
        if wrapper:
            where = f" at {name}" if name else ""
            return f"is wrapped{where} ({wrapper}); convert the inner model first, then wrap it"
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        return f"has parameters without a shape yet ({lazy[0]}, lazy); run it once, then convert it"
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    if sharded:
        return "is sharded (FSDP2); convert it before fully_shard"
    layers = list(converted(model))
    if layers:
        recipe = state_of(layers[0][1]).recipe
        return (
            f"is already converted ({len(layers)} layers, {recipe!r}; first:"
            f" {layers[0][0] or type(model).__name__}); call unconvert_(model) to get its raw"
            " weights back, then convert_ again (to mix methods, convert submodules one by one)"
        )
    return None


def _outermost(names: list[str]) -> list[str]:
    """Leave out the norms inside a norm, such as those of split batches: it is one norm."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _is_single(norm: nn.Module) -> bool:
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


class _Drawing:
    """One walk over the modules in registration order; each becomes rows."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        select: Selector | None,
        exclude: Selector | None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.weights = [
            layer
            for name, module in model.named_modules()
            if not norms.is_norm(module)
            for layer in WeightLayer.of(name, module)
        ]
        self.norm_names = _outermost([n for n, m in model.named_modules() if norms.is_norm(m)])
        names = [layer.name for layer in self.weights]
        self.selected = None if select is None else chooses(select, "select", names)
        excluded = [*names, *self.norm_names]
        self.excluded = None if exclude is None else chooses(exclude, "exclude", excluded)
        self.flow: Flow = trace(model, make_up=True)
        self.rows: list[Row] = []
        self.drawn = Draft(Report([], [], ""))

    def draft(self) -> Draft:
        """Return the plan."""
        by_module: dict[str, list[WeightLayer]] = {}
        for layer in self.weights:
            by_module.setdefault(layer.module_name, []).append(layer)
        self.removed = set(self._removed())
        self.bare = self._bare()
        for name, module in self.model.named_modules():
            if name in self.norm_names:
                self._norm(name, module)
            taken: list[WeightLayer] = []
            for layer in by_module.get(name, []):
                self._weight(layer, taken)
            if id(module) in self.bare:
                self._bias(name, module)
        self._nothing_selected()
        self.drawn.report = Report(self.rows, self._notes(), str(self.recipe))
        return self.drawn

    def _leaves_out(self, name: str, module: nn.Module) -> bool:
        return self.excluded is not None and self.excluded(name, module)

    def _removed(self) -> Iterator[str]:
        if self.recipe.norm == "none":
            for name in self.norm_names:
                if not self._leaves_out(name, self.model.get_submodule(name)):
                    yield name

    def _bare(self) -> dict[int, str]:
        """Return, by id, layers without a bias that a removed norm follows directly."""
        found = {}
        for norm in self.removed:
            for name in self.flow.producers(norm) or ():
                module = self.model.get_submodule(name)
                if "bias" in module._parameters and module._parameters["bias"] is None:
                    found[id(module)] = norm
        return found

    def _norm(self, name: str, module: nn.Module) -> None:
        kind = type(module).__name__
        wanted = self.recipe.norm
        if self._leaves_out(name, module):
            self.rows.append(Row(name, kind, "keep", reason="left out by exclude"))
            return
        if wanted == "keep":
            self.rows.append(Row(name, kind, "keep", reason="the recipe keeps norms"))
            return
        if not name:
            reason = "is itself an activation norm, which cannot be replaced in place"
            self.rows.append(Row(name, kind, "refuse", reason=reason))
            return
        try:
            new, words = norms.replacement(module, wanted, **self._before(name))
        except ValueError as error:
            reason = f"cannot become {wanted}: {str(error).rstrip('.')}"
            self.rows.append(Row(name, kind, "refuse", reason=reason))
            return
        if new is module:
            self.rows.append(Row(name, kind, "keep", reason=words))
            return
        action = "remove" if wanted == "none" else "replace"
        self.rows.append(Row(name, kind, action, reason=words))
        self.drawn.norms.append((module, new))

    def _before(self, name: str) -> dict[str, Any]:
        """Return what the convolutions tell of a norm: its dimension, dtype and device.

        The one before it does; else, behind an addition say, all of them if they agree.
        """
        before = [self.model.get_submodule(one) for one in self.flow.producers(name) or ()]
        everywhere = [layer.module for layer in self.weights]
        for modules in (before, everywhere):
            found: list[Any] = [m for m in modules if isinstance(m, (*CONVOLUTIONS, *TRANSPOSED))]
            if len({len(module.kernel_size) for module in found}) == 1:
                return {"dimension": len(found[0].kernel_size), "like": found[0].weight}
        return {}

    def _weight(self, layer: WeightLayer, taken: list[WeightLayer]) -> None:
        method = self.recipe.method
        keep = None
        if method is None:
            keep = "the recipe has no method"
        elif self._leaves_out(layer.name, layer.module):
            keep = "left out by exclude"
        elif self.selected is not None:
            keep = None if self.selected(layer.name, layer.module) else "not selected"
        else:
            keep = keep_reason(layer, self.flow)
        if keep is not None or method is None:
            self._row(layer, "keep", keep or "")
            return
        refused = refusal(layer, method, self._owners(layer))
        if taken and not refused:
            refused = (
                f"is the second weight of a module that takes one; {taken[0].name} is selected"
            )
        if refused:
            self._row(layer, "refuse", f'{refused}; leave it out with exclude="{layer.name}"')
            return
        taken.append(layer)
        self.drawn.layers.append(layer)
        words = []
        if not self._is_normalized(layer):
            words.append("nothing normalizes its output")
        if method.has_gain:
            words.append(f"{'gain' if method.learns_gain else 'fixed gain'} added")
        self._row(layer, "convert", "; ".join(words))
        adds_bias = method.uses_input and method.has_gain
        if (
            adds_bias
            and layer.module._parameters.get("bias") is None
            and id(layer.module) not in self.bare
        ):
            reason = "the affine's shift"
            self.rows.append(
                Row(f"{layer.module_name}.bias".lstrip("."), "Parameter", "add", reason=reason)
            )

    def _owners(self, layer: WeightLayer) -> list[nn.Module]:
        words = layer.module_name.split(".") if layer.module_name else []
        names = [".".join(words[:length]) for length in range(len(words) + 1)]
        return [self.model.get_submodule(name) for name in names]

    def _row(self, layer: WeightLayer, action: str, reason: str) -> None:
        kind = base_class(layer.module).__name__
        method = str(self.recipe.method) if action == "convert" else None
        self.rows.append(
            Row(layer.name, kind, action, method, reason, layer.fan_in, layer.filters)  # pyright: ignore[reportArgumentType]
        )

    def _bias(self, name: str, module: nn.Module) -> None:
        norm = self.bare[id(module)]
        reason = f"zeros, in place of the shift of {norm}"
        self.rows.append(Row(f"{name}.bias".lstrip("."), "Parameter", "add", reason=reason))
        self.drawn.biases.append(module)

    def _is_normalized(self, layer: WeightLayer) -> bool:
        method = self.recipe.method
        if method is None or not method.needs_norm:
            return True
        return self.flow.normalized(layer.module_name, removed=self.removed)

    def _nothing_selected(self) -> None:
        if self.recipe.method is None or self.drawn.layers:
            return
        if any(row.action == "refuse" for row in self.rows):
            return
        reason = (
            f"has no layer for {self.recipe.method} among its {len(self.weights)} weight layers;"
            ' choose some with select=, e.g. select="*", or see plan(model, recipe)'
        )
        self.rows.append(Row("", type(self.model).__name__, "refuse", reason=reason))

    def _notes(self) -> list[str]:
        notes = [self.flow.sentence]
        wanted = self.recipe.norm
        if wanted not in ("none", "keep") and not self.norm_names:
            notes.append(f"The model has no activation norm; none was inserted for {wanted!r}.")
        if self.flow.how == "registration order" and (self.drawn.layers or self.removed):
            demand = (
                "What follows what was guessed from the order of registration: check in this report"
                " that the classifier was left alone, or say select=."
            )
            notes.append(demand)
            self.drawn.demands.append(demand)
        bare = [layer for layer in self.drawn.layers if not self._is_normalized(layer)]
        if bare:
            self.drawn.unnormalized = self._unnormalized(bare)
            notes.append(self.drawn.unnormalized)
        single = [new for _, new in self.drawn.norms if _is_single(new)]
        if wanted == "gn" and single:
            notes.append(
                f"{len(single)} norms have one channel a group (32 channels in 32 groups),"
                " which is instance normalization; gn(16) gives two channels a group."
            )
        method = self.recipe.method
        added = sum(row.action == "add" for row in self.rows)
        if self.drawn.layers and method is not None and method.learns_gain:
            added += len(self.drawn.layers)
        if added:
            notes.append(
                f"{added} parameters are new; an optimizer made before does not know them."
                " Make it after converting, with param_groups(model, weight_decay)."
            )
        return notes

    def _unnormalized(self, bare: list[WeightLayer]) -> str:
        method, layer = self.recipe.method, bare[0]
        grows = ""
        if isinstance(method, WeightStandardization) and method.divide and method.scale == "unit":
            times = math.sqrt(layer.fan_in / 2)
            grows = (
                f' "{method}" gives its weights standard deviation 1, so activations are about'
                f" {times:.0f} times those of a He layer here (square root of half the fan-in,"
                f" {layer.fan_in})."
            )
        norm = self.recipe.norm
        advice = f'Leave it out with exclude="{layer.name}", or use "{norm}+wa"'
        if norm == "none":
            advice = f'Use Recipe("gn", {type(method).__name__}(...)) or "wa"'
            if method is not None and not method.cells:
                advice = f'Use "gn+{method}", or "wa"'
        return (
            f"nothing normalizes the output of {layer.name or 'the model'}"
            f" ({base_class(layer.module).__name__}, weight {tuple(layer.weight.shape)}).{grows}"
            f" {advice}, whose filters have He's scale. Shown once; check(model) lists"
            f" every such layer ({len(bare)} here)."
        )
