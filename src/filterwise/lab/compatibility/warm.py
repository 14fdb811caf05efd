"""Imported once by the process that all examinations are forked from, so that each starts warm."""

from __future__ import annotations

import timm  # noqa: F401
import torch
import torchvision  # noqa: F401
from torch import nn

import filterwise as fw
from filterwise.lab.compatibility import examine  # noqa: F401

torch.set_num_threads(1)
with torch.no_grad():  # a backward pass would start threads, which do not survive a fork
    _model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    fw.convert_(_model, "bn+ws")
    _model.eval()(torch.zeros(1, 3, 8, 8))
