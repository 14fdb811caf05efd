"""The command line's door to ``filterwise reproduce``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from filterwise.lab.errors import UsageError
from filterwise.lab.terminal import Terminal, one_line

__all__ = ["reproduce"]


def reproduce(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A table or figure, such as wa/table1, or a recipe file of one's own.",
            show_default=False,
        ),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Show every table and figure of the papers.")
    ] = False,
    row: Annotated[
        list[str] | None,
        typer.Option(help="Label or method of a row; may be given several times. [default: all]"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many: 0, 1, ... [default: the budget's]")
    ] = None,
    budget: Annotated[
        Literal["smoke", "short", "full"],
        typer.Option(
            help="full is the paper's set-up; short and smoke have fewer epochs, pictures and"
            " planes, and are not comparable with it."
        ),
    ] = "full",
    data: Annotated[
        str,
        typer.Option(help="Folder in which the data sets lie.", envvar="FILTERWISE_DATA"),
    ] = "data",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    precision: Annotated[
        Literal["32-true", "bf16-mixed"] | None,
        typer.Option(help="Of forward and backward. [default: the recipe's]", show_default=False),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Send networks through torch.compile.")
    ] = False,
    folder: Annotated[
        str, typer.Option(help="Of results and runs; several recipes may share it.")
    ] = "runs/reproduce",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at a time. [default: as many as have a core each and fit into memory; 1 on a"
            " GPU]",
        ),
    ] = None,
    executor: Annotated[
        Literal["local", "ray", "slurm"],
        typer.Option(help="Who does the runs: processes here, a Ray cluster, or SLURM."),
    ] = "local",
    cluster_option: Annotated[
        list[str] | None,
        typer.Option(
            help="name=value; for Ray address, cpus, gpus, retries; for SLURM what sbatch takes."
            " May be given several times.",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a torchvision set that is not there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and an estimate, and run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Run a table or figure of the papers, and write every run down.

    Interrupted or killed, the same command carries on from the last checkpoints; what is finished
    is not run again. Results are results.jsonl in the folder, one run a line; filterwise report
    makes tables and figures of them.
    """
    terminal = Terminal()
    with one_line(terminal):
        # Imported here, so that a mistyped option is answered before torch's slower parts load.
        from filterwise.lab.reproduce import command
        from filterwise.lab.reproduce.plan import Asked
        from filterwise.lab.training.settings import Execution

        if listing:
            command.show_list(terminal, as_json)
            return
        if recipe is None:
            raise UsageError("name a table or figure, such as wa/table1; --list shows all.")
        execution = Execution(
            device=device,
            root=data,
            download=download,
            compile=compiled,
            channels_last=device.startswith("cuda"),
        )
        asked = Asked(tuple(row or ()), seeds, budget, Path(folder), execution, precision)
        cluster = None
        if executor != "local":
            from filterwise.lab.cluster.options import cluster_executor

            cluster = cluster_executor(
                executor,
                folder=asked.folder,
                device=device,
                workers=workers,
                options=cluster_option or (),
            )
        elif cluster_option:
            raise UsageError("--cluster-option goes with --executor ray or slurm.")
        found = command.prepare(
            recipe,
            asked,
            workers=workers,
            look_at_data=not dry_run,
            elsewhere=cluster is not None,
        )
        if not dry_run:
            command.reproduce(found, terminal, cluster)
        if as_json:
            terminal.raw(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        elif dry_run:
            command.show_plan(found, terminal)
        else:
            command.show_results(found, terminal)
        if not dry_run and (found.refused or found.failed):
            raise typer.Exit(1)
