"""Data of training runs: sets in their own formats, what is wrong with them, augmentation."""

from __future__ import annotations

import hashlib
import pickle

import numpy
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional

from filterwise.lab.data import augment, load
from filterwise.lab.data.live import LivePictures
from filterwise.lab.data.stream import StreamedPictures, find_tree
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.training.place import make_fabric
from filterwise.lab.training.seeds import generator
from filterwise.lab.training.settings import Augmentation, checked_training
from filterwise.lab.training.train import train
from support.trainings import settings

NUMBERS = numpy.random.default_rng(0)


def arrays(**changes):
    found = {
        "train_images": NUMBERS.integers(0, 256, (12, 8, 8, 3), dtype=numpy.uint8),
        "train_labels": numpy.arange(12) % 3,
        "test_images": NUMBERS.integers(0, 256, (6, 8, 8, 3), dtype=numpy.uint8),
        "test_labels": numpy.arange(6) % 3,
        "class_names": numpy.array(["cat", "dog", "bird"]),
    } | changes
    return {name: value for name, value in found.items() if value is not None}


def write(path, **changes):
    found = arrays(**changes)
    numpy.savez(path, **found)
    return found


def test_an_archive_is_read_by_path_and_in_a_sets_place(tmp_path):
    found = write(tmp_path / "cifar10.npz", origin=numpy.array("recompressed, PSNR 45.4 dB"))
    for data in (load(str(tmp_path / "cifar10.npz")), load("cifar10", root=str(tmp_path))):
        pictures = data.train_pictures.permute(0, 2, 3, 1).numpy()
        numpy.testing.assert_array_equal(pictures, found["train_images"])
        assert data.test_labels.tolist() == found["test_labels"].tolist()
        assert data.classes == ("cat", "dog", "bird")
        assert data.origin == "arrays of cifar10.npz (recompressed, PSNR 45.4 dB)"


def test_an_archive_without_names_counts_its_classes(tmp_path):
    write(tmp_path / "x.npz", class_names=None)
    assert load(str(tmp_path / "x.npz")).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": None}, "has no array train_labels; it has train_images, "),
        ({"test_images": numpy.zeros((6, 8, 8), numpy.uint8)}, "test_images of .* must be uint8"),
        ({"test_images": numpy.zeros((6, 8, 8, 3))}, "and is float64 of shape"),
        ({"test_labels": numpy.zeros(6)}, "test_labels of .* must be whole numbers"),
        ({"train_labels": numpy.arange(11) % 3}, "12 training pictures and 11 labels"),
        ({"test_labels": numpy.array([0, 1, 2, 3, 0, 1])}, "test picture 3 .* has label 3, and"),
        ({"train_labels": numpy.arange(12) % 3 - 1}, "training picture 0 .* has label -1"),
    ],
)
def test_a_wrong_archive_is_named(tmp_path, changes, words):
    write(tmp_path / "x.npz", **changes)
    with pytest.raises(LabError, match=words):
        load(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_a_truncated_archive_is_one_line(tmp_path, keep):
    path = tmp_path / "x.npz"
    write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LabError, match=r"x\.npz cannot be read: .* Make it again") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_a_class_folder_tree_stands_in_for_a_set(tree, tmp_path):
    (tmp_path / "cifar10").symlink_to(tree)
    data = load("cifar10", root=str(tmp_path))
    assert data.name == "cifar10"
    assert data.train_pictures.shape == (40, 3, 32, 32)
    assert "train/ to train on" in data.origin


