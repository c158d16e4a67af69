# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`compress` from a trained model to INT8 and report on all five tasks, by the metrics of each."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from ultralytics import YOLO

from yolo_ext.stock.accuracy import METRICS
from yolo_ext.stock.evidence import Evidence

FAMILIES = ("yolov8n", "yolo11n", "yolo26n")
SLOW = [("detect", "yolo11n"), ("segment", "yolov8n"), ("pose", "yolo11n"), ("obb", "yolo26n"), ("classify", "yolo26n")]
REST = [(task, family) for task in METRICS for family in FAMILIES if (task, family) not in SLOW]
MARKED = ((pytest.mark.slow, SLOW), (pytest.mark.matrix, REST))
LEARNED = 0.2  # by the base model at least, or no loss could show
KEPT = 0.5  # of each metric, after one epoch of fine-tuning and INT8
ROUNDING = 0.03  # px of a box between ONNX and PyTorch, in a model that has learned little; 0.01 is the limit
WORDS = (
    "compress epochs=1 imgsz=64 batch=8 workers=0 device=cpu plots=False lr0=0.0005 prune.speedup=1.3 "
    "quant.mode=ptq quant.calib=16 quant.max_drop=1"
)


@pytest.mark.parametrize(
    ("task", "family"),
    [pytest.param(*case, marks=mark) for mark, cases in MARKED for case in cases],
)
def test_from_training_to_int8_and_report(learned, quick, run, task, family):
    model, data = learned(task, family)
    status, folder, said = run(f"{WORDS} model={model} data={data}")
    assert status < 2, said
    summary = json.loads((folder / "summary.json").read_text())
    failed = [c for c in summary["checks"] if not c["passed"]]
    assert status == bool(failed)
    rounded = [c for c in failed if c.get("key") == "box_max" and c["value"] < ROUNDING]
    assert all(c["name"].startswith("contract ") or c in rounded for c in failed), failed

    before, after = summary["before"], summary["after"]
    assert before["gflops"] / after["gflops"] == pytest.approx(1.3, rel=0.05)
    for metric in METRICS[task]:
        assert LEARNED < before[metric] <= 1, metric
        int8 = after[f"{metric}_onnx"]["int8"]
        assert KEPT * before[metric] < int8 <= 1, metric
        assert int8 == pytest.approx(after[f"{metric}_onnx"]["fp32"], abs=0.15)
        assert after[f"{metric}_onnx"]["fp32"] == pytest.approx(after[metric], abs=0.02)
    assert 0.8 * after["convs"] < after["int8_convs"] <= after["convs"]

    kept = {file.parent.name: Evidence.read(file) for file in folder.glob("*/evidence.npz")}
    assert kept.keys() >= {"base", "prune", "finetune", "ptq"}
    assert {e.about["labels_hash"] for e in kept.values()} == {kept["base"].about["labels_hash"]}
    assert summary["contract"]["images"] == len(kept["base"].images)
    changes = {c["name"]: c for c in summary["contract"]["changes"]}
    for metric in METRICS[task]:
        assert changes[metric]["before"] == pytest.approx(before[f"{metric}_onnx"]["fp32"], abs=0.02)
        assert changes[metric]["after"] == pytest.approx(after[f"{metric}_onnx"]["int8"], abs=1e-3)

    report = (folder / "report.html").read_text()
    assert summary["headline"] in html.unescape(report) and "<img" in report
    assert len(list((folder / "plots").glob("*.png"))) >= 4
    first = next(Path(data if task == "classify" else data.parent).rglob("val/**/*.png"))
    for file in ("weights/best.pt", "onnx/int8.onnx"):  # by Ultralytics alone
        yolo = YOLO(str(folder / file), task=task)
        (result,) = yolo.predict(str(first), imgsz=64, device="cpu", conf=0.01, verbose=False)
        found = {"classify": result.probs, "obb": result.obb}.get(task, result.boxes)
        assert found is not None and len(found.data), file
