# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Data checks: one clear refusal per mistake, warnings for what Ultralytics would skip, no write and no download."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data, check_label, image_probe
from yolo_ext.data.convert import convert

BCCD = Path(__file__).parents[2].parent / "shared/data/bccd"
JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))[1].tobytes()
YAML_TEXT = "path: {root}\ntrain: images/train\nval: images/val\nnames: [a, b]\n"


def make_data(root: Path, text: str = YAML_TEXT, label: str = "0 .5 .5 .2 .2\n", count: int = 3) -> Path:
    """Write a detection set and return its data.yaml."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            (root / f"images/{split}/{i}.jpg").write_bytes(JPEG)
            (root / f"labels/{split}/{i}.txt").write_text(label)
    (root / "data.yaml").write_text(text.format(root=root))
    return root / "data.yaml"


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """Collect warnings; Ultralytics' logger does not propagate to pytest."""
    seen: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: seen.append(str(text)))
    return seen


def test_good_data(tmp_path, warnings):
    for data in (make_data(tmp_path / "d ä"), tmp_path / "d ä"):
        info = check_data(data)
        assert info["names"] == {0: "a", 1: "b"} and info["nc"] == 2
        assert {k: [p.name for p in v] for k, v in info["images"].items()} == {
            k: ["0.jpg", "1.jpg", "2.jpg"] for k in ("train", "val")
        }
    assert warnings == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("names: [a\n b: {{", "not valid YAML", id="not YAML"),
        pytest.param("", "holds no keys", id="empty"),
        pytest.param("- a\n- b\n", "not valid YAML|holds no keys", id="a list"),
        pytest.param("path: {root}\ntrain: images/train\nval: images/val\n", "lacks names", id="no names"),
        pytest.param("path: {root}\ntrain: images/train\nnames: [a]\n", "lacks val", id="no val"),
        pytest.param("path: {root}\nval: images/val\nnames: [a]\n", "lacks train", id="no train"),
        pytest.param(YAML_TEXT + "nc: 3\n", "length 2 and 'nc: 3' must match", id="nc differs"),
        pytest.param(YAML_TEXT.replace("[a, b]", "5"), "'names' must be list or dict", id="names is a number"),
        pytest.param(YAML_TEXT.replace("images/val", "images/vol"), "missing path .*images/vol", id="val missing"),
        pytest.param(YAML_TEXT.replace("images/train", "images/x"), "'train' .*does not exist", id="train missing"),
        pytest.param(YAML_TEXT.replace("images/val", "labels/val"), "'val' .*holds no images", id="no images"),
        pytest.param(YAML_TEXT.replace("[a, b]", "[a]").replace("[a]", "{{0: a, 5: b}}"), "not usable", id="names gap"),
    ],
)
def test_illegal_yaml(tmp_path, text, expected):
    with pytest.raises(UsageError, match=expected):
        check_data(make_data(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("dta.yaml", r"Did you mean .*data\.yaml", id="near file"),
        pytest.param("other/data.yaml", "does not exist", id="no folder"),
        pytest.param("https://example.com/data.yaml", "have to be fetched", id="URL"),
        pytest.param("set.zip", "have to be fetched or unpacked", id="archive"),
        pytest.param("images", "holds no single data.yaml", id="folder without data.yaml"),
        pytest.param("", "no single data.yaml", id="empty name"),
    ],
)
def test_file_not_found(tmp_path, monkeypatch, name, expected):
    make_data(tmp_path)
    monkeypatch.chdir(tmp_path / "labels" if not name else tmp_path)
    with pytest.raises(UsageError, match=expected):
        check_data(name)


def test_near_bundled_name():
    with pytest.raises(UsageError, match=r"Did you mean .*coco8\.yaml"):
        check_data("coco88.yaml")


def test_nothing_is_downloaded(tmp_path):
    text = "path: {root}/none\ntrain: x\nval: x\nnames: [a]\ndownload: |\n  open(r'{root}/ran', 'w').close()\n"
    with pytest.raises(UsageError, match="nothing is fetched unasked"):
        check_data(make_data(tmp_path, text))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        pytest.param("2 .5 .5 .2 .2", "Label class 2 exceeds dataset class count 2", id="class too high"),
        pytest.param("0 .5 .5 .2 .2\n\n-1 .5 .5 .2 .2", "negative .*-1", id="class negative"),
        pytest.param("0 .5 .5 .2", "4 columns", id="four columns"),
        pytest.param("0 .5 .5 .2 .2 .9", "6 columns", id="with confidence"),
        pytest.param("a .5 .5 .2 .2", "could not convert", id="word"),
        pytest.param("0 .5 nan .2 .2", "not finite", id="nan"),
        pytest.param("0 .5 .5 .2 .2\n0 .1 .1 .2 .2 .3 .1", "labels mix", id="boxes and polygons"),
        pytest.param("", "has no labels", id="background only"),
    ],
)
def test_malformed_labels(tmp_path, label, expected):
    data = make_data(tmp_path, label=label)
    with pytest.raises(UsageError, match=expected):
        check_data(data)
    assert len(check_data(data, labels=False)["images"]["val"]) == 3


