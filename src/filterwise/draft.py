"""What a conversion will do to a model, worked out in full before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from filterwise import demands, norms
from filterwise.filters import CONVOLUTIONS, TRANSPOSED, check_module
from filterwise.graph import out_of_place, trace
from filterwise.host import base_class
from filterwise.preserve.carry import Carry, Found, find_carries
from filterwise.report import Report, Row
from filterwise.selection import (
    WeightLayer,
    chooses,
    keep_reason,
    owners_of,
    refusal,
    whole_refusal,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filterwise.graph import Flow
    from filterwise.methods.method import Method
    from filterwise.recipe import Recipe
    from filterwise.selection import Selector

__all__ = ["Draft", "draw"]


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
        removes: Whether norms are removed, not replaced.
        carries: What layers take over from norms, where the function is to be kept.
        followed: Norms by the layer whose output they alone take, likewise.
        in_place: Activations that may work in place no longer.
    """

    report: Report
    layers: list[WeightLayer] = field(default_factory=list)
    norms: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    biases: list[nn.Module] = field(default_factory=list)
    unnormalized: str = ""
    demands: list[str] = field(default_factory=list)
    removes: bool = False
    carries: list[Carry] = field(default_factory=list)
    followed: dict[str, str] = field(default_factory=dict)
    in_place: list[Any] = field(default_factory=list)


