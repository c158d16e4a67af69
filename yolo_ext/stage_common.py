# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the stages of `compress` share: the run, how a model is measured, and how one is trained."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yolo_ext import distill_loop, runs
from yolo_ext.core.config import as_plain
from yolo_ext.core.options import DistillConfig
from yolo_ext.stock.load import load_model

# Defaults of the trainings, below what the user gives. The model is trained already: low rate, short warm-up.
COMMON: dict[str, Any] = {"batch": 16, "optimizer": "AdamW", "cos_lr": True}
FINETUNE: dict[str, Any] = {**COMMON, "epochs": 30, "lr0": 0.001, "warmup_epochs": 1.0}
QAT: dict[str, Any] = {**COMMON, "warmup_epochs": 0.5, "mosaic": 0.0, "close_mosaic": 0}
Record = dict[str, Any]


@dataclass
class Run:
    """One compression run.

    Attributes:
        folder: Run folder.
        base: Base model file.
        data: Path of the data.yaml, empty when no stage needs data.
        info: Checked dataset dict.
        imgsz: Side of the square input in pixels.
        configs: Parsed technique options.
        native: Ultralytics training arguments given by the user.
        fresh: Whether the folder holds nothing of an earlier run.
        done: Records of finished stages.
    """

    folder: Path
    base: Path
    data: str
    info: dict[str, Any]
    imgsz: int
    configs: dict[str, Any]
    native: dict[str, Any]
    fresh: bool = False
    done: dict[str, Record] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Fine-tune epochs."""
        return int(self.native.get("epochs", FINETUNE["epochs"]))

    @property
    def prunes_later(self) -> bool:
        """Whether pruning is part of the fine-tuning instead of a stage of its own."""
        cfg = self.configs["prune"]
        return bool(cfg and (cfg.at or cfg.every or cfg.steps))

    def weights(self) -> Path:
        """Return the newest float weights."""
        found = [d["weights"] for d in self.done.values() if d.get("weights")]
        return self.folder / found[-1] if found else self.base

    def quantized(self) -> tuple[str, Record]:
        """Return the stage whose INT8 file is delivered, and its record."""
        name = "qat" if self.done.get("qat", {}).get("better") else "ptq"
        return name, self.done[name]


def measure(run: Run, weights: Path) -> dict[str, Any]:
    """Return params, GFLOPs, size and, where there are data, mAP of float weights."""
    model, _ = load_model(weights)
    found = runs.model_figures(model, weights, run.imgsz)
    if run.data and runs.has_boxes(model):
        from yolo_ext.stock.accuracy import accuracy

        found.update(accuracy(weights, run.data, run.imgsz))
        distill_loop.remember(model, run.data, run.imgsz, found["map"])
    return found


def train(run: Run, stage: str, options: dict[str, Any], native: dict[str, Any], weights: Path | None = None) -> Path:
    """Train the newest weights, or those given, in the stage's folder, going on where a killed run stopped."""
    from ultralytics import YOLO

    from yolo_ext.trainers import trainer_for

    folder = run.folder / stage
    last = folder / "weights" / "last.pt"
    place: dict[str, Any] = {"save_dir": str(folder), "exist_ok": True}
    if last.exists() and runs.is_unfinished(last):
        model, args = YOLO(str(last)), {"resume": True, **place}
    else:
        if folder.exists():
            shutil.rmtree(folder)
        model, args = (
            YOLO(str(weights or run.weights())),
            {"data": run.data, "imgsz": run.imgsz, **native, **options, **place},
        )
        if isinstance(args.get("batch"), int) and args["batch"] > 0:
            # With Ultralytics' nominal batch of 64, a small dataset gives a handful of optimizer steps per epoch.
            args.setdefault("nbs", args["batch"])
    model.train(trainer=trainer_for(model.task), **args)
    best = folder / "weights" / "best.pt"
    return best if best.exists() else last


def distill_config(run: Run) -> DistillConfig | None:
    """Return the distillation options, with the base model as teacher where the user named none."""
    cfg = run.configs["distill"]
    return replace(cfg, teacher=str(run.base.resolve())) if cfg and cfg.teacher == "self" else cfg


def distill_options(run: Run) -> dict[str, Any]:
    """Return the distillation options of a training as plain data, empty when there is none."""
    cfg = distill_config(run)
    return as_plain({"distill": cfg}) if cfg else {}


def finetune_arguments(run: Run) -> dict[str, Any]:
    """Return the training arguments of a fine-tuning: our defaults below those of the user."""
    return {**FINETUNE, "close_mosaic": min(10, run.epochs // 3), **run.native}
