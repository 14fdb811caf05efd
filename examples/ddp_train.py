"""Deferral under DistributedDataParallel: two processes on one machine, no GPU needed.

``python examples/ddp_train.py --processes 2``; under torchrun or SLURM call `train` yourself.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import filterwise as fw

STEPS, MICRO_BATCHES = 2, 4


def network() -> nn.Module:
    """Return a small network with batch normalization, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def train(rank: int) -> nn.Module:
    """Train on pictures of this process; gradients are reduced once an optimizer step."""
    model = network()
    fw.convert_(model, "gn+ws")
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(fw.param_groups(ddp, weight_decay=1e-4), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        for i in range(MICRO_BATCHES):
            pictures = torch.randn(2, 3, 16, 16, generator=generator)
            labels = torch.randint(10, (2,), generator=generator)
            with fw.defer(ddp, enabled=i < MICRO_BATCHES - 1):
                loss = nn.functional.cross_entropy(ddp(pictures), labels)
                (loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def one_process(rank: int, processes: int, store: str) -> None:
    """Join the group, train, and compare what the processes ended with."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    try:
        worst = 0.0
        for parameter in train(rank).parameters():
            here = parameter.detach()
            first = here.clone()
            distributed.broadcast(first, src=0)
            worst = max(worst, float((first - here).abs().max()))
        found = torch.tensor(worst)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        if rank == 0:
            print(f"largest difference between the processes' parameters: {float(found):g}")
    finally:
        distributed.destroy_process_group()
        gc.collect()  # the wrapper is part of a cycle; alive at the very end, its threads abort


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    processes = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        multiprocessing.spawn(one_process, (processes, store), nprocs=processes)


if __name__ == "__main__":
    main()
