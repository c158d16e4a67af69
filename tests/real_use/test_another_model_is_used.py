# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The file that was named is read, where Ultralytics would read, rename or fetch another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

NAMED = {
    "analyze": "analyze model=yolov5n.pt imgsz=64",
    "export": "export model=yolov5n.pt imgsz=64 format=torchscript",
    "label": "label model=yolov5n.pt source=shapes/images/val out=out",
    "compare": "predict model=tiny.pt compare=yolov5n.pt source=shapes/images/val imgsz=64",
    "predict": "predict model=yolov5n.pt source=shapes/images/val imgsz=64",
}


@pytest.mark.parametrize("words", NAMED.values(), ids=NAMED)
def test_the_file_that_is_named_is_read(place, call, words):
    shutil.copy("tiny.pt", "yolov5n.pt")
    Path("yolov5nu.pt").write_text("the file of this name that Ultralytics would read in its place")
    status, text = call(words)
    assert status == 0, text


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
