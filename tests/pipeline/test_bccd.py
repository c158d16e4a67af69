# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The acceptance run on real images: blood cells, YOLOv8n at 192 px. About four minutes on two cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolo_ext.cli import main

SHARED = Path(__file__).parents[2].parent / "shared"
DATA, WEIGHTS = SHARED / "data" / "bccd", SHARED / "weights" / "bccd_yolov8n_192.pt"


@pytest.mark.slow
@pytest.mark.bccd
@pytest.mark.skipif(
    not (DATA.is_dir() and WEIGHTS.is_file()), reason="BCCD data and weights are not beside the checkout"
)
def test_half_the_flops_in_int8_at_twice_the_speed_without_losing_accuracy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "format=voc", f"source={DATA}", "out=bccd", "train=trainval", "val=test"]) == 0
    words = ["compress", f"model={WEIGHTS}", "data=bccd/data.yaml", "imgsz=192", "prune.speedup=2", "epochs=30"]
    assert main([*words, f"save_dir={tmp_path / 'run'}", "plots=False"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["map"] == pytest.approx(0.557, abs=0.003)
    assert after["gflops"] <= 0.52 * before["gflops"]
    assert after["map_onnx"]["int8"] >= 0.540
    assert before["latency_ms"]["ort"] / after["latency_ms"]["ort_int8"] >= 2.0
    assert after["int8_convs"] == 56
