"""The doors of the command line: what a person types, and what they get back."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import filterwise as fw
from filterwise.lab.diagnosis.door import diagnose
from filterwise.lab.errors import UsageError
from filterwise.lab.reproduce.door import reproduce
from filterwise.lab.settings import CompareSettings, checked
from filterwise.lab.terminal import Terminal, one_line
from filterwise.recipe import split_recipes

__all__ = ["app"]

app = typer.Typer(
    name="filterwise",
    help="Weight-space normalization for PyTorch: compare recipes, reproduce the papers,"
    " inspect and export models, list methods.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    # Plain text: the framed form cuts lines at 80 columns and draws boxes into files and pipes.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULTS = CompareSettings()

Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of the tables.")]


@app.command(epilog="Example: filterwise compare --micro-batch 1,64 --seeds 1")
def compare(
    recipes: Annotated[
        str,
        typer.Option(help="Recipes with commas between them; a norm, a method, or norm+method."),
    ] = ",".join(DEFAULTS.recipes),
    micro_batch: Annotated[
        str | None,
        typer.Option(help="Pictures in one forward and backward pass: one or more numbers."),
    ] = None,
    lr: Annotated[
        str | None, typer.Option("--lr", help="Learning rate at the start: one or more numbers.")
    ] = None,
    net: Annotated[
        str | None,
        typer.Option(help="plain, residual, or a model of torchvision or timm: one or more."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many: 0, 1, ...")] = DEFAULTS.seeds,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training pictures.")
    ] = DEFAULTS.epochs,
    data: Annotated[
        str,
        typer.Option(
            help="digits; cifar10, cifar100, mnist, fashionmnist, kmnist, svhn, usps; or a folder"
            " with train/CLASS/picture and test/CLASS/picture."
        ),
    ] = DEFAULTS.data,
    root: Annotated[
        str, typer.Option(help="Folder in which torchvision's sets lie.")
    ] = DEFAULTS.root,
    size: Annotated[
        int, typer.Option(help="Side in pixels to which pictures from a folder are brought.")
    ] = DEFAULTS.size,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a torchvision set that is not there.")
    ] = False,
    out: Annotated[str, typer.Option(help="The run's own folder.")] = DEFAULTS.out,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = DEFAULTS.device,
    processes: Annotated[
        int | None,
        typer.Option(help="Runs at a time, each with one thread. [default: one a core, at most 8]"),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Refuse operations that cannot be repeated to the bit (matters on a GPU).",
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave the residual net out of the four default tables.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train small networks under several recipes and show what breaks and what holds.

    Without --net, --lr and --micro-batch four tables are made: the plain net at learning rate 0.1,
    at 0.3, with micro-batches of one picture, and a residual net of 50 layers. With any of them all
    combinations are trained. Interrupted, the same command carries on.
    """
    terminal = Terminal()
    with one_line(terminal):
        values: dict[str, Any] = {
            "recipes": tuple(split_recipes(recipes)),
            "nets": _words(net),
            "learning_rates": _numbers("--lr", lr, float),
            "micro_batches": _numbers("--micro-batch", micro_batch, int),
            "seeds": seeds,
            "epochs": epochs,
            "data": data,
            "root": root,
            "size": size,
            "download": download,
            "out": out,
            "device": device,
            "deterministic": deterministic,
            "quick": quick,
        }
        if processes is not None:
            values["processes"] = processes
        settings = checked(values)
        # Imported here, so that a mistyped option is answered before torch's slower parts load.
        from filterwise.lab.compare import compare as run
        from filterwise.lab.writing import write

        command = shlex.join(["filterwise", *sys.argv[1:]])
        comparison = run(settings, command, terminal)
        files = write(comparison)
        if as_json:
            found = {**comparison.to_dict(), "files": {k: str(v) for k, v in files.items()}}
            terminal.raw(json.dumps(found, indent=2, allow_nan=False))
            return
        terminal.summary(comparison.summary)
        terminal.reading(comparison.sentences)
        for note in comparison.notes:
            terminal.warn(note)
        terminal.print(f"Page with figures: {files['page']}")
        terminal.print(f"Results, one line a run: {files['results']}")


@app.command(epilog="Example: filterwise inspect resnet18 --recipe gn+ws")
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A model of torchvision or timm (random weights), or package.module:factory."
        ),
    ],
    recipe: Annotated[
        str, typer.Option(help="What to plan; 'keep' shows the layers and norms as they are.")
    ] = "keep",
    as_json: Json = False,
) -> None:
    """Show what a recipe would do to a model, layer by layer, and what is to be said against it."""
    terminal = Terminal()
    with one_line(terminal):
        parsed = fw.Recipe.parse(recipe)
        from filterwise.lab.inspection import inspect as look

        inspection = look(model, parsed)
        if as_json:
            terminal.raw(json.dumps(inspection.to_dict(), indent=2, allow_nan=False, default=str))
        else:
            inspection.show(terminal)


