# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import calibration_images, letterbox_batches, list_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            cv2.imwrite(str(tmp_path / split / f"{i}.png"), rng.integers(0, 256, (30, 60, 3), np.uint8))
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    (tmp_path / "list.txt").write_text("./train/0.png\n./train/3.png\n")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda f: {"train": str(f / "train"), "val": str(f / "val")}, 6),
        (lambda f: {"train": [str(f / "train"), str(f / "list.txt")]}, 6),
        (lambda f: f / "train", 6),
        (lambda f: f"{f}/train/[0-2].png", 3),
        (lambda f: str(f / "list.txt"), 2),
        (lambda f: [f / "train" / "1.png", f / "val"], 4),
    ],
    ids=["dict", "dict of lists", "folder", "glob", "txt", "list"],
)
def test_sources(folder, make, count):
    files = calibration_images(make(folder))
    assert len(files) == count and files == sorted(files) and all(p.is_file() for p in files)


def test_choice_depends_on_the_seed_only(folder):
    a, b = (calibration_images(folder / "train", 3, seed=s) for s in (0, 0))
    assert a == b and len(a) == 3
    assert any(calibration_images(folder / "train", 3, seed=s) != a for s in range(1, 6))


def test_val_images_are_never_used(folder):
    data = {"train": [str(folder / "train"), str(folder / "val")], "val": str(folder / "val")}
    assert {p.parent.name for p in calibration_images(data)} == {"train"}
    with pytest.raises(UsageError, match="validation images"):
        calibration_images({"train": str(folder / "val"), "val": str(folder / "val")}, 2)


@pytest.mark.parametrize(
    ("data", "n", "message"),
    [
        ("/nowhere", 5, "Cannot find"),
        ({"val": "x"}, 5, "no train split"),
        ([], 5, "no train split"),
        (".", 0, "at least 1"),
    ],
    ids=["missing", "no train", "empty", "count"],
)
def test_bad_sources(data, n, message):
    with pytest.raises(UsageError, match=message):
        calibration_images(data, n)


def test_letterbox_is_that_of_deployment(folder):
    image = np.zeros((30, 60, 3), np.uint8)
    image[..., 2] = 255  # BGR: red
    path = folder / "red.png"
    cv2.imwrite(str(path), image)
    (batch,) = letterbox_batches([path], 64)
    assert batch.shape == (1, 3, 64, 64) and batch.dtype == torch.float32
    assert batch[0, :, 32, 32].tolist() == [1, 0, 0]
    assert batch[0, :, 0, 0].tolist() == pytest.approx([114 / 255] * 3)


def test_classification_sees_the_middle(folder):
    image = np.zeros((30, 60, 3), np.uint8)
    image[:, 15:45] = 255
    path = folder / "middle.png"
    cv2.imwrite(str(path), image)
    (batch,) = letterbox_batches([path], 16, crop=True)
    assert batch.shape == (1, 3, 16, 16) and (batch == 1).all()


@pytest.mark.parametrize(("n", "at_most", "count"), [(None, 300, 6), (None, 4, 4), (6, 300, 6), (2, 1, 2)])
def test_how_many_images(folder, n, at_most, count):
    assert len(calibration_images(folder / "train", n, at_most=at_most)) == count


def test_fewer_images_than_asked(folder):
    with pytest.raises(UsageError, match=r"^7 calibration images are wanted, but .* has 6\. Ask for 6 or fewer"):
        calibration_images(folder / "train", 7)


@pytest.mark.parametrize("broken", [1, 3])
def test_unreadable_images_are_skipped(folder, broken):
    for i in range(broken):
        (folder / "train" / f"bad{i}.jpg").write_bytes(b"no image")
    files = calibration_images(folder / "train")[-3 - broken :]
    assert [len(b) for b in letterbox_batches(files, 32, batch=2)] == [2, 1]


@pytest.mark.parametrize(("whole", "broken"), [(0, 1), (2, 3)])
def test_mostly_unreadable_images(folder, whole, broken):
    for i in range(broken):
        (folder / "train" / f"bad{i}.jpg").write_bytes(b"no image")
    files = [folder / "train" / f"{i}.png" for i in range(whole)] + sorted((folder / "train").glob("bad*"))
    with pytest.raises(UsageError, match=f"of the {len(files)} calibration images cannot be read, such as .*bad"):
        list(letterbox_batches(files, 32))


@pytest.mark.parametrize("value", [0, 128])
def test_blank_images(folder, value):
    blank = [folder / f"{i}.png" for i in range(3)]
    for path in blank:
        cv2.imwrite(str(path), np.full((30, 60, 3), value, np.uint8))
    with pytest.raises(UsageError, match="Each of the 3 calibration images is of a single value"):
        list(letterbox_batches(blank, 32))
    assert sum(map(len, letterbox_batches([*blank, folder / "train" / "0.png"], 32))) == 4


def test_list_hash_follows_content(folder):
    files = sorted((folder / "train").glob("*.png"))
    before = list_hash(files)
    assert before == list_hash(files) != list_hash(files[1:])
    files[0].write_bytes(b"changed")
    assert list_hash(files) != before
