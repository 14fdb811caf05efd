"""Sets of pictures with objects: what is read, and every fault listed before training."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from filterwise.lab.data import faults
from filterwise.lab.data.detection import load_scenes
from filterwise.lab.data.scenes import tensors_of
from filterwise.lab.errors import LabError, UsageError
from support.scenes import annotation, crowd, samples, write_coco


def load(folder, *, skip_bad=False):
    return load_scenes(folder, (), (), skip_bad=skip_bad)


def change(folder, entries, images=(), part="train2017"):
    """Add annotations and images to a part."""
    path = folder / "annotations" / f"instances_{part}.json"
    content = json.loads(path.read_text())
    content["annotations"] += entries
    content["images"] += images
    path.write_text(json.dumps(content))


def test_boxes_classes_and_masks_are_those_of_the_file(tmp_path):
    data = load(write_coco(tmp_path))
    assert data.left_out == {}
    assert data.train.classes == ("background", "one", "two")
    assert [len(scene.things) for scene in data.train.scenes] == [3, 1, 0]
    picture, target = tensors_of(data.train.scenes[0], masks=True, training=True)
    with Image.open(data.train.scenes[0].path) as image:
        assert picture[:, 3, 5].tolist() == list(image.getpixel((5, 3)))
    assert picture.shape == (3, 40, 56)
    assert target["boxes"].tolist() == [[4, 6, 24, 30], [20, 8, 36, 38]]
    assert target["labels"].tolist() == [1, 2]
    wanted = torch.zeros(2, 40, 56, dtype=torch.uint8)
    wanted[0, 6:30, 4:24] = 1
    wanted[1, 8:38, 20:36] = 1
    assert torch.equal(target["masks"], wanted)


def test_a_crowd_is_there_when_testing_and_not_when_training(tmp_path):
    data = load(write_coco(tmp_path))
    _, target = tensors_of(data.test.scenes[0], masks=True, training=False)
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert int(target["masks"][2].sum()) == 28 * 40
    _, training = tensors_of(data.train.scenes[0], masks=False, training=True)
    assert training["iscrowd"].tolist() == [0, 0]


FAULTS = [
    (annotation(90, 0, [50, 6, 20, 24]), "box outside the picture"),
    (annotation(90, 0, [-9, 6, 20, 24]), "box outside the picture"),
    (annotation(90, 0, [4, 6, 0, 24]), "box without area"),
    (annotation(90, 0, [4, 6, 5, -3]), "box without area"),
    (annotation(90, 0, [math.nan, 6, 5, 3]), "box that is not finite"),
    (annotation(90, 0, [4, 6, 20, 24], category_id=5), "unknown class"),
    (annotation(90, 77, [4, 6, 20, 24]), "annotation of an image that is not listed"),
    ({"id": 90, "image_id": 0}, "annotation that cannot be read"),
    ({"id": 90, "image_id": 0, "category_id": 3, "bbox": [1, 2, "x", 4]}, "annotation that cannot"),
    ({**crowd(90, 0, 40, 56), "bbox": [0, 0, 20, 30]}, "mask of another size"),
    (annotation(90, 0, [4, 6, 20, 24], segmentation=[[1, 2, 3, 4]]), "polygon of fewer than three"),
    (annotation(90, 0, [4, 6, 20, 24], segmentation=[[0, 0, 80, 0, 9, 9]]), "mask outside"),
    (annotation(90, 0, [4, 6, 20, 24], segmentation=[]), "object without mask"),
]


@pytest.mark.parametrize(("entry", "words"), FAULTS)
def test_a_faulty_entry_is_refused_with_file_and_entry(tmp_path, entry, words):
    write_coco(tmp_path)
    change(tmp_path, [entry])
    with pytest.raises(UsageError, match=words) as caught:
        load(tmp_path)
    assert "instances_train2017.json, annotation 90: " in str(caught.value)
    data = load(tmp_path, skip_bad=True)
    assert list(data.left_out.values()) == [1]
    assert [len(scene.things) for scene in data.train.scenes] == [3, 1, 0]


def test_all_faults_are_listed_together_and_counted(tmp_path, monkeypatch):
    write_coco(tmp_path)
    (tmp_path / "train2017" / "000001.png").unlink()
    torn = tmp_path / "val2017" / "000100.png"
    torn.write_bytes(torn.read_bytes()[:900])
    Image.new("RGB", (9, 9)).save(tmp_path / "train2017" / "000002.png")
    change(tmp_path, [annotation(90 + k, 0, [4, 6, 0, 4]) for k in range(3)])
    with pytest.raises(UsageError, match="the data has 6 faulty entries") as caught:
        load(tmp_path)
    words = str(caught.value)
    assert "000001.png: missing picture" in words
    assert "000100.png: broken picture" in words
    assert "000002.png: picture of another size (9x9, the annotations say 56x40)" in words
    assert "annotation 92: box without area (from 4, 6 to 4, 10 in a picture of 56x40)" in words
    data = load(tmp_path, skip_bad=True)
    assert data.left_out == {
        "missing picture": 1,
        "broken picture": 1,
        "picture of another size": 1,
        "box without area": 3,
    }
    assert [scene.path.name for scene in data.train.scenes] == ["000000.png"]
    monkeypatch.setattr(faults, "LISTED", 2)
    with pytest.raises(UsageError, match="and 4 more"):
        load(tmp_path)


def test_a_torn_jpeg_is_found(tmp_path):
    from filterwise.lab.data.faults import check_pictures

    for name in ("whole", "torn"):
        Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / f"{name}.jpg")
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(torn.read_bytes()[:5000])
    found = check_pictures([(torn, (300, 200)), (tmp_path / "whole.jpg", (300, 200))])
    assert list(found) == [str(torn)]


def test_files_that_are_no_coco_json_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="has neither annotations"):
        load(tmp_path)
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="no COCO JSON: it has no images, annotations, categories"):
        load(tmp_path)
    path.write_text("{")
    with pytest.raises(LabError, match=r"instances_train2017\.json cannot be read"):
        load(tmp_path)


def test_the_real_sample_is_without_fault():
    data = load(samples("coco"))
    assert [len(data.train.scenes), len(data.test.scenes)] == [50, 50]
    assert [sum(len(s.things) for s in half.scenes) for half in (data.train, data.test)] == [
        470,
        382,
    ]
    things = [thing for half in (data.train, data.test) for s in half.scenes for thing in s.things]
    assert sum(thing.ignored for thing in things) == 10
    scene = next(s for s in data.test.scenes if any(thing.ignored for thing in s.things))
    _, target = tensors_of(scene, masks=True, training=False)
    crowds = target["iscrowd"] == 1
    areas = target["masks"].flatten(1).sum(1)[crowds].float()
    torch.testing.assert_close(areas, target["area"][crowds])
