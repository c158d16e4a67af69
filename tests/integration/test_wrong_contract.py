# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Limits that cannot be held and evidence that cannot be compared: one message, exit status 2, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.utils import YAML

from yolo_ext import cli
from yolo_ext.deployment.export import export_onnx
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.evidence import Evidence
from yolo_ext.stock.load import load_model

DATA = "data=shapes/data.yaml imgsz=64"
RUN = f"model=tiny.pt {DATA} epochs=1 device=cpu workers=0"
COMMANDS = {
    "compress": f"compress {RUN} prune.speedup=1.3",
    "prune": f"prune {RUN} prune.speedup=1.3",
    "quantize": f"quantize {RUN}",
    "train": f"train {RUN} prune.speedup=1.3",
    "distill": f"distill {RUN}",
    "bench": f"bench models=tiny.pt,tiny.onnx {DATA} rounds=1 memory=False",
    "verify": f"verify model=tiny.pt onnx=tiny.onnx {DATA}",
    "compare": f"compare model=tiny.pt other=tiny.onnx {DATA}",
}
LIMITS = {
    "unknown class": ("contract.recall.hexagon=-0.1", ["recall.hexagon", "Legal: map, recall"]),
    "misspelt class": ("contract.map.circel=-0.1", ["circel", "'map.circle'"]),
    "unknown figure": ("contract.mapp=-0.1", ["mapp", "'map'"]),
    "unknown size": ("contract.map.tiny=-0.1", ["map.tiny", "small"]),
    "masks of a detector": ("contract.map_mask=-0.1", ["map_mask"]),
    "top-1 of a detector": ("contract.top1=-0.1", ["top1"]),
    "wrong sign": ("contract.map=0.1", ["contract.map=0.1", "-0.01"]),
    "wrong sign of a class": ("contract.recall.circle=0.1", ["contract.recall.circle=0.1", "-0.01"]),
    "percent": ("contract.map=-5", ["contract.map=-5", "-0.01"]),
    "no number": ("contract.map=low", ["contract.map=low", "-0.01"]),
    "true": ("contract.map=True", ["contract.map=True", "-0.01"]),
    "no number in a file": ("contract=nan.yaml", ["map", "nan"]),
    "a number alone": ("contract=-0.01", ["contract=-0.01", "Give a YAML file, or contract.map=-0.01"]),
    "no file": ("contract=gone.yaml", ["gone.yaml", "does not exist"]),
    "a folder": ("contract=shapes", ["shapes"]),
    "no mapping": ("contract=list.yaml", ["list.yaml"]),
    "empty": ("contract=empty.yaml", ["empty.yaml"]),
    "no YAML": ("contract=broken.yaml", ["broken.yaml"]),
    "no class with objects": ("contract.recall.triangle=-0.1 data=two.yaml", ["triangle", "val"]),
    "confidence above 1": ("confidence=2", ["confidence=2"]),
    "confidence below 0": ("confidence=-0.5", ["confidence=-0.5"]),
    "confidence no number": ("confidence=high", ["confidence=high"]),
}
EVERYWHERE = ("unknown class", "wrong sign", "no class with objects")


@pytest.fixture(scope="module")
def onnx(tiny, tmp_path_factory) -> Path:
    return export_onnx(load_model(tiny)[0], tmp_path_factory.mktemp("onnx") / "tiny.onnx", 64)


@pytest.fixture
def place(place, onnx) -> Path:
    """Work in a folder with a model, files of limits, and a set without triangles in val."""
    for cache in place.rglob("*.cache"):
        cache.unlink()
    shutil.copy(onnx, "tiny.onnx")
    shutil.copytree("shapes", "two")
    for file in Path("two/labels/val").iterdir():
        file.write_text("".join(x for x in file.read_text().splitlines(True) if x[0] != "2"))
    YAML.save("two.yaml", {**YAML.load("shapes/data.yaml"), "path": str(place / "two")})
    for name, text in {"nan": "map: .nan", "list": "- map", "empty": "", "broken": "map: [a\n b: :"}.items():
        Path(f"{name}.yaml").write_text(text)
    return place


def refused(place: Path, capsys: pytest.CaptureFixture[str], words: str) -> str:
    """Run what must be refused, and return the message."""
    before = set(place.rglob("*"))
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("yolo-ext: ") and "Traceback" not in said and len(said) < 1200
    left = {f for f in set(place.rglob("*")) - before if f.suffix != ".cache"}  # Ultralytics' of labels
    assert not left and before <= set(place.rglob("*")), "wrong input must not leave anything behind"
    return said


