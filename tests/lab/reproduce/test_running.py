"""Jobs: killed, resumed, shared between commands, diverged, refused."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch

from filterwise.lab.reproduce.experiments import read_experiment
from filterwise.lab.reproduce.jobs import Done, Job, do, run_all
from filterwise.lab.reproduce.plan import Asked, make_plan
from filterwise.lab.reproduce.records import LineFacts, read
from support.commands import call, start
from support.recipes import TABLE, write_recipe
from support.trainings import settings


def asked(tmp_path, *rows, **more):
    return Asked(rows, folder=tmp_path / "out", root=tmp_path, **more)


def here(jobs, finished):
    """Do jobs in this process."""
    for job in jobs:
        done = do(job)
        assert isinstance(done, Done)
        finished(job, done)


def test_rows_seeds_and_lines(tmp_path):
    plan = make_plan(
        read_experiment(write_recipe(tmp_path)), asked(tmp_path, "WA", "GN", "BN, dash")
    )
    assert [(job.facts.row, job.settings.seed) for job in plan.jobs] == [
        ("WA", 0),
        ("GN", 0),
        ("WA", 1),
        ("GN", 1),
    ]
    assert plan.not_run == {"BN, dash": "a dash"}
    run_all(plan.all, here)
    lines = read(tmp_path / "out")
    assert [(line.row, line.run.settings.seed, line.budget, line.shrunk) for line in lines] == [
        (job.facts.row, job.settings.seed, "full", {}) for job in plan.jobs
    ]
    assert all(line.run.status == "finished" for line in lines)
    before = (tmp_path / "out/results.jsonl").read_bytes()

    def nobody(jobs, _finished):
        raise AssertionError(jobs)

    run_all(plan.all, nobody)
    assert (tmp_path / "out/results.jsonl").read_bytes() == before


def test_a_finished_run_whose_line_is_missing_is_only_read(tmp_path):
    plan = make_plan(read_experiment(write_recipe(tmp_path)), asked(tmp_path, "GN", seeds=1))
    run_all(plan.all, here)
    started = read(tmp_path / "out")[0].run.times["started"]
    (tmp_path / "out/results.jsonl").unlink()
    time.sleep(1.1)
    run_all(plan.all, here)
    assert read(tmp_path / "out")[0].run.times["started"] == started


FINE_TUNED = """\
  - {label: tuned, method: GN, run: {model: {recipe: gn+wa}}, added: a test,
     start: {recipe: me/table, row: GN}}
