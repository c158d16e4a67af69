# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where Ultralytics would read, rename or fetch another file than the one that was named, that is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

TRAIN = "imgsz=64 batch=4 device=cpu workers=0 plots=False"  # of a training that takes seconds
D = "data=shapes/data.yaml"
NAMED = {
    "analyze": "analyze model=yolov5n.pt",
    "export": "export model=yolov5n.pt imgsz=64",
    "openvino": "export model=yolov5n.pt imgsz=64 format=torchscript",
    "bench": "bench models=yolov5n.pt imgsz=64 rounds=1",
    "compress": f"compress model=yolov5n.pt {D} imgsz=64",
    "train": f"train model=yolov5n.pt {D} {TRAIN}",
    "label": "label model=yolov5n.pt source=shapes/images/val out=out",
    "compare": "predict model=tiny.pt compare=yolov5n.pt source=shapes/images/val",
    "verify": f"verify model=yolov5n.pt onnx=yolov5n.onnx {D}",
    "teacher": f"distill model=tiny.pt {D} {TRAIN} distill.teacher=yolov5n.pt",
    "pretrained": f"train model=tiny.pt {D} {TRAIN} pretrained=yolov5n.pt",
}


@pytest.mark.parametrize("words", NAMED.values(), ids=NAMED)
def test_a_file_that_ultralytics_renames(place, call, words):
    for name in ("yolov5n.pt", "yolov5nu.pt"):  # what is read in its place is a model that works
        shutil.copy("tiny.pt", name)
    before = {*Path().rglob("*")}
    status, text = call(words)
    assert status == 2 and "reads 'yolov5nu.pt' where 'yolov5n.pt' is asked for" in text and "yolov5n_own.pt" in text
    assert {*Path().rglob("*")} == before


def test_the_suggested_name_works(place, call):
    shutil.copy("tiny.pt", "yolov5n_own.pt")
    assert call("analyze model=yolov5n_own.pt imgsz=64")[0] == 0


def test_a_missing_file_is_not_fetched_under_another_name(place, call):
    shutil.copy("tiny.pt", "yolov5nu.pt")
    status, text = call("analyze model=yolov5n.pt")
    assert status == 2 and "'yolov5n.pt' does not exist" in text


def test_a_run_to_resume_that_is_missing_is_not_another_one(place, call):
    status, text = call("train model=tiny.pt resume=runs/gone/weights/last.pt")
    assert status == 2 and "'runs/gone/weights/last.pt' does not exist" in text


def test_the_yolov5_file_of_somebody_else(place, call):
    file = Path(__file__).parents[3] / "shared" / "weights" / "foreign" / "yolov5n.pt"
    if not file.exists():
        pytest.skip(f"{file.name} of the YOLOv5 repository is not beside the checkout")
    for name in ("yolov5n.pt", "best.pt"):
        shutil.copy(file, name)
        status, text = call(f"analyze model={name}")
        assert status == 2 and f"'{name}'" in text and "YOLOv5" in text
