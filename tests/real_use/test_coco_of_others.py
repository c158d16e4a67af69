# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""COCO files as tools write them: what can be read is read, and what is wrong is said in words, of a whole image."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.data.convert import convert

JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))[1].tobytes()
BOX = [8, 12, 16, 24]
ROW = "0 0.250000 0.500000 0.250000 0.500000"
OUTLINE = [8, 12, 24, 12, 24, 36, 8, 36]
GOOD = {"image_id": 3, "category_id": 1, "bbox": BOX}


def write(root: Path, *, annotation: dict | None = None, image: dict | None = None, **change) -> Path:
    """Write a COCO set of four images, of which the last one has another annotation or entry."""
    (root / "images").mkdir(parents=True)
    for k in range(4):
        (root / f"images/{k}.jpg").write_bytes(JPEG)
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 64, "height": 48} for k in range(4)],
        "annotations": [{"id": k, "image_id": k, "bbox": BOX, "category_id": 1} for k in range(4)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    if annotation is not None:
        content["annotations"][3] = {"id": 99, **annotation}
    if image is not None:
        content["images"][3] = image
    (root / "a.json").write_text(json.dumps({**content, **change}))
    return root


def of_last(out: Path) -> str | None:
    """Return the label of the last image, None where it was left out."""
    (label,) = [*(out / "labels").rglob("3.txt")] or [None]
    return label.read_text().strip() if label else None


READ = {  # annotation of the last image, notes, its label
    "no polygon": ({"segmentation": []}, {}, ROW),
    "empty polygon": ({"segmentation": [[]]}, {"flat": 1}, ROW),
    "flat polygon": ({"segmentation": [[8, 12, 24, 12, 16, 12]]}, {"flat": 1}, ROW),
    "two points": ({"segmentation": [[8, 12, 24, 36]]}, {"flat": 1}, ROW),
    "an odd number": ({"segmentation": [OUTLINE[:7]]}, {"flat": 1}, ROW),
    "null in a polygon": ({"segmentation": [[None, *OUTLINE[1:]]]}, {"flat": 1}, ROW),
    "one of two polygons is flat": ({"segmentation": [OUTLINE, [1, 1]]}, {"flat": 1, "boxed": 1}, ROW),
    "polygon that is null": ({"segmentation": None}, {}, ROW),
    "mask": ({"segmentation": {"counts": "abc", "size": [48, 64]}}, {"mask": 1}, ROW),
    "no box, a polygon": ({"segmentation": [OUTLINE], "bbox": None}, {"boxed": 1}, ROW),
    "empty box, a polygon": ({"segmentation": [OUTLINE], "bbox": []}, {"boxed": 1}, ROW),
    "box of zeros, a polygon": ({"segmentation": [OUTLINE], "bbox": [0, 0, 0, 0]}, {"boxed": 1}, ROW),
    "numbers as text": ({"bbox": [*map(str, BOX)]}, {}, ROW),
    "ids as text": ({"image_id": "3", "category_id": "1"}, {}, ROW),
    "swapped corners": ({"bbox": [24, 36, -16, -24]}, {"swapped": 1}, ROW),
    "box without area": ({"bbox": [8, 12, 0, 24]}, {"degenerate": 1}, ""),
    "crowd": ({"iscrowd": 1}, {"crowd": 1}, ""),
    "keypoints": ({"keypoints": [1, 2, 2], "num_keypoints": 1}, {"keypoints": 1}, ROW),
    "keypoints of which none is labelled": ({"keypoints": [0, 0, 0], "num_keypoints": 0}, {}, ROW),
}  # fmt: skip


@pytest.mark.parametrize(("annotation", "notes", "row"), READ.values(), ids=READ)
def test_read(tmp_path, annotation, notes, row):
    root = write(tmp_path / "c", annotation={**GOOD, **annotation})
    summary = convert(root, tmp_path / "out", format="coco")
    assert {kind: sum(n.values()) for kind, n in summary["notes"].items()} == notes
    assert of_last(tmp_path / "out") == row


@pytest.mark.parametrize(
    "image",
    [
        pytest.param({"id": 3, "file_name": "3.jpg"}, id="no size"),
        pytest.param({"id": 3, "file_name": "3.jpg", "width": None, "height": 0}, id="size of nothing"),
        pytest.param({"id": "3", "file_name": "3.jpg", "width": "64", "height": "48"}, id="text"),
        pytest.param({"id": 3, "file_name": "/home/me/set/images/3.jpg"}, id="absolute"),
        pytest.param({"id": 3, "file_name": "C:\\Users\\me\\set\\3.jpg"}, id="Windows"),
        pytest.param({"id": 3, "file_name": "..\\images\\3.jpg"}, id="above, Windows"),
        pytest.param({"id": 3, "file_name": "../other/3.jpg"}, id="above"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["images=", "found"])
def test_images(tmp_path, image, named):
    root = write(tmp_path / "c", image=image)
    options = {"images": root / "images"} if named else {}
    summary = convert(root / "a.json" if named else root, tmp_path / "out", format="coco", **options)
    assert summary["notes"] == {} and summary["boxes"] == {"cat": 4} and of_last(tmp_path / "out") == ROW


BROKEN = {  # annotation of the last image, what is said of it
    "unknown category": ({"category_id": 7}, "3.jpg: annotation 99: its category_id 7 is in no category"),
    "no category": ({"category_id": None}, "3.jpg: annotation 99: its category_id None is in no category"),
    "no box": ({"bbox": None}, "3.jpg: annotation 99: its bbox None is not four numbers, and it has no polygon"),
    "three numbers": ({"bbox": [1, 2, 3]}, r"3.jpg: annotation 99: its bbox \[1, 2, 3\] is not four numbers"),
    "not a number": ({"bbox": ["x", 2, 3, 4]}, "3.jpg: annotation 99: its bbox .* is not four numbers"),
    "flat polygon and no box": ({"bbox": None, "segmentation": [[1, 1, 2, 2, 3, 3]]}, "not four numbers"),
    "no image": ({"image_id": 55}, "1 annotations belong to no image: image_id 55"),
    "no image_id": ({"image_id": None}, "annotations belong to no image"),
}


@pytest.mark.parametrize(("annotation", "text"), BROKEN.values(), ids=BROKEN)
def test_broken_annotation(tmp_path, annotation, text):
    root = write(tmp_path / "c", annotation={**GOOD, **annotation})
    with pytest.raises(UsageError, match=f"1 problems, nothing was written. {text}|1 problems.*{text}") as caught:
        convert(root, tmp_path / "out", format="coco")
    assert "Error(" not in str(caught.value)
    summary = convert(root, tmp_path / "out", format="coco", broken="skip")
    alone = "image" in text.partition(":")[0] or "belong" in text
    assert sum(summary["images"].values()) == (4 if alone else 3), "never as background"
    assert of_last(tmp_path / "out") == ("" if alone else None) and summary["boxes"] == {"cat": 3}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"image": {"id": 3}}, "image 3 has no id or no file_name", id="no file name"),
        pytest.param({"image": {"file_name": "3.jpg"}}, "image None has no id or no file_name", id="no id"),
        pytest.param({"image": {"id": 3, "file_name": "gone.jpg"}}, "no image 'gone.jpg' in", id="missing image"),
        pytest.param({"image": {"id": 3, "file_name": "/etc/hosts.jpg"}}, "no image 'hosts.jpg' in", id="outside"),
    ],
)
def test_broken_image(tmp_path, change, text):
    root = write(tmp_path / "c", **change)
    with pytest.raises(UsageError, match=text) as caught:
        convert(root, tmp_path / "out", format="coco")
    assert "Error(" not in str(caught.value)
    assert convert(root, tmp_path / "out", format="coco", broken="skip")["boxes"] == {"cat": 3}


