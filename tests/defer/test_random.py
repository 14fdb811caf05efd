"""Random sequences of what training loops do, as ever and with `defer`: both must end alike.

Everything that a loop may do between two steps, in any order: this finds what nobody thought of.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import filterwise as fw
from support.deferral import as_ever, assert_same_gradients, convert, gradients, loss, states
from support.deferral import micro_batches as parts

X = [x for seed in range(3) for x in parts(1, 2, seed=seed)]
OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-3, fused=True),
}


class Broken(RuntimeError):
    pass


class Changing(nn.Module):
    """Layers of every kind, two of which may be tied; its forward changes as it is told."""

    def __init__(self, tie):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, groups=2, bias=False, padding=1)
        self.other = nn.Conv2d(4, 4, 3, groups=2, bias=False, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, groups=2)
        self.last = nn.Linear(4, 3)
        if tie:
            self.other.weight = self.second.weight
        self.skip, self.reentrant, self.twice = set(), None, False

    def middle(self, x):
        x = torch.tanh(self.second(x))
        return torch.tanh(self.second(x)) if self.twice else x

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        if "second" not in self.skip:
            keep = self.reentrant is None
            x = self.middle(x) if keep else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        for name in ("other", "up"):
            x = x if name in self.skip else torch.tanh(getattr(self, name)(x))
        return self.last(x.mean((2, 3)))


def fail(*_):
    raise Broken


class Loop:
    """A training loop; each method is something that it may do."""

    def __init__(self, model, defer, optimizer):
        self.model, self.defer, self.optimizer = model, defer, optimizer
        self.pending, self.seen = [], []
        self.draw, self.x = random.Random(), X[0]

    def deferred(self):
        with self.defer(self.model):
            loss(self.model, self.x).backward()

    def last(self):
        with self.defer(self.model, enabled=False):
            loss(self.model, self.x).backward()

    def bare(self):
        loss(self.model, self.x).backward()

    def close(self):
        with self.defer(self.model, enabled=False):
            pass

    def step(self):
        self.close()
        self.pending.clear()
        self.optimizer.step()
        if self.draw.random() < 0.8:
            self.optimizer.zero_grad(set_to_none=self.draw.random() < 0.5)

    def zero(self):
        self.model.zero_grad(set_to_none=self.draw.random() < 0.5)

    def evaluate(self):
        self.model.eval()
        with torch.no_grad() if self.draw.random() < 0.5 else torch.inference_mode():
            self.seen.append(self.model(self.x).clone())
        self.model.train()

    def change(self):
        self.close()
        self.pending.clear()
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(1.01)

    def freeze(self):
        self.close()
        self.pending.clear()
        self.draw.choice(list(self.model.parameters())).requires_grad_(False)

    def thaw(self):
        self.model.requires_grad_(True)

    def rearrange(self):
        self.model.skip = set(self.draw.sample(["second", "other", "up"], self.draw.randint(0, 2)))
        self.model.reentrant = self.draw.choice([None, None, True, False])
        self.model.twice = self.draw.random() < 0.3

    def breaks(self):
        handle = self.model.last.register_forward_hook(fail)
        with pytest.raises(Broken), self.defer(self.model, enabled=self.draw.random() < 0.7):
            loss(self.model, self.x).backward()
        handle.remove()

    def two_losses(self):
        with self.defer(self.model, enabled=self.draw.random() < 0.6):
            out = self.model(self.x)
            out.square().sum().backward(retain_graph=True)
            out.sin().sum().backward()

    def penalty(self):
        with self.defer(self.model, enabled=self.draw.random() < 0.6):
            more = sum(p.square().sum() for p in self.model.parameters())
            (loss(self.model, self.x) + 0.1 * more).backward()

    def forward(self):
        with self.defer(self.model, enabled=self.draw.random() < 0.6):
            self.pending.append(loss(self.model, self.x))

    def backward(self):
        if self.pending:
            self.pending.pop(self.draw.randrange(len(self.pending))).backward()

    def part(self):
        part = self.draw.choice([self.model.first, self.model.second, self.model.up])
        with self.defer(part, enabled=self.draw.random() < 0.6):
            loss(self.model, self.x).backward()


ACTIONS = {
    **{"deferred": 12, "last": 4, "bare": 5, "close": 2, "step": 5, "zero": 4, "evaluate": 2},
    **{"change": 1, "freeze": 1, "thaw": 1, "rearrange": 4, "breaks": 1, "two_losses": 1},
    **{"penalty": 1, "forward": 2, "backward": 3, "part": 2},
}


def run(seed):
    """Draw a model and a sequence, do it both ways, and compare all that is left."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    method = draw.choice(["wa", "ws", "cwn", "ws(affine=true)"])
    ordinary = convert(Changing(tie=draw.random() < 0.4), method).double()
    deferred = copy.deepcopy(ordinary)
    optimizer = draw.choice(list(OPTIMIZERS.values()))
    names = draw.choices(list(ACTIONS), list(ACTIONS.values()), k=draw.randint(4, 14))
    loops = []
    for model, defer in ((ordinary, as_ever), (deferred, fw.defer)):
        loop = Loop(model, defer, optimizer(model))
        for place, name in enumerate(names):
            loop.draw = random.Random(f"{seed} {place}")
            loop.x = loop.draw.choice(X)
            getattr(loop, name)()
        loop.close()
        loops.append(loop)
    note = f"seed {seed}, {method}: {', '.join(names)}"
    for got, expected in zip(loops[1].seen, loops[0].seen, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=note)
    try:
        assert_same_gradients(gradients(deferred), gradients(ordinary), within=1e-9)
        assert_same_gradients(states(deferred), states(ordinary), within=1e-9)
    except AssertionError as error:
        raise AssertionError(f"{error} ({note})") from None


@pytest.mark.parametrize("block", range(4))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_random_loops_end_alike(block):
    for seed in range(15 * block, 15 * (block + 1)):
        run(seed)
