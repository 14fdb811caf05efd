"""What `filterwise diagnose` does: runs, figures, and the files of both."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw
from filterwise.lab.checkpoints import load as load_into
from filterwise.lab.checkpoints import read
from filterwise.lab.diagnosis.catalogue import FIGURES, Runs
from filterwise.lab.diagnosis.distributions import channel_distributions
from filterwise.lab.diagnosis.lines import Measure, over_layers
from filterwise.lab.diagnosis.writing import made_folder, write
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.models import find_model, picture_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.diagnosis.canvas import Plot
    from filterwise.lab.diagnosis.runs import Setting
    from filterwise.lab.terminal import Terminal

__all__ = ["ModelSetting", "diagnose_model", "draw_figures", "refuse_unknown"]

NOISE_BATCH = 16


@dataclass(frozen=True)
class ModelSetting:
    """A model to look into.

    Attributes:
        model: Of torchvision or timm, or package.module:factory.
        recipe: What it is converted to.
        checkpoint: File of weights; None leaves those the model comes with.
        key: Entry of the checkpoint.
        classes: Size of the classifier.
        size: Side of the noise pictures in pixels; None is the model's own.
        seed: Of weights and noise.
    """

    model: str
    recipe: str = "keep"
    checkpoint: str | None = None
    key: str | None = None
    classes: int | None = None
    size: int | None = None
    seed: int = 0


def refuse_unknown(names: Sequence[str]) -> None:
    """Refuse a figure that there is not.

    Raises:
        UsageError: With the nearest names.
    """
    for name in names:
        if name not in FIGURES:
            near = get_close_matches(name, FIGURES, n=3) or list(FIGURES)[:3]
            raise UsageError(
                f"there is no figure {name!r}. Nearest: {', '.join(near)};"
                " filterwise diagnose --list names all."
            )


def draw_figures(
    names: Sequence[str], setting: Setting, out: Path, command: str, terminal: Terminal
) -> dict[str, Path]:
    """Run what the figures need, draw them and write everything.

    Raises:
        UsageError: If there is no such figure or data set.
        LabError: If a file cannot be read or written.
    """
    refuse_unknown(names)
    made_folder(out)
    chosen = [FIGURES[name] for name in (names or FIGURES)]
    made = Runs(setting, terminal.say)
    plots = []
    with terminal.progress("Figures", len(chosen)) as advance:
        for entry in chosen:
            plots.append(entry.plot(made))
            advance(1)
    nets: dict[str, Any] = {}
    for (kind, recipe), found in made.kept.items():
        if kind == "epochs":
            nets[f"{recipe}, trained on {setting.data}"] = found.records
        elif kind == "noise":
            nets[f"{recipe}, untrained on noise"] = found
    facts = {
        "what": f"{len(plots)} figures of the papers, drawn from small runs of this machine's own.",
        "Command": command,
        "Training": f"{setting.epochs} epochs on {setting.data}, learning rate at the start"
        f" {setting.learning_rate:g} unless a caption says otherwise, seed {setting.seed}",
    }
    return write(out, plots, nets, facts)


def diagnose_model(setting: ModelSetting, out: Path, command: str) -> tuple[dict[str, Path], Any]:
    """Send noise through a model, read its weights, and draw what is seen.

    Returns:
        The files, and all records.

    Raises:
        UsageError: If there is no such model, or the checkpoint does not fit it.
        LabError: If it does not run on pictures of noise.
    """
    made_folder(out)
    torch.manual_seed(setting.seed)
    with redirect_stdout(sys.stderr):
        model, origin = find_model(setting.model, classes=setting.classes)
    if setting.recipe != "keep":
        fw.convert_(model, setting.recipe)
    notes = []
    if setting.checkpoint is not None:
        notes = load_into(model, read(setting.checkpoint, setting.key), setting.recipe)
    records, shape = _look(model.eval(), setting)
    layers = list(dict.fromkeys(record["layer"] for record in records))
    seen = [layer for layer in layers if _has(records, layer, "channel_histogram")]
    words = f"{setting.model} ({origin}), recipe {setting.recipe}, on {NOISE_BATCH} x {shape} noise"
    plots = _plots(f"{words}, in evaluation mode.", setting.recipe, records, seen)
    facts = {
        "what": f"{words}.",
        "Command": command,
        "Weights": setting.checkpoint or "those the model comes with",
        **({"Notes": " ".join(notes)} if notes else {}),
    }
    return write(out, plots, {setting.model: records}, facts), records


def _look(model: torch.nn.Module, setting: ModelSetting) -> tuple[Any, str]:
    shape = picture_shape(setting.model) or (3, 224, 224)
    if setting.size is not None:
        shape = (shape[0], setting.size, setting.size)
    noise = torch.randn(
        NOISE_BATCH, *shape, generator=torch.Generator().manual_seed(setting.seed + 1)
    )
    words = " x ".join(map(str, shape))
    try:
        records = fw.diagnose.propagation(model, noise)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200]
        raise LabError(
            f"{setting.model} does not run on noise of {words}: {said}. --size sets the side."
        ) from error
    signals = ["weights", "weight_histogram", "effective_weight_histogram"]
    return records + fw.diagnose.weights(model, signals=signals), words


def _has(records: Any, layer: str, signal: str) -> bool:
    return any(one["layer"] == layer and one["signal"] == signal for one in records)


def _plots(words: str, recipe: str, records: Any, seen: list[str]) -> list[Plot]:
    shown = [seen[0], seen[len(seen) // 2], seen[-1]]
    kinds = {
        "measured": "variance_measured",
        "predicted (patches)": "variance_predicted",
        "predicted (channels)": "variance_predicted_channels",
        "printed": "variance_printed",
    }
    drawn = {
        name: [{**one, "signal": "variance"} for one in records if one["signal"] == signal]
        for name, signal in kinds.items()
    }
    return [
        over_layers(
            "variance-by-layer",
            "Predicted and measured variance, layer by layer",
            f"{words} Variance over samples, positions and channels.",
            {name: found for name, found in drawn.items() if found},
            [Measure(recipe, "variance", "variance", log=True)],
            repeats="batch",
        ),
        channel_distributions(
            "channels",
            "Channels of the first, the middle and the last weight layer",
            words,
            {recipe: records},
            {layer: layer for layer in dict.fromkeys(shown)},
        ),
    ]
