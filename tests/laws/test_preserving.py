"""Law 34: a layer converted with ``preserve=True`` computes with its raw weight."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import filterwise as fw
from support.compare import assert_close
from support.laws import host_law
from support.models import HostCase
from support.tolerances import TOLERANCE


@host_law(
    34,
    rejects={
        "mean_not_put_back": "ws-ConvTranspose2d[g=2]-f64",
        "division_not_undone": "pws-Conv2d-f32",
    },
    applies=lambda hosted: not hosted.case.cells,
)
def test_law34_preserved(hosted: HostCase):
    """At the start the effective weight is the raw one; gain and offset cost a rounding each."""
    layer = hosted.plain()
    raw = getattr(layer, hosted.host.parameter).detach().clone()
    method = hosted.method(layer)
    loader = [torch.rand(hosted.host.input_shape).to(hosted.dtype)] if method.uses_input else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        fw.convert_(
            nn.Sequential(layer),
            fw.Recipe("keep", method),
            select=hosted.host.selector,
            preserve=True,
            loader=loader,
        )
        found = hosted.effective(layer.eval()).detach()
    rows = [hosted.host.rows(layer, one).double() for one in (found, raw)]
    largest = rows[1].abs().amax(1, keepdim=True)
    assert_close(rows[0], rows[1], absolute=3 * TOLERANCE[hosted.dtype] * largest, what="E = W")
