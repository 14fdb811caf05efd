"""Runs every fenced block of a page: Python, what it prints, and commands.

A page is one program: its Python blocks share names. A block of language ``text`` right after a
block is what that block printed; dots (``...``) stand for anything. In a block of language
``console`` each line after ``$`` is a command: ``filterwise ...`` and ``python ...`` are run in an
empty folder, ``pip install`` and ``make`` are looked up in pyproject.toml and the Makefile. YAML
blocks are read, and blocks without a language are grammar or drawings.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sybil.example import Example

__all__ = ["DOCS", "ROOT", "languages", "pages", "run_page"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KNOWN = {"python", "text", "console"}
QUIET = {"", "{toctree}", "{include}", "{literalinclude}", "{eval-rst}", "{note}", "{warning}"}
"""Fences that are no code, or code that another test runs."""


def pages() -> list[str]:
    """Return the pages that people wrote, generated ones left out."""
    found = (page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
    return sorted(str(page) for page in found if page.parts[0] != "generated")


def languages(text: str) -> set[str]:
    """Return the languages of a page's fences."""
    return set(re.findall(r"^`{3,}([^`\s]*)[^`\n]*\n(?:.*\n)*?`{3,}\s*$", text, re.MULTILINE))


def run_page(page: Path, folder: Path) -> int:
    """Run a page's blocks in order, in a folder of their own; return how many there were."""
    document = Sybil(
        [
            CodeBlockParser("python", _python),
            CodeBlockParser("text", _printed),
            CodeBlockParser("console", _commands),
        ]
    ).parse(page)
    names: dict[str, Any] = document.namespace
    names["__name__"] = "__main__"
    names["_printed"] = None
    count = 0
    with contextlib.chdir(folder):
        for example in document.examples():
            example.evaluate()
            count += 1
    return count


_run_python = PythonEvaluator()


def _python(example: Example) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _run_python(example)
    example.namespace["_printed"] = printed.getvalue()


def _printed(example: Example) -> str | None:
    got, example.namespace["_printed"] = example.namespace["_printed"], None
    if got is None:
        return "no block before this one printed anything"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    checker = doctest.OutputChecker()
    expected = str(example.parsed)
    if checker.check_output(expected, got, flags):
        return None
    return checker.output_difference(doctest.Example("", expected), got, flags)


def _commands(example: Example) -> None:
    printed = [_command(line, example.path) for line in _lines(str(example.parsed))]
    example.namespace["_printed"] = "".join(printed)


def _lines(text: str) -> Iterator[str]:
    """Yield the commands, with lines that end in a backslash joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        assert line.startswith("$ "), f"a console block holds commands after '$ ' alone: {line!r}"
        yield line[2:].partition("  #")[0].strip()


def _command(line: str, page: Any) -> str:
    words = shlex.split(line)
    match words:
        case ["filterwise", *arguments]:
            return _filterwise(arguments)
        case ["pip", "install", target]:
            _look_up_extras(target)
            return ""
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            return ""
        case ["python", script, *arguments]:
            return _script(script, arguments)
    raise AssertionError(f"{page}: no way to run {line!r} is known")


def _filterwise(arguments: list[str]) -> str:
    from filterwise import cli

    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "argv", ["filterwise", *arguments]),
        _another_main(),
    ):
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert code in (0, None), f"filterwise {shlex.join(arguments)}: exit {code}"
    return printed.getvalue()


@contextlib.contextmanager
def _another_main() -> Iterator[None]:
    """Hide the test runner, by whose name the help text would call the command.

    Nothing else of `sys.modules` is put back: what a command imports cannot be imported twice.
    """
    runner = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = runner


def _in_this_process(path: Path, arguments: list[str]) -> str:
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def _script(script: str, arguments: list[str]) -> str:
    path = ROOT / script
    assert path.exists(), f"{script} does not exist"
    if "multiprocessing" not in path.read_text():  # saves importing torch again
        return _in_this_process(path, arguments)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _look_up_extras(target: str) -> None:
    match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
    assert match, f"pip install {target}: only the project itself is installed in pages"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in (match[1] or "").split(","):
        assert not extra or extra in project["optional-dependencies"], extra
