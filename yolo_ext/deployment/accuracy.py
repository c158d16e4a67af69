# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Box mAP of a torch model and of its export by Ultralytics' validators, on the same pixels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import YAML
from ultralytics.utils.metrics import smooth

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.export import head_args
from yolo_ext.deployment.runtime import Source, describe
from yolo_ext.stock.context import quiet
from yolo_ext.stock.load import float_model


def _validate(module: Any, task: str, data: str | Path, imgsz: int, **args: Any) -> dict[str, float]:
    """Run Ultralytics' validator on the CPU; without rectangular batches .pt and static ONNX see the same pixels."""
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.models import yolo

    validators: dict[str, Any] = {"detect": yolo.detect.DetectionValidator, "obb": yolo.obb.OBBValidator}
    validators |= {"segment": yolo.segment.SegmentationValidator, "pose": yolo.pose.PoseValidator}
    if task not in validators:
        raise UsageError(f"Task '{task}' has no box mAP. Legal tasks: {', '.join(validators)}.")
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            check_det_dataset(str(data), autodownload=False)
        except Exception as error:
            raise UsageError(f"Data set '{data}' cannot be used ({error}). Give a YAML of data on disk.") from error
        args |= {"task": task, "data": str(data), "imgsz": imgsz, "device": "cpu", "mode": "val", "save_dir": folder}
        args |= {"rect": False, "plots": False, "verbose": False}
        validator = validators[task](args=args, save_dir=Path(folder))
        found = validator(model=module)
    best = _best_f1(validator.metrics.box)
    return {"map50": float(found["metrics/mAP50(B)"]), "map": float(found["metrics/mAP50-95(B)"]), **best}


def _best_f1(box: Any) -> dict[str, float]:
    """Return the largest mean F1 and its confidence; Ultralytics smooths the curve in the same way."""
    curve = np.asarray(box.f1_curve)
    if not curve.size:
        return {"f1": 0.0, "f1_conf": 0.0}
    i = int(smooth(curve.mean(0), 0.1).argmax())
    return {"f1": float(curve.mean(0)[i]), "f1_conf": float(box.px[i])}


def map_torch(
    weights: Source, data: str | Path, imgsz: int, *, end2end: bool = False, batch: int = 16
) -> dict[str, float]:
    """Return the box mAP of a torch model on the val split, comparable with `map_onnx`.

    Args:
        weights: Ultralytics model or ``.pt`` file; not changed.
        data: Data set YAML. Nothing is downloaded.
        imgsz: Square input size in pixels.
        end2end: Use the NMS-free head of a dual-head model.
        batch: Images per forward pass.

    Returns:
        ``map50``, ``map`` (mAP50-95), ``f1`` (its largest mean over classes) and ``f1_conf`` (the confidence there).

    Raises:
        UsageError: The model, task or data set is not usable.
    """
    model = float_model(weights)
    return _validate(model, model.task, data, imgsz, batch=batch, **head_args(end2end))


def map_onnx(path: str | Path, data: str | Path, imgsz: int) -> dict[str, float]:
    """Return the box mAP of an exported model in its runtime on the val split.

    Args:
        path: ``.onnx`` file or ``*_openvino_model`` folder with Ultralytics' metadata.
        data: Data set YAML. Nothing is downloaded.
        imgsz: Square input size in pixels; a static file uses its own.

    Returns:
        ``map50``, ``map`` (mAP50-95), ``f1`` (its largest mean over classes) and ``f1_conf`` (the confidence there).

    Raises:
        UsageError: The file, task or data set is not usable.
    """
    task = YAML.load(Path(path) / "metadata.yaml")["task"] if Path(path).is_dir() else describe(path)["task"]
    return _validate(None, task, data, imgsz, model=str(path), batch=1)
