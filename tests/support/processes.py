"""What two processes do to compare deferral with none under DDP and FSDP2.

Here and not beside the tests, since a spawned process imports it by its name.
"""

from __future__ import annotations

import copy
import gc
import traceback
import warnings
from contextlib import nullcontext

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import filterwise as fw
from support.deferral import Net, convert, loss, micro_batches

STEPS = 3


class Skipping(Net):
    """Leaves its second layer out when told to."""

    skip = False

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        x = x if self.skip else torch.tanh(self.second(x))
        return self.last(x.mean((2, 3)))


class Whole(nn.Module):
    """A model of which only a part is wrapped."""

    def __init__(self, part, **options):
        super().__init__()
        self.part = DistributedDataParallel(part, **options)

    def forward(self, x):
        return self.part(x)


def network(make=Net):
    torch.manual_seed(0)
    return convert(make(), "wa").double()


def no_sync(model, enabled):
    """Skip the reduction as everybody does without deferral."""
    wrapper = model.part if isinstance(model, Whole) else model
    return wrapper.no_sync() if enabled else nullcontext()


class Both:
    """The two contexts that the inner model needs, which cannot see its wrapper."""

    def __init__(self, model, enabled):
        self.contexts = (no_sync(model, enabled), fw.defer(model.module, enabled=enabled))

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def train(model, defer, rank, *, skips=None, bare=False, whole_first=False):
    """Train a few steps of three micro-batches with momentum; return the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    inner = model.part.module if isinstance(model, Whole) else model.module
    for step in range(STEPS):
        for i, x in enumerate(micro_batches(2, 2, 1, seed=10 * step + rank)):
            if whole_first and step == 0 and i < 2:
                continue
            inner.skip = skips is not None and skips(step, i, rank)
            context = nullcontext() if bare and i == 2 else defer(model, enabled=i < 2)
            with context:
                loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in inner.named_parameters()}


def differences(got, expected):
    """Return the largest difference of each parameter, relative to its largest entry."""
    return max(float((got[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())


def ddp(rank, wrap=DistributedDataParallel, make=Net, defer=fw.defer, train_with=None, **options):
    """Return how far training with deferral is from training without, and over processes."""
    more = train_with or {}
    ordinary = train(wrap(network(make), **options), no_sync, rank, **more)
    deferred = train(wrap(network(make), **options), defer, rank, **more)
    theirs = [torch.zeros_like(deferred["first.weight"]) for _ in range(2)]
    distributed.all_gather(theirs, deferred["first.weight"])
    moved = differences(ordinary, dict(network(make).named_parameters()))
    assert moved > 1e-3, moved
    return max(differences(deferred, ordinary), float((theirs[0] - theirs[1]).abs().max()))


def last_skips(step, i, rank):
    del step, rank
    return i == 2


def one_process_skips(step, i, rank):
    return (i == 2 and rank == 0) or (step == 1 and i == 0)


def never_used(step, i, rank):
    del i, rank
    return step == 1


UNUSED = {"find_unused_parameters": True, "make": Skipping}
DDP = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "both": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
    # Torch itself fails if the very first backward of a static graph is not reduced.
    "static graph": {"static_graph": True, "train_with": {"whole_first": True}},
    "bare last micro-batch": {"train_with": {"bare": True}},
    "inner model": {"defer": Both},
    "a wrapped part": {"wrap": Whole},
    "last micro-batch skips a layer": {**UNUSED, "train_with": {"skips": last_skips}},
    "the same, bare": {**UNUSED, "train_with": {"skips": last_skips, "bare": True}},
    "one process skips a layer": {**UNUSED, "train_with": {"skips": one_process_skips}},
    "the same, bucket views": {
        **UNUSED,
        "gradient_as_bucket_view": True,
        "train_with": {"skips": one_process_skips},
    },
    "nobody uses a layer": {**UNUSED, "train_with": {"skips": never_used}},
}


def fsdp(rank, reshard):
    """Return how far a sharded model with deferral is from one on one process, and what it said."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    plain, sharded = network(), network()
    for layer in (sharded.first, sharded.second):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
    worst, told = 0.0, []
    optimizers = [torch.optim.SGD(m.parameters(), 0.02, momentum=0.9) for m in (plain, sharded)]
    for step in range(STEPS):
        for i in range(3):
            batches = [micro_batches(2, 2, 1, seed=10 * step + r)[i] for r in range(2)]
            for x in batches:
                (loss(plain, x) / 2).backward()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                with fw.defer(sharded, enabled=i < 2):
                    loss(sharded, batches[rank]).backward()
            told += [str(one.message) for one in seen if one.category is fw.FilterwiseWarning]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for model in (plain, sharded):
            model.eval()
        x = micro_batches(2)[0]
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                worst = max(worst, float((sharded(x) - plain(x)).abs().max()))
        for model in (plain, sharded):
            model.train()
    parameters = dict(plain.named_parameters())
    for module in (sharded, sharded.first, sharded.second):
        module.reshard()
    for name, p in sharded.named_parameters():
        worst = max(worst, float((p.full_tensor() - parameters[name]).abs().max()))
    return worst, told


def one_of_two(rank, store, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    try:
        for name, options in DDP.items():
            try:
                found[name] = ddp(rank, **copy.copy(options))
            except Exception:
                found[name] = traceback.format_exc()
                break  # the other process may wait for this one
        for reshard in (True, False):
            try:
                found[f"fsdp {reshard}"] = fsdp(rank, reshard)
            except Exception:
                found[f"fsdp {reshard}"] = traceback.format_exc()
                break
    finally:
        results[rank] = found
        distributed.destroy_process_group()
        gc.collect()  # DDP wrappers are part of cycles; alive at the very end, their threads abort
