"""One run: gradients of accumulated micro-batches, bits, divergence, what it keeps."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from filterwise.lab import engine
from filterwise.lab.data import PictureSet, load
from filterwise.lab.settings import RunSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    """Take 140 training and 100 test digits."""
    whole = load("digits")
    return PictureSet(
        "some digits",
        whole.train_pictures[:140],
        whole.train_labels[:140],
        whole.test_pictures[:100],
        whole.test_labels[:100],
        whole.classes,
        "",
    )


def settings(data, **changes):
    values = {
        "data": data.name,
        "data_sha256": data.sha256,
        "net": "plain",
        "recipe": "gn+ws",
        "initialization": "default",
        "learning_rate": 0.1,
        "micro_batch": 64,
        "seed": 0,
        "epochs": 2,
    }
    return RunSettings.model_validate(values | changes)


@pytest.mark.parametrize("recipe", ["none", "gn", "gn+ws", "wa", "pws"])
@pytest.mark.parametrize("micro_batch", [1, 24, 64])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_step(digits, recipe, micro_batch):
    """24 leaves a last micro-batch of 16: weighted as a full one the gradient would be off."""
    batches = engine.Batches(digits, 64, 0, CPU)
    pictures, labels = next(batches.epoch())
    trainer = engine.Trainer(
        settings(digits, recipe=recipe, micro_batch=micro_batch), digits, CPU, 10
    )
    trainer.model.double()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step(pictures.double(), labels)
    model = trainer.model
    with torch.no_grad():
        after = [p.clone() for p in model.parameters()]
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(pictures.double()), labels).backward()
    for parameter, old, new in zip(model.parameters(), before, after, strict=True):
        decay = 5e-4 if parameter.dim() > 1 else 0.0
        wanted = old - 0.1 * (parameter.grad + decay * old)
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-11)


def test_the_learning_rate_falls_along_a_cosine(digits):
    trainer = engine.Trainer(settings(digits, learning_rate=0.4), digits, CPU, steps=4)
    batches = engine.Batches(digits, 64, 0, CPU)
    rates = []
    for _ in range(2):
        for pictures, labels in batches.epoch():
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.step(pictures, labels)
    wanted = [0.2 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    numpy.testing.assert_allclose(rates, wanted, rtol=1e-12)


def test_an_epoch_takes_whole_steps_and_no_picture_twice(digits):
    numbered = PictureSet(
        "numbered",
        torch.arange(140).to(torch.uint8).view(140, 1, 1, 1),
        torch.arange(140),
        digits.test_pictures,
        digits.test_labels,
        tuple(map(str, range(140))),
        "",
    )
    batches = engine.Batches(numbered, 64, seed=0, device=CPU)
    first = [labels.tolist() for _, labels in batches.epoch()]
    second = [labels.tolist() for _, labels in batches.epoch()]
    assert [len(step) for step in first] == [64, 64]
    assert len({label for step in first for label in step}) == 128
    assert first != second
    again = engine.Batches(numbered, 64, seed=0, device=CPU)
    assert [labels.tolist() for _, labels in again.epoch()] == first


def test_a_set_smaller_than_a_step_is_one_step(digits):
    batches = engine.Batches(digits, 1000, 0, CPU)
    assert batches.steps == 1
    assert len(next(batches.epoch())[1]) == 140


@pytest.mark.parametrize("recipe", ["bn", "gn+ws", "wa"])
def test_the_same_settings_give_the_same_bits(digits, recipe):
    one = engine.train(settings(digits, recipe=recipe, micro_batch=32), digits)
    # Whatever was drawn before must not matter.
    torch.rand(17)
    two = engine.train(settings(digits, recipe=recipe, micro_batch=32), digits)
    assert one == two
    other = engine.train(settings(digits, recipe=recipe, micro_batch=32, seed=1), digits)
    assert other.curve != one.curve


def test_error_and_curve_are_those_of_the_wrong_answers(digits):
    outcome = engine.train(settings(digits, epochs=3), digits)
    wrong = engine.unpacked(outcome.wrong, 100)
    assert outcome.error == sum(wrong) / 100
    assert [point["epoch"] for point in outcome.curve] == [1, 2, 3]
    assert outcome.curve[-1]["test_error"] == outcome.error
    assert outcome.steps == 6
    assert outcome.diverged_at is None


@pytest.mark.parametrize("count", [1, 4, 7, 899])
def test_wrong_answers_are_packed_and_unpacked(count):
    bits = torch.rand(count) < 0.3
    assert engine.unpacked(engine._packed(bits), count) == bits.tolist()


def test_divergence_is_a_result_and_moves_no_parameter(digits):
    outcome = engine.train(settings(digits, recipe="none", learning_rate=1e6), digits)
    assert outcome.diverged_at is not None
    epoch, step = outcome.diverged_at
    assert outcome.steps == 2 * (epoch - 1) + step - 1
    assert len(outcome.curve) == epoch - 1
    wrong = engine.unpacked(outcome.wrong, 100)
    assert outcome.error == sum(wrong) / 100


def test_an_answer_that_is_not_finite_is_wrong(digits):
    trainer = engine.Trainer(settings(digits), digits, CPU, 1)
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(math.nan)
    wrong = trainer.wrong(engine.Batches(digits, 64, 0, CPU))
    assert wrong.all()
    assert trainer.model.training


def test_no_step_is_taken_on_a_loss_that_is_not_finite(digits):
    trainer = engine.Trainer(settings(digits), digits, CPU, 1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    loss = trainer.step(torch.full((4, 1, 8, 8), math.inf), torch.zeros(4, dtype=torch.long))
    assert not math.isfinite(loss)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_batch_norm_on_one_value_is_a_named_failure(digits):
    outcome = engine.train(
        settings(digits, net="resnet18", recipe="bn", micro_batch=1, epochs=1), digits
    )
    assert outcome.error is None
    assert outcome.failed == "the norm sees one value a channel, which torch refuses to train on"


def test_a_run_stops_when_it_is_asked_to(digits):
    calls = []

    def asked():
        calls.append(None)
        return len(calls) > 3

    with pytest.raises(engine.Stopped):
        engine.train(settings(digits, epochs=50), digits, asked_to_stop=asked)
    assert len(calls) == 4


def test_learning_happens(digits):
    """Not a shape test: on 140 digits a right loop is far below chance after ten epochs."""
    outcome = engine.train(settings(digits, epochs=10), digits)
    assert outcome.error is not None
    assert outcome.error < 0.5
