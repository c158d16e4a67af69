# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the check of a dataset takes, training reads, and the reverse; and no image of the user's is rewritten."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from ultralytics.data import utils as stock
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import imread

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data, check_label, image_probe, letterbox_batches
from yolo_ext.data.convert import convert
from yolo_ext.data.summary import summarise
from yolo_ext.stock.load import labelled_dataset
from yolo_ext.stock.safety import safely
from yolo_ext.training.trainer import DetectionTrainer

RGB = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """Return an image file of PIL as bytes."""
    image = Image.new(mode, size) if mode in ("I;16", "F", "I") else Image.fromarray(RGB).resize(size).convert(mode)
    if options.pop("pages", False):
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    if turn := options.pop("turn", 0):
        options["exif"] = Image.Exif()
        options["exif"][274] = turn
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPEG, PNG, BMP, TIFF, WEBP = (encoded(k) for k in ("JPEG", "PNG", "BMP", "TIFF", "WEBP"))
KINDS = {  # file name, content; whether both take it
    "jpg": ("a.jpg", JPEG, True),
    "jpeg": ("a.jpeg", JPEG, True),
    "upper case": ("a.JPG", JPEG, True),
    "gray jpg": ("a.jpg", encoded("JPEG", "L"), True),
    "CMYK jpg": ("a.jpg", encoded("JPEG", "CMYK"), True),
    "progressive jpg": ("a.jpg", encoded("JPEG", progressive=True), True),
    **{f"jpg turned by EXIF {t}": ("a.jpg", encoded("JPEG", turn=t), True) for t in (2, 3, 6, 8)},
    "jpg with bytes behind its end": ("a.jpg", JPEG + bytes(64), True),
    "jpg with text behind its end": ("a.jpg", JPEG + b"\n", True),
    "truncated jpg": ("a.jpg", JPEG[:-400], False),
    "half a jpg": ("a.jpg", JPEG[: len(JPEG) // 2], False),
    "jpg without its last byte": ("a.jpg", JPEG[:-1], None),
    "jpg of a header": ("a.jpg", JPEG[:200], False),
    "mpo": ("a.mpo", encoded("MPO", pages=True), True),
    "mpo called jpg": ("a.jpg", encoded("MPO", pages=True), True),
    "png": ("a.png", PNG, True),
    "png with alpha": ("a.png", encoded("PNG", "RGBA"), True),
    "gray png": ("a.png", encoded("PNG", "L"), True),
    "gray png with alpha": ("a.png", encoded("PNG", "LA"), True),
    "png of one bit": ("a.png", encoded("PNG", "1"), True),
    "png with a palette": ("a.png", encoded("PNG", "P"), True),
    "png of 16 bits": ("a.png", encoded("PNG", "I;16"), True),
    "png turned by EXIF": ("a.png", encoded("PNG", turn=6), True),
    "truncated png": ("a.png", PNG[:-900], False),
    "png without its end": ("a.png", PNG[:-12], None),
    "bmp": ("a.bmp", BMP, True),
    "gray bmp": ("a.bmp", encoded("BMP", "L"), True),
    "truncated bmp": ("a.bmp", BMP[:900], False),
    "tif": ("a.tif", TIFF, True),
    "tiff": ("a.tiff", TIFF, True),
    "tif of 16 bits": ("a.tif", encoded("TIFF", "I;16"), True),
    "tif of floats": ("a.tif", encoded("TIFF", "F"), None),
    "tif of pages": ("a.tif", encoded("TIFF", pages=True), True),
    "compressed tif": ("a.tif", encoded("TIFF", compression="tiff_lzw"), True),
    "tif turned by EXIF": ("a.tif", encoded("TIFF", turn=6), True),
    "truncated tif": ("a.tif", TIFF[:2000], False),
    "webp": ("a.webp", WEBP, True),
    "webp with alpha": ("a.webp", encoded("WEBP", "RGBA"), True),
    "moving webp": ("a.webp", encoded("WEBP", pages=True), None),
    "webp turned by EXIF": ("a.webp", encoded("WEBP", turn=6), True),
    "truncated webp": ("a.webp", WEBP[:-200], False),
    "gif called jpg": ("a.jpg", encoded("GIF"), False),
    "ppm called png": ("a.png", encoded("PPM"), False),
    "ico called png": ("a.png", encoded("ICO"), False),
    "tga called jpg": ("a.jpg", encoded("TGA"), False),
    "png called jpg": ("a.jpg", PNG, True),
    "jpg called png": ("a.png", JPEG, True),
    "webp called jpg": ("a.jpg", WEBP, True),
    "bmp called tif": ("a.tif", BMP, True),
    "png called tif": ("a.tif", PNG, True),
    "jpg called heic": ("a.heic", JPEG, True),
    "no bytes": ("a.jpg", b"", False),
    "text": ("a.jpg", b"no picture", False),
    "a web page": ("a.png", b"<!DOCTYPE html><html></html>", False),
    "zeros": ("a.jpg", bytes(4000), False),
    "heic that cannot be decoded here": ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), False),
    "9 pixels": ("a.png", encoded("PNG", size=(64, 9)), False),
    "10 pixels": ("a.png", encoded("PNG", size=(64, 10)), True),
    "one pixel": ("a.png", encoded("PNG", size=(1, 1)), False),
    "wide": ("a.png", encoded("PNG", size=(3000, 12)), True),
}
if features.check("jpg_2000"):
    KINDS["jp2"] = ("a.jp2", encoded("JPEG2000"), None)
