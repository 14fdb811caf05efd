"""Two processes on gloo: SyncBatchNorm beside converted layers, and sharded checkpoints."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import filterwise as fw
from support import sharded
from support.compare import assert_close


def run(what, folder):
    """Let two processes do something; return what each gives."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=sharded.one_of_two, args=(rank, what, str(folder), results))
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
            if worker.exitcode is None:
                worker.terminate()
        found = [results.get(rank, "this process did not get so far") for rank in range(2)]
    for one in found:
        assert not isinstance(one, str), one
    return found


def close(found, expected):
    for name, values in expected.items():
        assert_close(
            torch.tensor(found[name], dtype=torch.float64),
            values.detach().flatten().double(),
            absolute=1e-9,
            what=name,
        )


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch's SyncBatchNorm wants a GPU for each process"
)
def test_synchronized_batch_norm_beside_converted_layers_is_one_process(tmp_path):
    alone = sharded.network("bn+wa")
    sharded.train(alone, None)
    for found in run("synchronized", tmp_path):
        close(found, alone.state_dict())


def test_a_checkpoint_of_two_processes_loads_on_one(tmp_path):
    """A sharded model, saved where it lies; then the model, its optimizer and its folded copy."""
    both = run("sharded", tmp_path)
    alone = sharded.network("gn+pws")
    optimizer = sharded.train(alone, None)
    for one in both:
        close(one, alone.state_dict())
    # Another process, that has no group: convert, then load.
    fresh = sharded.network("gn+pws")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    again = sharded.optimizer_of(fresh)
    fresh_state = get_model_state_dict(fresh)
    state = {"model": fresh_state, "optimizer": get_optimizer_state_dict(fresh, again)}
    assert set(fresh_state) == set(both[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    fresh.load_state_dict(state["model"])
    set_optimizer_state_dict(fresh, again, state["optimizer"], options=StateDictOptions())
    close({name: value.tolist() for name, value in _flat(fresh)}, dict(alone.state_dict()))
    momenta = [optimizer.state[p]["momentum_buffer"] for p in alone.parameters()]
    for p, expected in zip(fresh.parameters(), momenta, strict=True):
        assert_close(again.state[p]["momentum_buffer"], expected, absolute=1e-9)
    x = sharded.batch(9)
    expected = alone.eval()(x)
    assert_close(fw.fold(fresh.eval())(x), expected, absolute=1e-9)


def _flat(model: nn.Module):
    return [(name, value.flatten()) for name, value in model.state_dict().items()]