cost"""


def test_a_row_starts_with_the_weights_of_another(tmp_path):
    """Which is run first though it was not asked for, and is the same run when it is."""
    path = write_recipe(tmp_path, TABLE.replace("cost", FINE_TUNED))
    plan = make_plan(read_experiment(path), asked(tmp_path, "tuned", seeds=1))
    assert [job.facts.row for job in plan.before] == ["GN"]
    assert [job.facts.row for job in plan.jobs] == ["tuned"]
    run_all(list(reversed(plan.all)), here)
    tuned, source = read(tmp_path / "out")[1], read(tmp_path / "out")[0]
    assert tuned.run.settings.model.start == source.run.id
    assert tuned.run.facts["start"]
    both = make_plan(read_experiment(path), asked(tmp_path, "tuned", "GN", seeds=1))
    assert both.before == []
    assert {job.key for job in both.jobs} == {job.key for job in plan.all}


def test_a_divergence_is_a_result_and_a_fault_of_one_run_is_not_that_of_others(tmp_path):
    wild = TABLE.replace("learning_rate: 0.2", "learning_rate: 1.0e+30").replace(
        "run: {model: {recipe: gn}", "run: {model: {recipe: none}"
    )
    plan = make_plan(read_experiment(write_recipe(tmp_path, wild)), asked(tmp_path, seeds=1))
    broken = settings(data={"name": str(tmp_path / "nowhere")})
    facts = LineFacts(recipe="me/x", recipe_sha256="0" * 64, row="x", budget="full", shrunk={})
    came = {}
    run_all(
        [Job(broken, tmp_path / "out", facts), *plan.all],
        here,
        lambda job, done: came.update({job.facts.row: done}),
    )
    assert came["x"].record is None
    assert "there is no folder" in came["x"].why
    assert came["GN"].record.run.status == "diverged"
    assert came["WA"].record.run.status == "finished"
    assert {line.row for line in read(tmp_path / "out")} == {"WA", "GN", "none"}


LONG = TABLE.replace("epochs: 2", "epochs: 15").replace("train_samples: 64", "train_samples: 320")


def begin(path, folder):
    options = ["--row", "GN", "--seeds", "1", "--folder", folder, "--workers", "1"]
    return start("reproduce", path, *options)


def outcome(folder):
    [line] = read(folder)
    weights = torch.load(folder / "runs" / line.run.id / "model.pt", weights_only=True)["model"]
    return line.run.metrics, line.run.curve, weights


def test_a_killed_command_carries_on_to_the_same_result_and_two_share_a_folder(tmp_path):
    path = write_recipe(tmp_path, LONG)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = begin(path, killed)
    deadline = time.monotonic() + 600
    while not list(killed.glob("runs/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read(killed) == []
    # On the killed folder two at once, on the other one alone; all three at the same time.
    commands = [begin(path, folder) for folder in (killed, killed, whole)]
    for command in commands:
        _, words = command.communicate(timeout=600)
        assert command.returncode == 0, words
    metrics, curve, weights = outcome(killed)
    wanted_metrics, wanted_curve, wanted_weights = outcome(whole)
    assert read(killed)[0].run.times["resumed"] >= 1
    assert (metrics, curve) == (wanted_metrics, wanted_curve)
    assert all(torch.equal(weights[name], wanted_weights[name]) for name in wanted_weights)


def test_what_a_person_sees(tmp_path):
    path = write_recipe(tmp_path)
    folder = tmp_path / "out"
    words = ["reproduce", path, "--seeds", "1", "--folder", folder, "--workers", "1"]
    plan = call(*words, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert not folder.exists()
    for text in ("WA", "Estimate: ", "not run: BN, dash: a dash", "two CPU cores"):
        assert text in plan.stdout
    full = call(*words)
    assert full.exit_code == 0, full.output
    assert "paper: error" in full.stdout
    assert "25 (recovered)" in full.stdout
    assert "3 runs into" in full.stderr
    again = call(*words, "--json")
    assert "3 of them finished already" in again.stderr
    assert [run["status"] for run in json.loads(again.stdout)["runs"]] == ["finished"] * 3


def test_a_shrunk_run_is_never_beside_the_papers_number(tmp_path):
    shrunk = TABLE.replace("train_samples: 64, test_samples: 40", "test_samples: 60")
    path = write_recipe(tmp_path, shrunk.replace("epochs: 2", "epochs: 3"))
    words = ["reproduce", path, "--budget", "smoke", "--row", "GN", "--folder", tmp_path / "out"]
    found = call(*words, "--workers", "1")
    assert found.exit_code == 0, found.output
    assert "budget smoke (shrunk)" in found.stdout
    assert "shrunk: optimization.epochs: 3 -> 2" in found.stdout
    assert "paper: error" not in found.stdout
    assert "25" not in found.stdout.split("shrunk: ")[0].split("data:")[0].replace("0.25", "")
    [line] = read(tmp_path / "out")
    assert line.shrunk["data.train_samples"] == (898, 500)
    assert line.budget == "smoke"


def test_what_is_not_there_is_refused_by_name(tmp_path):
    changed = TABLE.replace(
        "run: {model: {recipe: wa}}", "run: {model: {name: resnet50_cifr, recipe: wa}}"
    ).replace("added: to compare with", "run: {data: {name: cifar10}}, added: to compare with")
    path = write_recipe(tmp_path, changed)
    words = ["reproduce", path, "--seeds", "1", "--folder", tmp_path / "out", "--workers", "1"]
    found = call(*words, "--data", tmp_path)
    assert found.exit_code == 1
    assert "refused: me/table 'WA': neither torchvision nor timm has a model" in found.stderr
    assert "Nearest: resnet50_cifar" in found.stderr
    assert f"me/table 'none': cifar10 is not in {tmp_path}" in found.stderr
    assert "--data, or fetch it with --download" in found.stderr
    assert [line.row for line in read(tmp_path / "out")] == ["GN"]
    nothing = call(*words, "--data", tmp_path, "--row", "none")
    assert nothing.exit_code == 2
    assert "nothing of this can be run here" in nothing.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reproduce"], "--list shows all"),
        (["reproduce", "wa/tabel1"], "Nearest: wa/table1"),
        (["reproduce", "ws/table4x"], "Nearest: ws/table4"),
        (["reproduce", "wa/table1", "--row", "WAA"], "wa/table1 has no row 'WAA'. Nearest: WA."),
        (["reproduce", "wa/table1", "--device", "moon"], "--device: 'moon'"),
    ],
)
def test_wrong_use_is_one_line(words, said):
    found = call(*words)
    assert found.exit_code == 2
    assert said in found.stderr
    assert "Traceback" not in found.output


def test_the_list_names_everything():
    found = call("reproduce", "--list")
    assert found.exit_code == 0
    assert "wa/table1" in found.stdout
    assert "ws/table4" in found.stdout
    entries = json.loads(call("reproduce", "--list", "--json").stdout)
    assert {"id", "rows", "without", "title", "where", "task"} == set(entries[0])
