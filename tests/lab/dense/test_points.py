"""Clouds of points: readers and their faults, the network, metrics."""

from __future__ import annotations

import math

import h5py
import numpy
import pytest
import torch
from torch import nn

from filterwise.lab.data.clouds import load_clouds
from filterwise.lab.dense.dgcnn import PointNetwork, edge_features, neighbours
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.classes import ClassScores
from filterwise.lab.tasks.points import Points
from filterwise.lab.training.place import make_fabric
from filterwise.lab.training.seeds import seed_everything
from filterwise.lab.training.settings import checked_training
from filterwise.lab.training.stepper import Stepper
from filterwise.lab.training.train import train
from filterwise.methods.registry import METHODS
from support.scenes import samples

CUBE = """OFF
8 12 0
0 0 0
2 0 0
2 2 0
0 2 0
0 0 2
2 0 2
2 2 2
0 2 2
3 0 1 2
3 0 2 3
3 4 6 5
3 4 7 6
3 0 5 1
3 0 4 5
3 1 6 2
3 1 5 6
3 2 7 3
3 2 6 7
3 3 4 0
3 3 7 4
"""


def cloud(seed, points=64):
    return numpy.random.default_rng(seed).normal(size=(points, 3)).astype(numpy.float32)


def pcd(values, kind="binary"):
    head = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        f"WIDTH {len(values)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {len(values)}\nDATA {kind}\n"
    )
    if kind == "binary":
        return head.encode() + values.astype("<f4").tobytes()
    return (
        head.encode() + "\n".join(" ".join(map(repr, map(float, row))) for row in values).encode()
    )


def write_lists(folder):
    """A folder of lists: binary clouds to train on, a text cloud and a mesh to test on."""
    (folder / "shape_names.txt").write_text("ball\ncube\n")
    for number in range(3):
        (folder / f"{number}.pcd").write_bytes(pcd(cloud(number)))
    (folder / "text.pcd").write_bytes(pcd(cloud(9), "ascii"))
    (folder / "cube.off").write_text(CUBE)
    (folder / "train.txt").write_text("0.pcd 0\n1.pcd 1\n2.pcd 0\n")
    (folder / "test.txt").write_text("text.pcd 0\ncube.off 1\n")
    return folder


def write_files(folder):
    (folder / "shape_names.txt").write_text("ball\ncube\n")
    for part in ("train", "test"):
        with h5py.File(folder / f"{part}0.h5", "w") as file:
            file["data"] = numpy.stack([cloud(k) for k in range(3)])
            file["label"] = numpy.array([[0], [1], [0]], numpy.uint8)
        (folder / f"{part}_files.txt").write_text(f"data/modelnet40/{part}0.h5\n")
    return folder


def centred(values):
    values = torch.from_numpy(values)
    values = values - values.mean(0)
    return values / values.norm(dim=1).max()


def test_clouds_of_lists_and_of_hdf5(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "files").mkdir()
    listed = load_clouds(write_lists(tmp_path / "lists"), 32, skip_bad=False)
    filed = load_clouds(write_files(tmp_path / "files"), 32, skip_bad=False)
    for data in (listed, filed):
        assert data.train[1] == [0, 1, 0]
        for number, found in enumerate(data.train[0]):
            torch.testing.assert_close(found, centred(cloud(number)))
    torch.testing.assert_close(listed.test[0][0], centred(cloud(9)))


def test_points_of_a_mesh_lie_on_its_surface(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "train.txt").write_text("cube.off 1\n0.pcd 0\n")
    data = load_clouds(tmp_path, 2048, skip_bad=True)
    (cube,) = data.test[0]
    # In a ball of radius 1, a cube that has been centred has sides of about 2 / sqrt(3).
    span = cube.max(0).values - cube.min(0).values
    on_a_side = ((cube - cube.max(0).values).abs() < 1e-4) | (
        (cube - cube.min(0).values).abs() < 1e-4
    )
    assert cube.shape == (2048, 3)
    assert bool(on_a_side.any(1).all())
    assert float(span.min()) == pytest.approx(2 / math.sqrt(3), abs=0.03)
    assert data.left_out == {"shape of too few points": 2}


