"""Fixup, SkipInit and 1/sqrt(L) on the gains of residual branches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filterwise import ConversionError, convert_
from filterwise.initialize import initialize_
from support.fingerprint import fingerprint


class Block(nn.Module):
    """A pre-activation residual block: x + F(x), F = m times (ReLU, linear)."""

    def __init__(self, width, length=2, bias=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(length))

    def forward(self, x):
        out = x
        for layer in self.layers:
            out = layer(out.relu())
        return x + out


def residual_net(recipe, *, depth=4, width=16, length=2, bias=False):
    model = nn.Sequential(*[Block(width, length, bias) for _ in range(depth)])
    convert_(model, recipe, select="*")
    return model


def gains(model, place):
    return [block.layers[place].gain.detach() for block in model]


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize(
    ("recipe", "start"),
    [
        ("wa", 1.0),
        ("pws", 1.0),
        ("sws", 1.0),
        ("ws(affine=true)", 1.0),
        ("cwn", math.sqrt(2.0)),
        ("wn(start=3.0)", 3.0),
    ],
)
@pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")
def test_fixup_on_the_gains(recipe, start, length):
    model = residual_net(recipe, depth=4, length=length, bias=True)
    raw = [p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")]
    report = initialize_(model, "fixup")
    factors = [float(gains(model, place)[0][0]) / start for place in range(length)]
    assert factors[-1] == 0
    # Fixup asks for a product of L^(-1/2) over the first m - 1 layers: 1/2 for four branches.
    assert math.prod(factors[:-1]) == pytest.approx(0.5, rel=1e-6)
    for block in model:
        for layer in block.layers:
            assert torch.equal(layer.bias, torch.zeros(16))
            assert layer.gain.unique().numel() == 1
    after = [p.detach() for n, p in model.named_parameters() if n.endswith("weight")]
    assert all(torch.equal(a, b) for a, b in zip(raw, after, strict=True))
    x = torch.randn(3, 16)
    assert torch.equal(model(x), x)
    assert len(report.converted) == 4 * length
    assert report.notes[0].startswith("4 residual branches.")


def test_wn_gains_are_scaled_from_their_own_start():
    model = residual_net("wn")
    initialize_(model, "branch")
    for block in model:
        norms = block.layers[1].weight.detach().double().norm(dim=1)
        torch.testing.assert_close(block.layers[1].gain.detach().double(), norms / 2)
        torch.testing.assert_close(
            block.layers[0].gain.detach().double(),
            block.layers[0].weight.detach().double().norm(dim=1),
        )


def test_a_gain_of_zero_learns_first_and_the_raw_weight_after_it():
    model = residual_net("wa").double()
    initialize_(model, "skipinit")
    last = model[-1].layers[1]
    x = torch.randn(5, 16, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    assert torch.equal(last.weight.grad, torch.zeros_like(last.weight))
    assert (last.gain.grad != 0).all()
    optimizer.step()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    assert last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("scheme", "factor"), [("skipinit", 0.0), ("branch", 0.5)])
def test_last_gains_alone(scheme, factor):
    model = residual_net("wa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialize_(model, scheme)
    for place, expected in ((0, 1.0), (1, factor)):
        assert all(torch.equal(g, torch.full((16,), expected)) for g in gains(model, place))
    assert report.converted == [f"{index}.layers.1" for index in range(4)]
    assert {row.reason for row in report if row.action == "keep"} == {"not set by this scheme"}
    for name, tensor in model.state_dict().items():
        assert name.endswith("layers.1.gain") or torch.equal(tensor, before[name])
    again = fingerprint(model)
    initialize_(model, scheme)
    assert fingerprint(model) == again


def growth(scheme, constant, depth=20, width=256):
    """Return ln(E x^2 at the end / at the start), one number for each of eight networks."""
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        recipe = f"wa(constant={constant})"
        model = residual_net(recipe, depth=depth, width=width)
        initialize_(model, "kaiming")
        if scheme:
            initialize_(model, scheme)
        x = torch.randn(16, width)
        with torch.no_grad():
            found.append(math.log(float(model(x).square().mean() / x.square().mean())))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("scheme", "constant", "factor"),
    # Each branch adds s^2 kappa of the second moment that enters it: s = 1/sqrt(20) or 1, kappa is
    # 1 with the preserving constant and (1 - 1/pi)^2 with He's, for two layers a branch.
    [
        ("branch", "preserving", 1 + 1 / 20),
        ("branch", "he", 1 + (1 - 1 / math.pi) ** 2 / 20),
        (None, "preserving", 2.0),
    ],
)
def test_branch_gains_hold_the_signal_of_a_deep_residual_network(scheme, constant, factor):
    logs = growth(scheme, constant)
    expected = 20 * math.log(factor)  # 0.976, just below ln e = 1, where the gains are right
    # Five standard errors over networks, and the bias of a finite width: a channel's share of the
    # second moment fluctuates by sqrt(2/256), which the logarithm turns into -1/256 a branch.
    error = float(logs.std() / math.sqrt(len(logs)))
    assert abs(float(logs.mean()) - expected) < 5 * error + 20 / 256
    assert error < 0.05 * max(expected, 1)  # the test can tell the three cases apart


def test_a_norm_behind_a_branch_is_noted():
    class Normed(Block):
        def __init__(self):
            super().__init__(16)
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

        def forward(self, x):
            out = self.norms[0](self.layers[0](x)).relu()
            return x + self.norms[1](self.layers[1](out))

    model = nn.Sequential(Normed(), Normed())
    convert_(model, "wa", select="*layers*")
    report = initialize_(model, "branch")
    assert report.notes[1] == (
        "A norm stands behind 4 of the 4 layers on branches; it undoes every gain but 0."
    )


@pytest.mark.filterwarnings("ignore::filterwise.NormalizationWarning")
@pytest.mark.parametrize(
    ("recipe", "scheme", "options", "words"),
    [
        ("ws", "fixup", {}, r"0.layers.0 \(Linear, ws\) has no gain, and a normalized weight does"),
        ("ws", "branch", {}, r"0.layers.1 \(Linear, ws\) has no gain"),
        ("wa", "fixup", {"length": 1}, "of 0.layers.0 has one weight layer, for which Fixup's exp"),
        ("wa(learn_gain=false)", "skipinit", {}, "a gain that is not learned, so its branch would"),
        ("wa(learn_gain=false)", "fixup", {}, "a gain that is not learned"),
        ("wa", "data", {}, "'data' needs a batch; pass input="),
    ],
)
def test_what_does_not_apply_is_refused_whole(recipe, scheme, options, words):
    model = residual_net(recipe, **options)
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=words) as error:
        initialize_(model, scheme)
    assert str(error.value).endswith("The model is unchanged.")
    assert fingerprint(model) == before


def test_a_branch_gain_that_is_not_learned_can_be_scaled():
    model = residual_net("wa(learn_gain=false)")
    initialize_(model, "branch")
    assert torch.equal(model[0].layers[1].gain, torch.full((16,), 0.5))


def test_a_plain_layer_on_a_branch_is_refused():
    model = nn.Sequential(Block(16), Block(16))
    convert_(model, "wa", select="*layers.0")
    with pytest.raises(
        ConversionError, match=r"0.layers.1 \(Linear, not converted\) lies on a res"
    ):
        initialize_(model, "branch")


@pytest.mark.parametrize("scheme", ["fixup", "skipinit", "branch", "data"])
def test_a_plain_model_is_refused(scheme):
    with pytest.raises(ConversionError, match="no layer is converted"):
        initialize_(nn.Sequential(Block(16)), scheme, input=torch.randn(2, 16))


def test_a_model_without_branches_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    convert_(model, "wa")
    with pytest.raises(
        ConversionError, match=r"no residual branch was found\. What follows what was"
    ):
        initialize_(model, "branch")


def test_branches_behind_control_flow_are_found_with_an_input():
    class Careful(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.isfinite().all() else x

    model = Careful(Block(16), Block(16))
    with pytest.warns(UserWarning, match="order of registration"):
        convert_(model, "wa", select="*")
    with pytest.raises(ConversionError, match="pass input=, a batch"):
        initialize_(model, "branch")
    assert len(initialize_(model, "branch", input=torch.randn(2, 16)).converted) == 2
