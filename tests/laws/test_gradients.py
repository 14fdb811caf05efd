"""Laws 16 to 20: the gradients."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from support import references
from support.cases import PLAIN, Subject, subjects
from support.compare import assert_close, assert_same, per_row
from support.laws import law
from support.models import HostCase, host_cases
from support.tolerances import WRONG

LAYERS = ("Conv2d[g=2]", "ConvTranspose1d[g=2]", "Linear", "named")


@law(
    16,
    rejects={
        "statistics_detached": "ws-f64",
        "eps_moved": "ws[inside]-f64",
        "half_statistics": "pws-bf16",
        "unbiased": "sws-f32",
    },
)
def test_law16_closed_form(subject: Subject):
    """Gradients of weights, gains and offsets equal the closed forms, as a slow double loop."""
    for fan_in, ratio, std in ((16, 0.3, 0.2), (27, 3.0, 0.02), (48, 1e7, 1e-3), (200, 0.0, 5.0)):
        weight = subject.draw(4, fan_in, ratio=ratio, std=std, seed=fan_in)
        upstream = subject.draw(4, fan_in, ratio=0.2, std=1.0, seed=fan_in + 1)
        gain, offset = subject.gain(4), subject.offset(4)
        found = subject.gradients(weight, upstream, gain, offset)
        expected = subject.expected_gradients(weight, upstream, gain)
        wanted = subject.saturated(expected[0])
        absolute, relative = subject.bound(wanted, gradient=True)
        assert_close(found[0], wanted, absolute=absolute, relative=relative, what="dL/dW")
        plain = per_row(upstream) * per_row(subject.expected(weight)) * fan_in
        for name, got, want in zip(("gain", "offset"), found[1:], expected[1:], strict=True):
            if got is not None:
                allowed = subject.tolerance * torch.maximum(plain[:, 0], want.abs())
                assert_close(got, subject.saturated(want), absolute=allowed, what=f"dL/d{name}")


@law(
    17,
    rejects={"statistics_detached": "cwn-f64", "first_order_only": "ws-f64"},
    dtypes=["f64"],
)
def test_law17_gradcheck(subject: Subject):
    """First and second derivatives agree with differences of the function."""
    for fan_in in (5, 20):
        weight = subject.draw(2, fan_in, std=1.0)
        inputs = [weight, subject.gain(2), subject.offset(2)]
        inputs = [value if value is None else value.requires_grad_() for value in inputs]
        assert gradcheck(subject.effective, inputs)
        assert gradgradcheck(subject.effective, inputs)


@pytest.mark.parametrize(
    "subject",
    [subject for subject in subjects(dtypes=["f64"]) if not subject.case.cells],
    ids=lambda subject: subject.id,
)
def test_law17_gradcheck_of_the_smallest_filter(subject: Subject):
    weight = torch.tensor([[0.9, -0.4], [1.3, 2.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(subject.effective, (weight, subject.gain(2), subject.offset(2)))


@pytest.mark.parametrize(
    "subject",
    [subject for subject in subjects(dtypes=["f64"]) if subject.flags.uses_input],
    ids=lambda subject: subject.id,
)
def test_law17_gradcheck_through_the_input_statistics(subject: Subject):
    method = subject.case.method()
    weight = subject.draw(3, 12).view(3, 4, 3).requires_grad_()
    means = (0.2 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    gain = subject.gain(3)
    inputs = (weight, means, None if gain is None else gain.requires_grad_())
    assert gradcheck(method.effective, inputs, check_forward_ad=True)
    assert gradgradcheck(method.effective, inputs)


@pytest.mark.parametrize("subject", subjects(dtypes=["f64"]), ids=lambda subject: subject.id)
def test_law17_per_sample_gradients_under_vmap(subject: Subject):
    weight, gain, offset = subject.draw(3, 12), subject.gain(3), subject.offset(3)
    samples = torch.randn(4, 12, dtype=torch.float64)
    method, means = subject.case.method(weight.shape), subject.input_mean(12)

    def loss(raw, sample):
        effective = subject.kernel(method, raw, gain, offset, means)
        return (effective @ sample).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, samples)
    for one, sample in zip(each, samples, strict=True):
        leaf = weight.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(leaf, sample), leaf)
        assert_close(one, alone, absolute=1e-12 * per_row(alone), what="per-sample gradient")


@pytest.mark.parametrize("subject", subjects(PLAIN, ["f64"]), ids=lambda subject: subject.id)
def test_law17_forward_mode_is_right_or_refused(subject: Subject):
    """A Jacobian-vector product is exact where torch offers one, and an error elsewhere."""
    weight, gain = subject.draw(3, 12), subject.gain(3)
    tangent, upstream = subject.draw(3, 12, seed=8), subject.draw(3, 12, seed=9)
    method, means = subject.case.method(weight.shape), subject.input_mean(12)
    try:
        _, pushed = torch.func.jvp(
            lambda w: subject.kernel(method, w, gain, None, means), (weight,), (tangent,)
        )
    except (RuntimeError, NotImplementedError):
        return
    pulled = subject.gradients(weight, upstream, gain)[0]
    found, expected = (pushed * upstream).sum(), (pulled * tangent).sum()
    assert_close(found, expected, absolute=1e-12 * float(upstream.norm() * pushed.norm()))


@pytest.mark.parametrize(
    "hosted",
    [one for one in host_cases(("f64",)) if one.host.id in LAYERS],
    ids=lambda one: one.id,
)
def test_law17_gradcheck_of_a_layer(hosted: HostCase):
    """Through the forward, in input, raw weight, gain and bias, by `functional_call`."""
    layer = hosted.layer().requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]
    x = hosted.x()[:1].requires_grad_()
    assert gradcheck(call, (x, *values), fast_mode=True)
    if hosted.case.method().uses_input:
        layer.train()
        assert gradcheck(call, (x, *values), fast_mode=True)


@law(
    18,
    rejects={"statistics_detached": "ws-f64", "not_centred": "pws-f32"},
)
def test_law18_no_push_along_ones(subject: Subject):
    """The gradient of a centred filter sums to zero, whatever the loss and eps."""
    weight, upstream = subject.draw(), subject.draw(ratio=1.0, std=1.0, seed=5)
    gradient = subject.gradients(weight, upstream, subject.gain())[0].double()
    whole = [slice(None)] if subject.case.cells and subject.flags.shared else subject.parts(weight)
    for part in whole:
        rows = gradient[:, part]
        sums, scale = rows.sum(1), rows.norm(dim=1) * rows.shape[1] ** 0.5
        if subject.case.cells and subject.flags.shared:
            sums, scale = sums.sum(), scale.norm()
        if subject.flags.centred or subject.flags.uses_input:
            assert_close(sums, torch.zeros(()), absolute=subject.tolerance * scale, what="sum")
        elif subject.dtype in (torch.float32, torch.float64):
            assert (sums.abs() >= WRONG * subject.tolerance * scale).all(), "declared uncentred"


@law(
    19,
    rejects={
        "statistics_detached": "wa-f64",
        "eps_forgotten": "pws-f64",
        "eps_moved": "ws-f64",
    },
)
def test_law19_euler_identity(subject: Subject):
    """<g, d> = rho <G, E>; rho is 0 where scale-free: the gradient is orthogonal to the filter."""
    weight, upstream = subject.draw(std=0.02), subject.draw(ratio=0.2, std=1.0, seed=5)
    gain = subject.gain()
    effective = subject.effective(weight, gain).double()
    gradient = subject.gradients(weight, upstream, gain)[0].double()
    shared = subject.case.cells and subject.flags.shared
    for part in subject.parts(weight):
        raw, out = weight.double()[:, part], effective[:, part]
        pull, push = gradient[:, part], upstream.double()[:, part]
        if shared:
            raw, out, pull, push = (t.reshape(1, -1) for t in (raw, out, pull, push))
        if subject.flags.uses_input:
            distance, rho = raw, torch.zeros(len(raw), dtype=torch.float64)
        else:
            f = references.formula(subject.flags, raw.shape[1])
            found = [references.moments(row, f) for row in raw.tolist()]
            kept = [one.deviation for one in found] if f.centred else raw.tolist()
            distance = torch.tensor(kept, dtype=torch.float64)
            rho = torch.tensor([f.rho(one.s) for one in found], dtype=torch.float64)
        if subject.flags.scale_free:
            assert_close(rho, torch.zeros(()), absolute=1e-14, what="rho of a scale-free method")
        scale = pull.norm(dim=1) * distance.norm(dim=1) + rho * push.norm(dim=1) * out.norm(dim=1)
        assert_close(
            (pull * distance).sum(1),
            rho * (push * out).sum(1),
            absolute=subject.tolerance * scale,
            what="<g, d>",
        )


@law(
    20,
    rejects={"gain_dropped": "wa-f32", "gain_divided_out": "pws-f64"},
    applies=lambda subject: subject.flags.has_gain,
)
def test_law20_gains(subject: Subject):
    """dL/dgain = <G, N>, N the effective weight at gain 1, at a gain of 0 too."""
    weight, gain = subject.draw(), subject.gain()
    upstream = subject.draw(ratio=0.2, std=1.0, seed=5)
    gain[2] = 0.0
    plain = subject.expected(weight)
    to_weight, to_gain, _ = subject.gradients(weight, upstream, gain)
    expected = (upstream.double() * plain).sum(1)
    scale = upstream.double().norm(dim=1) * plain.norm(dim=1)
    allowed = subject.tolerance * scale
    assert_close(to_gain, expected, absolute=allowed, what="dL/dgain")
    assert_same(to_weight[2], torch.zeros_like(to_weight[2]), "dL/dW at a gain of 0")
    wide = gain.float() if subject.dtype != torch.float64 else gain
    in_its_dtype = subject.gradients(weight, upstream, wide)[1]
    assert in_its_dtype.dtype == wide.dtype
    narrow = 1e-6 if wide.dtype == torch.float32 else 1e-13
    assert_close(in_its_dtype, expected, absolute=narrow * scale, what="dL/dgain of a wide gain")


@pytest.mark.parametrize("frozen", ["weight", "gain"])
@pytest.mark.parametrize(
    "subject",
    [subject for subject in subjects(dtypes=["f32"]) if subject.flags.has_gain],
    ids=lambda subject: subject.id,
)
def test_law20_a_frozen_part_gets_none_and_leaves_the_other_alone(subject: Subject, frozen):
    upstream = subject.draw(ratio=0.2, std=1.0, seed=5)
    both = {"weight": subject.draw(), "gain": subject.gain()}
    expected = dict(zip(both, subject.gradients(**both, upstream=upstream)[:2], strict=True))
    leaves = {k: v.detach().clone().requires_grad_(k != frozen) for k, v in both.items()}
    subject.effective(**leaves).backward(upstream)
    assert leaves[frozen].grad is None
    (free,) = set(leaves) - {frozen}
    assert_same(leaves[free].grad, expected[free], f"dL/d{free}")
