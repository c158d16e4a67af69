# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Broken inputs: each is read, repaired, skipped and counted, or refused with one line; the source stays as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from yolo_ext.core.errors import UsageError
from yolo_ext.data.convert import convert
from yolo_ext.data.summary import summarise

PICTURE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
JPEG = cv2.imencode(".jpg", PICTURE)[1].tobytes()
XML = (
    "<annotation><size><width>64</width><height>48</height></size><object><name>cat</name><bndbox><xmin>{}</xmin>"
    "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"
)
GOOD = XML.format(8, 12, 24, 36)
BOMB = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {n} "{f"&{m};" * 10}">' for m, n in zip("abcdefgh", "bcdefghi")
)
BOMB += "]>" + GOOD.replace("cat", "&i;")
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + GOOD.replace("cat", "&x;")
Change = Callable[[Path], object]


def put(name: str, content: str | bytes) -> Change:
    """Return a change that writes a file."""
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def picture(suffix: str, mode: str = "RGB", **options) -> Change:
    """Return a change that writes another kind of image."""

    def save(root: Path) -> None:
        (root / "JPEGImages/i1.jpg").unlink()
        image = Image.fromarray(PICTURE).convert(mode) if mode != "I;16" else Image.new(mode, (64, 48), 999)
        image.save(root / f"JPEGImages/i1{suffix}", **options)

    return save


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[274] = 6
    return tags


def link(name: str, target: str) -> Change:
    return lambda root: (root / name).symlink_to(root / target)


def deep(root: Path) -> None:
    (root / "Annotations/i1.xml").write_text(f"<annotation>{'<a>' * 100_000}{'</a>' * 100_000}</annotation>")


def move(source: str, target: str) -> Change:
    return lambda root: (root / source).rename(root / target)


def nothing(root: Path) -> None:
    """Leave the source whole."""


