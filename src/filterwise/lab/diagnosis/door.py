"""The command line's door to ``filterwise diagnose``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from filterwise.lab.errors import UsageError
from filterwise.lab.terminal import Terminal, one_line

__all__ = ["diagnose"]


def diagnose(
    figures: Annotated[
        list[str] | None,
        typer.Argument(help="Figures, such as wa/fig2; none draws all.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Look into this model in place of drawing figures: of torchvision or timm, or"
            " package.module:factory."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Of the model; 'keep' takes it as it comes.")
    ] = "keep",
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights of the model: of torch.save, or safetensors.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Entry of the checkpoint to load.")] = None,
    classes: Annotated[int | None, typer.Option(help="Size of the model's classifier.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the noise pictures. [default: the model's]")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name the figures.")] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training run.")] = 8,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the training runs.")] = 0.1,
    width: Annotated[int, typer.Option(min=4, help="Channels of the net on noise.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights, noise and order of pictures.")] = 0,
    data: Annotated[str, typer.Option(help="Data set of the training runs.")] = "digits",
    root: Annotated[str, typer.Option(help="Folder in which data sets lie.")] = "data",
    out: Annotated[str, typer.Option(help="The run's own folder.")] = "runs/diagnose",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of lines.")] = False,
) -> None:
    """Draw what happens inside networks: the papers' diagnostic figures, or a model of one's own.

    Figures come as SVG and PNG with their data (CSV), in TensorBoard's format, and in a page that
    needs no network, where one steps through epochs and layers. Without --model small networks are
    trained on real digits or shown noise; with it the model is shown noise.
    """
    terminal = Terminal()
    with one_line(terminal):
        from filterwise.lab.diagnosis.catalogue import FIGURES
        from filterwise.lab.diagnosis.command import ModelSetting, diagnose_model, draw_figures
        from filterwise.lab.diagnosis.runs import Setting

        if listing:
            rows = [(one.name, one.title, one.stand_in) for one in FIGURES.values()]
            if as_json:
                names = ("name", "title", "stand_in")
                terminal.raw(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
            else:
                terminal.table("Figures", ("figure", "shows", "drawn from"), rows)
            return
        if model is not None and figures:
            raise UsageError("--model looks into one model: leave the figures' names out.")
        if model is None and (checkpoint or key or size or classes or recipe != "keep"):
            raise UsageError("--recipe, --checkpoint, --key, --size, --classes belong to --model.")
        command = shlex.join(["filterwise", *sys.argv[1:]])
        if model is not None:
            asked = ModelSetting(model, recipe, checkpoint, key, classes, size, seed)
            files, _ = diagnose_model(asked, Path(out), command)
        else:
            setting = Setting(epochs, seed, width, data, root, lr)
            files = draw_figures(figures or [], setting, Path(out), command, terminal)
        if as_json:
            terminal.raw(json.dumps({name: str(path) for name, path in files.items()}, indent=2))
            return
        for name, path in files.items():
            terminal.print(f"{name}: {path}")
