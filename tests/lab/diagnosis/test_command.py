"""The command: files, the page in a browser, TensorBoard, and one line for a person's mistake."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from typer.testing import CliRunner

import filterwise as fw
from filterwise.lab.commands import app
from filterwise.lab.diagnosis.writing import explorable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def run(*words):
    return CliRunner().invoke(app, ["diagnose", *words])


def test_figures_with_their_data_a_page_and_tensorboard(tmp_path):
    out = tmp_path / "new" / "folder"
    found = run("equinorm/fig1", "wa/fig2", "--width", "4", "--out", str(out), "--json")
    assert found.exit_code == 0, found.output
    files = json.loads(found.stdout)
    for stem in ("equinorm-fig1", "wa-fig2"):
        for ending in ("svg", "png", "csv"):
            assert (out / f"{stem}.{ending}").stat().st_size > 500
            assert f"{stem}.{ending}" in files
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"equinorm-fig1", "wa-fig2"}
    assert events.Tags()["histograms"]
    page = (out / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page


def test_a_model_with_a_checkpoint(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    trained = resnet18(num_classes=7)
    fw.convert_(trained, "gn+ws")
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    found = run(
        *("--model", "resnet18", "--recipe", "gn+ws", "--classes", "7", "--size", "32"),
        *("--checkpoint", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "out")),
    )
    assert found.exit_code == 0, found.output
    assert "layer1.0.conv1" in (tmp_path / "out" / "variance-by-layer.csv").read_text()
    assert "resnet18" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["wa/fig22"], "Nearest: wa/fig2"),
        (["wa/fig2", "--model", "resnet18"], "leave the figures"),
        (["--recipe", "ws"], "belong to --model"),
        (["--model", "resnet81"], "resnet"),
        (["wa/fig2", "--out", "/proc/nothing"], "cannot be written"),
        (["--model", "resnet18", "--recipe", "gn+wss"], "wss"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*words)
    assert found.exit_code == 2
    assert complaint in found.output
    assert "Traceback" not in found.output


def test_names_cannot_leave_the_pages_data():
    row = [0.0, 1.0, *[1] * 64]
    record = {"step": 1, "layer": "</script><b>", "signal": "channel_histogram", "value": [row]}
    text = explorable({"<!--": [record]})
    assert "<" not in text
    assert "</script><b>: activations of the layer" in json.loads(text)["<!--"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium to look at the page")
def test_a_person_can_step_through_epochs_in_a_browser_without_a_network(tmp_path):
    found = run("wa/fig9", "--epochs", "2", "--out", str(tmp_path / "out"))
    assert found.exit_code == 0, found.output
    page = (tmp_path / "out" / "index.html").read_text()
    before, after = (
        dom(tmp_path, page, clicks)
        for clicks in (
            "",
            "after",
        )
    )
    assert "epoch 1: 8 channels or filters" in before
    assert "epoch 2: 8 channels or filters" in after
    assert before.count("<polyline") == after.count("<polyline") == 8
    assert 'id="explorer" hidden' not in before


def dom(folder, page, click):
    """Return what the browser makes of the page, after a click."""
    script = f'<script>document.getElementById("{click}").click()</script>' if click else ""
    file = folder / f"page{click}.html"
    file.write_text(page.replace("</body>", f"{script}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout
