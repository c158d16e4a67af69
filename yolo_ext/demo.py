# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext demo`: data, base model and compression from nothing but this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs
from yolo_ext.core.config import cfg_dir

IMGSZ = 128
COMMON: dict[str, Any] = {"batch": 8, "nbs": 8, "device": "cpu"}
BASE: dict[str, Any] = {"epochs": 50, "optimizer": "AdamW", "lr0": 0.002, "cos_lr": True, "warmup_epochs": 1.0}
BASE |= {**COMMON, "close_mosaic": 15, "plots": False}
FINETUNE: dict[str, Any] = {**COMMON, "epochs": 20}


def demo(seed: int = 0, **place: Any) -> dict[str, Any]:
    """Generate the `shapes` set, train a small YOLO on it and compress it.

    Args:
        seed: Seed of the data and of the trainings.
        place: `project`, `name`, `exist_ok` for the run folder.

    Returns:
        What `compress` returns.
    """
    from ultralytics import YOLO

    from yolo_ext.data.shapes import make_shapes
    from yolo_ext.pipeline import compress

    folder = runs.folder(place, task="detect", mode="demo")
    LOGGER.info(f"{colorstr('bold', 'demo: ')}generating images, training a base model, compressing it in {folder}")
    data = make_shapes(folder / "shapes", seed=seed)
    base = YOLO(str(cfg_dir() / "models" / "yolov8n-shapes.yaml"))
    base.train(data=str(data), imgsz=IMGSZ, seed=seed, save_dir=str(folder / "base"), exist_ok=True, **BASE)
    best = Path(str(base.trainer.best))
    summary = compress(best, data, imgsz=IMGSZ, seed=seed, save_dir=str(folder / "compress"), exist_ok=True,
                       prune={"speedup": 2.0}, distill={}, quant={}, **FINETUNE)  # fmt: skip
    LOGGER.info(f"{colorstr('bold', 'demo: ')}open {Path(summary['run_dir']) / 'report.html'}")
    return summary
