"""Data: real files in the formats that the loaders read, and every way in which they are wrong."""

from __future__ import annotations

import struct

import numpy
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from filterwise.lab.data import load, load_tensors, save_tensors
from filterwise.lab.errors import LabError, UsageError


@pytest.fixture
def tree(tmp_path):
    """Make a tree of two classes: dark and light pictures of several sizes and modes."""
    generator = numpy.random.default_rng(0)
    for half, count in (("train", 3), ("test", 2)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "tree" / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (20 + 3 * number, 24, 3)
                pixels = generator.integers(level - 20, level + 20, shape, dtype=numpy.uint8)
                image = Image.fromarray(pixels)
                image.convert("L" if number == 1 else "RGB").save(folder / f"{number}.png")
    return tmp_path / "tree"


def test_digits_are_the_unshuffled_halves():
    data, raw = load("digits"), load_digits()
    assert (len(data.train_labels), len(data.test_labels)) == (898, 899)
    assert torch.equal(data.train_pictures[:, 0].double(), torch.from_numpy(raw.images[:898]))
    assert torch.equal(data.test_pictures[:, 0].double(), torch.from_numpy(raw.images[898:]))
    assert data.train_labels.tolist() == raw.target[:898].tolist()
    assert data.test_labels.tolist() == raw.target[898:].tolist()


def test_chance_is_the_error_of_the_commonest_answer():
    _, counts = numpy.unique(load_digits().target[898:], return_counts=True)
    assert load("digits").chance == pytest.approx(1 - counts.max() / 899)


def test_statistics_of_channels_are_those_of_all_pixels(tree):
    data = load(str(tree), size=16)
    mean, deviation = data.channel_statistics()
    pixels = data.train_pictures.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    numpy.testing.assert_allclose(mean.flatten(), pixels.mean(1), rtol=1e-6)
    numpy.testing.assert_allclose(deviation.flatten(), pixels.std(1), rtol=1e-6)


def test_a_tree_of_pictures_is_read_as_rgb_of_one_size(tree):
    data = load(str(tree), size=16)
    assert data.train_pictures.shape == (6, 3, 16, 16)
    assert data.test_pictures.shape == (4, 3, 16, 16)
    assert data.classes == ("dark", "light")
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    means = data.train_pictures.float().mean((1, 2, 3))
    assert (means[:3] < 80).all()
    assert (means[3:] > 160).all()


def test_the_middle_of_a_picture_is_kept(tree):
    pixels = numpy.zeros((16, 48, 3), numpy.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tree / "train" / "dark" / "0.png")
    data = load(str(tree), size=16)
    assert data.train_pictures[0].min() == 255


def test_val_serves_as_the_half_to_test_on(tree):
    (tree / "test").rename(tree / "val")
    assert "val/ to test on" in load(str(tree)).origin


def test_changed_pictures_are_other_data(tree):
    before = load(str(tree), size=16).sha256
    assert load(str(tree), size=16).sha256 == before
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tree / "train" / "dark" / "0.png")
    assert load(str(tree), size=16).sha256 != before


def test_progress_adds_up_to_one(tree):
    shares = []
    load(str(tree), progress=shares.append)
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_broken_picture_is_named(tree, content):
    path = tree / "train" / "light" / "2.png"
    # None: a true picture that ends half-way, as after a broken copy.
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(LabError, match=r"broken picture .*light.2\.png: ") as caught:
        load(str(tree))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_an_empty_class_is_named(tree):
    (tree / "test" / "medium").mkdir()
    (tree / "train" / "medium").mkdir()
    with pytest.raises(UsageError, match=r"train.medium has no picture in it"):
        load(str(tree))


def test_a_class_that_one_half_lacks_is_named(tree):
    folder = tree / "train" / "medium"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "0.png")
    with pytest.raises(UsageError, match="test has no class medium, which the other has"):
        load(str(tree))


@pytest.mark.parametrize(
    ("removed", "words"),
    [("train", "has no folder train"), ("test", "has no folder to test on")],
)
def test_a_missing_half_is_named(tree, removed, words):
    (tree / removed).rename(tree / "elsewhere")
    with pytest.raises(UsageError, match=words):
        load(str(tree))


def test_a_half_without_class_folders_is_named(tree, tmp_path):
    (tree / "train").rename(tmp_path / "old")
    (tree / "train").mkdir()
    with pytest.raises(UsageError, match="train has no class folders in it"):
        load(str(tree))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("cifr10", "neither a set nor a folder here. Nearest: cifar10"),
        ("no/such/place", "there is no folder no/such/place"),
        ("FILE", "is a file"),
    ],
)
def test_data_that_is_not_there(tmp_path, data, words):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UsageError, match=words):
        load(data.replace("FILE", str(tmp_path / "file")))


def _write_mnist(root, count, seed):
    """Write a set in the MNIST files' own format (IDX, big-endian)."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = numpy.random.default_rng(seed)
    halves = {}
    for half, name in (("train", "train"), ("test", "t10k")):
        pictures = generator.integers(0, 256, (count, 28, 28), dtype=numpy.uint8)
        labels = (numpy.arange(count) % 10).astype(numpy.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        halves[half] = pictures, labels
    return halves


def test_a_torchvision_set_on_disk_is_read_by_its_own_loader(tmp_path):
    halves = _write_mnist(tmp_path, 20, seed=0)
    data = load("FashionMNIST", root=str(tmp_path))
    assert data.name == "fashionmnist"
    assert data.train_pictures.shape == (20, 1, 28, 28)
    numpy.testing.assert_array_equal(data.train_pictures[:, 0].numpy(), halves["train"][0])
    numpy.testing.assert_array_equal(data.test_pictures[:, 0].numpy(), halves["test"][0])
    numpy.testing.assert_array_equal(data.test_labels.numpy(), halves["test"][1])
    assert data.classes[0] == "T-shirt/top"


def test_a_truncated_torchvision_file_is_one_line(tmp_path):
    _write_mnist(tmp_path, 20, seed=0)
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LabError, match="fashionmnist cannot be read from") as caught:
        load("fashionmnist", root=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "svhn", "usps"])
def test_a_torchvision_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    with pytest.raises(LabError, match=f"{name} cannot be read from .* --root, or .* --download"):
        load(name, root=str(tmp_path))


def test_cifar_archives_of_others_are_not_unpickled(tmp_path):
    """Torchvision compares checksums first, so a stranger's pickle in its place is never opened."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(LabError, match="not found or corrupted"):
        load("cifar10", root=str(tmp_path))


def test_processes_read_the_same_tensors_from_a_file(tree, tmp_path):
    data = load(str(tree), size=16)
    save_tensors(data, tmp_path / "pictures.pt")
    again = load_tensors(tmp_path / "pictures.pt")
    assert torch.equal(again.train_pictures, data.train_pictures)
    assert torch.equal(again.test_labels, data.test_labels)
    assert (again.name, again.classes, again.sha256) == (data.name, data.classes, data.sha256)
