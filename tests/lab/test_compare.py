"""A whole comparison: what is printed and written, and what a second one finds there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest

import filterwise as fw
from filterwise.lab.results import Results
from support.commands import call, one_line

TINY = ("--epochs", "1", "--seeds", "2", "--net", "plain", "--processes", "2")


def test_compare_prints_tables_reading_and_files(compared):
    stdout, stderr, out, _ = compared
    lines = stdout.splitlines()
    assert lines[0] == "Table 1: plain net, learning rate 0.1, micro-batch 3"
    assert re.split("  +", lines[1]) == [
        "recipe",
        "error %",
        "quartiles",
        "seeds",
        "diverged",
        "step time",
        "quartiles",
    ]
    assert lines[2].split()[0] == "none"
    assert re.fullmatch(
        r"gn\+ws +\d+\.\d +\d+\.\d to \d+\.\d +2 +0 of 2 +\d+\.\d\d +\d+\.\d\d to \d+\.\d\d",
        lines[3],
    )
    assert "What speaks against normalizing weights" in lines
    assert any("recipes taking turns, over 5 rounds." in line for line in lines)
    assert f"Page with figures: {out / 'index.html'}" in lines
    assert "\x1b" not in stdout + stderr
    assert stderr == f"8 runs into {out}\n"


def test_compare_learns(compared):
    """Stripes along and across are told apart without error by a network that learns at all."""
    out = compared[2]
    records = Results(out).read().records.values()
    errors = [r.outcome.error for r in records if r.settings.recipe == "gn+ws"]
    assert min(errors) < 0.2


def test_compare_writes_one_line_a_run(compared):
    out = compared[2]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert len({line["id"] for line in lines}) == 8
    assert {line["settings"]["recipe"] for line in lines} == {"none", "gn+ws"}
    for line in lines:
        assert line["hardware"]["threads"] == 1
        assert line["versions"]["filterwise"] == fw.__version__
        assert [point["epoch"] for point in line["outcome"]["curve"]] == [1, 2, 3]


def test_compare_writes_a_page_that_opens_offline(compared):
    out = compared[2]
    html = (out / "index.html").read_text(encoding="utf-8")
    assert "://" not in html
    assert html.count("<table>") == 2
    assert html.count("<svg") == 2
    assert "micro-batch 3</caption>" in html
    for name in ("error_by_micro_batch", "error_by_epoch"):
        assert (out / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*.tmp"))


def test_compare_again_trains_nothing(compared):
    stdout, _, out, words = compared
    before = (out / "results.jsonl").read_bytes()
    again = call(*words, out)
    assert again.exit_code == 0
    assert again.stderr.startswith("all 8 runs are in ")
    assert again.stdout == stdout
    assert (out / "results.jsonl").read_bytes() == before


def test_compare_as_json(compared):
    _, _, out, words = compared
    result = call(*words, out, "--json")
    found = json.loads(result.stdout)
    assert set(found) == {"command", "data", "panels", "reading", "notes", "files"}
    assert [panel["micro_batch"] for panel in found["panels"]] == [3, 20]
    rows = found["panels"][0]["rows"]
    assert [row["recipe"] for row in rows] == ["none", "gn+ws"]
    assert set(rows[1]) == {
        "recipe",
        "seeds",
        "median",
        "lower",
        "upper",
        "errors",
        "diverged",
        "failed",
        "step",
        "curve",
        "conversion",
    }
    assert rows[0]["step"]["ratio"] == 1.0
    assert rows[1]["median"] == numpy.median(rows[1]["errors"])
    assert {each["side"] for each in found["reading"]} <= {"for", "against", "note"}
    assert Path(found["files"]["page"]).exists()


def test_a_damaged_line_is_reported_kept_and_trained_again(compared, tmp_path):
    _, _, out, words = compared
    lines = (out / "results.jsonl").read_bytes().splitlines()
    torn = b"\n".join([lines[0], lines[1][:100], *lines[2:]])
    (tmp_path / "results.jsonl").write_bytes(torn)
    result = call(*words, tmp_path)
    assert result.exit_code == 0
    assert "8 runs, 7 of them in" in result.stderr
    assert "results.jsonl line 2 is not a run of this program" in result.stderr
    after = (tmp_path / "results.jsonl").read_bytes().splitlines()
    assert after[:8] == torn.splitlines()
    assert json.loads(after[8])["outcome"] == json.loads(lines[1])["outcome"]


def test_a_run_of_other_settings_stays_and_is_counted(compared, tmp_path):
    _, _, out, words = compared
    (tmp_path / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes())
    result = call(*[word if word != "none,gn+ws" else "none" for word in words], tmp_path)
    assert result.exit_code == 0
    assert "also holds 4 runs of other settings, not shown here" in result.stderr


def test_quick_beside_named_tables_is_told(compared):
    _, _, out, words = compared
    assert "note: --quick changes the default tables only" in call(*words, out, "--quick").stderr


def test_a_wrong_recipe_is_shown_with_a_caret(tmp_path):
    message = one_line(call("compare", "--recipes", "bn,gn+wss", "--out", tmp_path / "run"), 2)
    assert message.splitlines()[-2:] == ["    gn+wss", "       ^^^"]
    assert "Nearest: 'ws'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "no/folder"], 2, "there is no folder no/folder"),
        (["--data", "cifar10", "--root", "nowhere"], 1, "--root, or fetch it with --download"),
        (["--recipes", "gn(7)"], 2, r"gn\(7\) does not fit the plain net: features.1 "),
        (["--net", "rezidual"], 2, "Nearest: residual"),
        (["--net", "alexnet"], 2, "alexnet cannot take pictures of 1x8x8"),
        (["--lr", "fast"], 2, "--lr: 'fast' will not do: it takes numbers, such as --lr 0.1,0.3"),
        (["--lr", ""], 2, "--lr: '' will not do"),
        (["--micro-batch", "1.5"], 2, "--micro-batch: '1.5' will not do: it takes whole numbers"),
        (["--micro-batch", "0"], 2, "--micro-batch: 0 will not do"),
        (["--seeds", "0"], 2, "--seeds: 0 will not do"),
        (["--device", "toaster"], 2, "--device: 'toaster' cannot be used here"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, words, code, message):
    out = tmp_path / "run"
    assert re.search(message, one_line(call("compare", "--quick", "--out", out, *words), code))
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("text")
    result = call("compare", *TINY, "--out", tmp_path / "file" / "run")
    assert "--out:" in one_line(result, 1)
    assert "cannot be written to: Not a directory." in result.stderr


def test_a_broken_picture_is_one_line(tree, tmp_path):
    copy = tmp_path / "copy"
    for path in tree.rglob("*.png"):
        target = copy / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = copy / "test" / "along" / "7.png"
    broken.write_bytes(broken.read_bytes()[:60])
    message = one_line(call("compare", *TINY, "--data", copy, "--out", tmp_path / "run"), 1)
    assert f"broken picture {broken}: " in message
    assert "\n" not in message


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path):
    """The system refuses files above 4,000 bytes: the first runs fit, the others do not."""
    pytest.importorskip("resource")
    code = textwrap.dedent("""
        import resource, sys
        from filterwise.lab import pool
        from filterwise.lab.commands import app
        begin = pool._start_process
        def limited(*arguments):
            begin(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        pool._start_process = limited
        if __name__ == "__main__":
            app()
    """)
    script = tmp_path / "limited.py"
    script.write_text(code)
    words = [
        "compare",
        "--recipes",
        "none,bn,gn,gn+ws",
        *TINY[:-1],
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    found = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert found.returncode == 1
    assert "results.jsonl cannot be written: File too large" in found.stderr
    assert "Traceback" not in found.stderr
    contents = Results(tmp_path / "run").read()
    assert contents.records
    assert contents.complaints == ()
