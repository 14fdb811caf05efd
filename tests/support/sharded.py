"""What two processes do for the tests of shipping: synchronized norms, sharded checkpoints.

Here and not beside the tests, since a spawned process imports it by its name.
"""

from __future__ import annotations

import gc
import traceback

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import filterwise as fw

STEPS = 3


def network(recipe: str, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2, bias=False),
        norm(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    fw.convert_(model, recipe)
    return model.double()


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=generator) + 0.3


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(fw.param_groups(model, 1e-3), lr=0.1, momentum=0.9)


def train(model: nn.Module, rank: int | None) -> torch.optim.Optimizer:
    """Train a few steps on a half of each batch, or on the whole."""
    optimizer = optimizer_of(model)
    device = next(model.parameters()).device
    half = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)[half].to(device)).square().mean().backward()
        optimizer.step()
    return optimizer


def synchronized(rank: int) -> dict[str, list[float]]:
    """Train under DDP with SyncBatchNorms beside converted layers; torch asks for a GPU each."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network("bn+wa")).cuda(rank)
    train(DistributedDataParallel(model, device_ids=[rank]), rank)
    return {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}


def save_sharded(rank: int, folder: str) -> dict[str, list[float]]:
    """Train a sharded model, and save it and its optimizer, each process its own part."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = network("gn+pws")
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = train(model, rank)
    assert model[0].weight.to_local().numel() < 16 * 27
    model_state = get_model_state_dict(model)
    state = {"model": model_state, "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=folder)
    return {name: _whole(tensor).flatten().tolist() for name, tensor in model_state.items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


WORK = {"sharded": save_sharded, "synchronized": lambda rank, _: synchronized(rank)}


def one_of_two(rank: int, what: str, folder: str, results: dict) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo" if what == "sharded" else "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
    )
    try:
        results[rank] = WORK[what](rank, f"{folder}/checkpoint")
    except Exception:
        results[rank] = traceback.format_exc()
    finally:
        distributed.destroy_process_group()
        gc.collect()  # DDP wrappers are part of cycles; alive at the very end, their threads abort
