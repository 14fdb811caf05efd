"""Ways to run: half precision, memory formats, averages, checkpointing, torch.func, compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint_sequential

import filterwise as fw
from support.compare import assert_close, assert_same, relative_error
from support.shipped import RECIPES, batch, moved, network, optimizer_of, train

loss = nn.functional.cross_entropy

# How far four steps may end from those in float32, relative to their length. Steps on bfloat16
# weights are rounded to 1/256 of the weight, the networks without a method included (0.5).
WAYS = {
    "autocast to bfloat16": (torch.float32, torch.bfloat16, 0.3),
    "autocast to float16, scaled loss": (torch.float32, torch.float16, 0.1),
    ".half()": (torch.float16, None, 0.15),
    ".bfloat16()": (torch.bfloat16, None, 0.8),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_in_half_precision_goes_the_same_way(recipe, way):
    dtype, cast, allowed = WAYS[way]
    expected = moved(train(network(recipe)), network(recipe))
    model = network(recipe, dtype)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=cast == torch.float16)
    for step in range(4):
        x, target = batch(step, dtype)
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            value = loss(model(x).float(), target)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative_error(moved(model, network(recipe, dtype)), expected) < allowed


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_with_an_overflow_is_skipped_whole(recipe):
    model = network(recipe)
    before = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    x, target = batch(0)
    with torch.autocast("cpu", torch.float16):
        value = loss(model(x).float(), target)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**120
    for found, expected in zip(model.parameters(), before.parameters(), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_channels_last_is_kept_and_the_same(recipe):
    expected = network(recipe).double()
    model = network(recipe).double().to(memory_format=torch.channels_last)
    optimizers = optimizer_of(expected), optimizer_of(model)
    for step in range(3):
        x, target = batch(step, torch.float64)
        for net, optimizer in zip((expected, model), optimizers, strict=True):
            given = x if net is expected else x.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            out = net[:4](given)
            assert net is expected or out.is_contiguous(memory_format=torch.channels_last)
            loss(net[4:](out), target).backward()
            optimizer.step()
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(found, wanted, absolute=1e-10)


@pytest.mark.parametrize("recipe", RECIPES)
def test_averages_of_raw_weights_are_models_of_their_own(recipe):
    """EMA and SWA average raw weights; the average has their effective weights, and folds."""
    model = train(network(recipe), 1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    swa = AveragedModel(model)
    optimizer = optimizer_of(model)
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    mean, exponential, seen = 0.0, None, []
    for step in range(4):
        x, target = batch(step)
        for average in (ema, swa):
            average.eval()(x)  # kept weights of the average must not stay
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
        schedule.step()
        for average in (ema, swa):
            average.update_parameters(model)
        raw = model[3].weight.detach().clone()
        seen.append(raw)
        exponential = raw if exponential is None else 0.5 * exponential + 0.5 * raw
    mean = sum(seen) / len(seen)
    assert_close(swa.module[3].weight, mean, absolute=1e-6)
    assert_close(ema.module[3].weight, exponential, absolute=1e-6)
    update_bn([batch(step)[0] for step in range(4)], swa)
    x = batch(9)[0]
    for average in (ema, swa):
        average.eval()
        effective = copy.deepcopy(model).eval()
        effective.load_state_dict(average.module.state_dict())
        assert_close(average(x), effective(x), absolute=1e-5)
        assert relative_error(average(x), model.eval()(x)) > 1e-4
        assert relative_error(fw.fold(average.module)(x), average(x)) < 1e-5


@pytest.mark.parametrize("recipe", ["gn+ws", "bn+wa", "equinorm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_give_the_same_gradients(recipe, reentrant):
    model, plain = network(recipe).double(), network(recipe).double()
    x, target = batch(0, torch.float64)
    loss(plain(x), target).backward()
    found = checkpoint_sequential(model, 3, x.clone().requires_grad_(), use_reentrant=reentrant)
    loss(found, target).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, absolute=1e-12)


@pytest.mark.parametrize("recipe", ["gn+ws", "pws", "sws", "keep+wn"])
def test_gradients_of_each_sample(recipe):
    model = train(network(recipe)).double().eval()
    x, target = batch(5, torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def of_one(values, sample, label):
        out = functional_call(model, (values, buffers), (sample[None],))
        return loss(out, label[None])

    each = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, x, target)
    for index in range(len(x)):
        model.zero_grad()
        loss(model(x[index : index + 1]), target[index : index + 1]).backward()
        for name, parameter in model.named_parameters():
            assert_close(each[name][index], parameter.grad, absolute=1e-12, what=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_built_without_memory_then_filled(recipe):
    """On the meta device: convert, `to_empty`, load; nothing of the empty tensors is left."""
    source = train(network(recipe))
    with torch.device("meta"):
        model = network(recipe)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.load_state_dict(source.state_dict())
    x = batch(3)[0]
    assert_same(model.eval()(x), source.eval()(x))
    train(model.train(), 1)


@pytest.mark.parametrize("first", ["convert", "synchronize"])
def test_synchronized_norms_stand_beside_converted_layers(first):
    """In one process SyncBatchNorm is BatchNorm; with two it is tested where there are two GPUs."""
    expected = train(network("bn+wa"))
    if first == "convert":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network("bn+wa"))
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network(None))
        fw.convert_(model, "bn+wa")
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 2
    assert list(fw.describe(model)) == ["0", "3"]
    train(model)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(found, wanted, absolute=1e-6, what=name)
    x = batch(9)[0]
    plain = fw.fold(model.eval(), bn=True)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in plain.modules())
    assert relative_error(plain(x), expected.eval()(x)) < 1e-5


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def test_a_residual_network_is_one_graph_over_steps():
    """Law 31 does it for every method; here with norms, branches and a downsampling layer."""
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(1)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.layer1 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 5)
    fw.convert_(model, "bn+wa")
    torch.compiler.reset()
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = optimizer_of(model)
    for step in range(3):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    assert counter.graphs == 1
    compiled.eval()
    for _ in range(2):
        found = compiled(x)
    assert counter.graphs == 2  # BatchNorm computes something else in evaluation
    assert relative_error(found, copy.deepcopy(model).eval()(x)) < 1e-5
    torch.compiler.reset()