def test_images_that_are_not_in_the_file(tmp_path):
    root = write(tmp_path / "c")
    (root / "images/more.jpg").write_bytes(JPEG)
    notes = convert(root, tmp_path / "out")["notes"]
    assert [Path(p).name for p in notes["unannotated"]] == ["more.jpg"]


def test_categories_of_the_same_name(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: said.append(str(text)))
    root = write(tmp_path / "c", categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}])
    assert convert(root, tmp_path / "out")["boxes"] == {"cat": 4}
    assert said == ["a.json: categories of the same name become one class: cat"]


def test_no_image_is_found(tmp_path):
    root = write(tmp_path / "c")
    (root / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"Cannot find the images of .*no image '0.jpg' in .*Give images=FOLDER"):
        convert(root, tmp_path / "out", format="coco")
    assert convert(root, tmp_path / "out", images=tmp_path / "elsewhere")["boxes"] == {"cat": 4}


def test_the_same_name_in_two_folders(tmp_path):
    """File names without a folder mean the images of their own file."""
    for split, x in (("train", 8), ("val", 0)):
        root = tmp_path / "c"
        (root / f"pool/{split}").mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        for k in range(2):
            (root / f"pool/{split}/{k}.jpg").write_bytes(JPEG)
        content = {
            "images": [{"id": k, "file_name": f"{k}.jpg"} for k in range(2)],
            "annotations": [{"id": k, "image_id": k, "bbox": [x, 12, 16, 24], "category_id": 1} for k in range(2)],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    convert(root, tmp_path / "out")
    for split, row in (("train", ROW), ("val", "0 0.125000 0.500000 0.250000 0.500000")):
        assert {p.read_text().strip() for p in (tmp_path / f"out/labels/{split}").rglob("*.txt")} == {row}
