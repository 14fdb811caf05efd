"""The monitor: it changes nothing, sees each kind of trouble, and says it once."""

from __future__ import annotations

import copy
import math
import random
import warnings

import pytest
import torch
from torch import nn

import filterwise as fw
from filterwise.monitoring import watch as watching
from filterwise.monitoring.watch import EARLY


def make(recipe=None, width=8, norm=False):
    torch.manual_seed(0)
    layers = []
    for channels in (4, width, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    for module in net:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    if recipe is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            fw.convert_(net, recipe)
    return net


def sgd(net, lr=0.05, decay=5e-4, momentum=0.9):
    return torch.optim.SGD(fw.param_groups(net, decay), lr=lr, momentum=momentum)


def batches(count, size=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        y = torch.randint(3, (size,), generator=generator)
        x = torch.randn(size, 4, 6, 6, generator=generator)
        x[torch.arange(size), y] += 1.0
        yield x, y


def train(net, optimizer, steps, watch=None, micro=4, autocast=False, scaler=None):
    found = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        parts = list(zip(x.split(micro), y.split(micro), strict=True))
        for i, (a, b) in enumerate(parts):
            with (
                fw.defer(net, enabled=i < len(parts) - 1),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                loss = nn.functional.cross_entropy(net(a), b, reduction="sum") / len(y)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if watch is not None:
            found.append(watch.step())
    return found


def layers_of(findings, start):
    return [one.layer for one in findings if start in one.what]


@pytest.mark.filterwarnings("ignore:3 converted layers take no part")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recipe", [None, "wa", "gn(4)+ws", "equinorm"])
@pytest.mark.parametrize("kind", ["sgd", "fused"])
def test_training_is_the_same_to_the_bit(recipe, autocast, kind):
    trained = []
    for watched in (False, True):
        net = make(recipe, norm=True)
        options = {"fused": True} if kind == "fused" else {}
        optimizer = torch.optim.SGD(fw.param_groups(net, 1e-2), lr=0.05, momentum=0.9, **options)
        watch = fw.monitor(net, optimizer, every=1, speak=False) if watched else None
        train(net, optimizer, 25, watch, autocast=autocast)
        momenta = [optimizer.state[p].get("momentum_buffer") for p in net.parameters()]
        trained.append((net.state_dict(), momenta, torch.get_rng_state(), random.getstate()))
    (one, momenta, *states), (other, others, *after) = trained
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert all(torch.equal(a, b) for a, b in zip(momenta, others, strict=True))
    assert torch.equal(states[0], after[0])
    assert states[1] == after[1]


def test_a_loss_scaler_changes_nothing_and_a_skipped_step_is_none():
    net = make("wa")
    optimizer = sgd(net)
    watch = fw.monitor(net, optimizer, every=1, speak=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    found = train(net, optimizer, 6, watch, scaler=scaler)
    assert found == [[]] * 6  # the scale overflows, is halved, and no step is taken with infinity


@pytest.mark.parametrize("recipe", [None, "wa", "pws", "gn(4)+ws", "gn(4)"])
def test_sound_training_raises_nothing(recipe):
    net = make(recipe, norm=recipe is not None and recipe.startswith("gn"))
    optimizer = sgd(net)
    watch = fw.monitor(net, optimizer, every=1)
    assert train(net, optimizer, 60, watch) == [[]] * 60
    assert watch.findings == []


def test_what_check_finds_is_said_first():
    net = make("bn+ws", norm=True)
    with pytest.warns(fw.TrainingWarning, match="3 BatchNorms see 2 samples a forward"):
        watch = fw.monitor(net, sgd(net), batch_size=2)
    assert [one.level for one in watch.findings] == ["warning"]


def test_what_check_finds_of_many_layers_is_said_at_the_first():
    net = make("ws")
    (finding,) = fw.monitor(net, sgd(net), speak=False).findings
    assert (finding.level, finding.layer) == ("error", "0")
    assert finding.what.endswith("(3 such layers)")


@pytest.mark.parametrize(("recipe", "norm", "limit"), [("wa", False, 10), ("gn(4)+ws", True, 30)])
def test_a_rate_that_turns_filters_too_far_is_said_once(recipe, norm, limit):
    net = make(recipe, norm=norm)
    optimizer = sgd(net, lr=30.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fw.TrainingWarning)
        watch = fw.monitor(net, optimizer, every=1)
    before = len(watch.findings)
    with pytest.warns(fw.TrainingWarning, match="turned its filters by") as seen:
        found = train(net, optimizer, 3, watch)
    assert len(layers_of(watch.findings, "turned its filters by")) == 1
    assert f"over the limit of {limit}" in found[0][0].what
    assert sum("turned its filters" in str(one.message) for one in seen) == 1
    assert watch.findings[before:] == [one for step in found for one in step]


def test_what_a_first_step_would_turn_is_not_said_twice():
    net = make("wa")
    optimizer = sgd(net, lr=30.0)
    watch = fw.monitor(net, optimizer, every=1, loader=list(batches(2)), speak=False)
    assert len(layers_of(watch.findings, "a first step")) == 1
    train(net, optimizer, 2, watch)
    assert not layers_of(watch.findings, "turned its filters by")


def test_the_angle_is_set():
    net = make("wa")
    optimizer = sgd(net)
    watch = fw.monitor(net, optimizer, every=1, turn=0.01, speak=False)
    (first,) = train(net, optimizer, 1, watch)
    assert "over the limit of 0.01" in first[0].what


def test_shift_of_the_average_gradient():
    # Every weight of a filter moves alike, and every filter in its own direction.
    net = make()
    optimizer = sgd(net)
    watch = fw.monitor(net, optimizer, every=1, turn=180, speak=False)
    with torch.no_grad():
        step = torch.linspace(-1, 1, 8)[:, None, None, None] * 2.5 / 36
        net[0].weight += step
        net[2].weight += step / 10
    (finding,) = watch.step()
    # 36 weights each move by 2.5/36 times -1 .. 1: Var of 2.5 linspace(-1, 1, 8) is 2.68.
    assert finding.layer == "0"
    assert "is 2.68 in step 1" in finding.what
    centred = make("wa")
    watch = fw.monitor(centred, sgd(centred), every=1, turn=180, speak=False)
    with torch.no_grad():
        centred[0].weight += step
    assert watch.step() == []


def decayed(recipe, optimizer_of, steps, factor, **options):
    """Shrink all weights by a factor a step, beside a noise of a size that goes as 1/|W|."""
    net = make(recipe)
    watch = fw.monitor(net, optimizer_of(net), every=1, speak=False, **options)
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(steps):
        with torch.no_grad():
            for module in net:
                if isinstance(module, nn.Conv2d):
                    # The step goes as 1/|W|, as it does for a scale-invariant filter.
                    noise = torch.randn(module.weight.shape, generator=generator)
                    scale = 1e-6 / module.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
                    module.weight.mul_(factor).add_(noise * scale)
        found += watch.step()
    return found


def test_collapse_of_the_variance_is_foreseen():
    """The step that is named is the one at which half the limit is then passed, to 15 %."""

    def strong(net):
        return sgd(net, lr=0.3, decay=0.2)

    found = decayed("pws(gamma=none)", strong, 150, 0.95)
    half = decayed("pws(gamma=none)", strong, 150, 0.95, turn=5)
    collapse = next(one for one in found if "weight decay shrinks Var[W]" in one.what)
    turned = next(one for one in half if "turned its filters" in one.what)
    named = int(collapse.what.rsplit(" ", 1)[1])
    said = int(collapse.what.split("at step ")[1].split(",")[0])
    passed = int(turned.what.split()[1])
    assert said <= 15
    assert named == pytest.approx(passed, rel=0.15)
    assert "balances at" in collapse.why


def test_decay_that_balances_below_the_limit_is_none():
    found = decayed("pws(gamma=none)", lambda net: sgd(net, lr=0.05, decay=5e-3), 60, 0.995)
    assert not layers_of(found, "weight decay shrinks")
    assert not layers_of(
        decayed("pws(gamma=none)", lambda net: sgd(net, decay=0.0), 60, 0.995), "weight decay"
    )


def test_an_optimizer_without_a_law_goes_by_the_trend():
    def rmsprop(net):
        return torch.optim.RMSprop(net.parameters(), lr=0.01, weight_decay=0.1)

    assert layers_of(decayed("pws(gamma=none)", rmsprop, 60, 0.99), "weight decay shrinks")


def test_gamma_and_eps_beside_a_variance_that_fell():
    for recipe, words in (
        ("pws(gamma=1e-3)", "gamma = 0.001"),
        ("gn(4)+ws(eps=1e-2)", "eps = 0.01"),
    ):
        found = decayed(recipe, lambda net: sgd(net, decay=0.0), 100, 0.94, turn=180)
        (finding,) = [one for one in found if "dwarfs" in one.what]
        assert words in finding.what


def test_gamma_that_no_longer_bounds_the_step():
    found = decayed("pws(gamma=1e-6)", lambda net: sgd(net, lr=0.1), 100, 0.96, turn=180)
    (finding,) = [one for one in found if "no longer bounds the step" in one.what]
    net = make("pws(gamma=1e-6)")
    variance = float(finding.what.split("Var[W] at ")[1].split()[0])
    times = float(finding.what.split("effective weight is ")[1].split()[0])
    fan_in = net.get_submodule(finding.layer).weight[0].numel()
    assert times == pytest.approx(0.1 * 2 / fan_in / (variance + 1e-6), rel=2e-2)
    assert times >= 3.5


@pytest.mark.parametrize(("recipe", "heard"), [(None, True), ("wn", True), ("wa", False)])
def test_filters_of_one_sign(recipe, heard):
    net = make(recipe)
    watch = fw.monitor(net, sgd(net), every=1, turn=180, speak=False)
    with torch.no_grad():
        net[2].weight[3] = -net[2].weight[3].abs() - 1e-3
    found = watch.step()
    assert layers_of(found, "have weights of one sign") == (["2"] if heard else [])


def test_one_sign_under_the_single_pass():
    net = make("equinorm(single_pass=true)")
    watch = fw.monitor(net, sgd(net), every=1, turn=180, speak=False)
    with torch.no_grad():
        net[2].weight[3].abs_().add_(1e-3)
    (finding,) = [one for one in watch.step() if "of one sign" in one.what]
    assert finding.fix == "equinorm(single_pass=false)"


def test_damage_is_an_error():
    net = make("wa")
    watch = fw.monitor(net, sgd(net), every=1, speak=False)
    with torch.no_grad():
        net[2].weight[3, 0, 0, 0] = math.nan
    (finding,) = watch.step()
    assert (finding.level, finding.layer) == ("error", "2")
    assert watch.step() == []


def test_looks_are_as_rare_as_they_are_set(monkeypatch):
    looked = []
    net = make("wa")
    watch = fw.monitor(net, sgd(net), every=7)
    monkeypatch.setattr(
        watching,
        "figures_of",
        lambda *a, f=watching.figures_of: looked.append(watch._step) or f(*a),
    )
    for _ in range(45):
        watch.step()
    assert looked == [*range(1, EARLY + 1), 21, 28, 35, 42]
    assert watch._before is None


def test_a_checkpoint_does_not_repeat_what_was_said():
    net = make("wa")
    optimizer = sgd(net, lr=30.0)
    first = fw.monitor(net, optimizer, every=1, speak=False)
    train(net, optimizer, 2, first)
    state = copy.deepcopy(first.state_dict())
    assert state["step"] == 2
    again = fw.monitor(net, optimizer, every=1, speak=False)
    again.load_state_dict(state)
    found = train(net, optimizer, 1, again)
    assert not layers_of(found[0], "turned its filters")
    assert again.state_dict()["step"] == 3


def test_refusals():
    net = make("wa")
    with pytest.raises(ValueError, match="every must be"):
        fw.monitor(net, sgd(net), every=0)
    with pytest.raises(ValueError, match="turn must be an angle"):
        fw.monitor(net, sgd(net), turn=200)
    with pytest.raises(ValueError, match="holds no weight that can be watched"):
        fw.monitor(net, sgd(make("wa")))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fw.monitor("net", sgd(net))


def test_several_optimizers_and_a_wrapper():
    net = make("wa")
    both = [sgd(net[:4]), sgd(net[4:])]
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        watch = fw.monitor(wrapped, both, every=1)
        assert [one.layer.name for one in watch._layers] == ["0", "2", "4"]
