"""One architecture with one recipe: convert, train a step, fold, save, load and copy."""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import filterwise as fw
from filterwise import verify
from filterwise.lab.compatibility.inputs import Prepared, loss_of, prepare
from filterwise.lab.errors import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from filterwise.lab.compatibility.architectures import Architecture

__all__ = ["RECIPES", "Failed", "examine", "is_widened"]

RECIPES = ("gn+ws", "bn+ws", "wa", "pws", "sws", "equinorm")
LEARNING_RATE = 1e-3
HUGE = 1e18
"""Numbers whose squares float32 cannot hold."""
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Failed(Exception):
    """A step of the examination that did not come out as promised."""


class NotFinite(Failed):
    """A step whose numbers are NaN or infinite."""


def is_widened(one: Architecture, recipe: str) -> bool:
    """Tell whether a pair is examined in float64 too: one recipe of each architecture."""
    return RECIPES[zlib.crc32(str(one).encode()) % len(RECIPES)] == recipe


def examine(one: Architecture, recipe: str, prepared: Prepared | None = None) -> dict[str, Any]:
    """Examine one architecture with one recipe; whatever goes wrong is told, not raised.

    Args:
        one: The architecture.
        recipe: The recipe.
        prepared: The architecture as it runs, made once for several recipes; it is not changed.

    Returns:
        ``outcome`` ("passed", "refused", "diverges" where its numbers leave float32's range and
        `check` says so, "failed", or "unfit" where the plain architecture does not run here),
        ``step`` and ``reason`` where it is not passed, ``size`` of the input,
        ``converted`` (number of layers), ``graph`` (how it was found what follows what),
        ``difference`` (relative, of the folded model; ``difference64`` on float64 copies),
        ``depends`` (the same of the model with its raw weights) and ``seconds``.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"outcome": "passed", "step": "", "reason": ""}
    examination = _Examination(one, recipe, found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examination.run(prepared)
    except NotFinite as error:
        found.update(_failure(examination.step, error))
        if examination.step in ("train", "evaluate"):
            found.update(_quietly(examination.diverges))
    except fw.ConversionError as error:
        if examination.step == "convert":
            found.update(outcome="refused", step="convert", reason=reason(error))
        else:
            found.update(_failure(examination.step, error))
    except Exception as error:
        found.update(_failure(examination.step, error))
    if examination.step == "build":
        found["outcome"] = "unfit"
    found["seconds"] = round(time.perf_counter() - started, 2)
    return found


def _quietly(function: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return what comes out; nothing where the function raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    except Exception:
        return {}


def _failure(step: str, error: Exception) -> dict[str, str]:
    kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return {"outcome": "failed", "step": step, "reason": f"{kind}{reason(error)}"}


class _Examination:
    """The steps, in order; `step` names the one that runs."""

    def __init__(self, one: Architecture, recipe: str, found: dict[str, Any]) -> None:
        self.one, self.found = one, found
        # One batch must do for running statistics, those of BatchNorm (`optimize`) and EquiNorm.
        self.recipe = "equinorm(momentum=1)" if recipe == "equinorm" else recipe
        self.step = "build"
        self.modules: dict[str, nn.Module] = {}

    def run(self, prepared: Prepared | None) -> None:
        if prepared is None:
            prepared = prepare(self.one)
        self.prepared, self.plain = prepared, prepared.model
        self.modules = dict(self.plain.named_modules())
        self.found["size"] = prepared.size
        if not prepared.checked:
            self.check_plain(copy.deepcopy(self.plain))
            prepared.checked = True
        model = copy.deepcopy(self.plain)
        self.step = "convert"
        before = _fingerprint(model)
        try:
            report = fw.convert_(model, self.recipe)
        except fw.ConversionError:
            if _fingerprint(model) != before:
                raise Failed("the model was refused and has changed") from None
            raise
        self.report = report
        self.found["converted"] = len(report.converted)
        self.found["graph"] = report.notes[0]
        self.train(model)
        expected = self.evaluate(model)
        self.fold(model, expected)
        if is_widened(self.one, self.recipe.partition("(")[0]):
            self.fold_widened(model)
        self.copy(model, expected)
        self.states(model, expected)

    def check_plain(self, plain: nn.Module) -> None:
        """Make sure that what is found later is not the plain model's own doing."""
        self.optimize(plain)
        with _seeded(), verify.evaluating(plain):
            output = plain(*self.prepared.inputs)
        if not _is_finite(output):
            raise NotFinite("the plain model's own output is not finite")

    def train(self, model: nn.Module) -> None:
        self.step = "train"
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter in self.optimize(model):
            if not bool(parameter.isfinite().all()):
                raise NotFinite(f"{names[id(parameter)]} is not finite after the optimizer's step")

    def optimize(self, model: nn.Module) -> list[nn.Parameter]:
        """Take one optimizer step; return the parameters that got a gradient."""
        for module in model.modules():
            if isinstance(module, BATCH_NORM):
                module.momentum = 1.0
        optimizer = torch.optim.Adam(fw.param_groups(model, 1e-4), lr=LEARNING_RATE)
        with _seeded():
            output = model(*self.prepared.inputs, *copy.deepcopy(self.prepared.more))
            if not _is_finite(output):
                raise NotFinite("the output in training is not finite")
            loss_of(output).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise NotFinite(f"the gradient of {name} is not finite")
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        return trained

    def evaluate(self, model: nn.Module) -> Any:
        self.step = "evaluate"
        self.trained = model
        # Statistics of the weights as they are now: one step from two samples moves them far.
        with _seeded(), torch.no_grad():
            model(*self.prepared.inputs, *copy.deepcopy(self.prepared.more))
        model.eval()
        expected = self.output(model)
        if not _is_finite(expected):
            raise NotFinite("the output in evaluation is not finite")
        self.step = "in-place activations"
        other = copy.deepcopy(model)
        activations: list[Any] = [one for one in other.modules() if hasattr(one, "inplace")]
        for module in activations:
            if module.inplace is True:
                module.inplace = False
        difference = verify.relative_difference(expected, self.output(other))
        if difference > verify.tolerance(torch.float32):
            raise Failed(f"the model without in-place activations differs by {difference:.2g}")
        return expected

    def diverges(self) -> dict[str, str]:
        """Tell a network that grows without bound from arithmetic that is wrong.

        It grows if its numbers are as large on a float64 copy, and `check` says it to who asks.
        """
        if self.step == "train":
            model = copy.deepcopy(self.plain)
            fw.convert_(model, self.recipe)
        else:
            model = self.trained
        findings = fw.check(model, input=self.prepared.inputs)
        told = [one for one in findings if one.level in ("error", "warning")]  # errors first
        if not told or self.largest(model) < HUGE:
            return {}
        return {
            "outcome": "diverges",
            "reason": f"{told[0].layer}: {told[0].what}; {told[0].why}",
        }

    def largest(self, model: nn.Module) -> float:
        """Return the largest output or gradient in a float64 copy, in the step that failed."""
        wide, sizes = verify.widened(model), [0.0]

        def note(tensor: torch.Tensor) -> None:
            if tensor.numel():  # NaN tells no size
                sizes.append(float(tensor.detach().abs().nan_to_num(0.0, math.inf).max()))

        def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in verify.floating_tensors(output):
                note(tensor)
                if tensor.requires_grad:
                    tensor.register_hook(note)

        for module in wide.modules():
            module.register_forward_hook(watch)
        inputs = _widened(self.prepared.inputs)
        with _default_float64(), _seeded():
            if self.step == "train":
                loss_of(wide.train()(*inputs, *_widened(self.prepared.more))).backward()
            else:
                wide.eval()(*inputs)
        return max(sizes)

    def output(self, model: nn.Module) -> Any:
        with _seeded(), torch.no_grad():
            return model(*copy.deepcopy(self.prepared.inputs))

    def fold(self, model: nn.Module, expected: Any) -> None:
        self.step = "fold"
        folded = fw.fold(model)
        left = [
            name
            for name, module in folded.named_modules()
            if "filterwise" in repr(type(module)).lower()
        ]
        if left:
            raise Failed(f"{left[0]} is not a plain layer after folding")
        for name in self.report.converted:
            before = self.modules.get(name)  # none where it is the name of a parameter
            if before is not None and type(folded.get_submodule(name)) is not type(before):
                raise Failed(f"{name} has not the class it had")
        difference = verify.relative_difference(expected, self.output(folded))
        self.found["difference"] = difference
        if difference > verify.tolerance(torch.float32):
            self.fold_widened(model)

    def fold_widened(self, model: nn.Module) -> None:
        """Fold a float64 copy: what is left there is no rounding."""
        self.step = "fold in float64"
        wide = verify.widened(model)
        inputs = _widened(self.prepared.inputs)
        try:
            with _default_float64(), _seeded(), torch.no_grad():
                expected = wide(*copy.deepcopy(inputs))
        except RuntimeError:
            if self.found["difference"] <= verify.tolerance(torch.float32):
                return  # a model that makes float32 tensors itself; float32 has shown it
            raise
        with _default_float64(), _seeded(), torch.no_grad():
            found = fw.fold(wide)(*copy.deepcopy(inputs))
        difference = verify.relative_difference(expected, found)
        self.found["difference64"] = difference
        if difference > verify.tolerance(torch.float64):
            raise Failed(f"the folded model differs by {difference:.2g} in float64")

    def copy(self, model: nn.Module, expected: Any) -> None:
        self.step = "deepcopy"
        other = copy.deepcopy(model)
        self.same(expected, self.output(other), "the copy")
        # Where raw weights give the same output, the comparison of the folded model shows nothing.
        fw.unconvert_(other)
        self.found["depends"] = verify.relative_difference(expected, self.output(other))

    def states(self, model: nn.Module, expected: Any) -> None:
        """Load converted into converted, plain into converted, and converted into plain."""
        self.step = "state_dict, converted to converted"
        other = copy.deepcopy(self.plain)
        fw.convert_(other, self.recipe)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        other.load_state_dict(model.state_dict(), strict=True)
        self.same(expected, self.output(other.eval()), "the model that was loaded")
        self.step = "state_dict, plain to converted"
        plain = self.plain.state_dict()
        result = other.load_state_dict(plain, strict=False)
        self.keys(result, missing=self.added | self.norms, unexpected=self.norms)
        self.raw(other, plain)
        self.step = "state_dict, converted to plain"
        back = copy.deepcopy(self.plain)
        result = back.load_state_dict(model.state_dict(), strict=False)
        self.keys(result, missing=self.norms, unexpected=self.added | self.norms)
        self.raw(back, model.state_dict())

    @functools.cached_property
    def added(self) -> set[str]:
        """Return names under which the conversion added something."""
        words = ("gain", "offset", "input_mean", "num_batches_tracked", "geometry_factor")
        names = {f"{name}.{word}" for name in self.report.converted for word in words}
        names |= {f"{name}_gain" for name in self.report.converted}
        return names | {row.name for row in self.report if row.action == "add"}

    @functools.cached_property
    def norms(self) -> set[str]:
        """Return names of whatever belongs to a norm that was replaced or removed."""
        gone = [row.name for row in self.report if row.action in ("replace", "remove")]
        words = ("weight", "bias", "norm.weight", "norm.bias", "running_mean", "running_var")
        words += ("num_batches_tracked", *(f"norm.{word}" for word in words[4:]))
        named = {f"{name}.{word}" for name in gone for word in words}
        for name in gone:
            if name in self.modules:
                named |= {f"{name}.{key}" for key in self.modules[name].state_dict()}
        return named

    def keys(self, result: Any, missing: set[str], unexpected: set[str]) -> None:
        for word, found, allowed in (
            ("missing", result.missing_keys, missing),
            ("unexpected", result.unexpected_keys, unexpected),
        ):
            strange = [key for key in found if key not in allowed]
            if strange:
                raise Failed(f"{word} key {strange[0]} ({len(strange)} in all)")

    def raw(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Compare the raw weights of converted layers with a state."""
        mine = model.state_dict()
        for name in self.report.converted:
            key = f"{name}.weight" if f"{name}.weight" in mine else name
            if not torch.equal(mine[key], state[key]):
                raise Failed(f"{key} was not loaded as it is")

    def same(self, expected: Any, found: Any, what: str) -> None:
        difference = verify.relative_difference(expected, found)
        if difference != 0:
            raise Failed(f"{what} differs by {difference:.2g}")


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


@contextmanager
def _default_float64() -> Iterator[None]:
    """Let what a forward makes anew (positions, anchors) be float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widened(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.double(), inputs)


def _is_finite(output: object) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in verify.floating_tensors(output))


def _fingerprint(model: nn.Module) -> list[Any]:
    """Return what must not change when a model is refused."""
    types = [(name, type(module)) for name, module in model.named_modules()]
    return [types, [(key, value._version) for key, value in model.state_dict().items()]]
