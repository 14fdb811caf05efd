"""Each benchmark from end to end at a toy size: its table, its record, its refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2] / "benchmarks"
RUNS = {
    "step": ("--contestants", "gn-again,ws,ws-bare,official,composer,pws", "--micro-batches", "2"),
    "kernel": (),
    "inference": (),
    "scaling": ("--contestants", "ws,timm"),
    "bars": ("--only", "step1,step8,pws,kernel,evaluation,small"),
    "bounds": (),
    "diagnose": (),
}


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers_in(one)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_and_writes_a_record(benchmark, name):
    code, printed, aside, record = benchmark(name, "--quick", "--threads", "1", *RUNS[name])
    assert code == 0, aside
    assert record["benchmark"] == name
    assert record["command"].startswith(f"python benchmarks/{name}.py --quick --threads 1")
    assert record["versions"]["torch"]
    assert record["hardware"]["threads"] == 1
    assert {"commit", "changed", "started", "load_average", "other_cores", "idle"} <= set(record)
    assert all(math.isfinite(number) for number in numbers_in(record["rows"]))
    for table in record["tables"]:
        assert table["title"] in printed
        for row in table["rows"]:
            assert row[0].strip() in printed
    assert "these figures mean nothing" in aside


def test_rows_hold_every_round_and_the_ratio_follows_from_them(benchmark):
    _, _, _, record = benchmark("step", "--quick", "--threads", "1", "--contestants", "gn-again,ws")
    rows = {row["contestant"]: row for row in record["rows"]}
    assert list(rows) == ["gn", "gn-again", "ws"]
    pairs = zip(rows["ws"]["seconds"], rows["gn"]["seconds"], strict=True)
    found = [mine / plain for mine, plain in pairs]
    assert rows["ws"]["ratio"]["median"] == pytest.approx(sum(found) / 2, rel=1e-3)
    assert rows["gn"]["ratio"]["median"] == 1.0
    assert rows["ws"]["layers"] == 6


def test_memory_is_measured_in_processes_of_its_own(benchmark):
    words = ("--quick", "--threads", "1", "--contestants", "ws", "--memory")
    code, printed, aside, record = benchmark("step", *words)
    assert code == 0, aside
    peaks = [row["peak_bytes"] for row in record["rows"]]
    assert all(5e7 < peak < 5e9 for peak in peaks)
    # 6 layers of 16 channels: 6 * 9 * 16 * 16 weights of 4 bytes.
    copies = (peaks[1] - peaks[0]) / (4 * 6 * 9 * 16 * 16)
    assert record["rows"][1]["copies"] == pytest.approx(copies)
    assert "copies more" in printed


def test_a_larger_model_has_a_larger_peak():
    """The control of the measurement: what is held during a step is seen."""
    import torch

    from harness.contestants import CONTESTANTS
    from harness.memory import converted_bytes, peak
    from harness.nets import NETS
    from harness.steps import Cell

    peaks = [
        peak(CONTESTANTS["gn"], Cell(NETS["toy"], batch, 1, None, torch.device("cpu")), 1, 1)
        for batch in (1, 4000)
    ]
    # 18 activations of 16 x 8 x 8 float32 a picture, most of them held for the backward.
    assert peaks[1] - peaks[0] > 10 * 4000 * 16 * 8 * 8 * 4
    assert converted_bytes(Cell(NETS["toy"], 1, 1, None, torch.device("cpu"))) == 55296


WRONG = {
    "step": [
        (("--nets", "resnet51"), "step.py: --nets: there is no network 'resnet51'. Known: resnet5"),
        (("--contestants", "tim"), "step.py: there is no contestant 'tim'. Known: gn, gn-again"),
        (("--batch", "0"), "step.py: argument --batch: '0' is not a whole number >= 1"),
        (("--round", "3"), "step.py: there is no option --round; nearest: --rounds."),
        (("--device", "mps"), "step.py: --device: benchmarks run on cpu or cuda, not on mps."),
        (("--device", "gpu"), "step.py: --device: there is no device 'gpu'; cpu or cuda."),
        (("--seconds", "0"), "step.py: --seconds: must be above 0, got 0."),
    ],
    "kernel": [
        (("--millions", "many"), "kernel.py: --millions: 'many' is neither a number above 0 nor"),
        (("--autocast",), "kernel.py: --autocast and --compile are for whole networks"),
    ],
    "inference": [(("--contestants", "fold"), "inference.py: there is no way 'fold'. Known: pla")],
    "scaling": [(("--sweeps", "depth"), "scaling.py: --sweeps: there is no sweep 'depth'. Known:")],
    "bars": [(("--only", "step2"), "bars.py: --only: there is no group 'step2'. Known: step1")],
    "bounds": [(("--net", "x"), "bounds.py: --net: there is no network 'x'. Known: resnet50")],
}


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_a_wrong_option_is_refused_in_one_line(benchmark, monkeypatch, name, words, expected):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    code, printed, aside, record = benchmark(name, *words)
    assert code == 2
    assert printed == ""
    assert aside.startswith(expected)
    assert aside.count("\n") == 1
    assert record is None


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, HOME / "kernel.py", "--quick", "--out", tmp_path / "file" / "x.json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kernel.py: --out: ")
    assert done.stderr.count("\n") == 1


def test_an_earlier_record_stays_when_a_command_is_refused(benchmark, tmp_path):
    path = tmp_path / "bars.json"
    path.write_text(json.dumps({"benchmark": "earlier"}))
    code, _, _, record = benchmark("bars", "--only", "nothing")
    assert code == 2
    assert record == {"benchmark": "earlier"}


def test_stopped_it_writes_down_what_was_finished(benchmark, monkeypatch):
    from harness import nets

    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)

    small = nets.NETS["small"]
    monkeypatch.setitem(nets.NETS, "small", dataclasses.replace(small, make=stopped))
    words = ("--rounds", "1", "--nets", "toy,small", "--contestants", "gn", "--threads", "1")
    code, printed, aside, record = benchmark("step", *words)
    assert code == 130
    assert [row["net"] for row in record["rows"]] == ["toy"]
    assert "stopped before the end" in record["notes"][0]
    assert "6 layers" in printed
    assert "stopped before the end" in aside
