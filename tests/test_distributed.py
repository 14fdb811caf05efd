"""Two processes on gloo: synchronized EquiNorm equals one process with the whole batch."""

from __future__ import annotations

import torch
from torch import distributed, multiprocessing, nn

import filterwise as fw

BATCHES = (3, 5)  # of unequal size, so that a mean of means would be wrong


def layer():
    torch.manual_seed(1)
    net = nn.Conv2d(4, 6, 3, padding=1).double()
    fw.convert_(net, "equinorm(synchronize=true)", select=lambda *_: True)
    return net


def pictures():
    generator = torch.Generator().manual_seed(2)
    return torch.rand(sum(BATCHES), 4, 6, 6, generator=generator, dtype=torch.float64)


def one_process_of_two(rank, store, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        net = layer()
        x = pictures().split(BATCHES)[rank].requires_grad_()
        net(x).square().sum().backward()
        for parameter in net.parameters():
            distributed.all_reduce(parameter.grad)
        results[rank] = {
            "weight": net.weight.grad.tolist(),
            "gain": net.gain.grad.tolist(),
            "mean": net.input_mean.tolist(),
            "x": x.grad.tolist(),
        }
    finally:
        distributed.destroy_process_group()


def test_synchronized_statistics_and_gradients_equal_one_process(tmp_path):
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
            worker.join(400)
            assert worker.exitcode == 0
        got = [dict(results[rank]) for rank in range(2)]
    net = layer()
    x = pictures().requires_grad_()
    net(x).square().sum().backward()
    for found in got:
        torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float64), net.input_mean)
        for name in ("weight", "gain"):
            expected = getattr(net, name).grad
            torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), expected)
    whole = torch.cat([torch.tensor(found["x"], dtype=torch.float64) for found in got])
    torch.testing.assert_close(whole, x.grad)
