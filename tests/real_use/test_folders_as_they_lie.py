# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Folders as labelling tools and archives leave them are converted as they lie, and nothing in them vanishes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.utils import LOGGER

from yolo_ext import cli
from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.data.convert import convert
from yolo_ext.data.summary import summarise

JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))[1].tobytes()
XML = (
    "<annotation><size><width>64</width><height>48</height></size><object><name>cat</name><bndbox><xmin>8</xmin>"
    "<ymin>12</ymin><xmax>24</xmax><ymax>36</ymax></bndbox></object></annotation>"
)
TXT = "0 0.25 0.5 0.25 0.5\n"
NAMES = "cat\ndog\n"
IDS = range(4)
PARTS = ("train", "train", "valid", "test")


def coco(names: list[str], category: int = 1, **more) -> str:
    """Return a COCO file with one box in each image."""
    images = [{"id": k, "file_name": n, "width": 64, "height": 48} for k, n in enumerate(names)]
    boxes = [{"id": k, "image_id": k, "bbox": [8, 12, 16, 24], "category_id": category} for k in range(len(names))]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": category, "name": "cat"}], **more})


def lay(root: Path, *places: str, **files: str) -> Path:
    """Write images and annotations, whose paths may hold the number `{k}` and the part `{s}`, and further files."""
    for place in places:
        for k in IDS:
            put(root / place.format(k=k, s=PARTS[k]), JPEG if place.endswith("jpg") else XML if "xml" in place else TXT)
    for name, text in files.items():
        put(root / name, text)
    return root


