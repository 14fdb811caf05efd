"""The examples at toy size: what they leave is what the ordinary way leaves."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import torch

import filterwise as fw

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(one, other, tolerance=1e-5):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_every_example_is_shown_in_the_documentation():
    shown = "".join(page.read_text() for page in EXAMPLES.parent.glob("docs/**/*.md"))
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in shown, path.name


def test_accelerate_trains_the_same_with_and_without_deferral():
    example = load("accelerate_train")
    deferred, ordinary = example.train(), example.train(deferred=False)
    assert_same(deferred, ordinary)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(deferred.parameters(), example.network().parameters(), strict=False)
    )


def test_timm_trains_the_same_with_and_without_deferral(monkeypatch, capsys):
    example = load("timm_train")
    model, plain = example.train("resnet10t", "gn+ws", steps=2, micro_batches=2)
    decays = {group["weight_decay"] for group in fw.param_groups(model, 5e-4)}
    assert decays == {5e-4, 0.0}
    assert not fw.describe(plain)
    printed = capsys.readouterr().out
    assert "step 2: loss" in printed

    def ordinary(model, enabled=True):
        del enabled
        return real(model, enabled=False)

    real = fw.defer
    monkeypatch.setattr(example.fw, "defer", ordinary)
    assert_same(model, example.train("resnet10t", "gn+ws", steps=2, micro_batches=2)[0], 2e-2)


def test_lightning_example(capsys):
    example = load("lightning_train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        module = example.train()
    assert "filterwise/raw_std_min" in capsys.readouterr().out
    assert fw.describe(module.net) == {"0": "ws"}
    assert "lightning" in sys.modules
