"""What two processes do under DDP while a monitor watches; a spawned process imports it by name."""

from __future__ import annotations

import gc
import traceback
import warnings

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import filterwise as fw
from support.deferral import Net, convert, loss, micro_batches

STEPS = 3


def train(rank, watched, rate):
    torch.manual_seed(0)
    model = DistributedDataParallel(convert(Net(), "wa").double())
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        watch = fw.monitor(model, optimizer, every=1, turn=0.5) if watched else None
        for step in range(STEPS):
            for i, x in enumerate(micro_batches(2, 2, 1, seed=10 * step + rank)):
                with fw.defer(model, enabled=i < 2):
                    loss(model, x).backward()
            optimizer.step()
            if watch is not None:
                watch.step()
            optimizer.zero_grad()
    spoken = [str(one.message) for one in seen if one.category is fw.TrainingWarning]
    parameters = [p.detach().clone() for p in model.parameters()]
    return parameters, [] if watch is None else [str(one) for one in watch.findings], spoken


def one_of_two(rank, store, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        alone, _, _ = train(rank, False, 0.2)
        parameters, findings, spoken = train(rank, True, 0.2)
        same = all(torch.equal(a, b) for a, b in zip(alone, parameters, strict=True))
        results[rank] = (same, findings, spoken)
    except Exception:
        results[rank] = traceback.format_exc()
    finally:
        distributed.destroy_process_group()
        gc.collect()  # DDP wrappers are part of cycles; alive at the very end, their threads abort