def test_faults_are_listed_together(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "0.pcd").write_bytes(pcd(cloud(0))[:300])
    wrong = cloud(1)
    wrong[3, 1] = numpy.nan
    (tmp_path / "1.pcd").write_bytes(pcd(wrong))
    (tmp_path / "few.pcd").write_bytes(pcd(cloud(0, 8)))
    (tmp_path / "empty.off").write_text("OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n")
    with (tmp_path / "train.txt").open("a") as file:
        file.write("nowhere.pcd 0\nfew.pcd 0\nempty.off 0\n2.pcd 7\n")
    with pytest.raises(UsageError, match="6 faulty entries") as caught:
        load_clouds(tmp_path, 32, skip_bad=False)
    words = str(caught.value)
    for sentence in (
        "0.pcd: shape that cannot be read",
        "1.pcd: shape with points that are not finite",
        "train.txt, line 4: missing shape",
        "few.pcd: shape of too few points (8, 32 are asked for)",
        "empty.off: empty shape",
        "2.pcd: unknown class (7; there are 2)",
    ):
        assert sentence in words
    assert len(load_clouds(tmp_path, 32, skip_bad=True).train[0]) == 1


def test_neighbours_and_edges_are_their_definition():
    points = torch.randn(2, 3, 10, dtype=torch.float64)
    found = neighbours(points, 4)
    edges = edge_features(points, 4)
    for which in range(2):
        for place in range(10):
            distance = ((points[which] - points[which, :, place, None]) ** 2).sum(0)
            assert set(found[which, place].tolist()) == set(distance.argsort()[:4].tolist())
            for k, near in enumerate(found[which, place].tolist()):
                own = points[which, :, place]
                wanted = torch.cat([points[which, :, near] - own, own])
                assert torch.equal(edges[which, :, place, k], wanted)


def test_the_number_of_parameters_is_that_of_the_published_net():
    weights = 6 * 64 + 128 * 64 + 128 * 128 + 256 * 256 + 512 * 1024
    weights += 2048 * 512 + 512 * 256 + 256 + 256 * 40 + 40
    norms = 2 * (64 + 64 + 128 + 256 + 1024 + 512 + 256)
    assert weights + norms == 1_809_576
    assert sum(each.numel() for each in PointNetwork(40).parameters()) == weights + norms


def values_of(labels, answers, classes=3):
    scores = ClassScores(classes, torch.device("cpu"))
    logits = nn.functional.one_hot(torch.tensor(answers), classes).float()
    scores.update(logits, torch.tensor(labels))
    return scores.compute()


@pytest.mark.parametrize(
    ("labels", "answers", "wanted"),
    [
        ([0, 1, 2], [0, 1, 2], (1.0, 1.0)),
        ([0, 1, 2], [1, 2, 0], (0.0, 0.0)),
        ([0, 0, 0, 1], [0, 0, 0, 2], (0.5, 0.75)),
        ([0, 0, 1, 1], [0, 1, 1, 1], (0.75, 0.75)),
    ],
)
def test_mean_class_and_overall_accuracy_by_hand(labels, answers, wanted):
    found = values_of(labels, answers)
    assert (found["class_accuracy"], found["overall_accuracy"]) == pytest.approx(wanted)


def test_an_answer_that_is_not_finite_is_wrong():
    scores = ClassScores(3, torch.device("cpu"))
    scores.update(torch.tensor([[math.nan, 0, 0], [0, 1, 0]]), torch.tensor([0, 1]))
    assert scores.compute() == {"class_accuracy": 0.5, "overall_accuracy": 0.5}


def settings(folder, **changes):
    values = {
        "task": "points",
        "data": {"name": str(folder)},
        "model": {"name": "dgcnn", "recipe": "gn(groups=16)+ws"},
        "optimization": {"learning_rate": 0.1, "step_size": 3, "micro_batch": 2},
        "options": {"points": 32, "neighbours": 4, "dropout": 0.0},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return checked_training(values)


@pytest.mark.filterwarnings("ignore:the EquiNorm layer:filterwise.FilterwiseWarning")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "ews"])
def test_a_ragged_step_has_the_gradient_of_the_whole(tmp_path, method):
    recipe = f"gn(groups=16)+{method}"
    # Fan-in 6 is for those methods that take it.
    wanted = settings(write_lists(tmp_path), model={"recipe": recipe}, precision="64-true")
    seed_everything(0, "model")
    task = Points(wanted, make_fabric(precision="64-true"))
    assert task.facts["conversion"].startswith("5 converted")
    (step,) = task.epoch(0, 0)
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
        torch.testing.assert_close(value, parameter.grad, rtol=1e-6, atol=1e-10)


def test_a_run_on_clouds(tmp_path):
    record = train(settings(write_files(tmp_path), model={"recipe": "gn(groups=16)"}))
    assert record.status == "finished"
    assert record.facts["shapes"] == {"train": 3, "test": 3}
    assert 0 <= record.metrics["class_accuracy"] <= 1


def test_the_real_sample_is_read():
    data = load_clouds(samples("modelnet10"), 1024, skip_bad=False)
    assert [len(data.train[0]), len(data.test[0]), len(data.classes)] == [123, 60, 10]
    assert all(float(each.norm(dim=1).max()) == pytest.approx(1) for each in data.train[0])
