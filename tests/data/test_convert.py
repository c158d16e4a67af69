# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Conversions between YOLO, Pascal VOC and COCO: what is kept, where it lies, and commands."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from ultralytics.data.utils import img2label_paths
from ultralytics.utils import LOGGER, YAML

from yolo_ext import cli
from yolo_ext.commands import data as commands
from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.data.convert import convert
from yolo_ext.data.formats import voc_text, yolo_row
from yolo_ext.data.records import Object, list_images

JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))[1].tobytes()
BOX, POLYGON, POSE = "1 0.5 0.5 0.25 0.5", "0 0.1 0.1 0.5 0.1 0.5 0.6", "0 .5 .5 .2 .2 .4 .4 2 .6 .6 0"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(LOGGER, "warning", lambda *_: None)


def make_yolo(root: Path, row: str = BOX, extra: str = "", splits=("train", "val"), count: int = 4) -> Path:
    """Write a YOLO set whose splits use the same file names, as most do."""
    for split in splits:
        for kind in ("images", "labels"):
            (root / kind / split / "sub").mkdir(parents=True)
        for k in range(count):
            (root / f"images/{split}/sub/{k}.jpg").write_bytes(JPEG)
            (root / f"labels/{split}/sub/{k}.txt").write_text(f"{row}\n" if k else "")
    paths = "".join(f"{s}: images/{s}\n" for s in splits)
    (root / "data.yaml").write_text(f"path: {root}\n{paths}names: [cat, dog]\n{extra}")
    return root


