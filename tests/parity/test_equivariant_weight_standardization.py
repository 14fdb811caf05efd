"""Equivariant Weight Standardization by orbit labels (section 5.4)."""

from __future__ import annotations

import pytest
import torch

from filterwise.errors import FilterwiseWarning
from filterwise.functional import equivariant_weight_standardization as ews
from filterwise.functional import weight_standardization
from support.compare import assert_close, relative_error

W = torch.randn(6, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2
G = torch.randn(6, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
RINGS = torch.tensor([[0, 1, 0], [1, 2, 1], [0, 1, 0]])
COLUMNS = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
EXACT = 1e-12


def rotate(weight):
    return torch.rot90(weight, 1, (2, 3))


def cell_by_cell(weight, label, eps=1e-5, *, inside=False):
    out = torch.empty_like(weight)
    for one in label.unique():
        where = (label == one).expand(weight.shape)[0]
        part = weight[:, where]
        dotted = part - part.mean(1, keepdim=True)
        variance = dotted.square().mean(1, keepdim=True)
        out[:, where] = dotted / ((variance + eps).sqrt() if inside else variance.sqrt() + eps)
    return out


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
def test_every_cell_is_standardized(eps, inside):
    found = ews(W, label=RINGS, eps=eps, eps_inside=inside)
    assert relative_error(found, cell_by_cell(W, RINGS, eps, inside=inside)) < EXACT


def test_one_label_is_weight_standardization():
    found = ews(W, label=torch.zeros(1, dtype=torch.long))
    assert relative_error(found, weight_standardization(W)) < EXACT


def test_the_filter_keeps_sum_0_and_norm_root_n():
    found = ews(W, label=RINGS, eps=0.0).flatten(1)
    assert_close(found.sum(1), torch.zeros(6), absolute=1e-11)
    assert_close(found.square().sum(1), torch.full((6,), 144.0), relative=EXACT)


def test_it_commutes_with_a_rotation_that_maps_cells_onto_cells():
    assert relative_error(ews(rotate(W), label=RINGS), rotate(ews(W, label=RINGS))) < EXACT


def test_it_does_not_commute_where_the_labels_break_the_symmetry():
    """The control: columns are rotated into rows."""
    assert relative_error(ews(rotate(W), label=COLUMNS), rotate(ews(W, label=COLUMNS))) > 1e-2


def test_lifting_standardizing_the_copies_or_their_orbit_is_the_same():
    """Copies of a base filter are permutations of it, so their statistics are equal."""
    base = W[:2]
    copies = torch.cat([torch.rot90(base, k, (2, 3)) for k in range(4)])
    each = weight_standardization(copies)
    first = weight_standardization(base)
    lifted = torch.cat([torch.rot90(first, k, (2, 3)) for k in range(4)])
    pooled = ews(copies, label=torch.tensor([0, 1] * 4).view(8, 1, 1, 1), shared=True)
    assert relative_error(each, lifted) < EXACT
    assert relative_error(pooled, lifted) < EXACT


def test_gradients_cell_by_cell():
    """Section 1.2 in every cell, with its own number of members."""
    leaf = W.clone().requires_grad_()
    (found,) = torch.autograd.grad(ews(leaf, label=RINGS), leaf, G)
    expected = torch.empty_like(W)
    eps = 1e-5
    for one in RINGS.unique():
        where = (one == RINGS).expand(W.shape)[0]
        part, upstream = W[:, where], G[:, where]
        dotted = part - part.mean(1, keepdim=True)
        sigma = dotted.square().mean(1, keepdim=True).sqrt()
        hat = dotted / (sigma + eps)
        radial = (upstream * hat).mean(1, keepdim=True) * hat * (sigma + eps) / sigma
        expected[:, where] = (upstream - upstream.mean(1, keepdim=True) - radial) / (sigma + eps)
    assert relative_error(found, expected) < EXACT


def test_small_cells_are_warned_about():
    with pytest.warns(FilterwiseWarning, match="8 weights"):
        ews(W[:, :8], label=RINGS)


def test_a_cell_of_one_weight_is_refused():
    """On one 3x3 kernel the centre is an orbit of one: its weight would be 0."""
    with pytest.raises(ValueError, match="cell of one weight"):
        ews(W[:, :1], label=RINGS)
