"""A small paper with one recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

DEFAULTS = """\
paper: me
title: A paper
authors: Me
code: none
run:
  optimization: {weight_decay: 0.001, step_size: 32}
seeds: 2
"""

TABLE = """\
id: me/table
where: Table 1
title: A table
task: classification
metrics:
  error: {title: top-1 error, measured: error, better: lower}
run:
  data: {name: digits, train_samples: 64, test_samples: 40}
  optimization:
    learning_rate: 0.05
    schedule: {kind: steps, milestones: [1]}
    epochs: 2
rows:
  - {label: WA, method: WA, run: {model: {recipe: wa}},
     paper: {error: {value: 24.92, status: printed}}}
  - {label: GN, method: GN, run: {model: {recipe: gn}, optimization: {learning_rate: 0.2}},
     paper: {error: {value: 25.0, status: recovered, how: elsewhere}}}
  - {label: none, method: plain, added: to compare with}
  - {label: "BN, dash", method: plain, not_run: a dash,
     paper: {error: {value: null, status: printed, mark: "-"}}}
cost: {gpu_hours: 1, cpu_hours: 2}
"""


def write_recipe(root: Path, table: str = TABLE, defaults: str = DEFAULTS) -> Path:
    """Write the paper's folder, and return the recipe's file."""
    folder = root / "me"
    folder.mkdir(exist_ok=True)
    (folder / "defaults.yaml").write_text(defaults)
    (folder / "table.yaml").write_text(table)
    return folder / "table.yaml"
