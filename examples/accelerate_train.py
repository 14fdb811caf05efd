"""Hugging Face Accelerate: `accumulate` says when gradients are synchronized, `defer` follows it.

``python examples/accelerate_train.py`` trains a small network on random pictures.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

import filterwise as fw

PICTURES, MICRO_BATCHES = 10, 4


def network() -> nn.Module:
    """Return a small network with batch normalization."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def train(*, deferred: bool = True, epochs: int = 2) -> nn.Module:
    """Train with gradients accumulated over micro-batches of one picture."""
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
    model = network()
    fw.convert_(model, "gn+ws")  # before prepare, which wraps it
    optimizer = torch.optim.SGD(fw.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(PICTURES, 3, 12, 12, generator=generator),
        torch.randint(10, (PICTURES,), generator=generator),
    )
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for pictures, labels in loader:
            with (
                accelerator.accumulate(model),
                fw.defer(model, enabled=deferred and not accelerator.sync_gradients),
            ):
                accelerator.backward(nn.functional.cross_entropy(model(pictures), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    trained = train()
    print(fw.describe(trained))
