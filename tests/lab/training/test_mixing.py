"""Mixtures: what is mixed where, what the loss is, and that a run with them is resumed."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

from filterwise.lab.errors import UsageError
from filterwise.lab.nets import build
from filterwise.lab.training.loop import Stopped
from filterwise.lab.training.mixing import Mixer
from filterwise.lab.training.settings import Mixing
from filterwise.lab.training.train import train
from support.trainings import settings, weights


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def unmix(mixed, x):
    """Find share and partners from what is mixed and what it was mixed from."""
    flat, whole = mixed.detach().flatten(1), x.detach().flatten(1)
    shares, partners = {}, []
    for own, row in zip(whole, flat, strict=True):
        fits = []
        for number, other in enumerate(whole):
            direction = own - other
            if not direction.any():
                continue
            share = float(direction @ (row - other) / (direction @ direction))
            rest = float((row - other - share * direction).abs().max())
            fits.append((rest, number, share))
        rest, number, share = min(fits)
        if rest < 1e-9 and share < 1 - 1e-9:
            shares[round(share, 9)] = None
            partners.append(number)
        else:
            partners.append(len(partners))
    return list(shares), partners


def watched(kind, places, seed):
    """Take one loss on a net and keep what entered each place."""
    torch.manual_seed(0)
    model, _ = build("plain", "none", 1, 10)
    model.double()
    mixer = Mixer(model, Mixing(kind=kind, alpha=1.0, places=places))
    entered = {}
    for name, behind in (("input", "features.0"), ("features.2", "features.3")):
        model.get_submodule(behind).register_forward_pre_hook(
            lambda _, inputs, name=name: entered.__setitem__(name, inputs[0])
        )
    x, labels = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    torch.manual_seed(seed)
    loss = mixer.loss(model, x, labels, cross_entropy)
    return model, x, labels, loss, {**entered}


@pytest.mark.parametrize("seed", range(4))
def test_pictures_and_losses_are_mixed_by_one_share(seed):
    model, x, labels, loss, entered = watched("mixup", None, seed)
    (share,), partners = unmix(entered["input"], x)
    assert sorted(partners) == list(range(6))
    assert 0 < share < 1
    by_hand = torch.stack([share * x[i] + (1 - share) * x[j] for i, j in enumerate(partners)])
    torch.testing.assert_close(entered["input"], by_hand)
    logs = model(by_hand).log_softmax(1)
    wanted = -sum(
        share * logs[i, labels[i]] + (1 - share) * logs[i, labels[j]]
        for i, j in enumerate(partners)
    )
    torch.testing.assert_close(loss, wanted)


def test_manifold_mixup_mixes_at_one_place_a_time():
    seen = Counter()
    for seed in range(12):
        model, x, labels, loss, entered = watched("manifold", ("input", "features.2"), seed)
        plain = model.features[:3](x)
        at_input = not torch.equal(entered["input"], x)
        seen[at_input] += 1
        if at_input:
            torch.testing.assert_close(entered["features.2"], model.features[:3](entered["input"]))
            continue
        (share,), partners = unmix(entered["features.2"], plain)
        mixed = share * plain + (1 - share) * plain[partners]
        rest = model.pool(model.features[3:](mixed)).flatten(1)
        logs = model.classifier(rest).log_softmax(1)
        wanted = -(
            share * logs[range(6), labels] + (1 - share) * logs[range(6), labels[partners]]
        ).sum()
        torch.testing.assert_close(loss, wanted)
    assert min(seen.values()) >= 2
    assert len(seen) == 2


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_shares_are_beta_distributed(alpha):
    mixer = Mixer(nn.Identity(), Mixing(kind="mixup", alpha=alpha))
    torch.manual_seed(0)
    shares = []
    for _ in range(2000):
        # The picture of label 1 is 1 and the other 0: the first one's mixture is its share.
        found = mixer.loss(lambda x: x, torch.tensor([1.0, 0.0]), torch.tensor([1, 0]), take)
        shares.append(float(found))
    kept = torch.tensor([share for share in shares if share >= 0])
    assert len(kept) == pytest.approx(1000, abs=100)
    assert float(kept.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(kept.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def take(answers, labels):
    """Return the first answer once where the pair was exchanged, and -1 in all where it was not."""
    del labels
    return answers[0] if float(answers[0]) != 1.0 else torch.tensor(-1.0)


def test_evaluation_is_not_mixed():
    model, x, *_ = watched("manifold", ("features.2",), 0)
    torch.testing.assert_close(model(x), build_again()(x))


def build_again():
    torch.manual_seed(0)
    return build("plain", "none", 1, 10)[0].double()


@pytest.mark.parametrize(
    ("net", "places"),
    [
        ("wide_residual_20", ("input", "stage1", "stage2")),
        ("resnet18_cifar", ("input", "layer1", "layer2")),
        ("resnet18", ("input", "layer1", "layer2")),
    ],
)
def test_where_verma_et_al_mix(net, places):
    model, _ = build(net, "bn", 3, 10)
    assert Mixer(model, Mixing(kind="manifold")).places == places


def test_places_that_are_not_there():
    model, _ = build("plain", "bn", 1, 10)
    with pytest.raises(UsageError, match="Name modules behind which to mix: features, pool"):
        Mixer(model, Mixing(kind="manifold"))
    with pytest.raises(UsageError, match=r"no module 'feature\.2'\. Nearest: features\.2"):
        Mixer(model, Mixing(kind="manifold", places=("feature.2",)))


def test_a_run_with_mixtures_resumes_to_the_bit(tmp_path):
    wanted = settings(
        model={"recipe": "bn+ws"},
        mixing={"kind": "manifold", "alpha": 6.0, "places": ["input", "features.2", "features.5"]},
        optimization={"epochs": 2, "micro_batch": 12},
    )
    whole = train(wanted, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(wanted, tmp_path / "stopped", asked_to_stop=iter([False] * 7 + [True]).__next__)
    again = train(wanted, tmp_path / "stopped")
    assert again.times["resumed"] == 1
    assert again.curve == whole.curve
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = train(settings(model={"recipe": "bn+ws"}, optimization={"epochs": 2}))
    assert math.isfinite(whole.curve[-1]["train_loss"])
    assert whole.curve[-1]["train_loss"] > plain.curve[-1]["train_loss"]
