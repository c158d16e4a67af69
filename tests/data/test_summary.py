# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Dataset summary: counts, duplicates and leaks that were put there are found, and no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yolo_ext.data.convert import convert
from yolo_ext.data.shapes import make_shapes
from yolo_ext.data.summary import fingerprint, near_pairs, summarise

BCCD = Path(__file__).parents[2].parent / "shared/data/bccd"


@pytest.fixture
def data(tmp_path) -> Path:
    """Return a YOLO set of smooth random pictures, all different: 3 train, 2 val, 2 test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for k in range(count):
            picture = cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), (320, 240))
            cv2.imwrite(str(tmp_path / f"images/{split}/{split}{k}.jpg"), picture)
            (tmp_path / f"labels/{split}/{split}{k}.txt").write_text("0 .5 .5 .05 .05\n1 .5 .5 .2 .2\n1 .5 .5 .9 .9\n")
    text = f"path: {tmp_path}\ntrain: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog, bird]\n"
    (tmp_path / "data.yaml").write_text(text)
    return tmp_path / "data.yaml"


def test_counts(data):
    (data.parent / "labels/val/val0.txt").write_text("")
    (data.parent / "labels/test/test0.txt").unlink()
    found = summarise(data)
    rest = {"broken": 0, "malformed": 0, "outside": 0}
    assert found["splits"] == {
        "train": {"images": 3, "boxes": 9, "unlabelled": 0, "empty": 0, **rest},
        "val": {"images": 2, "boxes": 3, "unlabelled": 0, "empty": 1, **rest},
        "test": {"images": 2, "boxes": 3, "unlabelled": 1, "empty": 0, **rest},
    }
    # 16 x 12, 64 x 48 and 288 x 216 pixels: sides of 13.9, 55.4 and 249.4
    assert found["classes"]["cat"] == {"train": 3, "val": 1, "test": 1, "small": 5, "medium": 0, "large": 0}
    assert found["classes"]["dog"] == {"train": 6, "val": 2, "test": 2, "small": 0, "medium": 5, "large": 5}
    assert set(found["classes"]["bird"].values()) == {0}
    assert found["sizes"] == {"8-16": 5, "16-32": 0, "32-64": 5, "64-128": 0, "128-256": 5}
    assert found["passed"] and found["duplicates"] == found["duplicates_near"] == []


def resave(source: Path, target: Path) -> None:
    """Save a picture smaller and with other compression."""
    cv2.imwrite(str(target), cv2.resize(cv2.imread(str(source)), (240, 180)), [cv2.IMWRITE_JPEG_QUALITY, 60])


@pytest.mark.parametrize(
    ("copy", "to", "key", "passed"),
    [
        pytest.param(shutil.copy, "train/copy.jpg", "duplicates", True, id="copy in train"),
        pytest.param(shutil.copy, "val/copy.jpg", "leaks train/val", False, id="copy in val"),
        pytest.param(shutil.copy, "test/copy.jpg", "leaks train/test", False, id="copy in test"),
        pytest.param(resave, "train/near.jpg", "duplicates_near", True, id="saved again in train"),
        pytest.param(resave, "val/near.png", "leaks_near train/val", True, id="saved again in val"),
    ],
)
def test_planted_copies(data, copy, to, key, passed):
    source, target = data.parent / "images/train/train1.jpg", data.parent / "images" / to
    copy(source, target)
    found = summarise(data)
    assert found["passed"] == passed
    kind, _, where = key.partition(" ")
    pairs = found[kind][where] if where else found[kind]
    assert [sorted(p) for p in pairs] == [sorted([str(source), str(target)])]
    all_pairs = [p for k in ("", "_near") for ps in (found[f"duplicates{k}"], *found[f"leaks{k}"].values()) for p in ps]
    assert len(all_pairs) == 1


def test_same_list_twice(data):
    data.write_text(data.read_text().replace("test: images/test", "test: images/train"))
    found = summarise(data)
    assert not found["passed"] and len(found["leaks"]["train/test"]) == 3 and found["leaks"]["train/val"] == []


def test_one_copy_in_all_splits(data):
    for split in ("train", "val", "test"):
        shutil.copy(data.parent / "images/train/train0.jpg", data.parent / f"images/{split}/again.jpg")
    leaks = summarise(data)["leaks"]
    assert {k: len(v) for k, v in leaks.items()} == {"train/val": 1, "train/test": 1, "val/test": 1}


@given(st.sets(st.integers(0, 2**256 - 1), max_size=12), st.integers(0, 12), st.randoms(use_true_random=False))
def test_near_pairs_finds_all(prints, limit, rng):
    near = {p ^ sum(1 << b for b in rng.sample(range(256), rng.randint(0, 14))) for p in prints}
    members = sorted(prints | near)
    expected = {(a, b) for a in members for b in members if a < b and bin(a ^ b).count("1") <= limit}
    assert set(near_pairs(members, limit)) == expected


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "RGBA", "1"])
def test_fingerprint_of_any_mode(tmp_path, mode):
    base = cv2.resize(np.random.default_rng(1).integers(0, 255, (6, 8), dtype=np.uint8), (128, 96))
    prints = []
    for name, m in (("a.png", "L"), ("b.tif", mode)):
        image = Image.fromarray(base.astype(np.uint16) * 256 if m == "I;16" else base)
        (image if m in ("L", "I;16") else image.convert(m)).save(tmp_path / name)
        prints.append(fingerprint(tmp_path / name)[1])
    assert (prints[0] ^ prints[1]).bit_count() <= (40 if mode == "1" else 4)


def test_shapes_have_no_near_duplicates(tmp_path):
    found = summarise(make_shapes(tmp_path / "shapes", train=24, val=8))
    assert found["passed"] and found["duplicates_near"] == [] and not any(found["leaks_near"].values())


@pytest.mark.bccd
@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD data is not beside the checkout")
def test_bccd(tmp_path):
    data = convert(BCCD, tmp_path / "bccd", splits={"train": "trainval", "val": "test"})["data"][0]
    found = summarise(data)
    assert found["passed"] and found["duplicates"] == [] and found["duplicates_near"] == []
    assert found["splits"]["train"]["boxes"] + found["splits"]["val"]["boxes"] == 4886