IMAGE, LABEL = "JPEGImages/i1.jpg", "Annotations/i1.xml"
PAGES = {"save_all": True, "append_images": [Image.new("RGB", (64, 48))]}
# verdict: read (nothing to say), kind of note of a repair, skip (refused, or left out with broken=skip), or refuse
VOC = {
    "0-byte image": (put(IMAGE, b""), "skip", "cannot be read as an image"),
    "truncated jpeg": (put(IMAGE, JPEG[:-400]), "skip", "truncated"),
    "text as image": (put(IMAGE, "no picture"), "skip", "cannot be read as an image"),
    "1-pixel image": (put(IMAGE, cv2.imencode(".jpg", PICTURE[:1, :1])[1].tobytes()), "skip", "<10 pixels"),
    "CMYK jpeg": (picture(".jpg", "CMYK"), "read", ""),
    "16-bit png": (picture(".png", "I;16"), "read", ""),
    "animated webp": (picture(".webp", **PAGES), "read", ""),
    "animated gif": (picture(".gif", **PAGES), "skip", "i1 has no image"),
    "EXIF-rotated jpeg": (picture(".jpg", exif=exif()), "rotated", ""),
    "dead link as image": (lambda r: (r / IMAGE).unlink() or link(IMAGE, "none")(r), "skip", "No such file"),
    "pipe as image": (lambda r: (r / IMAGE).unlink() or os.mkfifo(r / IMAGE), "skip", "i1 has no image"),
    "no image": (lambda r: (r / IMAGE).unlink(), "skip", "i1 has no image"),
    "duplicate stems": (put("JPEGImages/i1.png", b"x"), "skip", "i1.jpg and i1.png have the same id"),
    "unicode and space path": (move("JPEGImages", "Images"), "read", ""),
    "symlink loop": (link("JPEGImages/loop", "JPEGImages"), "refuse", "links back to its own parent"),
    "link to itself": (link("JPEGImages/self", "JPEGImages/self"), "read", ""),
    "0-byte xml": (put(LABEL, ""), "skip", "not valid XML"),
    "truncated xml": (put(LABEL, GOOD[:90]), "skip", "not valid XML"),
    "BOM in xml": (put(LABEL, "\ufeff" + GOOD), "read", ""),
    "utf-16 xml": (put(LABEL, GOOD.encode("utf-16")), "read", ""),
    "nested 100,000 deep": (deep, "read", ""),
    "entity bomb": (put(LABEL, BOMB), "skip", "i1.xml: holds a document type"),
    "entity bomb in utf-16": (put(LABEL, BOMB.encode("utf-16")), "skip", "i1.xml: holds a document type"),
    "entity bomb in EBCDIC": (
        put(LABEL, b'<?xml version="1.0" encoding="cp037"?>' + BOMB.encode("cp037")), "skip",
        "unknown encoding",
    ),
    "unknown encoding": (put(LABEL, f'<?xml version="1.0" encoding="klingon"?>{GOOD}'), "skip", "not valid XML"),
    "external entity": (put(LABEL, EXTERNAL), "skip", "i1.xml: holds a document type"),
    "external document type": (
        put(LABEL, '<!DOCTYPE a SYSTEM "http://localhost/a.dtd">' + GOOD), "skip", "i1.xml: holds a document type",
    ),
    "missing size": (put(LABEL, GOOD.replace("size", "sise")), "read", ""),
    "size of another image": (put(LABEL, GOOD.replace("64", "128")), "resized", ""),
    "negative corners": (put(LABEL, XML.format(-8, -1, 24, 36)), "clipped", ""),
    "swapped corners": (put(LABEL, XML.format(24, 36, 8, 12)), "swapped", ""),
    "box without area": (put(LABEL, XML.format(8, 12, 8, 36)), "degenerate", ""),
    "huge numbers": (put(LABEL, XML.format("-1e308", 12, "1e308", 36)), "clipped", ""),
    "NaN in xml": (put(LABEL, XML.format("nan", 12, 24, 36)), "skip", "complete box in object 1"),
    "word in xml": (put(LABEL, XML.format("left", 12, 24, 36)), "skip", "complete box in object 1"),
    "empty split": (put("ImageSets/Main/val.txt", "\n"), "refuse", "is empty"),
    "BOM in a list": (put("ImageSets/Main/val.txt", "\ufeffi1\r\n"), "read", ""),
    "train == val": (put("ImageSets/Main/val.txt", "i0\ni2\ni3\n"), "refuse", "hold the same 3 images"),
    "ghost in a list": (put("ImageSets/Main/val.txt", "i1\ni9\n"), "skip", "i9 has no image"),
    "path in a list": (put("ImageSets/Main/val.txt", "i1\n../../etc/x\n"), "skip", "x has no image"),
}  # fmt: skip


def snapshot(root: Path) -> dict[str, bytes]:
    """Return the content of every regular file."""
    return {str(p): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink()}


@pytest.fixture
def voc(tmp_path) -> Path:
    """Write a VOC set of four images, i1 for validation."""
    root = tmp_path / "my söurce"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for k in range(4):
        (root / f"JPEGImages/i{k}.jpg").write_bytes(JPEG)
        (root / f"Annotations/i{k}.xml").write_text(GOOD)
    (root / "ImageSets/Main/train.txt").write_text("i0\ni2\ni3\n")
    (root / "ImageSets/Main/val.txt").write_text("i1\n")
    return root


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "verdict", "text"), VOC.values(), ids=VOC)
def test_voc(voc, tmp_path, change, verdict, text):
    change(voc)
    before = snapshot(voc)
    out = tmp_path / "my öut"
    if verdict in ("skip", "refuse"):
        with pytest.raises(UsageError, match=text) as caught:
            convert(voc, out)
        assert "\n" not in str(caught.value) and not out.exists()
    if verdict == "skip":  # without the only validation image the split has to be a random one
        ghost = text in ("i9 has no image", "x has no image")
        summary = convert(voc, out, broken="skip", ratios=None if ghost else {"train": 0.5, "val": 0.5})
        assert len(summary["notes"]["broken"]) == 1 and any(text in p for p in summary["notes"]["broken"])
    elif verdict != "refuse":
        summary = convert(voc, out)
        assert list(summary["notes"]) == ([] if verdict == "read" else [verdict])
        assert summary["images"] == {"train": 3, "val": 1}
    assert snapshot(voc) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({voc.name} | ({out.name} if out.exists() else set()))


