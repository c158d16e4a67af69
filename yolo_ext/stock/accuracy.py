# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Accuracy of a model over a split by Ultralytics' validators: torch and exported files on the same pixels."""

import ast
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from ultralytics.models.rtdetr.val import RTDETRValidator
from ultralytics.models.yolo import classify, detect, obb, pose, segment
from ultralytics.utils import YAML
from ultralytics.utils.metrics import smooth

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.stock.context import alone, quiet
from yolo_ext.stock.evidence import collected, hash_of
from yolo_ext.stock.fit import ONE_CLASS, check_fit, one_class
from yolo_ext.stock.load import check_det_dataset, float_model, gpu_runs, head_args
from yolo_ext.stock.model import METRIC
from yolo_ext.stock.model import METRICS as METRICS
from yolo_ext.stock.safety import safely

VALIDATORS: dict[str, Any] = {
    "detect": detect.DetectionValidator, "obb": obb.OBBValidator, "segment": segment.SegmentationValidator,
    "pose": pose.PoseValidator, "classify": classify.ClassificationValidator,
}  # fmt: skip
NAMES = {"map50": "mAP50(B)", "map": "mAP50-95(B)", "map_mask": "mAP50-95(M)", "map_pose": "mAP50-95(P)",
         "top1": "accuracy_top1", "top5": "accuracy_top5"}  # fmt: skip


def accuracy(
    model: str | Path | nn.Module, data: str | Path | None = None, imgsz: int | None = None, *, batch: int = 16,
    end2end: bool = False, like: Any = None, loader: Any = None, keep: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the metrics of the task, `images` of the val split, and with boxes `map50`, `f1` and `f1_conf`."""
    net = _net(model)
    with tempfile.TemporaryDirectory() as folder, quiet(), safely():
        if like is not None:  # the validator of a trainer
            cls, args = type(like), {**vars(like.args), "compile": False}
        else:
            cls, args = validator_of(model, data, net)
            args |= {"rect": False, "mode": "val"} | ({"imgsz": imgsz} if imgsz else {})  # as static exports see them
            args |= {"model": str(model), "batch": 1} if net is None else {"batch": batch, **head_args(end2end)}
            options |= {} if net or gpu_runs(Path(str(model))) else {"device": "cpu"}
        args |= {"plots": False, "verbose": False, "save_dir": folder, **options}
        validator = cls(dataloader=loader, save_dir=Path(folder), args=args)
        made = collected(validator, hash_of(Path(str(model)) if net is None else net)) if keep else None
        with alone(cls) if like is None else nullcontext():
            found = _figures(validator, validator(model=net))
        if made:
            keep(made())
        return found


def score(found: Mapping[str, Any]) -> float | None:
    """Return the mean of the metrics of the task, by which models are ranked; None where there is none."""
    values = [found[k] for k in METRIC if found.get(k) is not None]
    return sum(values) / len(values) if values else None


def lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Return the largest loss among the metrics of the task, which budgets limit; None where there is none of both."""
    return max((before[k] - after[k] for k in METRIC if None not in (before.get(k), after.get(k))), default=None)


def validator_of(model: str | Path | nn.Module, data: str | Path | None, net: Any = None) -> tuple[Any, dict[str, Any]]:
    """Return validator class and arguments for data and a model (`net`, if loaded); UsageError if they do not fit."""
    net = _net(model) if net is None else net
    task, names, head, size = about(model, net)
    one = names == ONE_CLASS  # as it was trained
    if task not in VALIDATORS:
        raise UsageError(f"Task '{task}' has no box mAP. Legal tasks: {', '.join(VALIDATORS)}.")
    if task != "classify":
        with refused(f"Data set '{data}' cannot be used ({{e}}). Give a YAML of data on disk."):
            info = check_det_dataset(str(data), autodownload=False)
        who = "model" if isinstance(model, nn.Module) else model
        check_fit(net or {"names": names}, one_class(info) if one else info, (who, data))
    elif not Path(str(data)).is_dir():
        raise UsageError(f"Data set '{data}' cannot be used (not a folder). Give a folder of data on disk.")
    cls = RTDETRValidator if head == "RTDETRDecoder" else VALIDATORS[task]  # which stretches images
    return cls, {"task": task, "data": str(data), "single_cls": one, "imgsz": size}


def _net(model: str | Path | nn.Module) -> Any:
    return float_model(model) if isinstance(model, nn.Module) or Path(model).suffix == ".pt" else None


def about(model: str | Path | nn.Module, net: Any = None) -> tuple[str, dict[int, str], str, int]:
    """Return task, class names, type of the head and longer side in pixels of a model (`net`, if loaded)."""
    import onnx

    if net := _net(model) if net is None else net:
        return net.task, net.names, type(net.model[-1]).__name__, 640
    path = Path(str(model))
    broken = f"The metadata of '{path}' cannot be read ({{e}}). Export the model again."
    if path.is_dir():
        with refused(broken):
            found = YAML.load(path / "metadata.yaml")
            told = found["task"], dict(found["names"]), found.get("head", ""), max(found["imgsz"])
        return told
    if not path.is_file():
        raise UsageError(f"ONNX model '{path}' does not exist. Export one first.")
    with refused(f"'{path}' is not an ONNX model ({{e}})."):
        props = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    if "task" not in props:
        raise UsageError(f"ONNX model '{path}' has no Ultralytics metadata. Export it with yolo-ext or Ultralytics.")
    with refused(broken):
        names, size = map(ast.literal_eval, (props.get("names", "{}"), props.get("imgsz", "[640]")))
        return props["task"], dict(names), props.get("head", ""), max(size)


def _figures(validator: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Return our figures of what a validator returned; Ultralytics smooths the F1 curve in the same way."""
    values = {k: float(found[f"metrics/{name}"]) for k, name in NAMES.items() if f"metrics/{name}" in found}
    images = {"images": len(validator.dataloader.dataset)} if values else {}
    if "map" not in values:
        return {**values, **images}
    box, best = validator.metrics.box, {"f1": 0.0, "f1_conf": 0.0}
    if (curve := np.asarray(box.f1_curve)).size:
        i = int(smooth(curve.mean(0), 0.1).argmax())
        best = {"f1": float(curve.mean(0)[i]), "f1_conf": float(box.px[i])}
    return {**values, **best, **images}