def make_coco(root: Path, **change) -> Path:
    """Write a COCO set of two splits with gaps in its category ids, a crowd and images in folders."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 3), ("val", 2)):
        images, boxes = [], []
        for k in range(count):
            file = root / f"images/{split}2017/a/{k}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(JPEG)
            images.append({"id": 10 * k, "file_name": f"a/{k}.jpg", "width": 64, "height": 48})
            outline = [[8, 12, 24, 12, 24, 36, 8, 36], [30, 30, 40, 30, 40, 40]] if k else []
            box = {"image_id": 10 * k, "bbox": [8, 12, 16, 24], "category_id": 90 if k else 7, "segmentation": outline}
            boxes += [{"id": 2 * k, **box}, {"id": 2 * k + 1, **box, "iscrowd": int(k == 1)}]
        categories = [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 50, "name": "none"}]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps({**content, **change}))
    (root / "annotations/captions_train2017.json").write_text("{}")
    return root


def labels(root: Path) -> dict[str, str]:
    return {p.relative_to(root / "labels").as_posix(): p.read_text() for p in (root / "labels").rglob("*.txt")}


def test_coco_boxes(tmp_path):
    summary = convert(make_coco(tmp_path / "c"), tmp_path / "y", format="coco")
    assert summary["names"] == ["cat", "none", "dog"] and summary["images"] == {"train": 3, "val": 2}
    assert summary["boxes"] == {"cat": 4, "none": 0, "dog": 4}
    boxed = {"train_a/1": 1, "train_a/2": 2, "val_a/1": 1}
    assert summary["notes"] == {"crowd": {"train_a/1": 1, "val_a/1": 1}, "boxed": boxed}
    row = "0.250000 0.500000 0.250000 0.500000\n"
    assert labels(tmp_path / "y")["train/train_a/0.txt"] == f"0 {row}" * 2
    assert labels(tmp_path / "y")["val/val_a/1.txt"] == f"2 {row}"
    assert check_data(summary["data"][0])["nc"] == 3


def test_coco_polygons(tmp_path):
    summary = convert(make_coco(tmp_path / "c"), tmp_path / "y", format="coco", task="segment")
    assert summary["boxes"] == {"cat": 0, "none": 0, "dog": 4} and summary["notes"]["polygon"] == {
        "train_a/0": 2,
        "val_a/0": 2,
    }
    cls, *points = labels(tmp_path / "y")["val/val_a/1.txt"].split()
    outline = np.reshape([float(p) for p in points], (-1, 2)) * (64, 48)
    assert cls == "2" and {(8, 12), (24, 36), (40, 40)} <= {tuple(p) for p in outline.round(3).tolist()}
    assert len(check_data(summary["data"][0], task="segment")["images"]["train"]) == 3


@pytest.mark.parametrize(
    ("place", "images", "options"),
    [
        pytest.param("train/_annotations.coco.json", "train/{}", {}, id="images beside"),
        pytest.param("annotations/instances_default.json", "images/default/{}", {}, id="images by name"),
        pytest.param("labels.json", "data/{}", {}, id="data folder"),
        pytest.param("a/b/c/labels.json", "elsewhere/{}", {"images": "elsewhere"}, id="given"),
    ],
)
def test_coco_layouts(tmp_path, place, images, options):
    root = tmp_path / "c"
    for k in range(4):
        file = root / images.format(f"{k}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(JPEG)
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 64, "height": 48} for k in range(4)],
        "annotations": [{"id": k, "image_id": k, "bbox": [8, 8, 20, 20], "category_id": 1} for k in range(4)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (root / place).write_text(json.dumps(content))
    options = {k: root / v for k, v in options.items()}
    for source in (root, root / place):
        summary = convert(source, tmp_path / f"out{source.is_file()}", format="coco", **options)
        assert summary["images"] == {"train": 3, "val": 1} and summary["boxes"] == {"cat": 4}
    if options:
        with pytest.raises(UsageError, match="Give images=FOLDER"):
            convert(root / place, tmp_path / "out", format="coco")


@pytest.mark.parametrize("to", ["voc", "coco"])
def test_there_and_back(tmp_path, to):
    root = make_yolo(tmp_path / "y")
    there = convert(root, tmp_path / "there", format="yolo", to=to)
    assert there["boxes"] == {"cat": 0, "dog": 6} and there["data"] == []
    back = convert(tmp_path / "there", tmp_path / "back", format=to)
    assert back["images"] == {"train": 4, "val": 4} and back["boxes"]["dog"] == 6
    rows = {t.partition(" ")[2] for t in labels(tmp_path / "back").values()}
    assert rows == {"", "0.500000 0.500000 0.250000 0.500000\n"}


def test_coco_file(tmp_path):
    convert(make_yolo(tmp_path / "y", POLYGON), tmp_path / "c", format="yolo", to="coco")
    content = json.loads((tmp_path / "c/annotations/instances_train.json").read_text())
    assert content["categories"] == [{"id": i, "name": n, "supercategory": ""} for i, n in ((1, "cat"), (2, "dog"))]
    assert [i["id"] for i in content["images"]] == [1, 2, 3, 4] and [a["id"] for a in content["annotations"]] == [
        1,
        2,
        3,
    ]
    first = content["annotations"][0]
    assert first["bbox"] == [6.4, 4.8, 25.6, 24] and first["image_id"] == 2 and first["category_id"] == 1
    assert first["segmentation"] == [[6.4, 4.8, 32, 4.8, 32, 28.8]] and first["area"] == pytest.approx(25.6 * 24 / 2)
    assert all((tmp_path / "c/images/train" / i["file_name"]).is_file() for i in content["images"])
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["annotations", "images"]


@pytest.mark.parametrize(
    ("row", "extra"),
    [
        pytest.param(BOX, "", id="detect"),
        pytest.param(POLYGON, "", id="segment"),
        pytest.param(POSE, "kpt_shape: [2, 3]\nflip_idx: [1, 0]\n", id="pose"),
        pytest.param("1 .1 .1 .4 .1 .4 .4 .1 .4", "", id="obb"),
        pytest.param("0 0.5 0.5 1.005 0.5", "", id="within tolerance"),
    ],
)
@pytest.mark.parametrize("files", ["link", "copy", "list"])
def test_split_keeps_rows_word_for_word(tmp_path, row, extra, files):
    root = make_yolo(tmp_path / "y", row, extra)
    ratios = {"train": 0.5, "val": 0.25, "test": 0.25}
    summary = convert(root, tmp_path / "s", format="yolo", ratios=ratios, files=files)
    assert summary["images"] == {"train": 4, "val": 2, "test": 2} and summary["notes"] == {}
    content = YAML.load(summary["data"][0])
    assert all(content[k] == v for k, v in YAML.load(root / "data.yaml").items() if k in ("kpt_shape", "flip_idx"))
    images = [p for s in ratios for p in list_images(Path(content["path"]) / content[s])]
    texts = [Path(p).read_text() for p in img2label_paths([str(i) for i in images])]
    assert sorted(texts) == [""] * 2 + [f"{row}\n"] * 6
    inodes = {p.stat().st_ino for p in root.rglob("*.jpg")}
    assert len({p.stat().st_ino for p in images} & inodes) == (0 if files == "copy" else 8)


def test_folds(tmp_path):
    root = make_yolo(tmp_path / "y", splits=("train", "val", "test"))
    summary = convert(root, tmp_path / "f", format="yolo", folds=4, stratify=True)
    assert [p.name for p in summary["data"]] == [f"fold{k}.yaml" for k in (1, 2, 3, 4)]
    assert summary["images"] == {"all": 8, "test": 4}
    seen: list[Path] = []
    for data in summary["data"]:
        info = check_data(data, need=("train", "val", "test"))
        members = {s: set(info["images"][s]) for s in ("train", "val", "test")}
        assert [len(m) for m in members.values()] == [6, 2, 4]
        assert not members["train"] & members["val"] and not members["test"] & (members["train"] | members["val"])
        seen += members["val"]
    assert len(seen) == len(set(seen)) == 8
    voc = convert(root, tmp_path / "v", format="yolo", to="voc", folds=2)
    lists = {p.stem: p.read_text().split() for p in (tmp_path / "v/ImageSets/Main").iterdir()}
    assert {k: len(v) for k, v in lists.items()} == {
        f"fold{k}_{s}": n for k in (1, 2) for s, n in (("train", 4), ("val", 4), ("test", 4))
    }
    assert voc["data"] == []


def test_yolo_folder_without_yaml(tmp_path):
    root = make_yolo(tmp_path / "y", splits=("train",))
    (root / "data.yaml").unlink()
    with pytest.raises(UsageError, match="Give classes=a,b"):
        convert(root, tmp_path / "out", format="yolo")
    (root / "labels/classes.txt").write_text("\ufeffcat\ndog\n")
    assert convert(root, tmp_path / "a", format="yolo")["boxes"] == {"cat": 0, "dog": 3}
    (root / "labels/classes.txt").unlink()
    assert convert(root, tmp_path / "b", format="yolo", classes=["x", "y"])["boxes"] == {"x": 0, "y": 3}


def test_classes_are_chosen_and_renumbered(tmp_path):
    root = make_yolo(tmp_path / "y")
    (root / "labels/train/sub/1.txt").write_text(f"{BOX}\n0 0.1 0.1 0.1 0.1\n")
    summary = convert(root, tmp_path / "s", format="yolo", classes=["dog"])
    assert summary["boxes"] == {"dog": 6} and summary["notes"] == {"class": {"cat": 1}}
    assert labels(tmp_path / "s")["train/train_sub/1.txt"] == "0 0.5 0.5 0.25 0.5\n"


def test_folder_called_images_inside(tmp_path):
    """Ultralytics replaces the last `images` of a path, so such a folder would hide the labels."""
    voc = tmp_path / "v"
    for k in range(4):
        for name, content in (
            (f"JPEGImages/images/{k}.jpg", JPEG),
            (f"Annotations/images/{k}.xml", voc_text("", (64, 48), [Object("cat", (1, 1, 9, 9))]).encode()),
        ):
            (voc / name).parent.mkdir(parents=True, exist_ok=True)
            (voc / name).write_bytes(content)
    summary = convert(voc, tmp_path / "out")
    info = check_data(summary["data"][0])
    assert sum(map(len, info["images"].values())) == 4


def test_polygon_rows():
    square = (0.0, 0.0, 10.0, 0.0, 10.0, 10.0)
    assert yolo_row(Object("a", (0, 0, 10, 10), (square,)), 3, (20, 10), "segment") == (
        "3 0.000000 0.000000 0.500000 0.000000 0.500000 1.000000"
    )
    assert yolo_row(Object("a", (0, 0, 10, 10), (square,)), 3, (20, 10), "detect") == (
        "3 0.250000 0.500000 0.500000 1.000000"
    )


def test_turned_photo(tmp_path):
    """An annotation made on the stored pixels is turned with the photo, as training sees it."""
    tags = Image.Exif()
    tags[274] = 6
    picture = np.zeros((60, 40, 3), np.uint8)  # upright: white object at x 5..15, y 20..50
    picture[20:50, 5:15] = 255
    stored = np.ascontiguousarray(np.rot90(picture))  # turned left; orientation 6 turns it right again
    root = tmp_path / "v"
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    ys, xs = np.nonzero(stored[..., 0])
    box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
    for k in range(2):
        Image.fromarray(stored).save(root / f"JPEGImages/{k}.jpg", exif=tags, quality=95)
        (root / f"Annotations/{k}.xml").write_text(voc_text("", (60, 40), [Object("a", box)]))
    summary = convert(root, tmp_path / "y", ratios={"train": 0.5, "val": 0.5})
    assert summary["notes"] == {"rotated": {"0": 1, "1": 1}}
    (row,) = set(labels(tmp_path / "y").values())
    _, x, y, w, h = map(float, row.split())
    np.testing.assert_allclose([x * 40, y * 60, w * 40, h * 60], [10, 35, 10, 30], atol=1e-3)


# Commands ----------------------------------------------------------------------------------------------------------
def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_yolo(tmp_path / "y")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert cli.main(["convert", "format=yolo", "to=voc", "source=y", "out=v"]) == 0
    assert (
        cli.main(["convert", "format=voc", "source=v", "out=z", "train=val", "val=train", "classes=classes.txt"]) == 0
    )
    assert YAML.load("z/data.yaml")["names"] == {0: "dog", 1: "cat"}
    assert cli.main(["convert", "source=v", "out=z2", "ratio=0.5,0.25,0.25", "stratify=True"]) == 0
    assert cli.main(["split", "source=y", "out=s", "ratio=0.6,0.4", "seed=3"]) == 0
    assert cli.main(["split", "source=y", "out=f", "folds=2"]) == 0 and Path("f/fold2.yaml").is_file()
    assert cli.main(["data", "check=y/data.yaml", f"project={tmp_path}", "name=d"]) == 1, (
        "all images are the same, so val leaks"
    )
    (folder,) = tmp_path.rglob("data.json")
    found = json.loads(folder.read_text())
    assert not found["passed"] and folder.with_name("boxes.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("convert format=xml source=y out=o", "'format=xml'", id="format"),
        pytest.param("convert to=coc source=y out=o", "Did you mean 'coco'", id="to"),
        pytest.param("convert source=gone out=o", "does not exist", id="no source"),
        pytest.param("convert source=y out=o ratio=a,b", "'ratio=a,b'", id="ratio of words"),
        pytest.param("split source=y out=o ratio=0.5,0.5,0.5,0.5", "each split", id="four shares"),
        pytest.param("split source=y out=o ratio=0.9,0.2", "sum to 1", id="shares above 1"),
        pytest.param("split source=y out=o folds=1", "'folds=1'", id="one fold"),
        pytest.param("split source=y out=o fold=3", "Did you mean 'folds'", id="unknown key"),
        pytest.param("split source=y out=y/s", "inside the source", id="out in source"),
        pytest.param("data", "check=...", id="nothing to check"),
        pytest.param("data check=gone.yaml", "does not exist", id="no data"),
        pytest.param("data check=y near=99", "'near=99'", id="near"),
    ],
)
def test_wrong_words(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    make_yolo(tmp_path / "y")
    assert cli.main(words.split()) == 2
    assert expected in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_ratio_may_be_a_list(tmp_path):
    assert commands.split(make_yolo(tmp_path / "y"), tmp_path / "s", ratio=[0.5, 0.5])["images"] == {
        "train": 4,
        "val": 4,
    }