if features.check("avif"):
    KINDS["avif"] = ("a.avif", encoded("AVIF"), True)


@pytest.mark.parametrize(("name", "content", "expected"), KINDS.values(), ids=KINDS)
def test_images(tmp_path, name, content, expected):
    for folder in ("ours", "stock"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    file, copy = tmp_path / "ours" / name, str(tmp_path / "stock" / name)
    try:
        size, ours = image_probe(file)[0], True
    except ValueError:
        size, ours = (0, 0), False
    assert expected is None or ours is expected
    with safely():
        assert (stock.verify_image_label((str(file), "", "", False, 1, 0, 0, False))[0] is not None) == ours
    assert file.read_bytes() == content and [p.name for p in file.parent.iterdir()] == [name]
    found = stock.verify_image_label((copy, "", "", False, 1, 0, 0, False))
    alone = found[0] is not None and imread(copy) is not None
    assert alone == ours or name == "a.jp2", found[-1]  # which older releases refuse; trainings of ours take it
    if ours and alone:
        assert size == found[2][::-1]


BOX, POLYGON, POSE = "0 .5 .5 .2 .2", "0 .1 .1 .2 .2 .3 .1", "0 .5 .5 .2 .2 .4 .4 2 .6 .6 0"
ROWS = {  # text of a label file; with a third value in pose files, of two keypoints
    "box": BOX,
    "two boxes": f"{BOX}\n1 .1 .1 .1 .1",
    "the same box twice": f"{BOX}\n{BOX}",
    "empty": "",
    "blank lines": f"\n\n{BOX}\n  \n",
    "tabs": BOX.replace(" ", "\t"),
    "carriage returns": f"{BOX}\r\n{BOX}\r\n",
    "byte-order mark": f"\ufeff{BOX}",
    "space at the end": f"{BOX}  ",
    "class as a float": "1.0 .5 .5 .2 .2",
    "class in scientific notation": "1e0 .5 .5 .2 .2",
    "class not whole": "0.5 .5 .5 .2 .2",
    "last class": "2 .5 .5 .2 .2",
    "class too high": "3 .5 .5 .2 .2",
    "class negative": "-1 .5 .5 .2 .2",
    "class barely negative": "-0.005 .5 .5 .2 .2",
    "word": "cat .5 .5 .2 .2",
    "commas": "0,.5,.5,.2,.2",
    "comma as decimal point": "0 0,5 0,5 0,2 0,2",
    "one column": "0",
    "four columns": "0 .5 .5 .2",
    "six columns": f"{BOX} .9",
    "rows of five and four": f"{BOX}\n0 .5 .5 .2",
    "rows of five and six": f"{BOX}\n{BOX} .9",
    "nan": "0 .5 nan .2 .2",
    "class nan": "nan .5 .5 .2 .2",
    "infinite": "0 .5 inf .2 .2",
    "minus infinite": "0 .5 -inf .2 .2",
    "pixels": "0 320 240 20 20",
    "within tolerance": "0 .5 .5 1.009 .2",
    "above tolerance": "0 .5 .5 1.02 .2",
    "slightly negative": "0 -.005 .5 .2 .2",
    "negative": "0 -.02 .5 .2 .2",
    "negative width": "0 .5 .5 -.005 .2",
    "box without area": "0 .5 .5 0 0",
    "polygon": POLYGON,
    "polygon of two points": "0 .1 .1 .2 .2",
    "polygon with an odd number": f"{POLYGON} .2",
    "oriented box": "0 .1 .1 .4 .1 .4 .4 .1 .4",
    "polygon beside a box": f"{BOX}\n{POLYGON}",
    "polygon beside six columns": f"{BOX} .9\n{POLYGON}",
    "polygon beside one point": f"{POLYGON}\n0 .5 .5",
    "polygon outside": "0 .1 .1 1.2 .2 .3 .1",
    "polygon slightly outside": "0 .1 .1 1.005 .2 .3 -.005",
    "polygon twice": f"{POLYGON}\n{POLYGON}",
    "pose": POSE,
    "pose and box": f"{POSE}\n{BOX}",
    "keypoint outside": "0 .5 .5 .2 .2 1.4 .4 2 .6 .6 0",
    "hidden keypoint outside": "0 .5 .5 .2 .2 -1 -1 0 .6 .6 2",
    "keypoint slightly outside": "0 .5 .5 .2 .2 -.005 .4 2 .6 .6 0",
    "box of a pose outside": "0 1.5 .5 .2 .2 .4 .4 2 .6 .6 0",
    "pose with one keypoint": "0 .5 .5 .2 .2 .4 .4 2",
    "visibility of three": "0 .5 .5 .2 .2 .4 .4 3 .6 .6 0",
    "UTF-16": BOX.encode("utf-16"),
    "GBK": f"{BOX}\n# 红细胞".encode("gbk"),
    "zero bytes": bytes(8),
    "unicode digits": "0 .5 .5 .2 ٠",
    "underscore": "0 .5 .5 .2 0_1",
}


@pytest.mark.parametrize("shape", [(0, 0, False), (2, 3, False), (2, 3, True), (2, 2, True)], ids=str)
@pytest.mark.parametrize("text", ROWS.values(), ids=ROWS)
def test_label_rows(tmp_path, text, shape):
    *kpt, pose = shape
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = stock.verify_image_label((str(tmp_path / "a.jpg"), str(tmp_path / "a.txt"), "", pose, 3, *kpt, False))
    try:
        rows = check_label(tmp_path / "a.txt", 3, tuple(kpt), pose)
    except (ValueError, ArithmeticError) as e:
        assert found[0] is None and str(e) and "\n" not in str(e)
    else:
        assert found[0] is not None
        width = 5 if kpt[0] and not pose else None  # of keypoints that the task does not read
        assert len({tuple(row[:width]) for row in rows}) == len(found[1]), "Ultralytics drops rows that occur twice"


@pytest.mark.parametrize("task", ["detect", "pose"])
def test_labels_that_training_drops(tmp_path, monkeypatch, task):
    """The check leaves out what training leaves out, and says so; what cannot be meant is refused."""
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: said.append(str(text)))
    good, bad = (POSE, ROWS["keypoint outside"]) if task == "pose" else (BOX, ROWS["above tolerance"])
    data = dataset(tmp_path, good, "kpt_shape: [2, 3]\n" if task == "pose" else "")
    (tmp_path / "labels/train/1.txt").write_text(bad)
    info = check_data(data, task=task)
    built, files = labelled_dataset(info, task, 32, 2)
    assert [p.name for p in info["images"]["train"]] == [p.name for p in files] == ["0.jpg", "2.jpg"]
    assert len(built) == 2 and any("1 images are left out, labels outside" in line for line in said)


