"""The command line as a person meets it: words, files, exit codes, interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy
import pytest
from filelock import FileLock
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import filterwise as fw
from filterwise.lab import timing
from filterwise.lab.commands import app
from filterwise.lab.results import Results

COMMAND = [sys.executable, "-c", "from filterwise.cli import main; main()"]
TINY = ("--epochs", "1", "--seeds", "2", "--net", "plain", "--processes", "2")


@pytest.fixture(autouse=True, scope="module")
def _short_timing():
    """Let the timing pass take its least number of rounds; no test looks at what it measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SECONDS", 0.0)
        yield


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


def draw_stripes(root):
    """Draw stripes along and across: 40 pictures to train on, 20 to test on."""
    generator = numpy.random.default_rng(0)
    for half, count in (("train", 20), ("test", 10)):
        for name, axis in (("across", 0), ("along", 1)):
            folder = root / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (12, 12, 3))
                pixels.swapaxes(0, axis)[::4] += 150
                image = Image.fromarray(pixels.astype(numpy.uint8))
                image.save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Give a class-folder tree."""
    return shared(tmp_path_factory, "stripes", draw_stripes)


@pytest.fixture(scope="module")
def compared(tree, tmp_path_factory):
    """Give a whole comparison: its standard output, standard error, folder and words."""
    words = ["compare", "--data", tree, "--size", "8", "--recipes", "none,gn+ws", "--epochs", "3"]
    words += ["--micro-batch", "3,20", "--seeds", "2", "--out"]

    def make(out):
        result = call(*words, out)
        assert result.exit_code == 0, result.output
        (out / "stdout").write_text(result.stdout)
        (out / "stderr").write_text(result.stderr)

    out = shared(tmp_path_factory, "compared", make)
    return (out / "stdout").read_text(), (out / "stderr").read_text(), out, words


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


def start(*words, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 120
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
    process = start(*long, "--epochs", "200", "--out", tmp_path)
    wait_for_lines(path, 1, process)
    # As a terminal does: to every process of the foreground.
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
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


def test_methods_are_listed_with_formula_and_source():
    result = call("methods")
    assert result.exit_code == 0
    for info in fw.methods():
        (line,) = [row for row in result.stdout.splitlines() if row.startswith(f"{info.name} ")]
        assert info.title in line
        assert info.formula in line
        assert info.source in line


def test_methods_as_json():
    found = json.loads(call("methods", "--json").stdout)
    assert [row["name"] for row in found] == [info.name for info in fw.methods()]
    assert found[0]["needs_norm"] is True
    assert found[0]["options"]["eps"] == 1e-5


def test_inspect_shows_plan_and_findings():
    result = call("inspect", "resnet18", "--recipe", "ws")
    assert result.exit_code == 0
    assert "resnet18 (torchvision), recipe ws" in result.stdout
    assert re.search(r"layer1\.0\.conv1 +Conv2d +convert ws .* 576", result.stdout)
    assert re.search(r"bn1 +BatchNorm2d +remove", result.stdout)
    assert "Findings (converted)" in result.stdout
    assert "…" not in result.stdout


def test_inspect_as_json_agrees_with_plan():
    from torchvision.models import resnet18

    found = json.loads(call("inspect", "resnet18", "--recipe", "gn+ws", "--json").stdout)
    assert found["rows"] == fw.plan(resnet18(), "gn+ws").to_dicts()
    assert found["recipe"] == "gn+ws"
    assert found["findings_of"] == "converted model"


def test_inspect_without_recipe_shows_the_model_as_it_is():
    found = json.loads(call("inspect", "resnet18", "--json").stdout)
    assert {row["action"] for row in found["rows"]} == {"keep"}


def test_inspect_shows_what_would_be_refused():
    result = call("inspect", "resnet18", "--recipe", "gn(7)")
    assert result.exit_code == 0
    assert "refuse" in result.stdout
    assert "Findings (as it is)" in result.stdout


def test_inspect_finds_models_of_timm():
    result = call("inspect", "resnetv2_50", "--recipe", "gn+ws")
    assert result.exit_code == 0
    assert "resnetv2_50 (timm)" in result.stdout


def make_model():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 3))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models_of_test_cli.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 3))\n"
        "def wrong():\n"
        "    return 3\n"
        "def failing():\n"
        "    raise KeyError('depth')\n"
        "number = 4\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_models_of_test_cli"
    sys.modules.pop("own_models_of_test_cli", None)


def test_inspect_finds_a_factory_in_the_current_folder(own_module):
    result = call("inspect", f"{own_module}:small", "--recipe", "gn+ws", "--json")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("factory", "code", "words"),
    [
        ("smal", 2, "has no smal. Nearest: small"),
        ("wrong", 2, "gave a int, not a torch.nn.Module"),
        ("failing", 1, r"failed: KeyError at \S+own_models_of_test_cli.py:7: 'depth'"),
        ("number", 2, "is a int, not a function"),
    ],
)
def test_a_factory_that_will_not_do_is_one_line(own_module, factory, code, words):
    assert re.search(words, one_line(call("inspect", f"{own_module}:{factory}"), code))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet_18", "Nearest: resnet18"),
        ("no.such.module:model", "there is no module no in the environment"),
        ("torchvision.models:resnet8", "torchvision.models has no resnet8. Nearest: resnet18"),
    ],
)
def test_an_unknown_model_names_the_nearest(name, words):
    assert words in one_line(call("inspect", name), 2)


def test_a_wrong_recipe_of_inspect_is_told_before_the_model_is_built():
    message = one_line(call("inspect", "no_such_model", "--recipe", "gn+wss"), 2)
    assert "unknown norm or method" in message


@pytest.mark.parametrize("command", ["compare", "inspect", "methods"])
def test_help_shows_an_example_that_works_as_typed(command):
    result = call(command, "-h")
    assert result.exit_code == 0
    (example,) = re.findall(r"Example: filterwise (.+)", result.stdout)
    assert example.split()[0] == command
    words = example.split()
    if command == "compare":
        # As typed, but for the size: 2 epochs fewer pictures would not change what is tried.
        words += ["--recipes", "none", "--epochs", "1", "--out", os.devnull + "/x"]
        assert "--out" in one_line(call(*words), 1)
    else:
        assert call(*words).exit_code == 0


@pytest.mark.parametrize("words", [["--nope"], ["compare", "--nope"], ["nope"], ["inspect"]])
def test_wrong_use_is_exit_code_2(words):
    result = call(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("missing", ["typer", "sklearn"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from filterwise.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "methods"], capture_output=True, text=True, timeout=60
    )
    package = {"sklearn": "scikit-learn"}.get(missing, missing)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr == (
        f"filterwise: the command line needs {package}; install its extra with"
        " pip install 'filterwise[lab]'\n"
    )


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="filterwise")
    from filterwise.cli import main

    assert script.load() is main
