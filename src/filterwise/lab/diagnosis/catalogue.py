"""Every figure by its name: what runs for it, and what draws it.

`draw` of a figure takes records (by panel) and gives the plot; `gather` makes such records on noise
or digits, where the papers' own data and nets are too large. A reproduction brings its own records.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from filterwise.lab.diagnosis.distributions import channel_distributions, ridgelines
from filterwise.lab.diagnosis.gathering import DRAWN, Runs
from filterwise.lab.diagnosis.lines import (
    Measure,
    over_layers,
    over_steps,
    parts_by_sign,
    share_curves,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from filterwise.lab.diagnosis.canvas import Plot
    from filterwise.lab.diagnosis.runs import Records

__all__ = ["FIGURES", "Entry", "Runs"]

NORMS = ("none", "bn", "wa", "ln", "in", "gn")
BOTH = ("bn+wa", "ln+wa", "in+wa", "gn+wa")
GAMMAS = ("1e-5", "1e-4", "1e-3", "1e-2")
NOISE_LAYERS = {"0": "1st convolution", "6": "3rd convolution", "18": "7th convolution"}
CLASSIFIER = {"23": "classifier"}


@dataclass(frozen=True)
class Entry:
    """A figure.

    Attributes:
        name: Paper and number, as ``wa/fig2``.
        title: What it shows.
        stand_in: What takes the place of the paper's data and net here.
        gather: Makes what `draw` takes.
        draw: Gives the plot.
    """

    name: str
    title: str
    stand_in: str
    gather: Callable[[Runs], dict[str, Any]]
    draw: Callable[..., Plot]

    def plot(self, made: Runs) -> Plot:
        """Run what has to be run, and draw."""
        return self.draw(**self.gather(made))


NOISE = "128 inputs from N(0, 1); eight layers of 64 channels (option --width), untrained, ReLU."
DIGITS = "Stand-in: the lab's plain net of five convolutions and a classifier on 8 x 8 digits."
BEFORE = "Activations are taken from the weight layer, before any norm."


def _noise(recipes: Sequence[str], made: Runs) -> dict[str, Any]:
    return {"panels": {recipe: made.noise(recipe) for recipe in recipes}}


def _distributions(
    name: str, title: str, layers: Mapping[str, str], channels: int, said: str
) -> Callable[..., Plot]:
    def draw(panels: Mapping[str, Records]) -> Plot:
        return channel_distributions(
            name, title, f"{said} {BEFORE}", panels, layers, channels=channels
        )

    return draw


def _epochs(recipes: Sequence[str], made: Runs) -> dict[str, Any]:
    return {"panels": {recipe: made.trained(recipe).records for recipe in recipes}}


def _both_weights(recipes: Sequence[str], made: Runs) -> dict[str, Any]:
    """Return effective weights, and beside WeightAlign's the raw ones."""
    panels: dict[str, Any] = {}
    for recipe in recipes:
        records = made.trained(recipe).records
        panels[recipe] = records
        if "wa" in recipe:
            panels[recipe] = records
            panels[f"{recipe}, raw weight"] = [
                {**one, "signal": "effective_weight_histogram"}
                for one in records
                if one["signal"] == "weight_histogram"
            ]
    return {"panels": panels}


def _trained_distributions(made: Runs) -> dict[str, Any]:
    panels = {}
    for recipe in ("none", "bn", "gn", "wa", "gn+wa"):
        run = made.trained(recipe)
        panels[f"{recipe} ({run.words})" if run.words else recipe] = run.records
    return {"panels": panels}


def _ridges(name: str, title: str, signal: str, quantity: str, said: str) -> Callable[..., Plot]:
    def draw(panels: Mapping[str, Records]) -> Plot:
        return ridgelines(name, title, said, panels, signal, DRAWN, quantity=quantity)

    return draw


def _variance(panels: Mapping[str, Records]) -> Plot:
    kinds = {
        "measured": "variance_measured",
        "predicted (patches)": "variance_predicted",
        "predicted (channels)": "variance_predicted_channels",
        "printed": "variance_printed",
    }
    measures = [Measure(recipe, "variance", f"variance in {recipe}", log=True) for recipe in panels]
    drawn = {
        words: [
            {**record, "signal": f"variance in {recipe}"}
            for recipe, records in panels.items()
            for record in records
            if record["signal"] == signal
        ]
        for words, signal in kinds.items()
    }
    return over_layers(
        "variance-by-layer",
        "Predicted and measured variance, layer by layer",
        f"{NOISE} Variance over samples, positions and channels. Printed: WA Eq. 5 with the"
        " measured second moment of the layer's input; predicted: with what centring takes away.",
        drawn,
        measures,
        repeats="batch",
    )


