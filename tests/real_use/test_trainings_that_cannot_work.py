# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What would be a traceback after an epoch, or a training for nothing, is said before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ultralytics.utils import YAML

from yolo_ext.deployment.contract import judged
from yolo_ext.stock.evidence import Evidence

TRAIN = "imgsz=64 batch=4 device=cpu workers=0 plots=False epochs=1"
B = f"model=tiny.pt data=shapes/data.yaml {TRAIN}"


@pytest.mark.parametrize("words", [f"train {B}", f"compress {B} prune.speedup=1.2"], ids=["train", "compress"])
def test_a_controller_without_validation(place, call, words):
    status, text = call(f"{words} sparsity.auto=True val=False")
    assert status == 2 and "'sparsity.auto=True'" in text and "'val=False'" in text
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_teacher_that_is_the_student(place, call):
    status, text = call(f"distill {B} save_dir=run")
    assert status == 0 and "the teacher is the model itself" in text
    status, text = call(f"train {B} distill.teacher=self prune.ratio=0.2 prune.round_to=1 prune.images=8 save_dir=cut")
    assert status == 0 and "the teacher is the model itself" not in text, text


@pytest.mark.slow
def test_a_stopped_training_whose_data_have_moved(place, call, monkeypatch):
    from yolo_ext.training.trainer import DetectionTrainer

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(DetectionTrainer, "final_eval", stop)
        assert call(f"train {B} save_dir=run max_drop=0.9 confidence=0.9 contract.recall.square=-1")[0] == 130
    last = "run/weights/last.pt"
    shutil.move("shapes", "moved")
    YAML.save("moved/data.yaml", {**YAML.load("moved/data.yaml"), "path": str(place / "moved")})
    for resume in ("resume=True", f"resume={last}"):
        status, text = call(f"train model={last} {resume}")
        assert status == 2 and "shapes/data.yaml' does not exist" in text and "add data=" in text
    assert call(f"train model={last} resume=True data=moved/data.yaml")[0] == 0
    summary = json.loads(Path("run/summary.json").read_text())
    names = ["Accuracy lost in total (at most, confidence 0.9; max_drop)", "contract recall.square"]
    assert [c["name"] for c in summary["checks"]] == names, "a budget is not forgotten"
    found = judged(*(Evidence.read(f"run/{k}.npz") for k in ("base_evidence", "evidence")), confidence=0.9)
    assert summary["contract"]["changes"] == found["changes"]
    assert summary["before"]["map"] is not None and summary["before"]["size_mb"] is None