def put(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def digest(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


RANDOM, FOLDERS = {"train": 3, "val": 1}, {"train": 2, "val": 1, "test": 1}
DATA = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['cat', 'dog']\n"
MASK = cv2.imencode(".png", np.zeros((48, 64), np.uint8))[1].tobytes()
LAYOUTS = {  # places, further files, images of each split
    "labelImg: XML beside images": (("{k}.jpg", "{k}.xml"), {"predefined_classes.txt": NAMES}, RANDOM),
    "annots": (("images/{k}.jpg", "annots/{k}.xml"), {}, RANDOM),
    "upper case": (("IMAGES/{k}.jpg", "ANNOTATIONS/{k}.xml"), {}, RANDOM),
    "xml": (("img/{k}.jpg", "xml/{k}.xml"), {}, RANDOM),
    "XML in labels": (("images/{k}.jpg", "labels/{k}.xml"), {}, RANDOM),
    "names of their own, deep": (("set/photos/{k}.jpg", "set/notes/{k}.xml"), {"set/pom.xml": "<project/>"}, RANDOM),
    "folder above a VOC folder": (
        ("VOC/JPEGImages/{k}.jpg", "VOC/Annotations/{k}.xml"),
        {**{f"VOC/SegmentationClass/{k}.png": MASK for k in IDS}, "VOC/ImageSets/Main/train.txt": "0\n1\n2",
         "VOC/ImageSets/Main/val.txt": "3"}, RANDOM,
    ),
    "Roboflow VOC": (("{s}/{k}_jpg.rf.0a.jpg", "{s}/{k}_jpg.rf.0a.xml"), {"README.roboflow.txt": "export"}, FOLDERS),
    "CVAT VOC": (
        ("JPEGImages/{k}.jpg", "Annotations/{k}.xml"),
        {"ImageSets/Main/default.txt": "0\n1\n2\n3\n", "labelmap.txt": "# label:color_rgb:parts:actions\ncat:::"},
        RANDOM,
    ),
    "Label Studio VOC": (("images/{k}.jpg", "Annotations/{k}.xml"), {}, RANDOM),
    "train, val and test folders": (("{s}/images/{k}.jpg", "{s}/annotations/{k}.xml"), {}, FOLDERS),
    "images/<split>, xml/<split>": (("images/{s}/{k}.jpg", "xml/{s}/{k}.xml"), {}, FOLDERS),
    "txt beside images": (("{k}.jpg", "{k}.txt"), {"classes.txt": NAMES}, RANDOM),
    "labelImg YOLO": (("pictures/{k}.jpg", "labels/{k}.txt"), {"labels/classes.txt": NAMES}, RANDOM),
    "Label Studio YOLO": (
        ("images/{k}.jpg", "labels/{k}.txt"), {"classes.txt": NAMES, "notes.json": '{"categories": []}'}, RANDOM,
    ),
    "upper case YOLO": (("IMAGES/{k}.jpg", "LABELS/{k}.txt"), {"classes.txt": NAMES}, RANDOM),
    "Roboflow YOLO": (("{s}/images/{k}.jpg", "{s}/labels/{k}.txt"), {"data.yaml": DATA}, FOLDERS),
    "Roboflow darknet": (
        ("{s}/{k}.jpg", "{s}/{k}.txt"), {f"{s}/_darknet.labels": NAMES for s in ("train", "valid", "test")}, FOLDERS,
    ),
    "CVAT YOLO 1.1": (
        ("obj_train_data/{k}.jpg", "obj_train_data/{k}.txt"),
        {"obj.names": NAMES, "obj.data": "classes = 2\nnames = data/obj.names\n",
         "train.txt": "".join(f"data/obj_train_data/{k}.jpg\n" for k in IDS)}, RANDOM,
    ),
    "YOLO with lists": (
        ("pool/{k}.jpg", "pool/{k}.txt"), {"classes.txt": NAMES, "train.txt": "pool/0.jpg\n1.jpg", "valid.txt": "2\n3"},
        {"train": 2, "val": 2},
    ),
    "Label Studio COCO": (
        ("images/{k}.jpg",), {"result.json": coco([f"images/{k}.jpg" for k in IDS], 0)}, RANDOM,
    ),
    "Label Studio COCO of Windows": (
        ("images/{k}.jpg",), {"result.json": coco([f"images\\{k}.jpg" for k in IDS])}, RANDOM,
    ),
    "CVAT COCO": (
        ("images/default/{k}.jpg",), {"annotations/instances_default.json": coco([f"{k}.jpg" for k in IDS])}, RANDOM,
    ),
    "Roboflow COCO": (
        ("{s}/{k}.jpg",),
        {f"{s}/_annotations.coco.json": coco([f"{k}.jpg" for k in IDS if PARTS[k] == s]) for s in {*PARTS}}, FOLDERS,
    ),
    "COCO, images anywhere": (("some/where/{k}.jpg",), {"x/y/a.json": coco([f"{k}.jpg" for k in IDS])}, RANDOM),
    "COCO of one flat folder": (("{k}.jpg",), {"a.json": coco([f"{k}.jpg" for k in IDS])}, RANDOM),
}  # fmt: skip


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Collect what is said; Ultralytics' logger does not propagate to pytest."""
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(LOGGER, level, lambda text, *_: lines.append(str(text)))
    return lines


@pytest.mark.parametrize(("places", "files", "splits"), LAYOUTS.values(), ids=LAYOUTS)
def test_as_it_lies(tmp_path, said, places, files, splits):
    root = lay(tmp_path / "my sét", *places, **files)
    before = digest(root)
    summary = convert(root, tmp_path / "out")
    assert summary["images"] == splits and summary["boxes"]["cat"] == 4
    rows = {p.read_text() for p in (tmp_path / "out/labels").rglob("*.txt")}
    assert rows in ({TXT}, {"0 0.250000 0.500000 0.250000 0.500000\n"})
    info = check_data(summary["data"][0], need=tuple(splits))
    assert {s: len(i) for s, i in info["images"].items()} == splits
    assert {p.stem[0] for i in info["images"].values() for p in i} == set("0123")
    assert digest(root) == before
    assert sum(line.startswith("Found in") and "images: 4 in" in line for line in said) == 1


@pytest.mark.parametrize("beside", [False, True], ids=["below the source", "elsewhere"])
def test_folders_that_are_named(tmp_path, beside):
    root = lay(tmp_path / "s", "a/{k}.jpg", "b/{k}.jpg", "c/{k}.xml", "d/{k}.xml")
    with pytest.raises(UsageError, match="fits several images"):
        convert(root, tmp_path / "out")
    source = lay(tmp_path / "t", "notes.txt") if beside else root
    words = [f"source={source}", f"out={tmp_path / 'out'}", f"images={root / 'b'}", f"annotations={root / 'd'}"]
    assert cli.main(["convert", *words]) == 0
    assert len([*(tmp_path / "out/images").rglob("*.jpg")]) == 4
    for key in ("images", "annotations"):
        with pytest.raises(UsageError, match=f"'{key}=.*does not exist"):
            convert(root, tmp_path / "no", **{key: root / "gone"})


def test_names_of_the_yaml_with_images_that_are_named(tmp_path):
    """CVAT writes lists that start from a folder which is not in the archive."""
    text = "path: ./\ntrain: train.txt\nnames:\n  0: cat\n  1: dog\n"
    root = lay(tmp_path / "s", "images/train/{k}.jpg", "labels/train/{k}.txt", **{"data.yaml": text})
    put(root / "train.txt", "".join(f"data/images/train/{k}.jpg\n" for k in IDS))
    assert convert(root, tmp_path / "out", images=root / "images")["boxes"] == {"cat": 4, "dog": 0}


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        pytest.param(("{k}.jpg",), "no label file found, looked in", id="images only"),
        pytest.param(("{k}.xml",), "No VOC images in .* Give images=FOLDER", id="annotations only"),
        pytest.param((), "holds no images", id="nothing"),
        pytest.param(("{k}.txt",), "holds no images", id="labels only"),
    ],
)
def test_half_a_dataset(tmp_path, places, expected):
    root = lay(tmp_path / "s", *places, **{"classes.txt": NAMES})
    with pytest.raises(UsageError, match=expected):
        convert(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_annotations_that_are_known(tmp_path):
    root = lay(tmp_path / "s", "{k}.jpg", **{"annotations.xml": "<annotations/>", "captions.json": '{"images": []}'})
    with pytest.raises(UsageError, match=r"neither VOC, COCO nor YOLO annotations\. Give annotations=FOLDER"):
        convert(root, tmp_path / "out")


def test_labels_where_training_does_not_look(tmp_path):
    """They are found by name, and may not stay where they are."""
    root = lay(tmp_path / "s", "pictures/{k}.jpg", "texts/{k}.txt", **{"classes.txt": NAMES})
    with pytest.raises(UsageError, match="4 labels lie where training does not look"):
        convert(root, tmp_path / "out", format="yolo", files="list")
    assert check_data(convert(root, tmp_path / "out")["data"][0])["nc"] == 2


def test_summary_of_a_flat_folder(tmp_path):
    found = summarise(lay(tmp_path / "s", "{k}.jpg", "{k}.txt", **{"classes.txt": NAMES}))
    assert found["splits"]["train"]["images"] == 4 and found["classes"]["cat"]["train"] == 4


def test_a_yaml_of_another_machine(tmp_path):
    text = "train: /content/set/train/images\nval: /content/set/valid/images\nnames: [cat, dog]\n"
    root = lay(tmp_path / "s", "{s}/images/{k}.jpg", "{s}/labels/{k}.txt", **{"data.yaml": text})
    with pytest.raises(UsageError, match=r"missing path .*/content.*images=FOLDER out=NEW"):
        convert(root, tmp_path / "out")
    assert convert(root, tmp_path / "out", images=root)["images"] == FOLDERS


def record(out: Path) -> dict[str, dict[str, int]]:
    """Return the names in the record of a conversion, by kind."""
    return {kind: note["names"] for kind, note in json.loads((out / "convert.json").read_text())["notes"].items()}


def test_nothing_vanishes_from_voc(tmp_path, said):
    root = lay(tmp_path / "s", "JPEGImages/{k}.jpg", "Annotations/{k}.xml")
    put(root / "JPEGImages/bare.jpg", JPEG)
    put(root / "Annotations/alone.xml", XML)
    put(root / "more/3.xml", XML)
    put(root / "Annotations/0.xml", XML.replace("cat", "dog"))
    with pytest.raises(UsageError, match=r"2 problems, .*annotates the same image.*alone has no image"):
        convert(root, tmp_path / "out")
    summary = convert(root, tmp_path / "out", broken="skip", classes=["cat"])
    assert summary["images"] == {"train": 2, "val": 1} and summary["boxes"] == {"cat": 2}
    told = record(tmp_path / "out")
    assert told["class"] == {"dog": 1} and told["unannotated"] == {"bare": 1}
    assert len(told["broken"]) == 2 and any("3.xml" in text for text in told["broken"])
    assert not [p for p in (tmp_path / "out").rglob("3.*")], "which of two annotations is right is not known"
    assert any("left out, each image whole" in line for line in said) and any("convert.json" in line for line in said)


@pytest.mark.parametrize("kind", ["xml", "txt"])
def test_which_annotation_is_meant_is_not_known(tmp_path, kind):
    """An image that shares an annotation with another one, or has two, is left out whole, never kept as background."""
    root = lay(tmp_path / "s", "a/{k}.jpg", "notes/a/{k}." + kind, **{"classes.txt": NAMES})
    put(root / "b/0.jpg", JPEG)
    put(root / "c/0.jpg", JPEG)
    for place in ("x", "y"):
        put(root / f"{place}/1.{kind}", XML if kind == "xml" else TXT)
    (root / f"notes/a/0.{kind}").rename(root / f"0.{kind}")
    (root / f"notes/a/1.{kind}").unlink()
    (root / "train.txt").write_text("a/2\na/0\nb/0\n1")
    (root / "val.txt").write_text("3\nc/0")
    with pytest.raises(UsageError, match=r"problems.*fits several images"):
        convert(root, tmp_path / "out")
    summary = convert(root, tmp_path / "out", broken="skip")
    assert summary["images"] == {"train": 1, "val": 1} and "background" not in summary["notes"]
    told = " ".join(record(tmp_path / "out")["broken"])
    assert "fits several images" in told and "annotates the same image as" in told


def test_nothing_vanishes_from_yolo(tmp_path):
    root = lay(tmp_path / "s", "images/train/{k}.jpg", "labels/train/{k}.txt", "images/val/{k}.jpg")
    put(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")
    put(root / "labels/train/alone.txt", TXT)
    put(root / "labels/val/0.txt", TXT)
    convert(root, tmp_path / "out", format="yolo")
    told = record(tmp_path / "out")
    assert [Path(p).name for p in told["orphan"]] == ["alone.txt"]
    assert told["background"] == {f"val_{k}": 1 for k in (1, 2, 3)}


OUTLINE = {"segmentation": [[8, 12, 24, 12, 24, 36, 8, 36]]}


@pytest.mark.parametrize(
    ("to", "task", "boxed"),
    [("yolo", "detect", 4), ("voc", "detect", 4), ("coco", "detect", 0), ("yolo", "segment", 0)],
)
def test_polygons_that_become_boxes_are_counted(tmp_path, to, task, boxed):
    content = json.loads(coco([f"{k}.jpg" for k in IDS]))
    content["annotations"] = [{**a, **OUTLINE} for a in content["annotations"]]
    root = lay(tmp_path / "s", "{k}.jpg", **{"a.json": json.dumps(content)})
    summary = convert(root, tmp_path / "out", to=to, task=task)
    assert sum(summary["notes"].get("boxed", {}).values()) == boxed
    assert (tmp_path / "out/convert.json").exists() == bool(boxed)


def test_nothing_to_tell(tmp_path):
    convert(lay(tmp_path / "s", "{k}.jpg", "{k}.xml"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.yaml", "images", "labels"]


@pytest.mark.parametrize("codec", ["gbk", "utf-16", "utf-8-sig"])
def test_text_of_chinese_windows(tmp_path, codec):
    root = lay(tmp_path / "s", "{k}.jpg", "{k}.txt", **{"classes.txt": ""})
    (root / "classes.txt").write_bytes("红细胞\n白细胞\n".encode(codec))
    (root / "train.txt").write_bytes("0\n1\n2\n".encode(codec))
    (root / "val.txt").write_bytes("3\n".encode(codec))
    summary = convert(root, tmp_path / "out")
    assert summary["boxes"] == {"红细胞": 4, "白细胞": 0} and summary["images"] == RANDOM


@pytest.mark.parametrize("declared", ["", '<?xml version="1.0" encoding="gbk"?>\n'], ids=["no word of it", "declared"])
def test_xml_of_chinese_windows(tmp_path, declared):
    root = lay(tmp_path / "s", "{k}.jpg", "{k}.xml")
    for k in IDS:
        (root / f"{k}.xml").write_bytes((declared + XML.replace("cat", "红细胞")).encode("gbk"))
    assert convert(root, tmp_path / "out")["boxes"] == {"红细胞": 4}


def test_text_that_cannot_be_read(tmp_path):
    root = lay(tmp_path / "s", "{k}.jpg", "{k}.txt")
    (root / "classes.txt").write_bytes("Müller\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"classes\.txt' cannot be read as text.*Save it as UTF-8"):
        convert(root, tmp_path / "out")


@pytest.mark.parametrize("name", ["$", "a$b$", "$_$", "cost \\$", "$\\frac$"])
@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_dollars_in_a_class_name(tmp_path, name, to):
    root = lay(tmp_path / "s", "{k}.jpg", "{k}.txt", **{"classes.txt": f"{name}\nother\n"})
    there = convert(root, tmp_path / "there", to=to)
    assert there["boxes"][name] == 4
    if to == "yolo":
        assert cli.main(["data", f"check={there['data'][0]}", f"project={tmp_path}", "name=d"]) == 1, (
            "the images are one"
        )
    else:
        assert convert(tmp_path / "there", tmp_path / "back")["boxes"][name] == 4
