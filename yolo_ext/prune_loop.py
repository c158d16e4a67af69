# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What pruning does to a training run: before it, between epochs, and after each optimizer step."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest, set_tripwire
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.probes import make_probes
from yolo_ext.pruning import during, unstructured
from yolo_ext.pruning.probes import Probes
from yolo_ext.pruning.schedules import epochs_of, progress
from yolo_ext.pruning.surgery import Kept, apply_plan, prune_with_plan
from yolo_ext.stock.context import recalibrate


def setup(trainer: Any) -> None:
    """Work out at which epochs a run prunes, and refuse what cannot be combined with that.

    Raises:
        UsageError: If an epoch lies outside the run, or another option does not allow surgery while training.
    """
    cfg = trainer.compression["prune"]
    trainer.prune_epochs = epochs_of(cfg, trainer.epochs) if cfg else []
    trainer.masks = None
    if not trainer.prune_epochs or cfg.kind != "structured":
        return
    if trainer.compression["quant"]:
        raise UsageError(
            "Pruning while training and QAT are both on: ranges belong to the channels that are there. Prune first, "
            "then train with quant.*; `yolo-ext compress` does both in this order."
        )
    if getattr(trainer.args, "compile", False):
        raise UsageError(
            f"'compile={trainer.args.compile}' is set, but pruning while training changes the model. Leave it out."
        )


def imgsz(trainer: Any, model: nn.Module) -> int:
    """Return the image size as `_setup_train` is going to round it."""
    stride = stock.max_stride(model)
    return check_imgsz(trainer.args.imgsz, stride=stride, floor=stride, max_dim=1)


def probes(trainer: Any, model: nn.Module) -> Probes:
    """Return the ways in which pruning may look at data and clock during this run."""
    cfg, args = trainer.compression["prune"], trainer.args
    return make_probes(trainer.data, imgsz(trainer, model), cfg, args.task, device=trainer.device)


def before_training(trainer: Any, model: nn.Module, weights: nn.Module | None) -> nn.Module:
    """Prune the student before the first epoch, or prepare it for being pruned later.

    Args:
        trainer: The trainer, which has its data but no model yet.
        model: The student with its weights.
        weights: Where they came from, None when they are random.

    Returns:
        The student on the CPU, from where other processes receive it by pickle.
    """
    cfg = trainer.compression["prune"]
    if weights is None:
        LOGGER.warning(f"{colorstr('prune: ')}the model has no trained weights, so magnitudes say nothing")
    stock.freeze(model, trainer.args.freeze)
    if cfg.kind != "structured":
        if not trainer.prune_epochs:
            unstructured.zero_weights(model, cfg, cfg.ratio)
        return model
    if trainer.prune_epochs:
        _prepare(model)
        return model
    model = model.eval().to(trainer.device)
    seen = probes(trainer, model)
    pruned = _prune(trainer, model, seen).train()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    head = type(stock.detection_head(model)).__name__
    LOGGER.info(f"{colorstr('prune: ')}{before:,} -> {after:,} parameters ({head} outputs unchanged)")
    if cfg.recalibrate and seen.images:
        n = recalibrate(pruned, seen.images())
        LOGGER.info(f"{colorstr('prune: ')}BatchNorm re-estimated on {n} train images")
    return pruned.cpu()


def _prune(trainer: Any, model: nn.Module, seen: Probes) -> nn.Module:
    """Return a pruned copy; on several devices all of them get the plan of the first."""

    def decide() -> tuple[Kept, dict[str, Any]]:
        pruned, kept = prune_with_plan(model, trainer.compression["prune"], imgsz(trainer, model), seen)
        return kept, manifest(pruned)["prune"]

    kept, record = during.agreed(decide)
    pruned = apply_plan(deepcopy(model), kept)
    manifest(pruned)["prune"] = record
    set_tripwire(pruned)
    return pruned


def _prepare(model: nn.Module) -> None:
    """Note what a later pruning step has to know about the model that the run starts with."""
    if record := manifest(model).get("prune"):
        record.pop("steps", None)  # those of an earlier run
    else:
        manifest(model)["parent"] = fingerprint(model)
    manifest(model).pop("dense", None)


def capture_masks(trainer: Any) -> None:
    """Take the zeros of a masked model for its masks, at the start of a run or of a resumed one."""
    model = unwrap_model(trainer.model)
    if manifest(model).get("masks"):
        trainer.masks = unstructured.capture(model)


def before_epoch(trainer: Any) -> None:
    """Prune if this epoch is one that prunes, then write last.pt anew: recovery from NaN needs its shapes."""
    if trainer.epoch not in trainer.prune_epochs:
        return
    cfg, ema = trainer.compression["prune"], trainer.ema.ema
    step, steps = trainer.prune_epochs.index(trainer.epoch) + 1, len(trainer.prune_epochs)
    if cfg.kind != "structured":
        _mask(trainer, cfg, progress(step=step, steps=steps, kind=cfg.schedule))
        return
    if trainer.epoch in [s["epoch"] for s in (manifest(ema).get("prune") or {}).get("steps", [])]:
        return  # a run that resumes, or repeats this epoch
    seen, size = probes(trainer, ema), imgsz(trainer, ema)
    if "dense" not in manifest(ema):
        during.remember_dense(ema, cfg, seen, size)
        manifest(unwrap_model(trainer.model))["dense"] = manifest(ema)["dense"]
    if not during.prune_run(trainer, cfg, step, steps, seen, size):
        return
    if trainer.sparsifier is not None:
        trainer.sparsifier.rebuild(unwrap_model(trainer.model))
    if trainer.epoch > 0 and RANK in {-1, 0}:
        _save_again(trainer)


def _save_again(trainer: Any) -> None:
    period, trainer.save_period = trainer.save_period, -1
    trainer.epoch -= 1
    try:
        trainer.save_model()
    finally:
        trainer.epoch += 1
        trainer.save_period = period


def _mask(trainer: Any, cfg: PruneConfig, part: float) -> None:
    """Zero more weights of the live model and the EMA, the same ones."""
    live, ema = unwrap_model(trainer.model), trainer.ema.ema
    chosen = during.copy_of_ema(trainer)
    unstructured.zero_weights(chosen, cfg, part * (cfg.ratio or 0.5))
    trainer.masks = unstructured.capture(chosen)
    for model in (live, ema):
        unstructured.apply(trainer.masks, model)
        set_tripwire(model)
    zeros = 100 * unstructured.sparsity(ema)["masked"]
    LOGGER.info(f"{colorstr('prune: ')}before epoch {trainer.epoch + 1}: {zeros:.1f} % of the weights are zero")


def after_step(trainer: Any) -> None:
    """Zero the masked weights again, in the live model and in the EMA."""
    if trainer.masks is not None:
        unstructured.apply(trainer.masks, unwrap_model(trainer.model), trainer.optimizer)
        unstructured.apply(trainer.masks, trainer.ema.ema)
