"""Two processes on gloo: what DDP's processes record is what one process with both parts would."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import filterwise as fw

SIZES = (2, 4)  # unequal, so that a mean of means would be wrong
SIGNALS = [one.name for one in fw.diagnose.signals() if one.name != "channel_histogram"]


def model():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        fw.convert_(net, "keep+wa", select="3")
    return net.double()


def pictures():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(SIZES), 3, 8, 8, generator=generator, dtype=torch.float64)
    x[: SIZES[0]] += 1
    return x


def records_of(net, parts, scale):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with fw.diagnose.record(net, signals=[*SIGNALS, "channel_histogram"]) as trace:
        for place, part in enumerate(parts):
            with fw.defer(net, enabled=place < len(parts) - 1):
                (scale * net(part).sin().sum()).backward()
        optimizer.step()
    return trace.records()


def one_process_of_two(rank, store, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        wrapped = DistributedDataParallel(model())
        parts = pictures().split(SIZES)[rank].split(SIZES[rank] // 2)
        results[rank] = records_of(wrapped, parts, 1.0)
        del wrapped
    finally:
        distributed.destroy_process_group()


def test_both_processes_record_what_one_would(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=one_process_of_two, args=(rank, tmp_path / "store", results))
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
        both = [results[rank] for rank in range(2)]
    # DDP averages gradients: the loss of one process is half the sum of both.
    alone = records_of(model(), pictures().split((1, 1, 2, 2)), 0.5)
    assert [len(records) for records in both] == [len(alone)] * 2
    for one, other, expected in zip(*both, alone, strict=True):
        name = expected["layer"], expected["signal"]
        assert (one["layer"], one["signal"]) == name
        if name[1] == "channel_histogram":  # its bins come from both first micro-batches
            assert one == other
            assert [sum(row[2:]) for row in one["value"]] == [
                sum(row[2:]) for row in expected["value"]
            ]
            continue
        for got in (one, other):
            if name[1].endswith("histogram"):
                assert got == expected
                continue
            assert got["value"] == pytest.approx(expected["value"], rel=1e-7, abs=1e-12), name
