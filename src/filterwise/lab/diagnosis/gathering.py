"""Runs of one command, each made once for all figures that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from filterwise.lab.diagnosis import runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from filterwise.lab.diagnosis.runs import Epochs, Records, Setting

__all__ = ["DRAWN", "Runs"]

DRAWN = "features.9"
"""The layer of ridgelines on digits: the fourth of five convolutions, as deep as the papers' is."""


class Runs:
    """Runs of one command, each made once for all figures that read it.

    Attributes:
        setting: What was asked for.
        kept: What was recorded, by kind and recipe.
    """

    def __init__(self, setting: Setting, told: Callable[[str], None] = lambda _: None) -> None:
        """Have run nothing yet; `told` hears of every run that starts."""
        self.setting = setting
        self.kept: dict[tuple[str, str], Any] = {}
        self._told = told

    def _once(self, kind: str, recipe: str, make: Callable[[], Any]) -> Any:
        if (kind, recipe) not in self.kept:
            self._told(f"{kind}: {recipe}")
            self.kept[kind, recipe] = make()
        return self.kept[kind, recipe]

    def noise(self, recipe: str) -> Records:
        """Return what the untrained net does to noise."""
        return self._once("noise", recipe, lambda: runs.variance_run(recipe, self.setting))

    def trained(self, recipe: str) -> Epochs:
        """Return a run whose distributions were recorded after every epoch."""
        layers = [DRAWN, "classifier"]
        return self._once(
            "epochs",
            recipe,
            lambda: runs.train(recipe, self.setting, layers=layers, drawn=DRAWN),
        )

    def shares(self, recipe: str) -> Epochs:
        """Return a run whose gradients were recorded at the first step of every epoch."""
        return self._once(
            "gradients", recipe, lambda: runs.train(recipe, self.setting, shares=True)
        )

    def variances(self, gamma: str) -> Epochs:
        """Return a PWS run whose least variance of the third convolution was recorded."""
        return self._once(
            "variance",
            f"pws(gamma={gamma})",
            lambda: runs.train(
                f"pws(gamma={gamma})",
                self.setting,
                steps=["weight_variance_minimum"],
                steps_layer="features.6",
                rate=0.05,
            ),
        )

    def passes(self, recipe: str) -> Records:
        """Return signals of forward and backward over all batches, without an update."""
        return self._once("no update", recipe, lambda: runs.gradient_pass(recipe, self.setting))

    def balance(self) -> tuple[dict[int, list[float]], Records]:
        """Return the EquiNorm kernel that is trained on toy pictures."""
        return self._once("toy", "equinorm", lambda: runs.toy_balance(self.setting))
