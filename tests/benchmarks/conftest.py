"""The benchmarks' shared package, which lies outside the installed one."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2] / "benchmarks"


def _load_harness() -> None:
    # Not by sys.path: benchmarks/kernel.py would hide the folder tests/kernel.
    package = HOME / "harness"
    spec = importlib.util.spec_from_file_location(
        "harness", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module
    spec.loader.exec_module(module)


_load_harness()


@pytest.fixture
def benchmark(tmp_path, capsys):
    """Return a function that runs a benchmark in this process.

    It gives back exit code, what was printed, what was said aside, and the JSON record.
    """
    from harness.command import run

    def call(name, *words):
        path = tmp_path / f"{name}.json"
        script = runpy.run_path(str(HOME / f"{name}.py"))
        try:
            code = run(name, script["parser"](), script["measure"], [*words, "--out", str(path)])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        record = json.loads(path.read_text()) if path.exists() else None
        return code, printed.out, printed.err, record

    return call
