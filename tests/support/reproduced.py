"""Lines of results and a recipe that never were, for tests of what is made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from filterwise.lab.reproduce.records import ReproduceRecord
from filterwise.lab.training.record import TrainingRecord
from filterwise.lab.training.settings import checked_training

if TYPE_CHECKING:
    from pathlib import Path

DEFAULTS = """\
paper: toy
title: "Toys <b>& more</b>"
authors: Nobody
code: none
constants: {optimizer: SGD}
seeds: 3
silent:
  - {what: momentum, choose: "0.9", why: everybody does}
notes: ["Nothing here is true."]
"""
RECIPE = """\
id: toy/table1
where: "Table 1"
title: "Error of toys, by method"
constants: {batch: "8 and 64"}
metrics:
  error: {title: top-1 error, measured: error, better: lower}
  spread: {title: spread of the error, measured: error, better: lower, statistic: iqr}
run:
  data: {name: digits}
  model: {name: plain}
  optimization: {epochs: 4}
rows:
  - {label: "none, 8", method: none, at: {batch: 8},
     run: {model: {recipe: none}, optimization: {micro_batch: 8}},
     paper: {error: {value: 9.5, status: printed}}}
  - {label: "none, 64", method: none, at: {batch: 64}, run: {model: {recipe: none}},
     paper: {error: {value: null, status: printed, mark: "NaN"}}}
  - {label: "BN, 8", method: BN, at: {batch: 8},
     run: {model: {recipe: bn}, optimization: {micro_batch: 8}},
     paper: {error: {value: 7.0, status: printed}}}
  - {label: "BN, 64", method: BN, at: {batch: 64}, run: {model: {recipe: bn}},
     paper: {error: {value: 5.0, status: printed}, spread: {value: 0.4, status: printed}}}
  - {label: "WA, 8", method: WA, at: {batch: 8},
     run: {model: {recipe: wa}, optimization: {micro_batch: 8}},
     paper: {error: {value: 6.0, status: recovered, how: "text | figure"}}}
  - {label: "WA, 64", method: WA, at: {batch: 64}, run: {model: {recipe: wa}},
     paper: {error: {value: null, status: unreadable, how: drawn only}}}
  - {label: "GN, 1", method: GN, at: {batch: 1}, not_run: the paper has no such run,
     paper: {error: {value: null, status: printed, mark: "-"}}}
  - {label: "GN, 64", method: GN, at: {batch: 64}, run: {model: {recipe: gn}},
     paper: {error: {value: 5.5, status: printed}}}
means:
  - {label: both BN, rows: ["BN, 8", "BN, 64"], paper: {value: 6.0, status: printed}}
silent:
  - {what: epochs, choose: "4", why: short}
notes: ["The batch is <i>doubtful</i>."]
cost: {gpu_hours: 0, cpu_hours: 0.1}
"""
METHODS = {"none": "none", "BN": "bn", "WA": "wa", "GN": "gn"}


def write_recipe(folder: Path) -> Path:
    """Write the recipe and its paper's defaults; return the recipe's file."""
    home = folder / "toy"
    home.mkdir(parents=True)
    (home / "defaults.yaml").write_text(DEFAULTS)
    (home / "table1.yaml").write_text(RECIPE)
    return home / "table1.yaml"


def line(
    row: str = "BN, 64",
    error: float | None = 0.05,
    *,
    seed: int = 0,
    budget: Any = "full",
    shrunk: dict[str, Any] | None = None,
    sha256: str = "0" * 64,
    recipe: str = "toy/table1",
    diverged: tuple[int, int] | None = None,
    why: str | None = None,
    epochs: int = 4,
    optimization: dict[str, Any] | None = None,
) -> ReproduceRecord:
    """Make a line whose curve falls to the error, or ends before it where it diverged."""
    method, _, batch = row.partition(", ")
    settings = checked_training(
        {
            "data": {"name": "digits"},
            "model": {"name": "plain", "recipe": METHODS[method]},
            "optimization": {
                "epochs": epochs,
                "micro_batch": None if batch == "64" else int(batch),
                **(optimization or {}),
            },
            "seed": seed,
        }
    )
    finished = diverged[0] - 1 if diverged else 0 if why else epochs
    curve = [
        {"epoch": epoch, "train_loss": 1 / epoch, "error": min(1.0, (error or 1) * epochs / epoch)}
        for epoch in range(1, finished + 1)
    ]
    metrics = {} if error is None else {"error": error}
    run = TrainingRecord(
        id=settings.identity,
        settings=settings,
        status="diverged" if diverged else "failed" if why else "finished",
        metrics=metrics,
        best={"error": 0.9 * error} if error is not None else {},
        curve=curve,
        diverged_at=diverged,
        why=why,
        steps=4,
        facts={"origin": "scikit-learn's digits", "commit": "0123456789ab"},
        times={"started": "2026-01-01T00:00:00+00:00", "seconds": 2.0, "peak_memory": 1000},
        versions={"filterwise": "0.1.0", "torch": "2.14.1"},
        hardware={"processor": "some", "cores": 2},
    )
    return ReproduceRecord(
        recipe=recipe,
        recipe_sha256=sha256,
        row=row,
        budget=budget,
        shrunk=shrunk or {},
        run=run,
    )


def write_lines(folder: Path, *lines: ReproduceRecord, more: bytes = b"") -> Path:
    """Write lines as a folder's results."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(each.model_dump_json() + "\n" for each in lines)
    (folder / "results.jsonl").write_bytes(text.encode() + more)
    return folder


def a_full_table() -> list[ReproduceRecord]:
    """Make the runs of all rows but one: one that diverges, one that fails, a single seed."""
    found = []
    for seed in range(3):
        found += [
            line("none, 8", 0.09 + 0.01 * seed, seed=seed),
            line("none, 64", 0.9, seed=seed, diverged=(2 + seed, 1)),
            line("BN, 64", 0.060 + 0.001 * seed, seed=seed),
            line("BN, 8", 0.07 + 0.002 * seed, seed=seed),
            line("WA, 8", 0.055 + 0.001 * seed, seed=seed),
        ]
    return [*found, line("WA, 64", 0.05)]
