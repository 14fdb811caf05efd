"""Dynamic graph network of point clouds (Wang et al., arXiv 1801.07829)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PointNetwork", "edge_features", "neighbours"]

WIDTHS = (64, 64, 128, 256)


def neighbours(points: Tensor, count: int) -> Tensor:
    """Return the numbers of the nearest points of each, itself among them.

    Args:
        points: ``(clouds, values, points)``.
        count: How many.

    Returns:
        ``(clouds, points, count)``.
    """
    places = points.transpose(1, 2)
    return torch.cdist(places, places).topk(count, largest=False).indices


def edge_features(points: Tensor, count: int) -> Tensor:
    """Return ``(clouds, 2 * values, points, count)``: neighbour minus point, and the point."""
    chosen = neighbours(points.detach(), count)
    places = points.transpose(1, 2)
    clouds = torch.arange(len(points), device=points.device)[:, None, None]
    near = places[clouds, chosen]
    own = places[:, :, None].expand_as(near)
    return torch.cat([near - own, own], dim=3).permute(0, 3, 1, 2)


class PointNetwork(nn.Module):
    """Four edge convolutions whose graphs are drawn anew from each one's values, for classes.

    1,809,576 parameters for 40 classes.
    """

    def __init__(self, classes: int, count: int = 20, dropout: float = 0.5) -> None:
        """Take the number of classes, and of neighbours."""
        super().__init__()
        self.count = count
        values, blocks = 3, []
        for width in WIDTHS:
            blocks.append(
                _block(nn.Conv2d(2 * values, width, 1, bias=False), width, nn.BatchNorm2d)
            )
            values = width
        self.edges = nn.ModuleList(blocks)
        self.points = _block(nn.Conv1d(sum(WIDTHS), 1024, 1, bias=False), 1024, nn.BatchNorm1d)
        self.hidden = nn.Sequential(
            *_block(nn.Linear(2048, 512, bias=False), 512, nn.BatchNorm1d),
            nn.Dropout(dropout),
            *_block(nn.Linear(512, 256), 256, nn.BatchNorm1d),
            nn.Dropout(dropout),
        )
        self.classifier = nn.Linear(256, classes)

    def forward(self, points: Tensor) -> Tensor:
        """Return logits ``(clouds, classes)`` of ``(clouds, 3, points)``."""
        found = []
        for block in self.edges:
            points = block(edge_features(points, self.count)).amax(3)
            found.append(points)
        values = self.points(torch.cat(found, dim=1))
        pooled = torch.cat([values.amax(2), values.mean(2)], dim=1)
        return self.classifier(self.hidden(pooled))


def _block(layer: nn.Module, width: int, norm: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(layer, norm(width), nn.LeakyReLU(0.2))