@pytest.mark.parametrize(("limit", "fragments"), LIMITS.values(), ids=LIMITS)
def test_limits_that_cannot_be(place, capsys, limit, fragments):
    said = refused(place, capsys, f"{COMMANDS['compress']} {limit}")
    assert [f for f in fragments if f not in said] == [], said


@pytest.mark.parametrize("limit", EVERYWHERE)
@pytest.mark.parametrize("command", list(COMMANDS)[1:])
def test_limits_that_cannot_be_in_any_command(place, capsys, command, limit):
    words, fragments = LIMITS[limit]
    said = refused(place, capsys, f"{COMMANDS[command]} {words}")
    assert [f for f in fragments if f not in said] == [], said


def test_limits_without_data_to_hold_them_on(place, capsys):
    said = refused(place, capsys, "prune model=tiny.pt epochs=0 imgsz=64 prune.ratio=0.2 contract.map=-0.01")
    assert "contract" in said and "data" in said


# Evidence ----------------------------------------------------------------------------------------------------------
def repaint(image: Path) -> None:
    """Change pixels; the file keeps its name and, as it is not compressed, its size."""
    pixels = cv2.imread(str(image))
    cv2.imwrite(str(image), 255 - pixels)


def move(label: Path) -> None:
    (first, x, *rest), *others = (line.split() for line in label.read_text().splitlines())
    label.write_text("\n".join(" ".join(row) for row in ([first, f"{float(x) * 0.97:.6f}", *rest], *others)))


def recode(label: Path) -> None:
    text = label.read_text()
    label.write_text(str((int(text[0]) + 1) % 3) + text[1:])


OTHERS = {
    "pixels": ("images", lambda root: repaint(root / "images/val/00001.bmp")),
    "an image less": ("images", lambda root: (root / "images/val/00002.bmp").unlink()),
    "a box": ("labels", lambda root: move(root / "labels/val/00001.txt")),
    "an object less": ("labels", lambda root: (root / "labels/val/00003.txt").unlink()),
    "a class": ("labels", lambda root: recode(root / "labels/val/00003.txt")),
}


@pytest.fixture
def measured(place) -> Path:
    """Return a folder with the evidence of a model over images that are not compressed."""
    for file in Path("shapes/images/val").iterdir():
        cv2.imwrite(str(file.with_suffix(".bmp")), cv2.imread(str(file)))
        file.unlink()
    keep("shapes", "base.npz")
    return place


def keep(folder: str, name: str) -> Evidence:
    found: list[Evidence] = []
    accuracy("tiny.pt", f"{folder}/data.yaml", 64, keep=found.append)
    Path(name).write_bytes(found[0].data())
    return found[0]


@pytest.mark.parametrize(("what", "change"), OTHERS.values(), ids=OTHERS)
def test_evidence_over_something_else(measured, capsys, what, change):
    shutil.copytree("shapes", "other", ignore=shutil.ignore_patterns("*.cache"))
    YAML.save("other/data.yaml", {**YAML.load("shapes/data.yaml"), "path": str(measured / "other")})
    keep("other", "same.npz")
    assert cli.main(["compare", "model=base.npz", "other=same.npz", "resamples=2", "name=same", "project=out"]) == 0
    change(Path("other"))
    for cache in measured.rglob("*.cache"):
        cache.unlink()
    keep("other", "other.npz")
    said = refused(measured, capsys, "compare model=base.npz other=other.npz project=out name=refused")
    assert f"different {what}" in said and "same split" in said


FINER = {  # what a row says besides class and box
    "segment": ("0 .2 .2 .8 .2 .8 .8 .2 .8", "0 .2 .2 .8 .2 .8 .8 .5 .5 .2 .8"),
    "pose": ("0 .5 .5 .6 .6 .3 .3", "0 .5 .5 .6 .6 .4 .4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", FINER)
def test_other_polygons_or_keypoints_are_other_labels(learned, tmp_path, task):
    model, data = learned(task, {"segment": "yolov8n", "pose": "yolo11n"}[task])
    hashes = set()
    for i, row in enumerate(FINER[task]):
        root = tmp_path / str(i)
        for split in ("train", "val"):
            (root / "images" / split).mkdir(parents=True)
            (root / "labels" / split).mkdir(parents=True)
            cv2.imwrite(str(root / "images" / split / "a.png"), np.full((64, 64, 3), 90, np.uint8))
            points = " .5 .5 .7 .7" if task == "pose" else ""
            (root / "labels" / split / "a.txt").write_text(row + points)
        YAML.save(root / "data.yaml", {**YAML.load(data), "path": str(root)})
        found: list[Evidence] = []
        accuracy(model, root / "data.yaml", 64, keep=found.append)
        hashes.add(found[0].about["labels_hash"])
    assert len(hashes) == 2
