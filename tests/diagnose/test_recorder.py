"""The recorder: it changes nothing, sees whole steps, and refuses what it could not see rightly."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn

import filterwise as fw

pytestmark = pytest.mark.filterwarnings("ignore::filterwise.FilterwiseWarning")

EVERYTHING = ["weights", "gradients", "activations"]


def net(recipe=None, dropout=0.3):
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    if recipe:
        fw.convert_(model, recipe)
    return model


def batches(steps=4, parts=3):
    generator = torch.Generator().manual_seed(8)
    return [
        [
            (
                torch.randn(4, 3, 6, 6, generator=generator),
                torch.randint(10, (4,), generator=generator),
            )
            for _ in range(parts)
        ]
        for _ in range(steps)
    ]


def train(model, *, deferred=False, autocast=False, optimizer=None, steps=4):
    torch.manual_seed(9)
    optimizer = optimizer or torch.optim.SGD(
        fw.param_groups(model, 1e-3), lr=0.1, momentum=0.9, nesterov=True
    )
    for step in batches(steps):
        for place, (x, labels) in enumerate(step):
            with (
                fw.defer(model, enabled=deferred and place < len(step) - 1),
                torch.autocast("cpu", enabled=autocast),
            ):
                nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("recipe", [None, "gn+ws", "wa", "pws", "equinorm", "bn+wn"])
def test_a_recorded_run_is_the_same_to_the_bit(recipe, deferred, autocast):
    alone = train(net(recipe), deferred=deferred, autocast=autocast)
    state = torch.get_rng_state()
    watched = net(recipe)
    names = [one.name for one in fw.diagnose.signals()]
    with fw.diagnose.record(watched, signals=names, every=2) as trace:
        train(watched, deferred=deferred, autocast=autocast)
    assert_same_bits(everything(alone), everything(watched))
    assert torch.equal(state, torch.get_rng_state())
    assert trace.steps() == [0, 2]
    assert {record["signal"] for record in trace.records()} >= set(names) - {"gain"}


def test_deferred_and_accumulated_steps_record_the_same():
    traces = []
    for deferred in (False, True):
        model = net("wa", dropout=0.0).double()
        step = [(x.double(), labels) for x, labels in batches(1)[0]]
        with fw.diagnose.record(model, signals=EVERYTHING) as trace:
            for place, (x, labels) in enumerate(step):
                with fw.defer(model, enabled=deferred and place < len(step) - 1):
                    nn.functional.cross_entropy(model(x), labels).backward()
        traces.append(trace.records())
    assert len(traces[0]) == len(traces[1]) > 40
    for one, other in zip(*traces, strict=True):
        assert (one["layer"], one["signal"]) == (other["layer"], other["signal"])
        assert one["value"] == pytest.approx(other["value"], rel=1e-7, abs=1e-12, nan_ok=True)


def test_weights_are_those_before_the_step_and_turns_those_of_the_step():
    model = net("wa", dropout=0.0).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = {}
    with fw.diagnose.record(model, signals=["weight_norm", "weight_turn"]) as trace:
        for step in range(2):
            model(torch.randn(4, 3, 6, 6).double()).square().sum().backward()
            rows[step] = model[3].weight.detach().flatten(1).clone()
            optimizer.step()
            optimizer.zero_grad()
    rows[2] = model[3].weight.detach().flatten(1)
    for step in range(2):
        (norms,) = trace.records("weight_norm", "3", step)
        assert norms["value"] == pytest.approx(rows[step].norm(dim=1).tolist(), rel=1e-12)
        (turns,) = trace.records("weight_turn", "3", step)
        before, after = (rows[at] - rows[at].mean(1, keepdim=True) for at in (step, step + 1))
        cosine = nn.functional.cosine_similarity(before, after)
        assert turns["value"] == pytest.approx(cosine.acos().tolist(), rel=1e-6)
        assert min(turns["value"]) > 1e-4


def test_the_rate_is_that_of_the_layers_parameter_group():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}], lr=0.1
    )
    with fw.diagnose.record(model, signals="effective_learning_rate") as trace:
        norms = {place: model[place].weight.detach().flatten(1).norm(dim=1) for place in (0, 3)}
        model(torch.randn(2, 3, 6, 6)).sum().backward()
        optimizer.step()
    for place, lr in ((0, 0.1), (3, 0.5)):
        (got,) = trace.records(layer=str(place))
        expected = (lr / norms[place].double() ** 2).tolist()
        assert got["value"] == pytest.approx(expected, rel=1e-5)
    assert not trace.records(layer="9")  # in no group


def test_chosen_layers_signals_and_steps():
    model = net("gn+ws")
    with fw.diagnose.record(
        model, signals=["weight_norm", "gradients"], layers="[03]", every=3
    ) as t:
        train(model)
    assert {record["layer"] for record in t.records()} == {"0", "3"}
    assert t.steps() == [0, 3]
    assert {r["step"] for r in t.records("weight_norm")} == {0, 3}
    assert t.latest() == t.records(step=3)
    with fw.diagnose.record(model, signals="weight_norm", layers=lambda name, _: name == "9") as t:
        pass
    assert [record["layer"] for record in t.records()] == ["9"]


def test_nothing_is_left_behind():
    model = net("gn+ws")
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    train(model)  # filterwise's own guard is there from now on
    with fw.diagnose.record(model, signals=EVERYTHING) as trace:
        train(model, deferred=True)
    before = len(hooks)
    with (
        pytest.raises(RuntimeError, match="channels"),
        fw.diagnose.record(model, signals=EVERYTHING) as trace,
    ):
        model(torch.randn(2, 1, 6, 6))
    assert len(hooks) == before
    assert not trace.records()
    for module in model.modules():
        assert not module._forward_hooks
        state = module.__dict__.get("_filterwise")
        assert state is None or state.watcher is None


def test_copies_and_pickles_made_meanwhile_are_not_watched():
    model = net("gn+ws")
    x = torch.randn(2, 3, 6, 6)
    with fw.diagnose.record(model, signals=EVERYTHING) as trace:
        model(x).sum().backward()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(1000 * x).sum().backward()
    largest = max(abs(record["value"]) for record in trace.records("input_mean", "0"))
    assert largest < 10


def test_a_recorder_holds_no_model():
    model = net("gn+ws")
    with fw.diagnose.record(model) as trace:
        train(model)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
    assert trace.records()


def test_gradients_of_an_unfinished_window_are_refused_with_the_reason():
    model = net("wa", dropout=0.0)
    x = torch.randn(4, 3, 6, 6)
    with fw.diagnose.record(model, signals=EVERYTHING) as trace:
        with fw.defer(model):
            model(x).sum().backward()
        with pytest.raises(fw.DeferralError, match=r"0 holds the gathered gradient of 1 deferred"):
            trace.step()
        with (
            pytest.raises(fw.DeferralError, match="recording began"),
            fw.diagnose.record(model),
        ):
            pass
    assert not {record["signal"] for record in trace.records()} & {
        "gradient_norm",
        "lipschitz_mean",
    }
    assert trace.records("weight_norm")
    assert "gradient of the effective weight" in trace.notes[0]
    with fw.defer(model, enabled=False):
        model(x).sum().backward()


def test_weights_can_be_recorded_inside_a_window():
    model = net("wa")
    with fw.defer(model):
        model(torch.randn(4, 3, 6, 6)).sum().backward()
    with fw.diagnose.record(model, signals="weights") as trace:
        pass
    assert trace.records("weight_norm")


def test_a_closure_computes_the_gradients_inside_the_step():
    model = net(dropout=0.0)
    x = torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    expected = {}
    closure()
    for place in (0, 3):
        expected[str(place)] = float(model[place].weight.grad.norm())
    optimizer.zero_grad()
    with fw.diagnose.record(model, signals=["gradient_norm", "weight_turn"]) as trace:
        optimizer.step(closure)
    for layer, norm in expected.items():
        (got,) = trace.records("gradient_norm", layer)
        assert got["value"] == pytest.approx(norm, rel=1e-5)
        (turn,) = trace.records("weight_turn", layer)
        assert max(turn["value"]) > 0
    assert trace.steps() == [0]


def test_a_step_that_a_scaler_leaves_out_is_no_step():
    model = net("wa", dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(4, 3, 6, 6)
    with fw.diagnose.record(model, signals=["gradients"]) as trace:
        for factor in (float("inf"), 1.0):
            scaler.scale(factor * model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert trace.steps() == [0]
    again = net("wa", dropout=0.0)
    with fw.diagnose.record(again, signals=["gradients"]) as other:
        again(x).sum().backward()
    for name in ("gradient_norm", "lipschitz_kept"):  # unscaled
        (one,), (two,) = trace.records(name, "3"), other.records(name, "3")
        assert one["value"] == pytest.approx(two["value"], rel=1e-3)


def test_an_optimizer_of_another_model_is_no_step():
    model, other = net(), net()
    with fw.diagnose.record(model, signals=EVERYTHING) as trace:
        train(other, steps=2)
        train(model, steps=1)
        train(other, steps=2)
    assert trace.steps() == [0]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: torch.compile(net()), "compiled"),
        (lambda: nn.Sequential(nn.DataParallel(nn.Linear(2, 2))), "DataParallel"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "no values yet"),
        (lambda: nn.Linear(3, 3, device="meta"), "no values yet"),
        (lambda: nn.ReLU(), "no convolution, linear or converted layer"),
    ],
)
def test_what_cannot_be_watched_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        fw.diagnose.record(make())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"signals": "weight_nrom"}, r"'weight_nrom'.*Nearest: weight_norm"),
        ({"every": 0}, "every must be"),
        ({"every": 1.5}, "every must be"),
        ({"layers": "layer*"}, r"matches none of the 3 weight layers"),
        ({"layers": lambda *_: False}, "none of the model's weight layers"),
    ],
)
def test_typos_are_told(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        fw.diagnose.record(net(), **options)


def test_a_trace_that_has_ended_says_so():
    with fw.diagnose.record(net()) as trace:
        pass
    with pytest.raises(RuntimeError, match="has ended"):
        trace.step()
