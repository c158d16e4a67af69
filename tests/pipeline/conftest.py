# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A small detector that really detects, trained once, and one compress run of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.tasks import load_checkpoint

from yolo_ext.core.config import cfg_dir
from yolo_ext.data.shapes import make_shapes
from yolo_ext.pipeline import compress

TRAIN: dict[str, Any] = {"imgsz": 64, "batch": 8, "nbs": 8, "device": "cpu", "workers": 0, "plots": False}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=64, val=16, imgsz=64)


@pytest.fixture(scope="session")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return a base model: about 20 s of training, enough for confidences that quantization can be judged on."""
    temp = tmp_path_factory.getbasetemp()
    folder = (temp if worker_id == "master" else temp.parent) / "base"  # one for all workers of pytest-xdist
    with FileLock(f"{folder}.lock"):
        if not (done := folder / "done").exists():
            options = {"optimizer": "AdamW", "lr0": 0.002, "save_dir": str(folder), "exist_ok": True, **TRAIN}
            YOLO(str(cfg_dir() / "models" / "yolov8n-shapes.yaml")).train(data=str(data), epochs=14, **options)
            done.touch()
    return folder / "weights" / "best.pt"


@pytest.fixture(scope="session")
def loaded() -> list[str]:
    """Return the model files that `compressed` read, one entry for each time."""
    return []


@pytest.fixture(scope="session")
def compressed(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, loaded: list[str]) -> dict[str, Any]:
    """Return the result of a whole run with all stages, QAT included."""
    folder = tmp_path_factory.mktemp("run") / "compress"

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(str(file))
        return load_checkpoint(file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(tasks, "load_checkpoint", load)
        return compress(
            base, data, epochs=2, save_dir=str(folder), prune={"speedup": 2.0}, distill={},
            quant={"mode": "qat", "epochs": 1, "calib": 32, "max_drop": 1.0}, **TRAIN,
        )  # fmt: skip