def _shares(made: Runs) -> dict[str, Any]:
    recipes = {
        "gn": "gn",
        "gn + Eq. 5": "gn+ws(divide=false)",
        "gn + Eq. 6": "gn+ws(centre=false)",
        "gn + Eq. 5 and 6": "gn+ws",
    }
    found = {words: made.shares(recipe) for words, recipe in recipes.items()}
    both = found["gn + Eq. 5 and 6"]
    return {
        "curves": {words: run.curve for words, run in found.items()},
        "records": both.gradients,
        "pictures": both.pictures,
    }


def _gammas(made: Runs) -> dict[str, Any]:
    panels = {}
    for gamma in GAMMAS:
        found = list(made.variances(gamma).steps)
        found += [
            {**one, "signal": "reciprocal", "value": (one["value"] + float(gamma)) ** -0.5}
            for one in found
        ]
        panels[f"gamma {gamma}"] = found
    return {"panels": panels}


FIGURES: dict[str, Entry] = {
    one.name: one
    for one in (
        Entry(
            "wa/fig2",
            "Channels of an untrained net on noise",
            NOISE,
            partial(_noise, ("none", "bn", "gn", "wa", "gn+wa")),
            _distributions(
                "wa-fig2",
                "WA Fig. 2: channels of an untrained net on noise",
                {"6": "3rd convolution"} | CLASSIFIER,
                8,
                NOISE,
            ),
        ),
        Entry(
            "wa/fig2-variance",
            "Predicted and measured variance by layer",
            NOISE,
            partial(_noise, ("none", "wa", "wa(constant=preserving)")),
            _variance,
        ),
        Entry(
            "wa/fig4",
            "Weights of one filter over the epochs",
            DIGITS,
            partial(_both_weights, ("none", "bn", "wa")),
            _ridges(
                "wa-fig4",
                "WA Fig. 4: weights of one filter over the epochs",
                "effective_weight_histogram",
                "weight value",
                f"{DIGITS} Fourth convolution, filter 0, the effective weight; for WeightAlign the"
                " raw weight beside it.",
            ),
        ),
        Entry(
            "wa/fig5",
            "Channels of trained nets",
            DIGITS,
            _trained_distributions,
            _distributions(
                "wa-fig5",
                "WA Fig. 5: channels of trained nets",
                {DRAWN: "4th convolution", "classifier": "classifier"},
                4,
                f"{DIGITS} 128 test pictures.",
            ),
        ),
        Entry(
            "wa/fig7",
            "Channels of an untrained net on noise, all norms",
            NOISE,
            partial(_noise, ("none", "bn", "in", "ln", "gn", "wa")),
            _distributions(
                "wa-fig7",
                "WA Fig. 7: channels of an untrained net on noise",
                NOISE_LAYERS | CLASSIFIER,
                8,
                NOISE,
            ),
        ),
        Entry(
            "wa/fig8",
            "The same with WeightAlign under the norms",
            NOISE,
            partial(_noise, BOTH),
            _distributions(
                "wa-fig8",
                "WA Fig. 8: channels of an untrained net, WeightAlign under the norms",
                NOISE_LAYERS | CLASSIFIER,
                8,
                NOISE,
            ),
        ),
        Entry(
            "wa/fig9",
            "Weights of one filter over the epochs, all norms",
            DIGITS,
            partial(_epochs, NORMS),
            _ridges(
                "wa-fig9",
                "WA Fig. 9: weights of one filter over the epochs",
                "effective_weight_histogram",
                "weight value",
                f"{DIGITS} Fourth convolution, filter 0, the effective weight.",
            ),
        ),
        Entry(
            "wa/fig10",
            "The same with WeightAlign under the norms",
            DIGITS,
            partial(_epochs, BOTH),
            _ridges(
                "wa-fig10",
                "WA Fig. 10: weights of one filter, WeightAlign under the norms",
                "effective_weight_histogram",
                "weight value",
                f"{DIGITS} Fourth convolution, filter 0, the effective weight.",
            ),
        ),
        Entry(
            "wa/fig11",
            "Activations of one channel over the epochs, all norms",
            DIGITS,
            partial(_epochs, NORMS),
            _ridges(
                "wa-fig11",
                "WA Fig. 11: activations of one channel over the epochs",
                "channel_histogram",
                "activation",
                f"{DIGITS} Fourth convolution, channel 0, 128 test pictures. {BEFORE}",
            ),
        ),
        Entry(
            "wa/fig12",
            "The same with WeightAlign under the norms",
            DIGITS,
            partial(_epochs, BOTH),
            _ridges(
                "wa-fig12",
                "WA Fig. 12: activations of one channel, WeightAlign under the norms",
                "channel_histogram",
                "activation",
                f"{DIGITS} Fourth convolution, channel 0, 128 test pictures. {BEFORE}",
            ),
        ),
        Entry(
            "ws/fig4",
            "What centring and dividing do to training, and to the gradient",
            DIGITS,
            _shares,
            partial(
                share_curves,
                "ws-fig4",
                "WS Fig. 4: training dynamics, and shares of the squared gradient norm",
                f"{DIGITS} Right: gradient of the first step of each epoch with respect to the"
                " effective weight, GN with Eqs. 5 and 6; over a layer's filters, then the mean of"
                " all convolutions but the first. The shares add to one.",
            ),
        ),
        Entry(
            "equinorm/fig1",
            "Positive and negative weights of a kernel balance each other",
            "One 3x3 kernel on 3x3 pictures, cyclic padding.",
            lambda made: dict(zip(("kernels", "records"), made.balance(), strict=True)),
            partial(
                parts_by_sign,
                "equinorm-fig1",
                "EquiNorm Fig. 1: weights by sign, and what they add to the output",
                "One 3x3 kernel on 32 pictures of 3x3 with cyclic padding, trained with SGD to"
                " follow another kernel; hatched weights are negative.",
            ),
        ),
        Entry(
            "pws/fig1",
            "The shift of the average gradient",
            DIGITS,
            lambda made: {"panels": {one: made.passes(one) for one in ("none", "bn", "wn", "pws")}},
            partial(
                over_layers,
                "pws-fig1",
                "PWS Fig. 1: the shift of the average gradient",
                f"{DIGITS} Untrained; forward and backward for every batch of 64 with learning rate"
                " 0.01, no update. Lines are medians, bands go from the least to the most over the"
                " batches (left: over filters too). PWS leaves the first convolution (fan-in 9) and"
                " the classifier as they are.",
                measures=[
                    Measure("(a) Var[W - dW] / Var[W]", "ratio", "gradient_variance_ratio"),
                    Measure(
                        "(b) variance over filters of n E[dW]",
                        "variance",
                        "gradient_shift",
                        log=True,
                    ),
                ],
                repeats="batches",
            ),
        ),
        Entry(
            "pws/fig2",
            "The least variance of the raw weights under decay",
            DIGITS,
            _gammas,
            partial(
                over_steps,
                "pws-fig2",
                "PWS Fig. 2: Var[W] and the divisor, third convolution",
                f"{DIGITS} Learning rate 0.05, weight decay 5e-4 on the raw weights.",
                measures=[
                    Measure("(a) least Var[W] of a filter", "variance", "weight_variance_minimum"),
                    Measure("(b) 1 / sqrt(Var[W] + gamma)", "1 / weight", "reciprocal"),
                ],
                at="optimizer step (n = 1 run)",
            ),
        ),
        Entry(
            "pws/fig6",
            "Means of the layers' inputs",
            DIGITS,
            lambda made: {"panels": {one: made.passes(one) for one in ("none", "bn")}},
            partial(
                over_layers,
                "pws-fig6",
                "PWS Fig. 6: squared mean of the layers' inputs",
                f"{DIGITS} Untrained; each batch of 64 gives one value. 1/pi = 0.318 is what ReLU"
                " makes of a centred normal number.",
                measures=[
                    Measure(
                        "(a) E[X]² of the input", "squared mean", "input_mean", lambda v: [v * v]
                    ),
                    Measure("(b) E[X]² / E[X²]", "ratio", "input_mean_share"),
                ],
                repeats="batches",
            ),
        ),
    )
}
