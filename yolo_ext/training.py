# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext train`: one training run with any technique in the loop, and its summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, YAML
from ultralytics.utils.checks import check_imgsz as ultralytics_imgsz

from yolo_ext import distill_loop, prune_loop, quant_loop, runs, stock
from yolo_ext.core.config import EXT_DEFAULTS, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.data.calibration import check_calibration
from yolo_ext.stock.load import load_model


def train(model: str | Path, **options: Any) -> dict[str, Any]:
    """Train a YOLO with our trainer of its task.

    Args:
        model: ``.pt`` or ``.yaml``; with ``resume=True`` the ``last.pt`` to go on with.
        options: `prune`, `distill`, `quant` and any Ultralytics training argument.

    Returns:
        The contents of ``summary.json``.

    Raises:
        UsageError: If the input is wrong.
    """
    from ultralytics import YOLO

    from yolo_ext.data.check import check_data
    from yolo_ext.stock.model import task_of
    from yolo_ext.trainers import refuse_two_distillations, trainer_for

    configs = parse({k: options[k] for k in EXT_DEFAULTS if k in options})
    base, ckpt = load_model(model)
    stock.refuse_rtdetr(base)
    task = task_of(base)
    resume = options.get("resume")
    if resume and (ckpt.get("epoch", -1) < 0 or ckpt.get("optimizer") is None):
        raise UsageError(
            f"'{model}' is a finished training, there is nothing to resume. Give a last.pt of a stopped run."
        )
    imgsz = int(options.get("imgsz") or (ckpt.get("train_args") or {}).get("imgsz") or 640)
    stride = stock.max_stride(base)
    imgsz = ultralytics_imgsz(imgsz, stride=stride, floor=stride, max_dim=1)  # rounded as the trainer will
    if options.get("data") and not resume:
        free = configs["quant"] and configs["quant"].supervision == "features"  # needs no labels
        info = check_data(str(options["data"]), task=task, labels=not free)
        refuse_two_distillations(configs["distill"], options.get("distill_model"))
        given = {**DEFAULT_CFG_DICT, **(YAML.load(options["cfg"]) if options.get("cfg") else {}), **options}
        check_pruning_epochs(configs, given)
        check_quantization(configs, given, task, info)
        epochs = int(options.get("epochs") or 100)
        check_techniques(str(model), base, info["names"], configs, options.get("freeze"), imgsz, epochs)
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
    best = Path(str(trainer.best if trainer.best.exists() else trainer.last))
    after = _figures(load_model(best)[0], best, trainer.args.data, imgsz, trained=True)
    return runs.write_summary(Path(trainer.save_dir), before, after, {"train": after})


def check_pruning_epochs(configs: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse pruning while training that does not fit the run, before there is a trainer.

    Args:
        configs: Parsed technique options.
        given: Ultralytics options; `epochs` and `compile` count.

    Raises:
        UsageError: If an epoch lies outside the run, or another option does not allow surgery while training.
    """
    args = SimpleNamespace(compile=given.get("compile"))
    prune_loop.setup(SimpleNamespace(compression=configs, epochs=given["epochs"], args=args))


def check_quantization(configs: dict[str, Any], given: Mapping[str, Any], task: str, info: dict[str, Any]) -> None:
    """Refuse what contradicts QAT, and images that cannot calibrate, before there is a trainer.

    Args:
        configs: Parsed technique options.
        given: Ultralytics options; `quantize` and `distill_model` count.
        task: Ultralytics task.
        info: Checked dataset dict.

    Raises:
        UsageError: If there is such a thing.
    """
    if not (cfg := configs["quant"]):
        return
    clashes = {k: given.get(k) for k in ("quantize", "distill_model")}
    args = SimpleNamespace(task=task, optimizer="AdamW", lr0=0.0, warmup_bias_lr=0.0, **clashes)
    quant_loop.setup(SimpleNamespace(compression=dict(configs), args=args))
    check_calibration(cfg.source or info, cfg.calib, cfg.seed)


def check_techniques(
    model: str, base: nn.Module, names: dict[int, str], configs: dict[str, Any], freeze: Any = None, imgsz: int = 640,
    epochs: int = 100,
) -> None:  # fmt: skip
    """Refuse what a trainer would only notice after the run folder has been made and the data have been read.

    Args:
        model: File of the model.
        base: The model, which is not changed.
        names: Class names of the data.
        configs: Parsed technique options.
        freeze: Ultralytics' option of this name.
        imgsz: Side of the square input in pixels.
        epochs: Epochs of sparsity training.

    Raises:
        UsageError: If the pruning target is out of reach, the teacher does not fit or a method does not exist.
    """
    from yolo_ext.distillation.criterion import Distiller
    from yolo_ext.pruning.allocate import read_sensitivity
    from yolo_ext.pruning.prune import check_plan
    from yolo_ext.pruning.unstructured import zero_weights
    from yolo_ext.quantization.fake_quant import insert_fake_quant
    from yolo_ext.quantization.observers import observers, weight_observers
    from yolo_ext.quantization.profiles import resolve_profile
    from yolo_ext.trainers import self_teacher

    student = deepcopy(base)
    if prune := configs["prune"]:
        stock.freeze(student, freeze)
        level = LOGGER.level
        LOGGER.setLevel(logging.ERROR)  # the pruning itself will say the same once more
        try:
            check_plan(student, prune, imgsz, ready=not configs["sparsity"])
        finally:
            LOGGER.setLevel(level)
        if prune.sensitivity:
            read_sensitivity(prune.sensitivity)
        if prune.kind != "structured":
            zero_weights(student, prune, 0.0)
    if sparsity := configs["sparsity"]:
        from yolo_ext.core.options import PruneConfig
        from yolo_ext.sparsity.sparsifier import Sparsifier

        Sparsifier(student, sparsity, configs["prune"] or PruneConfig(ratio=0.5), epochs)
    if distill := configs["distill"]:
        student.names = names
        teacher = self_teacher(model) if distill.teacher == "self" else distill.teacher
        Distiller(student, replace(distill, teacher=teacher), torch.device("cpu"))
    if quant := configs["quant"]:
        observers[quant.observer]
        weight_observers[quant.weight_observer]
        insert_fake_quant(student, resolve_profile(quant.profile), quant.exclude, quant.config_list)


def _figures(model: Any, path: Path, data: Any, imgsz: int, *, trained: bool) -> dict[str, Any]:
    """Return size figures, and mAP where the model is trained and its task has boxes."""
    from yolo_ext.stock.accuracy import accuracy

    found = runs.model_figures(model, path, imgsz)
    if trained and data and runs.has_boxes(model) and len(model.names) == _classes(data):
        found.update(accuracy(path, data, imgsz))
        distill_loop.remember(model, data, imgsz, found["map"])
    return found


def _classes(data: Any) -> int:
    from yolo_ext.data.check import check_data

    return int(check_data(str(data), labels=False)["nc"])
