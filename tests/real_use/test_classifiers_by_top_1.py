# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Classifiers have no boxes: what tables and files say of them is top-1 accuracy, never mAP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ultralytics.nn.tasks import ClassificationModel

from yolo_ext.checkpoint import save_model
from yolo_ext.stock import metric


@pytest.fixture
def classes(place: Path) -> Path:
    """Write a classifier `cls.pt` and a folder of images in two classes."""
    for i, image in enumerate(sorted(Path("shapes").rglob("*.jpg"))[:8]):
        for split in ("train", "val"):
            folder = Path("classes", split, f"c{i % 2}")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder)
    model = ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False)
    model.task, model.names = "classify", {0: "c0", 1: "c1"}
    save_model(model, Path("cls.pt"))
    return Path("classes")


def test_the_name_of_the_figure():
    assert metric("detect") == metric("obb") == "mAP50-95" and metric("classify") == "mean of top-1 and top-5"
    assert metric("segment") == "mean of mAP50-95 and mask mAP50-95"


@pytest.mark.slow
def test_bench_heads_the_column_top_1(classes, run, caplog):
    status, folder, said = run("bench models=cls.pt data=classes imgsz=64 rounds=3 memory=False")
    assert status == 0, said
    assert "top-1" in caplog.text and "mAP" not in caplog.text
    assert 0 <= json.loads((folder / "summary.json").read_text())["after"]["top1"] <= 1
    assert (folder / "tradeoff.png").is_file()


@pytest.mark.slow
def test_compare_heads_the_column_top_1(classes, run, caplog):
    words = "prune model=cls.pt data=classes imgsz=64 epochs=0 prune.speedup=1.3 prune.compare=True prune.method=l2"
    status, folder, said = run(f"{words} prune.recalibrate=4 device=cpu workers=0")
    assert status == 0, said
    assert "top-1" in caplog.text and "mAP50" not in caplog.text
    report = (folder / "report.html").read_text()
    assert "Top-1 accuracy" in report and "mAP50-95" not in report