def write_cifar10(root, monkeypatch):
    """Write batches in the format of the files that torchvision downloads."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    written = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        pictures = NUMBERS.integers(0, 256, (10, 3072), dtype=numpy.uint8)
        content = pickle.dumps({"data": pictures, "labels": list(range(10))})
        (folder / name).write_bytes(content)
        written[name] = pictures.reshape(10, 3, 32, 32), hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    sums = [[name, md5] for name, (_, md5) in written.items()]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    entry = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", entry)
    return {name: pictures for name, (pictures, _) in written.items()}


def test_cifar10_files_are_read_by_their_own_loader(tmp_path, monkeypatch):
    written = write_cifar10(tmp_path, monkeypatch)
    write(tmp_path / "cifar10.npz")
    data = load("cifar10", root=str(tmp_path))
    assert data.origin == "torchvision's CIFAR10, its own halves"
    wanted = numpy.concatenate([written[f"data_batch_{number}"] for number in range(1, 6)])
    numpy.testing.assert_array_equal(data.train_pictures.numpy(), wanted)
    numpy.testing.assert_array_equal(data.test_pictures.numpy(), written["test_batch"])


def test_a_truncated_cifar10_file_is_one_line(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LabError, match=r"cifar10 cannot be read from .* or fetch it with --downl"):
        load("cifar10", root=str(tmp_path))


def write_svhn(root, monkeypatch, label=10):
    from scipy.io import savemat

    written = {}
    for half, count in (("train", 6), ("extra", 5), ("test", 4)):
        pictures = NUMBERS.integers(0, 256, (32, 32, 3, count), dtype=numpy.uint8)
        labels = numpy.arange(1, count + 1)
        labels[0] = label
        savemat(root / f"{half}_32x32.mat", {"X": pictures, "y": labels[:, None]})
        written[half] = pictures, labels
    monkeypatch.setattr(datasets.svhn, "check_integrity", lambda *_: True)
    return written


def test_svhn_with_extra_trains_on_both(tmp_path, monkeypatch):
    written = write_svhn(tmp_path, monkeypatch)
    plain, both = (load(name, root=str(tmp_path)) for name in ("svhn", "svhn+extra"))
    assert (len(plain.train_labels), len(both.train_labels)) == (6, 11)
    wanted = numpy.concatenate([written[half][0] for half in ("train", "extra")], axis=3)
    found = both.train_pictures.permute(2, 3, 1, 0).numpy()
    numpy.testing.assert_array_equal(found, wanted)
    # Label 10 stands for the digit 0.
    assert both.train_labels.tolist() == [0, 2, 3, 4, 5, 6, 0, 2, 3, 4, 5]
    assert len(both.test_labels) == 4


def test_a_truncated_svhn_file_is_one_line(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / "extra_32x32.mat"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(LabError, match=r"svhn\+extra cannot be read from ") as caught:
        load("svhn+extra", root=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def office(tmp_path):
    for level, (domain, count) in enumerate((("amazon", 20), ("dslr", 7), ("webcam", 10))):
        for name in ("back_pack", "bike"):
            inner = ("images",) if domain == "amazon" else ()
            folder = tmp_path.joinpath("office31", domain, *inner, name)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (12, 10), (50 * level, number, 0)).save(folder / f"{number}.png")
    return tmp_path


def test_office_trains_on_one_domain_and_tests_on_three(office):
    data = load("office31/webcam", root=str(office), size=8)
    assert (data.origin_domain, sorted(data.domains)) == ("webcam", ["amazon", "dslr"])
    assert len(data.train_labels) == 17
    assert len(data.test_labels) == 3
    assert {name: len(labels) for name, (_, labels) in data.domains.items()} == {
        "amazon": 6,
        "dslr": 2,
    }
    assert data.domains["amazon"][0][:, 0].max() == 0
    assert (data.train_pictures[:, 0] == 100).all()
    # Held out are other pictures than those trained on, of both classes alike.
    trained = {(int(label), int(p[1, 0, 0])) for p, label in zip(*halves_of(data), strict=True)}
    tested = {
        (int(label), int(p[1, 0, 0]))
        for p, label in zip(data.test_pictures, data.test_labels, strict=True)
    }
    assert not trained & tested
    assert sorted(torch.bincount(data.test_labels).tolist()) == [1, 2]
    again = load("office31/webcam", root=str(office), size=8)
    assert again.sha256 == data.sha256


def halves_of(data):
    return data.train_pictures, data.train_labels


def test_the_usual_domains_hold_out_as_many_as_the_paper():
    from filterwise.lab.data.office import _held_out

    for domain, count, wanted in (("amazon", 2817, 415), ("dslr", 498, 73), ("webcam", 795, 130)):
        labels = torch.arange(count) % 31
        assert int(_held_out(domain, labels, 31).sum()) == wanted


def test_a_missing_domain_and_a_missing_class_are_named(office):
    (office / "office31" / "dslr" / "bike").rename(office / "bike")
    with pytest.raises(UsageError, match="the domain dslr of Office-31 has no class bike"):
        load("office31/webcam", root=str(office))
    (office / "office31" / "dslr").rename(office / "elsewhere")
    with pytest.raises(UsageError, match=r"Office-31 needs .*office31.dslr"):
        load("office31/webcam", root=str(office))
    with pytest.raises(UsageError, match="Nearest: office31/webcam"):
        load("office31/webcan", root=str(office))


def test_each_domain_has_its_own_metrics(office):
    record = train(
        settings(
            data={"name": "office31/webcam", "size": 8, "train_samples": None, "test_samples": 2},
            model={"recipe": "gn"},
            execution={"root": str(office)},
        )
    )
    assert set(record.metrics) == {
        f"{domain}/{name}" for domain in ("amazon", "dslr", "webcam") for name in ("error", "loss")
    }


RULES = Augmentation(padding=3, crop=9, flip=0.5, crop_probability=0.7, erasing=0.6)


def test_crops_and_flips_are_those_of_torchvision_picture_by_picture():
    pictures = torch.randint(0, 256, (40, 3, 10, 8), dtype=torch.uint8)
    rules = RULES.model_copy(update={"crop": 8})
    draws = augment.draw(40, 10, 8, rules, generator(0))
    found = augment.cropped(pictures, draws, rules, torch.tensor([1.0, 2.0, 3.0]))
    for number, picture in enumerate(pictures):
        wanted = functional.pad(picture, [3] * 4, fill=[1.0, 2.0, 3.0])
        wanted = functional.crop(wanted, int(draws.top[number]), int(draws.left[number]), 8, 8)
        if draws.flipped[number]:
            wanted = functional.horizontal_flip(wanted)
        assert torch.equal(found[number], wanted)
    assert 0 < int(draws.flipped.sum()) < 40


def test_every_crop_is_as_likely_as_every_other():
    draws = augment.draw(20_000, 8, 8, Augmentation(padding=2), generator(1))
    counts = torch.bincount(draws.top * 5 + draws.left, minlength=25)
    assert counts.min() > 800 - 6 * 28
    assert counts.max() < 800 + 6 * 28
    some = augment.draw(20_000, 8, 8, Augmentation(padding=2, crop_probability=0.5), generator(1))
    middle = float(((some.top == 2) & (some.left == 2)).double().mean())
    assert middle == pytest.approx(0.5 + 0.5 / 25, abs=0.02)


def test_erased_boxes_follow_torchvisions_rule():
    rules = Augmentation(erasing=0.6)
    draws = augment.draw(5000, 32, 32, rules, generator(2))
    pictures = torch.ones(5000, 1, 32, 32)
    found = augment.erased(pictures, draws)
    for number in range(50):
        top, left, height, width = draws.erased[number].tolist()
        wanted = functional.erase(pictures[number], top, left, height, width, torch.zeros(1))
        assert torch.equal(found[number], wanted)
    area = 1 - found.mean((1, 2, 3))
    assert float((area > 0).double().mean()) == pytest.approx(0.6, abs=0.03)
    # Uniform between 0.02 and 0.33, but for rounding and boxes that do not fit.
    assert float(area[area > 0].mean()) == pytest.approx(0.173, abs=0.01)
    assert float(area.max()) < 0.36


def test_draws_depend_on_seed_epoch_and_step_alone():
    wanted = settings(data={"augmentation": {"padding": 2, "flip": 0.5, "erasing": 0.5}})
    fabric = make_fabric()
    batches = LivePictures(load("digits"), wanted, fabric)

    def stack(number, first=0):
        return [
            torch.cat([part[0] for part in step.parts]) for step in batches.epoch(number, first)
        ]

    whole = stack(3)
    torch.rand(5)
    assert all(torch.equal(one, two) for one, two in zip(whole[2:], stack(3, 2), strict=True))
    assert not torch.equal(whole[0], stack(4)[0])


def test_two_processes_share_one_draw():
    """What two processes see, put together, is what one sees."""

    class Two:
        device, world_size = torch.device("cpu"), 2

        def __init__(self, rank):
            self.global_rank = rank

    wanted = settings(data={"augmentation": {"padding": 2, "flip": 0.5, "erasing": 0.5}})
    data = load("digits")
    one = list(LivePictures(data, wanted, make_fabric()).epoch(0, 0))
    both = [list(LivePictures(data, wanted, Two(rank)).epoch(0, 0)) for rank in (0, 1)]
    for step, *shares in zip(one, *both, strict=True):
        assert [share.samples for share in shares] == [step.samples] * 2
        together = [part for share in shares for part in share.parts]
        for place in (0, 1):
            found = torch.cat([part[place] for part in together])
            assert torch.equal(found, torch.cat([part[place] for part in step.parts]))


def test_scaling_and_middle_crop_when_testing():
    wanted = settings(data={"scaling": "unit", "augmentation": {"crop": 6}, "test_samples": None})
    data = load("digits")
    ((pictures, labels), *_) = LivePictures(data, wanted, make_fabric()).test("")
    assert torch.equal(pictures, data.test_pictures[:512, :, 1:7, 1:7] / 255)
    assert torch.equal(labels, data.test_labels[:512])


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"crop is 11, and pictures of 8 pixels padded by 1"):
        train(settings(data={"augmentation": {"crop": 11, "padding": 1}}))


def stream(tree, **changes):
    values = {
        "data": {"name": str(tree), "reading": "streamed", "size": 12} | changes.pop("data", {}),
        "optimization": {"step_size": 16, "ragged": "keep"},
    }
    wanted = checked_training(values | changes)
    return StreamedPictures(tree, wanted, make_fabric())


def read(steps):
    return [tuple(torch.cat(each) for each in zip(*step.parts, strict=True)) for step in steps]


def test_streamed_pictures_are_the_same_with_workers_and_after_a_resumption(tree):
    data = {"augmentation": {"random_resized": True, "flip": 0.5, "crop": 10, "erasing": 0.3}}
    alone = stream(tree, data=data)
    whole = read(alone.epoch(1, 0))
    assert [tuple(step[0].shape) for step in whole] == [
        (16, 3, 10, 10),
        (16, 3, 10, 10),
        (8, 3, 10, 10),
    ]
    state = torch.get_rng_state()
    again = read(stream(tree, data=data, execution={"workers": 2}).epoch(1, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(whole[1:], again, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert not torch.equal(read(alone.epoch(2, 0))[0][0], whole[0][0])


def test_streamed_test_pictures_are_resized_cropped_and_scaled(tree):
    batches = stream(tree)
    ((pictures, labels),) = batches.test("")
    live = load(str(tree), size=12)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.equal(labels, live.test_labels)
    torch.testing.assert_close(pictures, (live.test_pictures / 255 - mean) / deviation)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_streamed_picture_is_one_line(tree, tmp_path, workers):
    import shutil

    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "train" / "along" / "7.png").write_bytes(b"no picture")
    batches = stream(tmp_path / "tree", execution={"workers": workers})
    with pytest.raises(LabError, match=r"^--data: broken picture .*along.7\.png: ") as caught:
        list(batches.epoch(0, 0))
    assert "\n" not in str(caught.value)


def test_a_streamed_run_trains(tree):
    values = {
        "data": {"name": str(tree), "size": 12, "augmentation": {"random_resized": True}},
        "model": {"recipe": "gn+ws"},
        "optimization": {"epochs": 1, "step_size": 16},
    }
    record = train(checked_training(values))
    assert record.steps == 2
    assert record.facts["origin"].endswith("read as they are needed")


def test_where_imagenet_is_looked_for(tree, tmp_path):
    with pytest.raises(UsageError, match=r"ImageNet is not in .* ILSVRC2012_img_train\.tar"):
        find_tree("imagenet", str(tmp_path))
    (tmp_path / "imagenet").symlink_to(tree)
    assert find_tree("ImageNet", str(tmp_path)) == tmp_path / "imagenet"


def test_pictures_without_class_folders_are_told_what_to_do(tree, tmp_path):
    """ImageNet's validation archive has 50,000 pictures in one folder."""
    (tmp_path / "val").mkdir()
    (tmp_path / "train").symlink_to(tree / "train")
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match=r"files \(ILSVRC2012_val_00000001\.JPEG\): sort them in"):
        load(str(tmp_path))


def test_subsets_are_the_same_for_every_seed():
    batches = [LivePictures(load("digits"), settings(seed=seed), make_fabric()) for seed in (0, 1)]
    counts = [
        sorted(
            label for step in one.epoch(0, 0) for part in step.parts for label in part[1].tolist()
        )
        for one in batches
    ]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 150
    with pytest.raises(UsageError, match=r"data\.train_samples is 900, and there are 898"):
        LivePictures(load("digits"), settings(data={"train_samples": 900}), make_fabric())
