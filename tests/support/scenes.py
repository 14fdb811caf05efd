"""Small made pictures with objects, in the formats of the large sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

SAMPLES = "FILTERWISE_SAMPLES"


def samples(name: str) -> Path:
    """Return a folder of real samples, or skip: they are not part of the repository."""
    root = os.environ.get(SAMPLES)
    if not root:
        pytest.skip(f"{SAMPLES} does not name the folder of real samples")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"{SAMPLES}: there is no {folder}")
    return folder


def picture(path: Path, width: int, height: int, seed: int = 0) -> None:
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(path)


def box_of(left: float, top: float, width: float, height: float) -> list[list[float]]:
    """Return a box as COCO's polygon."""
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(number: int, image: int, box: list[float], **changes: Any) -> dict[str, Any]:
    """Return an annotation of COCO JSON whose mask fills its box."""
    return {
        "id": number,
        "image_id": image,
        "category_id": 3,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": box_of(*box),
        **changes,
    }


def crowd(number: int, image: int, width: int, height: int) -> dict[str, Any]:
    """Return a crowd over the left half of a picture, as run lengths."""
    left = width // 2
    runs = {"size": [height, width], "counts": [0, left * height, (width - left) * height]}
    return annotation(number, image, [0, 0, left, height], iscrowd=1, segmentation=runs)


def write_coco(folder: Path, train: int = 3, **changes: Any) -> Path:
    """Write a set of pictures of 56x40 and 40x56: one, two or no boxes, and a crowd.

    Categories are 3 (one) and 7 (two); the last picture of each part has no box.
    """
    for part, count, shift in (("train2017", train, 0), ("val2017", 2, 100)):
        images, annotations = [], []
        for number in range(count):
            size = (56, 40) if number % 2 == 0 else (40, 56)
            name = f"{shift + number:06d}.png"
            picture(folder / part / name, *size, seed=shift + number)
            images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
            if number == count - 1:
                continue
            annotations.append(annotation(10 * number, number, [4, 6, 20, 24]))
            if number % 2 == 0:
                annotations.append(
                    annotation(10 * number + 1, number, [20, 8, 16, 30], category_id=7)
                )
                annotations.append(crowd(10 * number + 2, number, *size))
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 7, "name": "two"}, {"id": 3, "name": "one"}],
        } | changes.get(part, {})
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def write_voc(folder: Path, lists: dict[str, int] | None = None) -> Path:
    """Write a VOCdevkit of pictures of 56x40 with a dog, a difficult cat, and their map.

    The dog fills the columns 4 to 23 and the rows 6 to 29; of the map a column behind it is void.
    """
    year = folder / "VOCdevkit" / "VOC2012"
    for name in ("Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (year / name).mkdir(parents=True)
    for part, count in (lists or {"train": 3, "val": 2}).items():
        names = [f"{part}{number}" for number in range(count)]
        for kind in ("Main", "Segmentation"):
            (year / "ImageSets" / kind / f"{part}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            picture(year / "JPEGImages" / f"{name}.jpg", 56, 40, seed=number)
            things = [("dog", (5, 7, 24, 30), 0), ("cat", (30, 1, 40, 20), 1)]
            (year / "Annotations" / f"{name}.xml").write_text(voc_entry(56, 40, things))
            values = numpy.zeros((40, 56), dtype=numpy.uint8)
            values[6:30, 4:24], values[6:30, 24] = 12, 255
            Image.fromarray(values).save(year / "SegmentationClass" / f"{name}.png")
    return folder


def voc_entry(width: int, height: int, things: list[tuple[str, Any, int]]) -> str:
    """Return an annotation in VOC's XML."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}"
        f"</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, box, difficult in things
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{size}{objects}</annotation>"