@pytest.mark.parametrize(
    ("label", "pose"),
    [
        pytest.param("0 .5 .5 .2 .2\n", False, id="box"),
        pytest.param("1 .5 .5 .2 .2\r\n", False, id="carriage return"),
        pytest.param("0 .1 .1 .2 .2 .3 .1", False, id="polygon"),
        pytest.param("0 .5 .5 .2 .2 .4 .4 2 .6 .6 0", True, id="pose"),
        pytest.param("0 .5 .5 1.009 .2", False, id="within tolerance"),
    ],
)
def test_legal_labels(tmp_path, label, pose):
    (tmp_path / "a.txt").write_text(label, encoding="utf-8")
    assert len(check_label(tmp_path / "a.txt", 2, (2, 3), pose)) == 1


def test_bad_images_and_labels_are_left_out(tmp_path, warnings):
    data = make_data(tmp_path)
    (tmp_path / "images/train/1.jpg").write_bytes(JPEG[:-300])
    (tmp_path / "labels/train/2.txt").write_text("0 .5 .5 .2 1.5")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}
    images = check_data(data)["images"]
    assert [p.name for p in images["train"]] == ["0.jpg"] and len(images["val"]) == 3
    assert "1 of 3 images cannot be read" in warnings[0] and "1.jpg" in warnings[0]
    assert "1 images are left out, labels outside" in warnings[1] and "2.txt" in warnings[1]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()} == before


def test_all_images_bad(tmp_path):
    data = make_data(tmp_path, count=7)
    for file in (tmp_path / "images/val").iterdir():
        file.write_text("")
    with pytest.raises(UsageError, match=r"No image of split 'val'.*and 2 more"):
        check_data(data)
    assert set(check_data(data, need=("train",))["images"]) == {"train"}


def test_missing_split_and_leak(tmp_path, warnings):
    data = make_data(tmp_path, YAML_TEXT.replace("images/val", "images/train"))
    check_data(data)
    assert "share 3 images" in warnings[0]
    with pytest.raises(UsageError, match="has no 'test' split"):
        check_data(data, need=("test",))


@pytest.mark.parametrize("shape", [None, [2], ["a", 3]], ids=str)
def test_pose_needs_kpt_shape(tmp_path, shape):
    with pytest.raises(UsageError, match="kpt_shape"):
        check_data(make_data(tmp_path, YAML_TEXT + (f"kpt_shape: {shape}\n" if shape else "")), task="pose")


def test_pose_columns(tmp_path):
    data = make_data(tmp_path, YAML_TEXT + "kpt_shape: [2, 3]\n", label="0 .5 .5 .2 .2 .4 .4 2 .6 .6 0\n")
    assert len(check_data(data, task="pose")["images"]["val"]) == 3
    (tmp_path / "labels/val/0.txt").write_text("0 .5 .5 .2 .2")
    with pytest.raises(UsageError, match="labels require 11 columns"):
        check_data(data, task="pose")


def test_classification_folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            (tmp_path / "set" / split / name / "0.jpg").write_bytes(JPEG)
    info = check_data(tmp_path / "set", task="classify")
    assert info["nc"] == 2 and len(info["images"]["train"]) == 2
    for folder, expected in (("none", "does not exist"), ("set/train", "has no 'train' folder")):
        with pytest.raises(UsageError, match=expected):
            check_data(tmp_path / folder, task="classify")
    assert [p.name for p in tmp_path.iterdir()] == ["set"], "Ultralytics alone would split it into a new folder"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "cannot be read as an image", id="empty"),
        pytest.param(b"GIF8", "cannot be read as an image", id="header only"),
        pytest.param(JPEG[: len(JPEG) // 2], "truncated", id="truncated"),
        pytest.param(cv2.imencode(".png", np.zeros((4, 20, 3)))[1].tobytes(), "<10 pixels", id="tiny"),
    ],
)
def test_bad_image(tmp_path, content, expected):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        image_probe(tmp_path / "a.jpg")


def test_image_probe_follows_exif(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (48, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert image_probe(tmp_path / "a.jpg")[0] == (32, 48)


@pytest.mark.bccd
@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD data is not beside the checkout")
def test_bccd_is_quick(tmp_path):
    data = convert(BCCD, tmp_path / "bccd", splits={"train": "trainval", "val": "test"})["data"][0]
    start = time.process_time()
    images = check_data(data)["images"]
    assert time.process_time() - start < 2
    assert {k: len(v) for k, v in images.items()} == {"train": 292, "val": 72}