def dataset(root: Path, row: str = BOX, extra: str = "", content: bytes = JPEG) -> Path:
    """Write three images and labels for each split and return the data.yaml."""
    for split in ("train", "val"):
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            (root / kind / split).mkdir(parents=True)
            for k in range(3):
                (root / f"{kind}/{split}/{k}.{suffix}").write_bytes(content if suffix == "jpg" else row.encode())
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n{extra}")
    return root / "data.yaml"


# Images are only read -------------------------------------------------------------------------------------------------
def build(data: Path) -> None:
    info = check_data(data)
    assert len(labelled_dataset(info, "detect", 32, 2)[0]) == 3


def train(data: Path) -> None:
    options = {"model": "a.yaml", "data": str(data), "save_dir": str(data.parents[1] / "run")}
    trainer = DetectionTrainer(overrides=options)
    trainer.model = SimpleNamespace(stride=torch.tensor([32]))
    assert len(trainer.build_dataset(trainer.data["train"], "train", 2)) == 3


def classify(data: Path) -> None:
    root = data.parent / "classes"
    for split in ("train", "val"):
        shutil.copytree(data.parent / f"images/{split}", root / split / "a")
    assert len(labelled_dataset(check_data(root, task="classify"), "classify", 32, 2)[0]) == 3
    assert {p.read_bytes() for p in root.rglob("*.jpg")} == {PADDED}


