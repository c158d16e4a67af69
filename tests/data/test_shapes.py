# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The generated set: same bytes for the same arguments, tight boxes, and no folder of the user replaced."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.data.shapes import NAMES, _cover, _outline, _paint, draw_scene, make_shapes

SMALL = {"train": 6, "val": 3, "imgsz": 64}


def files(root: Path) -> dict[str, bytes]:
    """Return the content of all images and labels."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.suffix in {".jpg", ".txt"}}


def test_same_arguments_same_bytes(tmp_path):
    a, b, c = (make_shapes(tmp_path / n, seed=s, **SMALL).parent for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert files(a) == files(b)
    assert files(a) != files(c)
    assert not {x for k, x in files(a).items() if "/train/" in k and k.endswith("jpg")} & {
        x for k, x in files(a).items() if "/val/" in k
    }


def test_set_is_legal(tmp_path):
    info = check_data(make_shapes(tmp_path / "s", **SMALL))
    assert {split: len(images) for split, images in info["images"].items()} == {"train": 6, "val": 3}
    assert tuple(info["names"].values()) == NAMES


def test_more_images_keep_the_first_ones(tmp_path):
    small = files(make_shapes(tmp_path / "a", **SMALL).parent)
    large = files(make_shapes(tmp_path / "b", **{**SMALL, "train": 8}).parent)
    assert small.items() < large.items()


def test_existing_set(tmp_path):
    data = make_shapes(tmp_path / "s", **SMALL)
    first = tmp_path / "s/images/train/00000.jpg"
    stamp = first.stat().st_mtime_ns
    make_shapes(tmp_path / "s", **SMALL)
    assert first.stat().st_mtime_ns == stamp, "a complete set is reused"
    first.unlink()
    make_shapes(tmp_path / "s", **SMALL)
    assert first.is_file(), "an incomplete set is written again"
    make_shapes(tmp_path / "s", **{**SMALL, "val": 2})
    assert len(check_data(data)["images"]["val"]) == 2, "another set replaces it"
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_files_of_others_are_kept(tmp_path, kind):
    out = tmp_path / "s"
    mine = out / "mine.txt" if kind == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("keep")
    with pytest.raises(UsageError, match="not a shapes set"):
        make_shapes(out, **SMALL)
    assert mine.read_text() == "keep"


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": -1}, {"imgsz": 32}, {"seed": -1}], ids=str)
def test_illegal_arguments(tmp_path, wrong):
    with pytest.raises(UsageError, match="not legal"):
        make_shapes(tmp_path / "s", **{**SMALL, **wrong})
    assert not (tmp_path / "s").exists()


def test_scenes():
    rows = []
    for seed in range(60):
        image, scene = draw_scene(np.random.default_rng(seed), 160)
        assert image.shape == (160, 160, 3) and image.dtype == np.uint8
        assert 1 <= len(scene) <= 5
        x, y, w, h = np.array(scene).T[1:]
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        assert boxes.min() >= 0 and boxes.max() <= 1
        assert all(_cover(a, b) < 0.3 for i, a in enumerate(boxes) for b in boxes[:i])
        rows += scene
    share = np.bincount([int(r[0]) for r in rows], minlength=3) / len(rows)
    assert share.min() > 0.25
    sides = np.array([r[3:] for r in rows])
    assert sides.min() > 0.08 and sides.max() < 0.55


@pytest.mark.parametrize("cls", range(3), ids=NAMES)
def test_boxes_are_tight(cls):
    """What is painted reaches the box on all four sides and does not leave it, to two pixels of smoothing."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        outline = _outline(rng, cls) * 60 + 80
        image = np.full((160, 160, 3), 127, np.float32)
        _paint(rng, image, outline)
        y, x = np.nonzero(np.abs(image - 127).max(2) > 20)
        found = np.array([x.min(), y.min(), x.max(), y.max()])
        np.testing.assert_allclose(found, [*outline.min(0), *outline.max(0)], atol=2)


def test_images_are_written_as_drawn(tmp_path):
    folder = make_shapes(tmp_path / "s", **SMALL).parent
    drawn, rows = draw_scene(np.random.default_rng([0, 1, 2]), 64)
    read = cv2.imread(str(folder / "images/val/00002.jpg")).astype(float)
    assert np.abs(read - drawn).mean() < 12
    assert len((folder / "labels/val/00002.txt").read_text().splitlines()) == len(rows)
