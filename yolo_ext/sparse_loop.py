# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What sparsity training does to a training run: around each optimizer step, and after each epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext.checkpoint import fingerprint, is_pruned, manifest
from yolo_ext.core.options import PruneConfig
from yolo_ext.prune_loop import imgsz
from yolo_ext.pruning.during import forget_best
from yolo_ext.sparsity import monitor
from yolo_ext.sparsity.sparsifier import Sparsifier

GROUP = "sparse"  # name of the parameter group without weight decay


def attach(trainer: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the sparsifier of a run, put its steps around those of the optimizer, and switch off weight decay for it.

    Out of memory, Ultralytics may come here once more with a new optimizer: the sparsifier stays.

    Args:
        trainer: The trainer.
        model: The live model, not wrapped.
        optimizer: Its new optimizer.

    Raises:
        UsageError: If nothing of the model can become sparse.
    """
    cfg = trainer.compression["sparsity"]
    if trainer.sparsifier is None:
        _make(trainer, model)
    _without_decay(model, optimizer, trainer.sparsifier.penalised(model))
    # Hooks of the optimizer see gradients behind unscaling and clipping, and are not run when AMP skips a step.
    if cfg.mode == "gradient":
        optimizer.register_step_pre_hook(lambda o, *_: trainer.sparsifier.gradient(_live(trainer), _part(trainer), o))
    else:
        optimizer.register_step_post_hook(lambda *_: trainer.sparsifier.shrink(_live(trainer), _part(trainer)))


def _make(trainer: Any, model: nn.Module) -> None:
    cfg = trainer.compression["sparsity"]
    if not trainer.resume and not is_pruned(model):
        manifest(model)["parent"] = fingerprint(model)  # channels keep their meaning: its own teacher stays comparable
    trainer.sparsifier = Sparsifier(model, cfg, _prune_config(trainer), trainer.epochs, trainer.prune_epochs)
    if RANK in {-1, 0}:
        LOGGER.info(
            f"{colorstr('sparsity: ')}{cfg.method}, pull {trainer.sparsifier.coefficient:g} over the run, "
            f"{len(trainer.sparsifier.groups)} groups that can be pruned"
        )


def _prune_config(trainer: Any) -> PruneConfig:
    """Return the pruning options, whose `include` and `exclude` say what is going to be pruned."""
    return trainer.compression["prune"] or PruneConfig(ratio=0.5, method=trainer.compression["sparsity"].method)


def _live(trainer: Any) -> nn.Module:
    return unwrap_model(trainer.model)


def _part(trainer: Any) -> float:
    """Return which part of an epoch the batches behind this optimizer step are."""
    return trainer.cadence.waiting / len(trainer.train_loader)


def _without_decay(model: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Move parameters out of groups with weight decay into like groups without."""
    chosen = {p for n, p in model.named_parameters() if n in names}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if p in chosen]
        if not moved or not group.get("weight_decay"):
            continue
        group["params"] = [p for p in group["params"] if p not in chosen]
        like = {k: v for k, v in group.items() if k != "params"}
        optimizer.add_param_group({**like, "params": moved, "weight_decay": 0.0, "param_group": GROUP})


def before_epoch(trainer: Any) -> None:
    """Set the pull of this epoch. While there is one, best.pt is the newest: fitness would prefer the least sparse."""
    sparsifier = trainer.sparsifier
    sparsifier.set_epoch(trainer.epoch)
    sparsifier.keep_up(_live(trainer), len(trainer.train_loader))
    if sparsifier.pull > 0:
        forget_best(trainer)


def after_step(trainer: Any) -> None:
    """Make zeros of the live model zeros of the EMA, where they would only fade."""
    trainer.sparsifier.follow(_live(trainer), trainer.ema.ema)


def items(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the penalty for the progress bar and results.csv."""
    return {"sparsity_loss": trainer.sparsifier.penalty(_live(trainer)).detach()}


def after_epoch(trainer: Any) -> dict[str, float]:
    """Look at the model, steer the pull, and return columns for results.csv.

    Args:
        trainer: The trainer after validation; its manifest gets a summary, its run folder the history and pictures.
    """
    sparsifier, ema, cfg = trainer.sparsifier, trainer.ema.ema, trainer.compression["sparsity"]
    record = monitor.observe(
        ema, cfg, _prune_config(trainer), epoch=trainer.epoch, coefficient=sparsifier.coefficient,
        penalty=float(sparsifier.penalty(ema)), imgsz=imgsz(trainer, ema), pull=sparsifier.pull,
    )  # fmt: skip
    if cfg.auto:
        sparsifier.steer(record["share"], float(trainer.fitness))
    summary = {"method": cfg.method, "coefficient": sparsifier.coefficient, "epochs": trainer.epoch + 1,
               "threshold": cfg.threshold, "share": record["share"], "speedup": record["speedup"]}  # fmt: skip
    for model in (_live(trainer), ema):
        manifest(model)["sparsity"] = summary
    history = monitor.History(trainer.save_dir)
    history.append(record)
    for picture in history.plot():
        trainer.on_plot(picture)
    return monitor.columns(record)