PADDED = JPEG + b"behind the end"
READERS = {
    "check": check_data,
    "summary": summarise,
    "convert with links": lambda d: build(convert(d, d.parents[1] / "out")["data"][0]),
    "split by lists": lambda d: convert(d, d.parents[1] / "out", format="yolo", files="list"),
    "labelled batches": build,
    "training": train,
    "training of classes": classify,
    "calibration": lambda d: list(letterbox_batches(check_data(d)["images"]["train"], 32)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_jpeg_with_bytes_behind_its_end_stays_as_it_is(tmp_path, read):
    data = dataset(tmp_path / "d", content=PADDED)
    read(data)
    images = [*(tmp_path / "d/images").rglob("*.*")]
    assert len(images) == 6 and {p.read_bytes() for p in images} == {PADDED}


def test_stock_alone_would_rewrite_it(tmp_path):
    """Or the test above would hold without a guard."""
    (tmp_path / "a.jpg").write_bytes(PADDED)
    assert "restored" in stock.check_image(str(tmp_path / "a.jpg"))[0]
    assert (tmp_path / "a.jpg").read_bytes() != PADDED


def test_one_image_that_cannot_be_decoded_does_not_end_a_training(tmp_path):
    data = dataset(tmp_path)
    (tmp_path / "images/train/x.webp").write_bytes(WEBP[:-200])
    info = check_data(data)
    assert len(info["images"]["train"]) == len(labelled_dataset(info, "detect", 32, 2)[1]) == 3


def test_malformed_labels_are_refused(tmp_path):
    data = dataset(tmp_path)
    (tmp_path / "labels/train/0.txt").write_text("0 .5 .5")
    with pytest.raises(UsageError, match=r"1 malformed label files: .*labels require 5 columns, 3 columns"):
        check_data(data)


COMMANDS = {
    "train": "train model=tiny.pt {} batch=4 epochs=1 device=cpu workers=0 plots=False",
    "prune": "prune model=tiny.pt {} epochs=0 prune.ratio=0.2 prune.round_to=1 prune.images=4",
    "quantize": "quantize model=tiny.pt {} quant.mode=ptq quant.calib=4 quant.max_drop=1",
    "val, which is Ultralytics' own": "val model=tiny.pt {} device=cpu workers=0 plots=False",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_leave_images_as_they_are(place, call, command):
    images = [*Path("shapes/images").rglob("*.jpg")]
    for file in images:
        file.write_bytes(file.read_bytes() + b"behind the end")
    before = {file: file.read_bytes() for file in images}
    status, text = call(command.format(f"data=shapes/data.yaml imgsz=64 project={place}"))
    assert status == 0, text
    assert {file: file.read_bytes() for file in Path("shapes/images").rglob("*.*")} == before