def draw(
    model: nn.Module,
    recipe: Recipe,
    select: Selector | None = None,
    exclude: Selector | None = None,
    *,
    preserve: bool = False,
    example: Any = None,
) -> Draft:
    """Work out what a conversion does, changing nothing and drawing no random number.

    Args:
        model: The model.
        recipe: What to do.
        select: As in `convert_`.
        exclude: As in `convert_`.
        preserve: Whether the function is to be kept.
        example: Arguments to run the model on, where it cannot be traced.

    Raises:
        ConversionError: If a pattern matches nothing.
        TypeError: If the model is no module, or a selector none of its forms.
    """
    check_module(model)
    reason = whole_refusal(model, preserve=preserve)
    if reason:
        row = Row("", type(model).__name__, "refuse", reason=reason)
        return Draft(Report([row], [], str(recipe)))
    return _Drawing(model, recipe, select, exclude, preserve, example).draft()


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
        preserve: bool,
        example: Any,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.preserve, self.has_example = preserve, example is not None
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
        self.flow: Flow = trace(model, example, make_up=example is None)
        self.rows: list[Row] = []
        self.drawn = Draft(Report([], [], ""))

    def draft(self) -> Draft:
        """Return the plan."""
        by_module: dict[str, list[WeightLayer]] = {}
        for layer in self.weights:
            by_module.setdefault(layer.module_name, []).append(layer)
        self.removed = set(self._removed())
        self.kept = {layer.name: self._why_kept(layer) for layer in self.weights}
        self.carried = self._carried() if self.preserve else Found({}, {}, {})
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
        self.drawn.removes = self.recipe.norm == "none"
        self.drawn.carries = list(self.carried.carries.values())
        self.drawn.followed = self.carried.followed
        self.drawn.report = Report(self.rows, self._notes(), str(self.recipe))
        return self.drawn

    def _leaves_out(self, name: str, module: nn.Module) -> bool:
        return self.excluded is not None and self.excluded(name, module)

    def _removed(self) -> Iterator[str]:
        if self.recipe.norm == "none":
            yield from self._touched()

    def _touched(self) -> Iterator[str]:
        for name in self.norm_names:
            if not self._leaves_out(name, self.model.get_submodule(name)):
                yield name

    def _carried(self) -> Found:
        """Find what layers take over from the norms that are removed, or replaced by groups."""
        wanted = self.recipe.norm
        return find_carries(
            self.model,
            self.flow,
            self.weights,
            {layer.module_name for layer in self.weights if self.kept[layer.name] is None},
            [] if wanted in ("keep", "bn") else list(self._touched()),
            whole=wanted == "none",
            has_example=self.has_example,
        )

    def _bare(self) -> dict[int, str]:
        """Return, by id, layers without a bias that need one.

        A removed norm follows them directly, or they take over the running mean of a replaced one.
        """
        found = {}
        for norm in {*self.removed, *self.carried.carries}:
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
        words = "; ".join(filter(None, (words, self._what_stays(name))))
        if action == "remove":
            try:
                activations, how = out_of_place(self.model, self.flow, name, self.removed)
            except ValueError as error:
                self.rows.append(Row(name, kind, "refuse", reason=str(error)))
                return
            self.drawn.in_place += activations
            words = "; ".join(filter(None, (words, how)))
        self.rows.append(Row(name, kind, action, reason=words))
        self.drawn.norms.append((module, new))

    def _what_stays(self, norm: str) -> str:
        """Say what becomes of a norm's statistics and affine where the function is to be kept."""
        if not self.preserve:
            return ""
        carry = self.carried.carries.get(norm)
        if carry is None:
            reason = self.carried.reasons.get(norm)
            what = "scale and shift are" if norm in self.removed else "running statistics are"
            return f"its {what} lost: {reason}" if reason else ""
        if not carry.whole:
            return f"running statistics went into {carry.layer_name}"
        if carry.scales:
            return f"scale and shift went into {carry.layer_name}"
        return f"shift went into {carry.layer_name}, which gets no gain to take the scale"

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

    def _why_kept(self, layer: WeightLayer) -> str | None:
        """Return why a weight layer gets no method; None if it does."""
        if self.recipe.method is None:
            return "the recipe has no method"
        if self._leaves_out(layer.name, layer.module):
            return "left out by exclude"
        if self.selected is not None:
            return None if self.selected(layer.name, layer.module) else "not selected"
        return keep_reason(layer, self.flow)

    def _weight(self, layer: WeightLayer, taken: list[WeightLayer]) -> None:
        method, keep = self.recipe.method, self.kept[layer.name]
        if keep is not None or method is None:
            self._row(layer, "keep", keep or "")
            return
        refused = refusal(
            layer, method, owners_of(self.model, layer.module_name), preserve=self.preserve
        )
        if method.uses_input and self.preserve and not self.has_example and not refused:
            refused = (
                "cannot keep its function under equinorm without data: its gains depend on the mean"
                " of its input; give loader=, or"
            )
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
        words += self._added_words(method)
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

    def _added_words(self, method: Method) -> list[str]:
        gain = "gain" if method.learns_gain else "fixed gain"
        if not self.preserve:
            return [f"{gain} added"] if method.has_gain else []
        offset = "offset" if method.has_offset else "fixed offset"
        return [f"{gain} and {offset} added" if method.shifts else f"{gain} added"]

    def _row(self, layer: WeightLayer, action: str, reason: str) -> None:
        kind = base_class(layer.module).__name__
        method = str(self.recipe.method) if action == "convert" else None
        self.rows.append(
            Row(layer.name, kind, action, method, reason, layer.fan_in, layer.filters)  # pyright: ignore[reportArgumentType]
        )

    def _bias(self, name: str, module: nn.Module) -> None:
        norm = self.bare[id(module)]
        reason = f"zeros, in place of the shift of {norm}"
        if norm in self.carried.carries:
            reason = f"in place of the {'shift' if norm in self.removed else 'mean'} of {norm}"
        self.rows.append(Row(f"{name}.bias".lstrip("."), "Parameter", "add", reason=reason))
        self.drawn.biases.append(module)

    def _is_normalized(self, layer: WeightLayer) -> bool:
        method = self.recipe.method
        # A gain that keeps the raw weight's scale fixes one, whatever the method.
        if method is None or not method.needs_norm or self.preserve:
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
            demand = demands.GUESSED
            notes.append(demand)
            self.drawn.demands.append(demand)
        bare = [layer for layer in self.drawn.layers if not self._is_normalized(layer)]
        if bare:
            self.drawn.unnormalized = demands.unnormalized(self.recipe, bare)
            notes.append(self.drawn.unnormalized)
        single = [new for _, new in self.drawn.norms if _is_single(new)]
        if wanted == "gn" and single:
            notes.append(
                f"{len(single)} norms have one channel a group (32 channels in 32 groups),"
                " which is instance normalization; gn(16) gives two channels a group."
            )
        lost = [name for name in self.removed if name in self.carried.reasons]
        lost += [name for name in self.removed if self._loses_scale(name)]
        if lost and not self.has_example:
            demand = demands.scale_lost(lost)
            notes.append(demand)
            self.drawn.demands.append(demand)
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

    def _loses_scale(self, norm: str) -> bool:
        carry = self.carried.carries.get(norm)
        return carry is not None and not carry.scales
