"""Jobs of SLURM: run by submitit on this machine, and what sbatch would be given."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest

from filterwise.lab.cluster import options as module
from filterwise.lab.cluster.handing import Work, check_shared, portable
from filterwise.lab.cluster.on_ray import OnRay
from filterwise.lab.cluster.on_slurm import OnSlurm
from filterwise.lab.cluster.options import cluster_executor
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.reproduce.jobs import Done, run_all
from filterwise.lab.reproduce.records import read
from filterwise.lab.training.train import train
from support.commands import call, one_line
from support.jobs import digits_job


def slurm(folder, **options):
    found = OnSlurm.of(options, folder=folder, threads=1, gpus=0, workers=None)
    return replace(found, cluster="local", seconds=0.1)


@pytest.mark.filterwarnings("default")
def test_a_job_whose_time_is_over_is_begun_again_and_a_failure_is_told(tmp_path, monkeypatch):
    """SLURM's signal before the end of a job's time; submitit queues what `checkpoint` returns."""
    monkeypatch.chdir(tmp_path)
    good = digits_job(tmp_path / "runs", epochs=15)
    missing = good.settings.model_copy(
        update={"data": good.settings.data.model_copy(update={"name": str(tmp_path / "none")})}
    )

    def signal_it():
        while not (good.home / "checkpoint.pt").exists():
            time.sleep(0.02)
        lock = str(good.home / ".lock")
        for process in psutil.Process().children(recursive=True):
            if any(file.path == lock for file in process.open_files()):
                process.send_signal(signal.SIGUSR2)

    threading.Thread(target=signal_it, daemon=True).start()
    done = {}
    run_all(
        [good, replace(good, settings=missing)],
        slurm(tmp_path / "runs"),
        lambda job, each: done.__setitem__(job.settings.identity, each),
    )
    assert done[good.settings.identity].why is None
    assert "none" in done[missing.identity].why
    (line,) = read(tmp_path / "runs")
    assert line == done[good.settings.identity].record
    assert line.run.times["resumed"] == 1
    assert line.run.curve == train(good.settings).curve


def test_what_sbatch_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    made = cluster_executor(
        "slurm",
        folder=tmp_path / "runs",
        device="cuda",
        workers=3,
        options=["partition=gpu", "time=1-02:30:00", "cpus-per-task=8", "exclusive=", "mem=16G"],
    )
    executor = made.executor()._executor
    executor.parameters["map_count"] = 5
    text = executor._make_submission_file_text("python work", "id")
    lines = [each.removeprefix("#SBATCH --") for each in text.splitlines() if "#SBATCH" in each]
    assert {
        "array=0-4%3",
        "cpus-per-task=8",
        "exclusive",
        "gpus-per-node=1",
        "job-name=filterwise",
        "mem=16G",
        "nodes=1",
        "ntasks-per-node=1",
        "partition=gpu",
        "time=1590",
    } <= set(lines)
    assert any(each.startswith("signal=USR2@") for each in lines)
    assert f"output={tmp_path}/runs/slurm/%A_%a_0_log.out" in lines
    assert "python work" in text


def test_without_slurm_it_is_said_where_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = OnSlurm.of({}, folder=tmp_path, threads=1, gpus=0, workers=None)
    with pytest.raises(LabError, match="no sbatch"):
        found([digits_job(tmp_path)], lambda *_: None)


@pytest.mark.parametrize(
    ("given", "minutes"),
    [("90", 90), ("04:00:00", 240), ("10:30", 11), ("1-0", 1440), ("0-1:30", 90), ("1:2:3", 63)],
)
def test_times_are_those_of_sbatch(tmp_path, given, minutes):
    assert slurm(tmp_path, time=given).minutes == minutes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["time=soon"], "time=soon will not do"),
        (["time=0"], "leaves a job no time"),
        (["partition"], "not of the form name=value"),
        (["array=1-2"], "array is not given here"),
        (["cpus-per-task=few"], "takes a whole number"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        cluster_executor("slurm", folder=tmp_path, device="cpu", workers=1, options=options)


def test_without_the_extra_it_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    for where, package in (("ray", "ray"), ("slurm", "submitit")):
        with pytest.raises(UsageError) as raised:
            cluster_executor(where, folder=tmp_path, device="cpu", workers=1)
        assert str(raised.value) == (
            f"--executor {where} needs {package}, which is not installed: pip install"
            " 'filterwise[cluster]'"
        )


def test_the_command_says_so_too(monkeypatch, tmp_path):
    words = ["reproduce", "wa/table3", "--budget", "smoke", "--folder", tmp_path]
    refused = one_line(call(*words, "--cluster-option", "time=10"), 2)
    assert "--cluster-option goes with --executor ray or slurm" in refused
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    refused = one_line(call(*words, "--executor", "ray"), 2)
    assert "pip install 'filterwise[cluster]'" in refused
    assert not list(tmp_path.iterdir())


def test_a_gpu_of_one_s_own_choice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--device cuda"):
        cluster_executor("ray", folder=tmp_path, device="cuda:1", workers=1)


def test_ray_s_options_reach_it(tmp_path):
    made = cluster_executor(
        "ray",
        folder=tmp_path,
        device="cuda",
        workers=2,
        options=["address=ray://head:10001", "gpus=0.5", "cpus=2", "retries=7"],
    )
    assert made == OnRay(2, 0.5, 2, "ray://head:10001", 7)


def test_paths_do_not_depend_on_where_a_worker_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = digits_job(tmp_path / "runs")
    relative = replace(job, folder=(tmp_path / "runs").relative_to(tmp_path))
    made = portable(relative)
    assert made.folder == tmp_path / "runs"
    assert made.settings.execution.root == str(tmp_path / "data")
    assert made.key == job.key


def test_a_folder_that_is_not_shared_is_found_out(tmp_path):
    here, there = digits_job(tmp_path / "here", epochs=1), digits_job(tmp_path / "there", epochs=1)
    done = Work(there, 1)()
    check_shared(there, done)
    check_shared(here, Done(None, "why"))
    with pytest.raises(LabError, match="do not share this folder"):
        check_shared(here, done)
