# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A folder in which the commands of the pages work: a small model, a small set, and what they are called there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ultralytics import YOLO, cfg
from ultralytics.utils import SETTINGS, YAML

from yolo_ext import cli
from yolo_ext.data.shapes import make_shapes

NAMES = ["person", "car", "bus"]  # as pages call them
SMALL = "imgsz=64 batch=8 workers=0 plots=False"
LAYERS = """
from torch import nn

class Fork(nn.Module):
    def forward(self, x):
        return x
"""
SCORES = "def score(group):\n    return sum(w.abs().amax(1) for w in group.out)\n"
PRUNER = """
import torch_pruning as tp

def make(model, example_inputs, options):
    return tp.pruner.MagnitudePruner(model, example_inputs, tp.importance.LAMPImportance(), global_pruning=True,
                                     pruning_ratio=options.ratio, round_to=options.round_to)
"""


def ran(words: str) -> None:
    """Run a command, which may find that a check fails."""
    assert cli.main(words.split()) in (0, 1), words


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a few photos and a VOC file beside each."""
    folder = tmp_path_factory.mktemp("shots")
    data = make_shapes(folder / "set", train=8, val=8, imgsz=64)
    YAML.save(data, {**YAML.load(data), "names": NAMES})
    ran(f"convert source={data} to=voc out={folder / 'voc'}")
    (folder / "photos").mkdir()
    for kind in ("JPEGImages", "Annotations"):
        for file in (folder / "voc" / kind).iterdir():
            shutil.copy(file, folder / "photos")
    return folder / "photos"


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path, shots: Path) -> Path:
    """Return the folder; what is in it was made by the commands that would make it."""
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patch:
        at_home(folder, patch)
        _furnish(folder, tiny_yaml, shots)
    return folder


def at_home(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in a folder whose runs lie in `runs`, as they do where no test is running."""
    patch.chdir(folder)
    patch.setattr(cfg, "TESTS_RUNNING", False)
    patch.setitem(SETTINGS, "runs_dir", str(folder / "runs"))


def _furnish(folder: Path, tiny_yaml: Path, shots: Path) -> None:
    data = make_shapes(folder / "set", train=16, val=8, imgsz=64)
    YAML.save("data.yaml", {**YAML.load(data), "path": str(folder / "set"), "names": NAMES})
    model = YOLO(str(tiny_yaml))
    model.train(data="data.yaml", epochs=3, name="base", device="cpu", **_options())
    for name in ("best.pt", "yolov8n.pt", "yolov8s.pt", "bigger.pt", "base.pt"):
        shutil.copy(model.trainer.best, name)
    for place in ("photos", "shots", "images", "folder"):
        shutil.copytree(shots, place)
    shutil.copytree(shots, "dataset/images", ignore=shutil.ignore_patterns("*.xml"))
    picture = next(shots.glob("*.jpg"))
    for name in ("shot.jpg", "image.jpg"):
        shutil.copy(picture, name)
    shutil.copytree(shots.parent / "voc", "VOC2012")
    lists = Path("VOC2012/ImageSets/Main")
    shutil.copy(lists / "train.txt", lists / "trainval.txt")
    shutil.copy(lists / "val.txt", lists / "test.txt")
    ran("convert source=photos out=mydata ratio=0.5,0.5")
    ran("convert source=data.yaml to=coco out=coco")
    coco = json.loads(next(Path("coco").rglob("*train*.json")).read_text())
    Path("instances.json").write_text(json.dumps(_with_polygons(coco)))
    ran(f"prune model=best.pt data=data.yaml epochs=1 prune.speedup=1.3 {SMALL} name=pruned")
    shutil.copy("runs/detect/pruned/weights/best.pt", "pruned.pt")
    ran(f"compress model=best.pt data=data.yaml epochs=1 prune.speedup=1.3 {SMALL}")
    ran("quantize model=best.pt data=data.yaml imgsz=64")
    _exported()
    for stage, name in (("base", "base"), ("ptq", "other")):
        for place in (f"{stage}/evidence.npz", f"run/{name}.npz"):
            Path(place).parent.mkdir(exist_ok=True)
            shutil.copy(f"runs/detect/quantize/{stage}/evidence.npz", place)
    Path("mypkg").mkdir()
    for name, text in {"__init__": "", "layers": LAYERS, "scores": SCORES, "prune": PRUNER}.items():
        Path(f"mypkg/{name}.py").write_text(text)
    YAML.save("custom.yaml", YAML.load(tiny_yaml))


@pytest.fixture
def furnished_place(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    at_home(furnished, monkeypatch)
    monkeypatch.syspath_prepend(str(furnished))
    _exported()
    return furnished


@pytest.fixture
def own_place(furnished: Path, shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with photos, VOC files and a trained model, and nothing else."""
    at_home(tmp_path, monkeypatch)
    shutil.copytree(shots, "photos")
    for name in ("yolov8n.pt", "best.pt"):
        shutil.copy(furnished / "best.pt", name)
    return tmp_path


def _exported() -> None:
    """Put the ONNX files where pages have them; what a page exports takes their place."""
    for name in ("base.onnx", "best.onnx", "fp32.onnx"):
        shutil.copy("runs/detect/quantize/onnx/fp32.onnx", name)
    for name in ("best_int8.onnx", "int8.onnx"):
        shutil.copy("runs/detect/quantize/onnx/int8.onnx", name)


def _with_polygons(coco: dict[str, Any]) -> dict[str, Any]:
    for row in coco["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return coco


def _options() -> dict[str, Any]:
    return {"imgsz": 64, "batch": 8, "workers": 0, "plots": False, "verbose": False}
