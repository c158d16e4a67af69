# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext train`: one training run with any technique in the loop, checked beforehand, and its summary."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, YAML

from yolo_ext import runs, stock
from yolo_ext.core.config import EXT_DEFAULTS, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.reporting.tables import write_summary
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import load_model
from yolo_ext.training.distill import remember
from yolo_ext.training.technique import Technique
from yolo_ext.training.trainer import TRAINERS, CompressionMixin, attach, techniques_of, trainer_for


def train(model: str | Path, **options: Any) -> dict[str, Any]:
    """Train a YOLO with our trainer of its task, as the command of this name does; returned is ``summary.json``."""
    from ultralytics import YOLO

    configs = parse({k: options[k] for k in EXT_DEFAULTS if k in options})
    base, ckpt = load_model(model)
    stock.refuse_rtdetr(base)
    task, resume = stock.task_of(base), options.get("resume")
    if resume and (ckpt.get("epoch", -1) < 0 or ckpt.get("optimizer") is None):
        raise UsageError(f"'{model}' is a finished training: nothing to resume. Give a last.pt of a stopped run.")
    imgsz = stock.image_size(base, ckpt, options.get("imgsz"), rounded=True)
    if options.get("data") and not resume:
        free = configs["quant"] and configs["quant"].supervision == "features"  # needs no labels
        info = check_data(str(options["data"]), task=task, labels=not free)
        own = YAML.load(options["cfg"]) if options.get("cfg") else {}
        check_training(configs, {**own, **options, "model": str(model), "task": task}, base, info, imgsz)
        options["data"] = str(info.get("yaml_file") or options["data"])
    before = _figures(base, Path(model), options.get("data"), imgsz, trained=bool(ckpt) and not resume)
    yolo = YOLO(str(model), task=task)
    try:
        yolo.train(trainer=trainer_for(task), **options)
    except UsageError:  # such as a size that turns out to be out of reach
        if yolo.trainer:
            runs.discard(Path(str(yolo.trainer.save_dir)))
        raise
    trainer: Any = yolo.trainer
    best = trainer.best if trainer.best.exists() else trainer.last
    after = _figures(load_model(best)[0], best, trainer.args.data, imgsz, trained=True)
    return write_summary(Path(trainer.save_dir), before, after, {"train": after})


def check_training(configs: Mapping, args: Mapping, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
    """Refuse parsed options and Ultralytics' arguments, `model` and `task` among them, before there is a run folder."""
    student = deepcopy(model)
    stock.freeze(student, args.get("freeze"))
    for technique in check_settled(configs, args):
        technique.check(student, info, imgsz)


def check_settled(configs: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[Technique, ...]:
    """Refuse options that contradict each other, as the first part of `check_training` that needs no model or data."""
    given = {k: v for k, v in args.items() if v is not None}
    return techniques_of({**EXT_DEFAULTS, **configs}, SimpleNamespace(**DEFAULT_CFG_DICT | given))


def _figures(model: Any, path: Path, data: Any, imgsz: int, *, trained: bool) -> dict[str, Any]:
    """Return size figures, and mAP where the model is trained and its task has boxes."""
    found = runs.model_figures(model, path, imgsz)
    boxes = stock.task_of(model) != "classify"
    if trained and data and boxes and len(model.names) == check_data(str(data), labels=False)["nc"]:
        found.update(accuracy(path, data, imgsz))
        remember(model, data, imgsz, found["map"])
    return found
