# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What quantization-aware training does to a training run: the model, its ranges and BatchNorm by epoch, validation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.data import YOLODataset
from ultralytics.utils import LOCAL_RANK, LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from yolo_ext.checkpoint import manifest, note
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import DistillConfig
from yolo_ext.prune_loop import imgsz
from yolo_ext.quantization import qat
from yolo_ext.quantization.fake_quant import load_state, quantizers, set_mode
from yolo_ext.stock.context import undisturbed
from yolo_ext.stock.load import load_model

FEATURES = "mimic"  # what the float self teaches where there are no labels (NVIDIA's QAT of YOLOv7)
PREFIX = "quantize: "


def setup(trainer: Any) -> None:
    """Refuse what cannot be combined with QAT, and choose teacher and learning rate where they follow from it.

    Raises:
        UsageError: If another option contradicts `quant`.
    """
    cfg = trainer.compression["quant"]
    if not cfg:
        return
    if cfg.mode == "ptq":
        raise UsageError("'quant.mode=ptq' does not train. Use `yolo-ext quantize` for it, or quant.mode=qat to train.")
    for name, why in (("quantize", "Both insert fake quantizers"), ("distill_model", "It hides the student")):
        if value := getattr(trainer.args, name, None):
            raise UsageError(
                f"'{name}={value}' of Ultralytics and 'quant.*' of yolo_ext are both set. {why}: leave {name} out"
                + (", and give distill.teacher instead." if name == "distill_model" else ".")
            )
    if cfg.supervision == "auto":
        by_labels = trainer.compression["distill"] or trainer.args.task == "classify"  # which has no neck to learn from
        cfg = replace(cfg, supervision="labels" if by_labels else "features")
        trainer.compression["quant"] = cfg
    if cfg.supervision == "features":
        trainer.compression["distill"] = without_labels(trainer.compression["distill"])
    args = trainer.args
    if str(args.optimizer).lower() == "auto":  # which chooses a rate for training from scratch
        args.optimizer, args.lr0 = "AdamW", cfg.lr0
        LOGGER.info(f"{colorstr(PREFIX)}optimizer=auto means AdamW with quant.lr0={cfg.lr0:g} here")
    args.warmup_bias_lr = min(args.warmup_bias_lr, args.lr0)  # 0.1 throws a trained model far off


def without_labels(given: DistillConfig | None) -> DistillConfig:
    """Return the distillation of a training that labels have no part in.

    Args:
        given: What the user asked for, if anything.

    Raises:
        UsageError: If that weighs labels.
    """
    if given is None:
        return DistillConfig(features=FEATURES, logits=None, alpha=0.0, schedule="constant", preflight=False)
    if given.alpha:
        raise UsageError(
            f"'quant.supervision=features' trains without labels, but 'distill.alpha={given.alpha:g}' weighs them. "
            "Set distill.alpha=0, or leave quant.supervision out."
        )
    return given


@contextmanager
def unlabelled(trainer: Any) -> Iterator[None]:
    """Have Ultralytics take a train split without any labels, where training needs none."""
    stock, cfg = YOLODataset.cache_labels, trainer.compression["quant"]

    def scan(dataset: Any, *args: Any) -> dict:
        augment, dataset.augment = dataset.augment, False  # its sign of a dataset that needs labels
        try:
            return stock(dataset, *args)
        finally:
            dataset.augment = augment

    if cfg and cfg.supervision == "features":
        YOLODataset.cache_labels = scan
    try:
        yield
    finally:
        YOLODataset.cache_labels = stock


# Model --------------------------------------------------------------------------------------------------------------
def insert(trainer: Any, model: nn.Module) -> None:
    """Make a float student fake-quantized in place, with the ranges that it has or else calibrated ones.

    Args:
        trainer: The trainer, which has its data but no model yet.
        model: The student on the CPU, where it stays.
    """
    cfg, pruned = trainer.compression["quant"], trainer.compression["prune"] and not trainer.resume
    if not cfg or pruned:
        note(model, quant=None)  # the model moves away from the ranges of an earlier run
    if not cfg:
        return
    if trainer.resume and (record := manifest(model).quant):
        cfg = replace(cfg, profile=record["profile"])  # `auto` may mean another one on this machine
    with torch_distributed_zero_first(LOCAL_RANK):  # the others find the ranges in the cache
        qat.prepare(model.to(trainer.device), cfg, trainer.data, imgsz(trainer, model))
    model.cpu()


