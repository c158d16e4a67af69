# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext label` with models: .pt and .onnx, boxes and polygons, and labels of a trained one against the truth."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.data.utils import img2label_paths
from ultralytics.nn.tasks import OBBModel
from ultralytics.utils.metrics import bbox_ioa

from yolo_ext.checkpoint import save_model
from yolo_ext.cli import main
from yolo_ext.commands.label import label
from yolo_ext.data.check import check_label
from yolo_ext.data.formats import read_voc
from yolo_ext.data.label import preview_of
from yolo_ext.stock.load import load_model

SHARED = Path(__file__).parents[2].parent / "shared"
BCCD, WEIGHTS = SHARED / "data/bccd", SHARED / "weights/bccd_yolov8n_192.pt"
CONF = 0.55


def tree(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def lively_(model: nn.Module) -> nn.Module:
    """Make a model that was never trained find objects of all classes."""
    torch.manual_seed(0)
    for branch in model.model[-1].cv3:
        nn.init.normal_(branch[-1].weight, std=1.0)
        nn.init.zeros_(branch[-1].bias)
    return model


@pytest.fixture(scope="module")
def lively(tiny, tmp_path_factory) -> Path:
    return save_model(lively_(load_model(tiny)[0]), tmp_path_factory.mktemp("lively") / "tiny.pt")


@pytest.fixture
def place(lively, shapes, tmp_path, monkeypatch) -> Path:
    """Work in a folder with a model and four images."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(lively, "tiny.pt")
    shutil.copytree(shapes.parent / "images/val", "shots")
    return tmp_path


def test_command_writes_everything_and_nothing_twice(place, capsys):
    before = tree(place / "shots")
    words = ["label", "model=tiny.pt", "source=shots", "out=out", f"conf={CONF}", "imgsz=64"]
    assert main(words) == 0
    found = tree(place / "out")
    assert {"detections.jsonl", "label.json", "review.html", "data.yaml"} < found.keys()
    images = sorted(before)
    for name in images:
        assert {f"images/{name}", f"labels/{Path(name).stem}.txt", preview_of(name)} < found.keys()
        check_label(place / f"out/labels/{Path(name).stem}.txt", 3)
    for again in (words, ["label", "resume=out"], ["label", "resume=True", "out=out", f"conf={CONF}"]):
        assert main(again) == 0
        assert tree(place / "out") == found
    assert main(["label", "resume=out", "conf=0.9"]) == 2
    assert tree(place / "shots") == before
    assert sorted(p.name for p in place.iterdir()) == ["out", "shots", "tiny.pt"]
    summary = json.loads((place / "out/label.json").read_text())
    assert (summary["images"], summary["labelled"], summary["kept"]) == (4, 4, [])
    assert sum(c["boxes"] for c in summary["classes"].values()) > 0


def test_labels_are_what_the_predictor_finds(place):
    found = label("tiny.pt", "shots", "out", conf=CONF, imgsz=64, save_conf=True)
    assert sum(c["boxes"] for c in found["classes"].values()) > 4
    for image in sorted(Path("shots").iterdir()):
        result = YOLO("tiny.pt").predict(image, conf=CONF, imgsz=64, verbose=False)[0].boxes
        rows = np.loadtxt(f"out/labels/{image.stem}.txt", ndmin=2)
        wanted = np.column_stack([result.cls, result.xywhn, result.conf])
        assert np.allclose(rows, wanted, atol=2e-4)


@pytest.mark.parametrize("classes", ["square", "1", 1, ["square"]], ids=str)
def test_only_chosen_classes(place, classes):
    assert len(label("tiny.pt", "shots", "all", conf=CONF, imgsz=64)["classes"]) > 1
    found = label("tiny.pt", "shots", "out", conf=CONF, imgsz=64, classes=classes)
    assert set(found["classes"]) == {"square"}
    assert {row.split()[0] for f in Path("out/labels").iterdir() for row in f.read_text().splitlines()} == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_labels_as_the_pt(place, capsys, dynamic):
    from yolo_ext.deployment.export import export_onnx

    export_onnx("tiny.pt", Path("tiny.onnx"), 64, dynamic=dynamic)
    options = {"conf": CONF, "previews": False, "files": "none"}
    a = label("tiny.pt", "shots", "a", imgsz=64, **options)
    b = label("tiny.onnx", "shots", "b", **options)
    assert a["settings"]["imgsz"] == 64 and b["settings"]["imgsz"] in (64, [64, 64])
    assert main(["label", "model=tiny.onnx", "source=shots", "out=c", "imgsz=96"]) == (0 if dynamic else 2)
    assert dynamic or "is fixed to [64, 64]" in capsys.readouterr().err
    assert {n: c["boxes"] for n, c in a["classes"].items()} == {n: c["boxes"] for n, c in b["classes"].items()}
    for file in Path("a/labels").iterdir():
        a, b = (np.loadtxt(Path(d) / "labels" / file.name, ndmin=2) for d in "ab")
        assert len(a) and np.allclose(a[np.lexsort(a.T)], b[np.lexsort(b.T)], atol=1e-3)


def test_polygons(place, randomise):
    torch.manual_seed(0)
    save_model(lively_(randomise(YOLO("yolov8n-seg.yaml", verbose=False).model)), place / "seg.pt")
    found = label("seg.pt", "shots", "out", conf=0.5, imgsz=64)
    assert found["classes"]
    rows = [r.split() for f in Path("out/labels").iterdir() for r in f.read_text().splitlines()]
    assert rows and all(len(r) >= 7 and len(r) % 2 for r in rows)
    for p in img2label_paths([str(p) for p in Path("out/images").iterdir()]):
        check_label(Path(p), 80)
    assert "<polygon" in Path("out/review.html").read_text()
    label("seg.pt", "shots", "out", conf=0.5, imgsz=64, format="coco")
    data = json.loads(Path("out/annotations.json").read_text())
    assert all(len(a["segmentation"][0]) >= 6 and a["area"] >= 0 for a in data["annotations"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("model=tiny.pt source=shots", "Missing: out", id="no out"),
        pytest.param("model=none.pt source=shots out=o", "'none.pt' does not exist", id="no model"),
        pytest.param("model=none.onnx source=shots out=o", "'none.onnx' does not exist", id="no onnx"),
        pytest.param("model=bad.onnx source=shots out=o", "cannot load 'bad.onnx'", id="broken onnx"),
        pytest.param("model=bad.txt source=shots out=o", "cannot label images", id="no model file"),
        pytest.param("model=tiny.pt source=nowhere out=o", "nowhere', which does not exist", id="no source"),
        pytest.param("model=tiny.pt source=shots out=shots/o", "lies inside the source", id="out in source"),
        pytest.param("model=tiny.pt source=shots out=o format=xml", "Unknown label format 'xml'", id="format"),
        pytest.param("model=tiny.pt source=shots out=o classes=sqare", "Did you mean 'square'", id="class"),
        pytest.param("model=tiny.pt source=shots out=o classes=7", "Unknown classes 7", id="class number"),
        pytest.param("model=tiny.pt source=shots out=o conf=2", "'conf=2' is illegal", id="conf"),
        pytest.param("model=tiny.pt source=shots out=o iou=high", "'iou=high' is illegal", id="iou"),
        pytest.param("model=tiny.pt source=shots out=o imgsz=0", "'imgsz=0' is illegal", id="imgsz"),
        pytest.param("model=tiny.pt source=shots out=o overwrite=never", "'overwrite=never' is illegal", id="flag"),
        pytest.param("model=tiny.pt source=shots out=o files=move", "'files=move' is illegal", id="files"),
        pytest.param("model=tiny.pt source=shots out=o colour=1", "Unknown key 'colour'", id="key"),
        pytest.param("model=obb.pt source=shots out=o", "'obb' model. Labelling takes detect", id="task"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(place, capsys, words, expected):
    Path("bad.onnx").write_bytes(b"no model")
    Path("bad.txt").write_text("no model")
    if "obb.pt" in words:
        save_model(OBBModel("yolov8n-obb.yaml", nc=3, verbose=False), place / "obb.pt")
    before = tree(place)
    assert main(["label", *words.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert tree(place) == before and not Path("o").exists()


def true_boxes(stem: str, names: list[str]) -> np.ndarray:
    """Return the true boxes of an image, class first."""
    objects = read_voc(BCCD / "Annotations" / f"{stem}.xml").objects
    return np.array([[names.index(o.name), *o.box] for o in objects]).reshape(-1, 5)


def matches(found: np.ndarray, true: np.ndarray, iou: float = 0.5) -> int:
    """Return how many boxes pair one to one with a true one of their class, the best overlap first."""
    overlap = bbox_ioa(found[:, 1:], true[:, 1:], iou=True) * (found[:, :1] == true[None, :, 0])
    pairs = 0
    while overlap.size and overlap.max() >= iou:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[i], overlap[:, j] = 0, 0
        pairs += 1
    return pairs


def written_boxes(out: Path, format: str, stem: str, names: list[str]) -> np.ndarray:
    """Read a label back, class first, corners in pixels of a 640 x 480 image."""
    if format == "voc":
        objects = read_voc(out / f"Annotations/{stem}.xml").objects
        return np.array([[names.index(o.name), *o.box] for o in objects]).reshape(-1, 5)
    rows = np.loadtxt(out / f"labels/{stem}.txt", ndmin=2).reshape(-1, 5)
    centre, half = rows[:, 1:3] * [640, 480], rows[:, 3:] * [320, 240]
    return np.hstack([rows[:, :1], centre - half, centre + half])


@pytest.mark.bccd
@pytest.mark.skipif(
    not (BCCD.is_dir() and WEIGHTS.is_file()), reason="BCCD data and weights are not beside the checkout"
)
@pytest.mark.parametrize(
    ("format", "conf", "precision", "recall"),
    [("yolo", 0.25, 0.65, 0.88), ("voc", 0.25, 0.65, 0.88), ("yolo", 0.5, 0.82, 0.67)],
)
def test_precision_and_recall_of_written_labels(tmp_path, format, conf, precision, recall, record_property):
    """Many red cells of this set have no true box, so they count as false: precision is understated."""
    stems = (BCCD / "ImageSets/Main/test.txt").read_text().split()
    images = [str(BCCD / f"JPEGImages/{s}.jpg") for s in stems]
    out = tmp_path / "out"
    options = {"format": format, "conf": conf, "files": "none"}
    found = label(WEIGHTS, images, out, **options)
    assert found["labelled"] == len(stems) == 72
    names = found["settings"]["names"]
    totals = {}
    for name in (*names, "all"):
        hits = written = true = 0
        for stem in stems:
            a, b = written_boxes(out, format, stem, names), true_boxes(stem, names)
            if name != "all":
                a, b = (x[x[:, 0] == names.index(name)] for x in (a, b))
            hits, written, true = hits + matches(a, b), written + len(a), true + len(b)
        totals[name] = hits / written, hits / true
        record_property(name, totals[name])
        print(f"{format} {conf} {name:<9} precision {hits / written:.3f} recall {hits / true:.3f} ({written}, {true})")
    assert totals["all"][0] > precision and totals["all"][1] > recall
    assert totals["WBC"][0] > 0.93 and totals["WBC"][1] == 1
    before = tree(out)
    assert label(WEIGHTS, images, out, **options) == found
    assert tree(out) == before