@app.command(epilog="Example: filterwise export resnet18 --recipe gn+ws --to resnet18.onnx")
def export(
    model: Annotated[
        str, typer.Argument(help="A model of torchvision or timm, or package.module:factory.")
    ],
    to: Annotated[
        str, typer.Option("--to", help="The file: its ending is .onnx, .pt2 or .safetensors.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="What training saved: of torch.save (read with weights_only), or safetensors."
            " Without one the weights are those the model comes with: random, if it is named."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="What it was trained with; 'keep' takes the model as it comes.")
    ] = "keep",
    key: Annotated[
        str | None,
        typer.Option(help="Entry of the checkpoint to load, such as state_dict_ema."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="A submodule to export in place of the model, such as backbone."),
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Size of the classifier.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Input: 224 (side in pixels), or all but the batch: 3x16x112x112."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples a call.")] = 1,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Let the file take any batch.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or float64.")
    ] = None,
    merge_bn: Annotated[
        bool | None,
        typer.Option(
            "--merge-bn/--keep-bn",
            help="Merge BatchNorms into the layers before them.  [default: merged, but for"
            " .safetensors, whose names are then those of the plain model]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fold a trained model, write it as ONNX, a torch.export program or tensors, and verify it.

    The file is run (onnxruntime, the loaded program, the loaded tensors) and compared with the
    converted model before it gets its name; the figures are printed.
    """
    terminal = Terminal()
    with one_line(terminal):
        from filterwise.lab.exporting import ExportSettings, export_model

        settings = ExportSettings(
            model=model,
            to=to,
            recipe=fw.Recipe.parse(recipe),
            checkpoint=checkpoint,
            key=key,
            part=part,
            classes=classes,
            size=size,
            batch=batch,
            dynamic_batch=dynamic_batch,
            opset=opset,
            precision=precision,
            merge_bn=merge_bn,
        )
        exported = export_model(settings)
        if as_json:
            terminal.raw(json.dumps(exported.to_dict(), indent=2, allow_nan=False))
        else:
            exported.show(terminal)


@app.command(epilog="Example: filterwise report runs/reproduce --markdown docs/results.md")
def report(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Where filterwise reproduce left results.jsonl, or a folder of such folders.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="The page. [default: report-BUDGET.html in DIR]", metavar="FILE"),
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(
            help="Write the same as Markdown, with the figures beside it.", metavar="FILE"
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="File of a recipe of your own; may be given again.", metavar="FILE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Set the runs of recipes beside the papers' numbers: tables and figures on one page."""
    terminal = Terminal()
    with one_line(terminal):
        from pathlib import Path

        from filterwise.lab.reporting.command import report as make

        made = make(
            Path(folder),
            shlex.join(["filterwise", *sys.argv[1:]]),
            out=Path(out) if out else None,
            markdown_file=Path(markdown) if markdown else None,
            recipes=recipe or (),
        )
        if as_json:
            terminal.raw(json.dumps(made.to_dict(), indent=2, allow_nan=False))
        else:
            made.show(terminal)


@app.command(epilog="Example: filterwise methods --json")
def methods(as_json: Json = False) -> None:
    """List the methods with formula, source and whether they need an activation norm."""
    terminal = Terminal()
    found = fw.methods()
    if as_json:
        rows = [
            {
                "name": info.name,
                "title": info.title,
                "source": info.source,
                "formula": info.formula,
                "needs_norm": info.needs_norm,
                "options": info.options,
            }
            for info in found
        ]
        terminal.raw(json.dumps(rows, indent=2, default=str))
        return
    terminal.table(
        "Methods",
        ("name", "title", "needs a norm", "formula", "source"),
        [
            (info.name, info.title, "yes" if info.needs_norm else "no", info.formula, info.source)
            for info in found
        ],
    )


def _words(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(
    option: str, text: str | None, kind: Callable[[str], float]
) -> tuple[float, ...] | None:
    words = _words(text)
    if words is None:
        return None
    numbers = []
    for word in words or ("",):
        try:
            numbers.append(kind(word))
        except ValueError:
            wanted = "whole numbers" if kind is int else "numbers"
            example = "1,8,64" if kind is int else "0.1,0.3"
            raise UsageError(
                f"{option}: {word!r} will not do: it takes {wanted}, such as {option} {example}."
            ) from None
    return tuple(numbers)


app.command(epilog="Example: filterwise reproduce wa/table3 --budget smoke --dry-run")(reproduce)
app.command(epilog="Example: filterwise diagnose wa/fig2 equinorm/fig1 --width 16")(diagnose)
