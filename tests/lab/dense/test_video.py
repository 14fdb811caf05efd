"""The temporal shift against its definition, folders of frames, runs on clips."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from filterwise.lab.data.clips import Clip, frames_of, load_clips
from filterwise.lab.dense.tsm import TemporalShift, clip_network
from filterwise.lab.errors import UsageError
from filterwise.lab.tasks.video import Video
from filterwise.lab.training.place import make_fabric
from filterwise.lab.training.seeds import seed_everything
from filterwise.lab.training.settings import checked_training
from filterwise.lab.training.stepper import Stepper
from filterwise.lab.training.train import train
from filterwise.methods.registry import METHODS
from support.scenes import picture, samples


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "classes.txt").write_text("up\ndown\n")
    for part, count in (("train", 3), ("val", 2)):
        lines = []
        for number in range(count):
            for frame in range(6):
                where = folder / f"{part}{number}" / f"{frame:05d}.png"
                picture(where, 48, 36, seed=10 * number + frame)
            # As TSN's lists have it, and without the number of frames.
            lines.append(f"{part}{number} 6 {number % 2}" if number else f"{part}{number} 0")
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_the_shift_is_its_definition():
    values = torch.randn(2 * 5, 16, 3, 2)
    found = TemporalShift(5)(values)
    for clip in range(2):
        for frame in range(5):
            for channel in range(16):
                source = frame + 1 if channel < 2 else frame - 1 if channel < 4 else frame
                wanted = torch.zeros(3, 2)
                if 0 <= source < 5:
                    wanted = values[5 * clip + source, channel]
                assert torch.equal(found[5 * clip + frame, channel], wanted)


def test_the_shift_is_in_the_branch_and_weights_keep_their_names():
    from filterwise.lab.dense.backbones import residual_network

    network = clip_network("resnet14", 4, 3)
    names = [name for name in residual_network("resnet14").state_dict() if "fc" not in name]
    assert [name for name in network.body.state_dict() if "fc" not in name] == names
    seen = {}
    block = network.body.layer2[0]
    block.register_forward_pre_hook(lambda _m, inputs: seen.update(block=inputs[0]))
    for name in ("conv1", "downsample"):
        layer = getattr(block, name)
        layer.register_forward_hook(
            lambda _m, inputs, _o, name=name: seen.update({name: inputs[0]})
        )
    copied = copy.deepcopy(network).eval()
    network.eval()(torch.randn(2, 3, 3, 32, 32))
    assert torch.equal(seen["conv1"], TemporalShift(3)(seen["block"]))
    assert torch.equal(seen["downsample"], seen["block"])
    clip = torch.randn(1, 3, 3, 32, 32)
    assert torch.equal(copied(clip), network(clip))
    assert not torch.equal(network(clip), network(clip.flip(1)))


def test_frames_are_one_of_each_part(clips):
    data = load_clips(clips, 3, skip_bad=False)
    assert [len(data.train), len(data.test)] == [3, 2]
    assert [clip.label for clip in data.train] == [0, 1, 0]
    clip = data.train[1]
    middle = frames_of(clip, 3, training=False)
    alone = [frames_of(Clip((path,), 0), 1, training=False)[0] for path in clip.frames]
    assert all(torch.equal(middle[k], alone[2 * k + 1]) for k in range(3))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        drawn = frames_of(clip, 3, training=True)
        places = [next(n for n in range(6) if torch.equal(frame, alone[n])) for frame in drawn]
        assert [place // 2 for place in places] == [0, 1, 2]
        seen.add(tuple(places))
    assert len(seen) > 2


def test_faults_are_listed_with_the_line(clips, tmp_path):
    import shutil

    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    with (folder / "train.txt").open("a") as file:
        file.write("nowhere 0\ntrain0 9\ntrain0 x\n")
    (folder / "train1" / "00003.png").write_bytes(b"no picture")
    for frame in range(4):
        (folder / "train2" / f"{frame:05d}.png").unlink()
    with pytest.raises(UsageError, match="5 faulty entries") as caught:
        load_clips(folder, 3, skip_bad=False)
    words = str(caught.value)
    assert "train.txt, line 4: missing clip" in words
    assert "train.txt, line 5: unknown class (9; there are 2)" in words
    assert "train.txt, line 3: clip that is too short" in words
    assert "has 2 frames, 3 are asked for" in words
    assert "train.txt, line 2: clip with a broken frame" in words
    data = load_clips(folder, 3, skip_bad=True)
    assert len(data.train) == 1
    assert sum(data.left_out.values()) == 5


def settings(folder, **changes):
    values = {
        "task": "video",
        "data": {"name": str(folder), "size": 32},
        "model": {"name": "tsm-resnet10", "recipe": "gn(groups=16)+ws"},
        "optimization": {"learning_rate": 0.01, "step_size": 3, "micro_batch": 2},
        "options": {"frames": 3, "dropout": 0.0},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return checked_training(values)


@pytest.mark.filterwarnings("ignore:the EquiNorm layer:filterwise.FilterwiseWarning")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "ews"])
def test_a_ragged_step_has_the_gradient_of_the_whole(clips, method):
    wanted = settings(clips, model={"recipe": f"gn(groups=16)+{method}"}, precision="64-true")
    seed_everything(0, "model")
    task = Video(wanted, make_fabric(precision="64-true"))
    (step,) = task.epoch(0, 0)
    assert [len(part) for part in step.parts] == [2, 1]
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    stepper = Stepper(make_fabric(precision="64-true"), task.model, optimizer, task.loss)
    found = stepper.step(step.parts, 3)
    assert math.isfinite(found)
    gradients = [each.grad.clone() for each in task.model.parameters()]
    if method == "equinorm":
        return
    task.model.zero_grad()
    shown, labels = task._inputs([sample for part in step.parts for sample in part])
    loss = nn.functional.cross_entropy(task.model(shown), labels)
    loss.backward()
    assert found == pytest.approx(float(loss.detach()), rel=1e-10)
    for value, parameter in zip(gradients, task.model.parameters(), strict=True):
        torch.testing.assert_close(value, parameter.grad, rtol=1e-7, atol=1e-10)


def test_a_run_on_clips(clips, tmp_path):
    record = train(settings(clips), tmp_path)
    assert record.status == "finished"
    assert record.facts["clips"] == {"train": 3, "test": 2}
    assert record.metrics["error"] in (0.0, 0.5, 1.0)


def test_the_real_sample_is_read():
    data = load_clips(samples("ucf101_one_class"), 8, skip_bad=False)
    assert [len(data.train), len(data.test)] == [10, 6]
    assert {len(clip.frames) for clip in data.train + data.test} == {25}
    assert data.classes[data.train[0].label] == "ApplyEyeMakeup"
