"""Clouds of points: HDF5 files as ModelNet40 is handed out, lists of PCD clouds and OFF meshes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from filterwise.lab.data.detection import pick
from filterwise.lab.data.faults import Fault, settle
from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CloudData", "load_clouds"]

FILES = "train_files.txt"
SAMPLED = 2048
"""Points that are drawn from a mesh's surface, as in the HDF5 files."""


class CloudData(NamedTuple):
    """What is trained and tested on: each half is clouds ``(points, 3)``, and labels.

    Attributes:
        train: To train on.
        test: To test on.
        classes: Names.
        origin: One sentence on where they come from.
        left_out: How many entries of each kind of fault were left out.
    """

    train: tuple[list[Tensor], list[int]]
    test: tuple[list[Tensor], list[int]]
    classes: tuple[str, ...]
    origin: str
    left_out: dict[str, int]


def load_clouds(folder: Path, points: int, *, skip_bad: bool) -> CloudData:
    """Read a folder of shapes, centred and scaled into the unit ball.

    Two layouts: ``train_files.txt`` and ``test_files.txt`` with HDF5 files of ``data`` and
    ``label``, and ``shape_names.txt``; or ``train.txt`` and ``test.txt`` with a line for each
    shape, its file (``.pcd``, ``.off``, ``.ply``, ``.obj``, ``.stl``) and the number of its class,
    and ``*shape_names.txt``.

    Args:
        folder: Which.
        points: That a cloud must have.
        skip_bad: Leave out what is faulty, and count it.

    Raises:
        UsageError: If the layout is neither, or an entry is faulty.
        LabError: If a file cannot be read.
    """
    names = sorted(folder.glob("*shape_names.txt"))
    lists = {file.stem: file for file in sorted(folder.glob("*.txt")) if file not in names}
    if not names or not lists:
        raise UsageError(
            f"--data: {folder} has no shape_names.txt with train.txt and test.txt, or with"
            f" {FILES} and test_files.txt, beside it."
        )
    classes = tuple(_lines(names[0]))
    read = _of_files if (folder / FILES).is_file() else _of_list
    halves, faults = [], []
    for beginnings in (("train",), ("test", "val")):
        (name,) = pick((), lists, beginnings, folder)
        clouds, labels = [], []
        for cloud, label, place in read(lists[name]):
            fault = place
            if not isinstance(fault, Fault):
                fault = _fault(cloud, label, place, len(classes), points)
            if fault is None:
                clouds.append(_in_ball(torch.from_numpy(cloud)))
                labels.append(int(label))
            else:
                faults.append(fault)
        halves.append((clouds, labels))
    left_out = settle(faults, skip_bad)
    if not all(clouds for clouds, _ in halves):
        raise UsageError(f"--data: {folder}: no shape is left to train or to test on.")
    return CloudData(halves[0], halves[1], classes, f"shapes in {folder}, its own lists", left_out)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--data: {file} cannot be read: {reason(error)}.") from None


def _of_files(file: Path) -> Any:
    """Yield what is in the HDF5 files that a list names; the names may have folders before them."""
    import h5py

    for line in _lines(file):
        path = file.parent / Path(line).name
        try:
            with h5py.File(path) as content:
                data: Any = content["data"]
                label: Any = content["label"]
                clouds, labels = data[:], label[:].reshape(-1)
        except (OSError, KeyError, ValueError, TypeError) as error:
            yield None, 0, Fault(str(path), "", "file that cannot be read", reason(error))
            continue
        if len(clouds) != len(labels):
            words = f"{len(clouds)} shapes and {len(labels)} labels"
            yield None, 0, Fault(str(path), "", "file that cannot be read", words)
            continue
        for number, cloud in enumerate(clouds):
            place = (str(path), f"shape {number}")
            yield cloud.astype(numpy.float32), int(labels[number]), place


def _of_list(file: Path) -> Any:
    for number, line in enumerate(_lines(file), start=1):
        name, _, label = line.rpartition(" ")
        path = file.parent / name.strip()
        if not path.is_file():
            yield None, 0, Fault(str(file), f"line {number}", "missing shape", str(path))
            continue
        try:
            cloud = _pcd(path) if path.suffix == ".pcd" else _mesh(path)
        except Exception as error:
            # Whatever a library's reader comes upon in a broken file.
            yield None, 0, Fault(str(path), "", "shape that cannot be read", reason(error))
            continue
        yield cloud, label, (str(path), "")


def _mesh(path: Path) -> numpy.ndarray:
    """Draw points evenly from a mesh's surface, the same ones every time."""
    import trimesh

    mesh: Any = trimesh.load(path, force="mesh")
    if not len(mesh.faces) or not mesh.area > 0:
        return numpy.zeros((0, 3), numpy.float32)
    sampled: Any = trimesh.sample.sample_surface(mesh, SAMPLED, seed=0)
    return numpy.asarray(sampled[0], numpy.float32)


def _pcd(path: Path) -> numpy.ndarray:
    """Read PCD 0.7 with x, y and z as little-endian float32 or as text."""
    content = path.read_bytes()
    head, found, body = content.partition(b"\nDATA ")
    kind, _, body = body.partition(b"\n")
    fields = dict(
        line.split(maxsplit=1) for line in head.decode("ascii").splitlines() if " " in line
    )
    if not found or fields.get("FIELDS") != "x y z" or fields.get("SIZE", "4 4 4") != "4 4 4":
        raise ValueError("only PCD with the fields x y z of 4 bytes is read")
    count = int(fields["POINTS"])
    if kind.strip() == b"ascii":
        return numpy.array(body.split(), numpy.float32).reshape(count, 3)
    if kind.strip() != b"binary":
        raise ValueError(f"PCD of the kind {kind.decode('ascii', 'replace').strip()} is not read")
    return numpy.frombuffer(body, "<f4", 3 * count).reshape(count, 3).astype(numpy.float32)


def _fault(
    cloud: numpy.ndarray, label: Any, place: tuple[str, str], classes: int, points: int
) -> Fault | None:
    file, entry = place
    if not str(label).isdigit() or int(label) >= classes:
        return Fault(file, entry, "unknown class", f"{label}; there are {classes}")
    if not len(cloud):
        return Fault(file, entry, "empty shape")
    if len(cloud) < points:
        words = f"{len(cloud)}, {points} are asked for"
        return Fault(file, entry, "shape of too few points", words)
    if not numpy.isfinite(cloud).all():
        return Fault(file, entry, "shape with points that are not finite")
    return None


def _in_ball(cloud: Tensor) -> Tensor:
    cloud = cloud[:, :3] - cloud[:, :3].mean(0)
    return cloud / cloud.norm(dim=1).max().clamp(min=1e-12)
