"""Calling the command line: inside the test's process, or as one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from filelock import FileLock
from typer.testing import CliRunner

from filterwise.lab.commands import app

COMMAND = [sys.executable, "-c", "from filterwise.cli import main; main()"]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def one_line(result, code):
    """Return the one message of a command that failed, without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    message = result.stderr.strip()
    assert message.startswith("filterwise: ")
    assert "Traceback" not in message
    return message


def start(*words, **options):
    """Start a command of its own that Ctrl-C reaches.

    Tests begun in the background of a script ignore it, and so would every process of theirs.
    """
    code = f"import signal; signal.signal({signal.SIGINT:d}, signal.default_int_handler); "
    python, option, main = COMMAND
    return subprocess.Popen(
        [python, option, code + main, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def shared(tmp_path_factory, name, make):
    """Make a folder once for all test processes of a session, and return it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            make(folder)
    return folder