YOLO_TEXT = "path: {}\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
L, P = "labels/train/0.txt", "images/train/0.jpg"
LABELS = {  # key of the summary that names the file, and what it says
    "carriage returns": (put(L, "0 .5 .5 .2 .2\r\n\r\n"), "", ""),
    "0-byte label": (put(L, ""), "", ""),
    "NaN": (put(L, "0 nan .5 .2 .2"), "malformed", "not finite"),
    "infinite": (put(L, "0 inf .5 .2 .2"), "malformed", "not finite"),
    "class 999": (put(L, "999 .5 .5 .2 .2"), "malformed", "class 999"),
    "class -1": (put(L, "-1 .5 .5 .2 .2"), "malformed", "[-1.]"),
    "words": (put(L, "cat .5 .5 .2 .2"), "malformed", "could not convert"),
    "four columns": (put(L, "0 .5 .5 .2"), "malformed", "4 columns"),
    "binary label": (put(L, b"\xff\xfe\x00\x80"), "malformed", "can't decode"),
    "pixels in a label": (put(L, "0 320 240 20 20"), "outside", "320"),
    "negative in a label": (put(L, "0 -.5 .5 .2 .2"), "outside", "-0.5"),
    "0-byte image": (put(P, b""), "broken", "cannot be read"),
    "truncated jpeg": (put(P, JPEG[:-400]), "broken", "truncated"),
    "1-pixel image": (put(P, cv2.imencode(".jpg", PICTURE[:1, :1])[1].tobytes()), "broken", "<10 pixels"),
    "truncated bmp": (
        put("images/train/x.bmp", cv2.imencode(".bmp", PICTURE)[1].tobytes()[:900]),
        "broken",
        "truncated",
    ),
    "dead link": (lambda r: (r / P).unlink() or link(P, "none")(r), "broken", "No such file"),
}


