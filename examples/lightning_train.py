"""Lightning's Trainer with the callback that defers and logs.

``python examples/lightning_train.py`` trains a small network on random pictures.
"""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import filterwise as fw
from filterwise.integrations.lightning import DeferralCallback


class Classifier(LightningModule):
    """Any module of yours: convert in __init__, take the groups in configure_optimizers."""

    def __init__(self) -> None:
        """Build and convert."""
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
        fw.convert_(self.net, "gn+ws")

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a micro-batch."""
        pictures, labels = batch
        return nn.functional.cross_entropy(self.net(pictures), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, gains and biases without decay."""
        return torch.optim.SGD(fw.param_groups(self, weight_decay=1e-4), lr=0.1, momentum=0.9)


def train() -> LightningModule:
    """Train for two epochs of ten pictures, four to a step."""
    data = torch.utils.data.TensorDataset(torch.randn(10, 3, 12, 12), torch.randint(10, (10,)))
    trainer = Trainer(
        max_epochs=2,
        accumulate_grad_batches=4,
        callbacks=[DeferralCallback(log_every=3)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=1))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return module


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    train()
