"""Early warnings: what a run came to, what is counted, and a command that carries on."""

from __future__ import annotations

import math

import pytest

from filterwise.lab.data import load
from filterwise.lab.early_warnings import command
from filterwise.lab.early_warnings.measure import Heard, Measured, Measurements, end_of, measure
from filterwise.lab.early_warnings.runs import Run, runs
from filterwise.lab.early_warnings.tables import ends, kinds_table, page

GUESS = math.log(10)


def settings(**more):
    given = {"data": "digits", "data_sha256": "0", "net": "plain", "recipe": "wa"}
    return Run(**{**given, "learning_rate": 0.1, "seed": 0, **more})


def run(losses, *, error=0.05, finite=True, heard=(), seed=0):
    made = settings(seed=seed)
    return Measured(
        id=made.identity,
        settings=made,
        error=error,
        losses=losses,
        finite=finite,
        classes=10,
        heard=[
            Heard(step=step, kind=kind, level="warning", layer="0", what="") for step, kind in heard
        ],
        seconds=1.0,
        versions={"torch": "2"},
        hardware={"processor": "p", "threads": 1},
    )


LEARNED = [GUESS] * 5 + [0.1] * 30
LOST = [*LEARNED, *[GUESS] * 40]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (run(LEARNED), ("healthy", None)),
        (run(LEARNED, error=0.3), ("between", None)),
        (run(LEARNED, error=0.6), ("fails in evaluation", 35)),
        (run([2.0, 5.0], finite=False), ("diverged", 3)),
        (run([GUESS] * 40, error=0.9), ("never learned", None)),
        # Ten losses of which nine are ln 10 have a mean of 0.904 ln 10 with one of 0.1.
        (run(LOST, error=0.9), ("fell back", 35 + 9)),
        (run([*LOST, *[0.1] * 20]), ("healthy", None)),
    ],
)
def test_what_a_run_came_to(made, expected):
    assert end_of(made) == expected


def test_what_is_counted():
    found = [
        run([1.0] * 19, finite=False, heard=[(0, "check: branch gains"), (5, "turn")]),
        run([1.0] * 9, finite=False, heard=[(10, "turn")], seed=1),  # with the collapse itself
        run([GUESS] * 30, error=0.9, heard=[(12, "shift")], seed=2),
        run(LEARNED, heard=[(3, "turn")], seed=3),
        run(LEARNED, seed=4),
        run(LEARNED, error=0.3, heard=[(0, "check: branch gains")], seed=5),
    ]
    headers, rows = kinds_table(found)
    assert headers[1] == "before a collapse (of 3)"
    assert headers[3:] == ["healthy runs (of 2)", "between (of 1)"]
    assert {row[0]: row[1:] for row in rows} == {
        "any warning": ["2", "20 (20 to 20)", "1", "1"],
        "any of the monitor's": ["2", "15 (15 to 15)", "1", "0"],
        "any of check's": ["1", "20 (20 to 20)", "0", "1"],
        "turn of the filters": ["1", "15 (15 to 15)", "1", "0"],
        "shift of the average gradient": ["1", "-", "0", "0"],
        "check: branch gains": ["1", "20 (20 to 20)", "0", "1"],
    }
    assert ends(found) == {"diverged": 2, "never learned": 1, "healthy": 2, "between": 1}
    text = page({"judge": found, "choose": []}, "the command", "real digits")
    assert (
        "| plain, wa, lr 0.1 | 0 | diverged | 20 | 5.0 % | check: branch gains (0), turn (5) |"
        in text
    )
    assert "`the command`" in text


def test_no_run_both_chooses_and_judges():
    choose, judge = (
        {(one.net, one.recipe, one.learning_rate, one.seed) for one in runs(group, "digits", "0")}
        for group in ("choose", "judge")
    )
    assert len(choose) >= 40
    assert len(judge) >= 60
    assert not choose & judge
    assert not {one[3] for one in choose} & {one[3] for one in judge}


def test_a_run_that_diverges_is_heard_before_it_does():
    data = load("digits", root="data")
    made = settings(learning_rate=1.0, epochs=2, data_sha256=data.sha256)
    found = measure(made, data)
    assert found.end == "diverged"
    kinds = {one.kind: one.step for one in found.heard}
    assert kinds["check: learning rate without norms"] == 0
    assert kinds["turn"] < found.collapse
    again = measure(made, data)
    assert (again.losses, again.heard) == (found.losses, found.heard)


def test_the_command_carries_on(tmp_path, capsys, monkeypatch):
    short = [settings(epochs=1, seed=0), settings(epochs=1, seed=10)]
    monkeypatch.setattr(command, "runs", lambda group, *_: short[group == "judge" :][:1])
    arguments = ["--limit", "1", "--out", str(tmp_path)]
    assert command.main([*arguments, "--group", "judge"]) == 0
    assert list(Measurements(tmp_path).read().records) == [short[1].identity]
    first = (tmp_path / "results.jsonl").read_text()
    assert command.main(arguments) == 0
    lines = (tmp_path / "results.jsonl").read_text()
    assert lines.startswith(first)
    assert len(lines.splitlines()) == 2
    assert "judge: 1 runs" in capsys.readouterr().out
    assert (
        "python -m filterwise.lab.early_warnings --limit 1" in (tmp_path / "README.md").read_text()
    )
    assert command.main(arguments) == 0
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_wrong_use(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--limit", "0", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--limit must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--data", "nowhere", "--out", str(tmp_path)])
    assert "neither a set nor a folder" in capsys.readouterr().err