def make_yolo(root: Path, text: str = YOLO_TEXT) -> Path:
    """Write a YOLO set of three images for each split, all different."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for k in range(3):
            picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            (root / f"images/{split}/{k}.jpg").write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
            (root / f"labels/{split}/{k}.txt").write_text(f"{k % 2} .5 .5 .25 .5\n")
    (root / "data.yaml").write_text(text.format(root))
    return root


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "kind", "text"), LABELS.values(), ids=LABELS)
def test_yolo(tmp_path, change, kind, text):
    root = make_yolo(tmp_path / "d ä")
    change(root)
    before = snapshot(root)
    found = summarise(root / "data.yaml")
    assert found["passed"] == (kind in ("", "outside"))
    assert {k: len(found[k]) for k in ("broken", "malformed", "outside")} == {
        k: int(k == kind) for k in ("broken", "malformed", "outside")
    }
    if kind:
        assert text in next(iter(found[kind].values()))
        with pytest.raises(UsageError, match=" 1 problems, nothing was written"):
            convert(root, tmp_path / "out", format="yolo")
    summary = convert(root, tmp_path / "out", format="yolo", to="coco", broken="skip")
    assert sum(summary["images"].values()) == 6 - (kind != "" and "x.bmp" not in str(found[kind]))
    assert snapshot(root) == before


COCO = {  # what is changed in the JSON, whether it can be skipped, and what is said
    "not JSON": ("{", False, "not valid JSON"),
    "nested JSON": ("[" * 100_000, False, "not valid JSON"),
    "a list": ("[]", False, "not a COCO file"),
    "no boxes": ({"annotations": None}, False, "not a COCO file"),
    "no images": ({"images": []}, False, "lists no images"),
    "category without name": ({"categories": [{"id": 1}]}, False, "category without id or name"),
    "unknown category": (
        {"annotations": [{"id": 1, "image_id": 0, "bbox": [1, 1, 9, 9], "category_id": 9}]}, True, "9",
    ),
    "unknown image": (
        {"annotations": [{"id": 1, "image_id": 77, "bbox": [1, 1, 9, 9], "category_id": 5}]}, True, "image_id 77",
    ),
    "box of three": ({"annotations": [{"id": 1, "image_id": 0, "bbox": [1, 1, 9], "category_id": 5}]}, True, "bbox"),
    "NaN in a box": (
        {"annotations": [{"id": 1, "image_id": 0, "bbox": [float("nan"), 1, 9, 9], "category_id": 5}]}, True, "nan",
    ),
    "path out of the folder": ({"images": [0, {"file_name": "../../x.jpg"}]}, True, "no image 'x.jpg'"),
    "image listed twice": ({"images": [0, {"file_name": "0.jpg"}]}, True, "annotated twice"),
    "absolute path": ({"images": [0, {"file_name": "/etc/x.jpg"}]}, True, "no image 'x.jpg'"),
    "missing image": ({"images": [0, {"file_name": "none.jpg"}]}, True, "no image 'none.jpg'"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("change", "skippable", "text"), COCO.values(), ids=COCO)
def test_coco(tmp_path, change, skippable, text):
    root = tmp_path / "c"
    (root / "images").mkdir(parents=True)
    for k in range(4):
        (root / f"images/{k}.jpg").write_bytes(JPEG)
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 64, "height": 48} for k in range(4)],
        "annotations": [{"id": k, "image_id": k, "bbox": [8, 8 + k, 20, 20], "category_id": 5} for k in range(4)],
        "categories": [{"id": 5, "name": "cat"}],
    }
    if isinstance(change, dict):
        for key, value in change.items():
            if key == "images" and value:
                content["images"][-1].update(value[1])
            else:
                content[key] = content[key] + value if key == "annotations" and value else value
    (root / "a.json").write_text(change if isinstance(change, str) else json.dumps(content))
    before = snapshot(root)
    with pytest.raises(UsageError, match=text) as caught:
        convert(root / "a.json", tmp_path / "out", format="coco")
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["c"]
    if skippable:
        halves = {"train": 0.5, "val": 0.5}
        summary = convert(root / "a.json", tmp_path / "out", format="coco", broken="skip", ratios=halves)
        assert len(summary["notes"]["broken"]) == 1 and sum(summary["boxes"].values()) >= 2
    assert snapshot(root) == before


def test_folder_that_cannot_be_read(voc, tmp_path, monkeypatch):
    """Permissions bind no superuser, so the refusal of the system is played."""
    real = os.scandir

    def refuse(path):
        if str(path).endswith("JPEGImages"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        convert(voc, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(voc, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(PermissionError):
        convert(voc, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [voc.name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("names: [a\n b: {{", "not valid YAML", id="not YAML"),
        pytest.param("path: {}\ntrain: images/train\n", "lacks names", id="no names"),
        pytest.param("path: {}\nnames: [a]\n", "lacks train, val", id="no splits"),
        pytest.param("path: {}\ntrain: images/gone\nnames: [a]\n", "missing path", id="missing folder"),
        pytest.param("path: {}\ntrain: images/train\nnames: {{0: a, 7: b}}\n", "not usable", id="gap in names"),
        pytest.param("path: {}\ntrain: labels/train\nnames: [a]\n", "holds no images", id="no images"),
    ],
)
def test_data_yaml(tmp_path, text, expected):
    root = make_yolo(tmp_path / "d", text)
    for work in (lambda: summarise(root), lambda: convert(root, tmp_path / "out", format="yolo")):
        with pytest.raises(UsageError, match=expected):
            work()
    shutil.rmtree(root)
    assert not list(tmp_path.iterdir())
