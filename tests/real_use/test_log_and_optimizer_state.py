# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What is left of a run: its log, and with save_optimizer=True the state of its optimizer."""

from __future__ import annotations

import pytest
import torch
from ultralytics import YOLO

from yolo_ext.checkpoint import MANIFEST
from yolo_ext.core.log import FILE, LOGGER

D = "data=shapes/data.yaml imgsz=64"
TRAIN = f"train model=tiny.pt {D} epochs=1 batch=4 nbs=4 device=cpu workers=0 plots=False"


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_best_and_last_keep_the_state_of_the_optimizer_if_asked(run, kept):
    status, folder, said = run(f"{TRAIN} prune.speedup=1.3 prune.recalibrate=4 prune.images=4 save_optimizer={kept}")
    assert status == 0, said
    for name in ("best.pt", "last.pt"):
        ckpt = torch.load(folder / "weights" / name, map_location="cpu", weights_only=False)
        assert bool(ckpt["optimizer"]) == kept and ckpt["epoch"] == -1 and ckpt[MANIFEST]["prune"]
        if kept:
            moments = [s["exp_avg"] for s in ckpt["optimizer"]["state"].values() if "exp_avg" in s] or [
                s["momentum_buffer"] for s in ckpt["optimizer"]["state"].values()
            ]
            shapes = {tuple(p.shape) for p in ckpt["model"].parameters()}
            assert moments and {tuple(m.shape) for m in moments} <= shapes
    assert YOLO(str(folder / "weights/best.pt")).names
    log = (folder / FILE).read_text(encoding="utf-8")
    assert "PyTorch" in log or "Results saved to" in log
    assert "\x1b" not in log and f"Optimizer {'kept in' if kept else 'stripped from'}" in log
    assert not [h for h in LOGGER.handlers if type(h).__name__ == "RunLog"]


@pytest.mark.slow
def test_a_run_without_training_has_a_log_from_its_first_line(run, quick):
    status, folder, said = run("prune model=tiny.pt imgsz=64 epochs=0 prune.speedup=1.3 prune.runtime=torch")
    assert status == 0, said
    log = (folder / FILE).read_text(encoding="utf-8")
    assert log.index("Without effect here: prune.runtime") < log.index("stage 1/") < log.index("Report: ")
    assert {p.name for p in folder.iterdir()} >= {"report.md", "report.html", "report.json", "summary.json"}
    assert not (folder / "prune" / FILE).exists()


def test_a_refused_run_leaves_no_folder_for_the_sake_of_its_log(run, place):
    assert run(f"{TRAIN} prune.size_mb=0.001")[0] == 2
    assert not (place / "out").exists() or not list((place / "out").iterdir())