# By epoch and step --------------------------------------------------------------------------------------------------
def before_epoch(trainer: Any) -> None:
    """Let ranges follow the data, or fix them."""
    for model in (unwrap_model(trainer.model), trainer.ema.ema):
        qat.set_epoch(model, trainer.epoch, trainer.compression["quant"])


def train_mode(trainer: Any) -> None:
    """Fix the statistics of BatchNorm when it is time, after Ultralytics has put the model into training mode."""
    if trainer.epoch < math.ceil(trainer.compression["quant"].freeze_bn * trainer.epochs):
        return
    for m in unwrap_model(trainer.model).modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()


def before_step(trainer: Any) -> None:
    """Keep ranges that follow the data equal on all devices."""
    if trainer.world_size > 1 and qat.observes(trainer.compression["quant"], trainer.epoch):
        mean_of_ranks(unwrap_model(trainer.model), trainer.world_size)


@torch.no_grad()
def mean_of_ranks(model: nn.Module, ranks: int) -> None:
    """Replace every range by its mean over all processes."""
    ends = [v for *_, q, _ in quantizers(model) for v in (q.lo, q.hi)]
    mean = torch.stack(ends)
    dist.all_reduce(mean)
    torch._foreach_copy_(ends, list((mean / ranks).unbind()))


# Checkpoints and validation -----------------------------------------------------------------------------------------
def stripped(model: nn.Module) -> nn.Module:
    """Return a copy of stock classes that carries specs and ranges in its manifest."""
    copy = deepcopy(model)
    qat.bake(copy)
    return qat.strip(copy)


def reload(trainer: Any, ckpt: dict[str, Any]) -> None:
    """Set ranges from the manifest of a checkpoint, whose tensors Ultralytics has loaded."""
    if ckpt.get("ema") and (record := manifest(ckpt["ema"]).quant):
        for model in (unwrap_model(trainer.model), trainer.ema.ema):
            load_state(model, record["state"])


def report_start(trainer: Any) -> None:
    """Say what the model is worth before it is trained, which is the result of PTQ, and note it in the manifest.

    Args:
        trainer: The trainer before its first epoch. A run that is resumed has said it.
    """
    if trainer.resume:
        return
    with undisturbed(trainer.device):
        model = deepcopy(trainer.ema.ema)
        found = _accuracy(trainer, model)
        set_mode(model, "float")
        base = _accuracy(trainer, model)
    if RANK not in {-1, 0}:
        return
    for live in (unwrap_model(trainer.model), trainer.ema.ema):
        note(live, quant={**manifest(live).quant, "ptq": found, "base": base})
    metric = "top-1" if trainer.args.task == "classify" else "mAP50-95"
    LOGGER.info(f"{colorstr(PREFIX)}PTQ start: {metric} {found:.4f} (float {base:.4f})")


def _accuracy(trainer: Any, model: nn.Module) -> float:
    """Return mAP50-95, or top-1 of a classifier, on the val split; on several GPUs all take part, and one knows."""
    from yolo_ext.stock.context import quiet
    from yolo_ext.stock.load import float_model

    own = trainer.validator
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = {**vars(own.args), "plots": False, "verbose": False, "compile": False, "save_dir": folder}
        found = type(own)(own.dataloader, Path(folder), args)(model=float_model(model))
    name = "accuracy_top1" if trainer.args.task == "classify" else "mAP50-95(B)"
    return float(found.get(f"metrics/{name}", 0.0))


def quantized(path: Path) -> nn.Module:
    """Return the model of a checkpoint as its INT8 file computes."""
    model = load_model(path)[0]
    qat.replay(model, manifest(model).quant)
    return model


class _Quantized:
    """In front of a validator: a checkpoint counts as what its INT8 file computes."""

    def __call__(self, trainer: Any = None, model: Any = None, **options: Any) -> Any:
        model = quantized(model) if isinstance(model, Path) else model
        return super().__call__(trainer, model, **options)  # type: ignore[misc]


@contextmanager
def quantized_validation(trainer: Any) -> Iterator[None]:
    """Have the trainer's validator measure checkpoints as quantized ones."""
    own = type(trainer.validator)
    if trainer.compression["quant"]:
        trainer.validator.__class__ = type(own.__name__, (_Quantized, own), {})
    try:
        yield
    finally:
        trainer.validator.__class__ = own
