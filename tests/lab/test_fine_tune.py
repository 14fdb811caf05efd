"""The fine-tuning experiment: what it measures, writes and refuses."""

from __future__ import annotations

import json

import pytest

from filterwise.lab import fine_tune

SHORT = ["--seeds", "1", "--epochs", "1", "--tune-epochs", "1", "--limit", "130", "--lr", "0.05"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine_tune")
    arguments = [*SHORT, "--recipes", "bn+wa,gn+ws", "--micro-batches", "32,16"]
    assert fine_tune.main([*arguments, "--out", str(folder)]) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    return folder, [json.loads(line) for line in lines]


def test_every_conversion_is_measured_and_the_exact_ones_keep_the_error(run):
    _, records = run
    assert [(one["recipe"], one["start"]) for one in records] == [
        ("bn", "as converted"),
        *(("bn+wa", start) for start in fine_tune.STARTS),
        *(("gn+ws", start) for start in fine_tune.STARTS),
    ]
    trained = records[0]["trained"]
    assert 0 < trained < 1
    kept = [one for one in records if one["recipe"] == "bn+wa" and "preserve" in one["start"]]
    assert [one["converted"] for one in kept] == [trained, trained]
    assert records[1]["converted"] != trained
    assert all(set(one["tuned"]) == {"32", "16"} for one in records)
    assert all(one["data"]["sha256"] and one["versions"]["torch"] for one in records)


def test_the_page_holds_table_command_and_data(run):
    text = (run[0] / "README.md").read_text()
    assert "| bn+wa | preserve, loader |" in text
    assert "python -m filterwise.lab.fine_tune --seeds 1" in text
    assert "130 pictures to train" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "must be 1 or more"),
        (["--micro-batches", "two"], "invalid literal"),
        (["--recipes", "gn+wss"], "wss"),
        (["--data", "nowhere"], "neither a set nor a folder"),
    ],
)
def test_wrong_use_is_said_in_a_line(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        fine_tune.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
