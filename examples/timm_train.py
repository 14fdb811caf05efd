"""A timm training loop on a converted model: factory, groups, EMA, scaler, accumulation.

``python examples/timm_train.py --model resnet10t --recipe gn+ws --steps 2`` trains on random
pictures; put your loader in place of `pictures`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn

import filterwise as fw


def pictures(size: int, classes: int, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stand in for a loader."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            torch.randn(batch, 3, size, size, generator=generator),
            torch.randint(classes, (batch,), generator=generator),
        )


def train(name: str, recipe: str, steps: int, micro_batches: int) -> tuple[nn.Module, nn.Module]:
    """Train a model; return it, and the average of its weights, folded."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(name, num_classes=10).to(device)
    print(fw.convert_(model, recipe).summary)

    # Groups in place of weight_decay=: timm's own rule goes by the number of dimensions.
    optimizer = create_optimizer_v2(
        fw.param_groups(model, weight_decay=5e-4), opt="sgd", lr=0.05, momentum=0.9
    )
    average = ModelEmaV3(model, decay=0.9)
    scaler = NativeScaler(device=device.type)
    loader = pictures(32, 10, batch=2, count=steps * micro_batches)
    model.train()
    for i, (x, y) in enumerate(loader):
        last = (i + 1) % micro_batches == 0
        with (
            fw.defer(model, enabled=not last),
            torch.autocast(device.type, dtype=torch.bfloat16),
        ):
            loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device)) / micro_batches
            # Inside defer, since it runs the backward; it unscales, clips and steps on the last.
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=last)
        if last:
            optimizer.zero_grad()
            average.update(model, step=i // micro_batches)
            print(f"step {i // micro_batches + 1}: loss {float(loss.detach()) * micro_batches:.3f}")
    return model, fw.fold(average.module.eval())


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--recipe", default="gn+ws")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    options = parser.parse_args()
    _, plain = train(options.model, options.recipe, options.steps, options.micro_batches)
    print(f"folded: {sum(p.numel() for p in plain.parameters()):,} parameters")


if __name__ == "__main__":
    main()
