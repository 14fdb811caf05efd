"""A real Ray with two workers, one of which is killed while it trains."""

from __future__ import annotations

import signal
import threading
import time

import psutil
import pytest

from filterwise.lab.cluster.on_ray import OnRay
from filterwise.lab.errors import UsageError
from filterwise.lab.reproduce.jobs import run_all
from filterwise.lab.reproduce.records import read
from filterwise.lab.training.train import train
from support.jobs import digits_job


def holder(job):
    """Return the process that holds a run's folder, once it has written a checkpoint there."""
    lock = str(job.home.resolve() / ".lock")
    while not (job.home / "checkpoint.pt").exists():
        time.sleep(0.02)
    # Ray's workers descend from this process, which started it.
    for process in psutil.Process().children(recursive=True):
        try:
            if any(file.path == lock for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    raise AssertionError("nobody holds the run")


@pytest.mark.filterwarnings("default")
def test_a_killed_worker_s_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    # Long enough to be killed on its way: it is found within an epoch or two.
    long = digits_job(folder, seed=0, epochs=25)
    short = [digits_job(folder, seed=seed, epochs=1) for seed in (1, 2)]
    killed = []

    def kill():
        process = holder(long)
        process.send_signal(signal.SIGKILL)
        killed.append(process.pid)

    assassin = threading.Thread(target=kill, daemon=True)
    assassin.start()
    done = []
    run_all(
        [long, *short],
        OnRay(workers=2),
        lambda job, each: done.append((job.settings.seed, each.why)),
    )
    assert killed
    assert sorted(done) == [(0, None), (1, None), (2, None)]
    lines = {line.run.settings.seed: line.run for line in read(folder)}
    assert sorted(lines) == [0, 1, 2]
    assert lines[0].times["resumed"] == 1
    assert lines[1].times["resumed"] == lines[2].times["resumed"] == 0
    assert lines[0].curve == train(long.settings).curve


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adress": "x"}, "no option 'adress'"),
        ({"gpus": "1.5"}, "gpus=1.5"),
        ({"retries": "often"}, "retries=often"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        OnRay.of(options, threads=1, gpus=0, workers=None)
