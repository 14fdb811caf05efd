"""Converted layers: what they compute, keep, refuse, and how they are copied."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import fusion, prune

import filterwise as fw
from filterwise.host import base_class, effective_weight, install, is_converted, uninstall
from filterwise.methods.registry import METHODS

HOSTS = {
    "Conv1d circular": lambda: nn.Conv1d(8, 6, 3, groups=2, padding=1, padding_mode="circular"),
    "Conv2d same": lambda: nn.Conv2d(8, 6, 3, padding="same", dilation=2),
    "Conv2d reflect": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False),
    "Conv2d replicate": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"),
    "Conv3d": lambda: nn.Conv3d(8, 6, 2, stride=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 6, 3, stride=2, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(8, 6, 2, groups=2),
    "Linear": lambda: nn.Linear(8, 5),
    "Conv2dSame": lambda: Conv2dSame(8, 6, 3, stride=2),
}
METHOD_NAMES = [name for name in METHODS if name != "ews"]
PAIRS = [
    pytest.param(host, method, id=f"{method}-{host}")
    for host in HOSTS
    for method in METHOD_NAMES
    if not (method == "equinorm" and "Transpose" in host)
]


def input_for(layer):
    if isinstance(layer, nn.Linear):
        return torch.rand(2, 7, 8)
    return torch.rand(2, layer.in_channels, *[9] * (layer.weight.dim() - 2))


def made(host, method):
    layer = HOSTS[host]()
    install(layer, METHODS[method](), "weight", method)
    return layer


@pytest.mark.parametrize(("host", "method"), PAIRS)
def test_layer_equals_the_plain_layer_with_the_effective_weight(host, method):
    layer = made(host, method)
    x = input_for(layer)
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    layer.eval()
    plain = HOSTS[host]()
    plain.weight = nn.Parameter(effective_weight(layer).detach())
    plain.bias = layer.bias
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize(("host", "method"), PAIRS)
def test_copies_pickles_and_uninstalls(host, method):
    layer = made(host, method)
    x = input_for(layer)
    layer(x)
    layer.eval()
    raw = layer.weight
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
        assert other.weight is not raw
        assert str(other) == str(layer)
    plain = HOSTS[host]()
    uninstall(layer)
    assert type(layer) is type(plain)
    assert layer.weight is raw
    assert set(layer.state_dict()) - {"bias"} == set(plain.state_dict()) - {"bias"}


def test_class_is_a_subclass_and_names_the_method():
    layer = made("Conv2d same", "wa")
    assert isinstance(layer, nn.Conv2d)
    assert type(layer) is not nn.Conv2d
    assert base_class(layer) is nn.Conv2d
    assert is_converted(layer)
    assert "wa" in repr(layer)


def test_transposed_layer_takes_an_output_size():
    layer = made("ConvTranspose2d", "ws")
    x = input_for(layer)
    assert layer(x, output_size=[19, 19]).shape[-2:] == (19, 19)


def test_new_parameter_in_place_of_the_raw_weight_is_refused():
    layer = made("Conv2d reflect", "ws")
    raw = layer.weight
    with pytest.raises(fw.ConversionError, match=r"assigned to \.weight"):
        layer.weight = nn.Parameter(torch.zeros_like(raw))
    with pytest.raises(fw.ConversionError, match="fold"):
        fusion.fuse_conv_bn_eval(layer.eval(), nn.BatchNorm2d(6).eval())
    assert layer.weight is raw
    layer.weight = raw
    nn.init.ones_(layer.weight)
    assert raw.eq(1).all()


def test_assigning_load_and_meta_construction():
    with torch.device("meta"):
        layer = HOSTS["Conv2d same"]()
    install(layer, METHODS["wn"](), "weight", "wn")
    source = HOSTS["Conv2d same"]()
    layer.load_state_dict(source.state_dict(), assign=True)
    norms = source.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(layer.gain.detach(), norms)
    x = input_for(layer)
    torch.testing.assert_close(layer(x), source(x))


def test_pruning_after_conversion_is_computed_with():
    layer = made("Conv2d same", "ws")
    prune.random_unstructured(layer, "weight", amount=0.5)
    x = input_for(layer)
    expected = fw.functional.weight_standardization(layer.weight_orig * layer.weight_mask)
    torch.testing.assert_close(effective_weight(layer), expected)
    layer(x).sum().backward()
    assert layer.weight_orig.grad is not None


def test_named_weight_is_hosted_by_its_own_forward():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    install(attention, METHODS["wn"](), "in_proj_weight", "wn")
    assert attention.in_proj_weight_gain.shape == (48,)
    x = torch.randn(2, 5, 16)
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(attention.state_dict(), strict=False)
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    attention.in_proj_weight_gain.data.mul_(2)
    plain.in_proj_weight.data.mul_(2)
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    attention(x, x, x)[0].sum().backward()
    assert attention.in_proj_weight.grad is not None
    assert attention.in_proj_weight_gain.grad is not None


def test_own_forward_that_fails_puts_the_raw_weight_back():
    layer = made("Conv2dSame", "ws")
    raw = layer.weight
    with pytest.raises(RuntimeError):
        layer(torch.rand(2, 3, 9, 9))
    assert layer.weight is raw


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_torch_func_sees_raw_weights(method):
    layer = made("Conv2d same", method).double()
    x = torch.rand(3, 8, 9, 9, dtype=torch.float64)
    layer(x)
    layer.eval()
    parameters = dict(layer.named_parameters())

    def loss(values, sample):
        return functional_call(layer, values, (sample.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(3):
        layer.zero_grad()
        loss(parameters, x[index]).backward()
        for name, value in parameters.items():
            torch.testing.assert_close(per_sample[name][index], value.grad)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_autocast_keeps_the_output_dtype_of_the_plain_layer(method):
    layer, plain = made("Conv2d same", method), HOSTS["Conv2d same"]()
    x = input_for(layer)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == plain(x).dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_symbolic_tracing_by_torch_keeps_the_layer_whole():
    net = nn.Sequential(made("Conv2d same", "wa"), nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    net[0].weight.data.normal_()
    x = torch.rand(1, 8, 9, 9)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo", "ignore::DeprecationWarning")
def test_whole_graph_compiles_once_for_two_steps(method):
    torch._dynamo.reset()
    net = nn.Sequential(made("Conv2d same", method), nn.ReLU(), nn.Conv2d(6, 4, 3))
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x = torch.rand(2, 8, 9, 9)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(3):
        compiled(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(compiles) == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), net.eval()(x))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*has seen no training batch")
def test_layers_can_be_traced_by_torch_jit(method):
    layer = made("Conv2d same", method).eval()
    x = input_for(layer)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))


class TestEquiNorm:
    def test_statistics_stay_wide_in_half_precision(self):
        layer = made("Conv2d same", "equinorm").half()
        assert layer.weight.dtype == torch.float16
        assert layer.input_mean.dtype == torch.float32
        assert layer.double().input_mean.dtype == torch.float64

    def test_running_mean_is_set_by_the_first_batch_then_moves(self):
        layer = made("Conv2d same", "equinorm")
        first, second = torch.rand(2, 8, 9, 9), torch.rand(4, 8, 5, 5)
        layer(first)
        torch.testing.assert_close(layer.input_mean, first.mean((0, 2, 3)))
        layer(second)
        expected = 0.9 * first.mean((0, 2, 3)) + 0.1 * second.mean((0, 2, 3))
        torch.testing.assert_close(layer.input_mean, expected)
        assert layer.num_batches_tracked == 2

    def test_unbatched_input_and_linear_layers(self):
        layer = made("Conv2d same", "equinorm")
        x = torch.rand(8, 9, 9)
        torch.testing.assert_close(layer(x), layer(x.unsqueeze(0)).squeeze(0))
        linear = made("Linear", "equinorm")
        x = torch.rand(64, 3, 8)
        out = linear(x)
        torch.testing.assert_close(out.mean((0, 1)), linear.bias, rtol=0, atol=1e-5)

    def test_zero_mean_input_warns_once(self):
        layer = made("Conv2d reflect", "equinorm")
        x = torch.randn(4, 8, 9, 9)
        x -= x.mean()
        with pytest.warns(fw.FilterwiseWarning, match="positive mean"):
            layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.isfinite(layer(x)).all()

    def test_evaluation_before_any_batch_warns_once(self):
        layer = made("Conv2d same", "equinorm").eval()
        with pytest.warns(fw.FilterwiseWarning, match="no training batch"):
            layer(torch.rand(1, 8, 9, 9))

    def test_paper_geometry_is_kept_for_evaluation(self):
        layer = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        install(layer, fw.EquilibriumNormalization(geometry="paper"), "weight", "equinorm")
        x = torch.rand(2, 8, 7, 7)
        layer(x)
        # Output size 4, stride 2, input size 7, on two axes (specification, 4.1).
        assert float(layer.geometry_factor) == pytest.approx((4 * 2 / 7) ** 2)
        layer.eval()
        weight = effective_weight(layer)
        positive = (weight * layer.input_mean.view(1, -1, 1, 1)).clamp_min(0).sum((1, 2, 3))
        torch.testing.assert_close(positive, torch.full_like(positive, 64 / 49))

    def test_first_fraction_of_the_batch(self):
        layer = nn.Conv2d(8, 6, 3)
        install(layer, fw.EquilibriumNormalization(fraction=0.25), "weight", "equinorm")
        x = torch.rand(7, 8, 9, 9)
        layer(x)
        torch.testing.assert_close(layer.input_mean, x[:2].mean((0, 2, 3)))
