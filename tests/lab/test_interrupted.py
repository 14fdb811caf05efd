"""Commands that are stopped, killed, or given twice: what is finished stays, the rest follows."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import pytest

from filterwise.lab.results import Results
from support.commands import call, shared, start


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"no {count} lines in {path}")


@pytest.fixture(scope="module")
def long(tree):
    """Give the words of a command with eight runs, each long enough to be interrupted."""
    words = ["compare", "--recipes", "none,gn+ws", "--net", "plain", "--seeds", "4"]
    return [*words, "--epochs", "40", "--data", tree, "--size", "8", "--processes", "2"]


@pytest.fixture(scope="module")
def whole(long, tmp_path_factory):
    """Give the folder of that command, given twice at the same time and never interrupted."""

    def make(out):
        processes = [start(*long, "--processes", "1", "--out", out) for _ in range(2)]
        for process in processes:
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr

    return shared(tmp_path_factory, "whole", make)


def outcomes(folder):
    contents = Results(folder).read()
    assert contents.complaints == ()
    return {identity: record.outcome for identity, record in contents.records.items()}


def test_two_commands_on_one_folder_share_the_work(whole):
    assert len((whole / "results.jsonl").read_bytes().splitlines()) == 8
    assert len(outcomes(whole)) == 8


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_killed_it_leaves_whole_runs_and_nobody_and_carries_on(whole, long, tmp_path):
    path = tmp_path / "results.jsonl"
    process = start(*long, "--out", tmp_path)
    wait_for_lines(path, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("processes of the killed command are still training")
    contents = Results(tmp_path).read()
    assert contents.complaints == ()
    assert 2 <= len(contents.records) < 8
    before = path.read_bytes()
    result = call(*long, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"8 runs, {len(contents.records)} of them in" in result.stderr
    assert path.read_bytes().startswith(before)
    # The same bits as from commands that nobody killed.
    assert outcomes(tmp_path) == outcomes(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_keeps_what_is_finished(long, tmp_path):
    path = tmp_path / "results.jsonl"
    process = start(*long, "--epochs", "80", "--out", tmp_path)
    wait_for_lines(path, 1, process)
    # As a terminal does: to every process of the foreground.
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert stdout == ""
    message = stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"filterwise: Stopped\. \d of 8 runs finished and are kept in \S+; the same command carries"
        r" on with the others\.",
        message,
    )
    assert "Traceback" not in stderr
    assert 1 <= len(Results(tmp_path).read().records) < 8
