# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning while training: at the start of an epoch, with optimizer state, EMA and adapters cut alike.

The channels are chosen on the EMA, which is what is validated and saved; the same plan then cuts the live weights,
their gradients and the optimizer's moments. Optimizer, scheduler and AMP scaler stay the objects that they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, set_tripwire, size_mb
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import YoloExtError
from yolo_ext.pruning.probes import Probes
from yolo_ext.pruning.schedules import progress
from yolo_ext.pruning.surgery import Kept, apply_plan, cut, parameter_slices, prune_with_plan
from yolo_ext.stock.context import recalibrate

ENOUGH = 1.005  # a step that would gain less than this is left out


def step_config(cfg: PruneConfig, model: nn.Module, step: int, steps: int, probes: Probes) -> PruneConfig | None:
    """Return the options of one step, whose target counts from the model as it is now.

    Args:
        cfg: Options of the run, whose target counts from the first dense model.
        model: The model before this step.
        step: Which step this is, counted from 1.
        steps: How many there are.
        probes: What data can tell, for `max_drop`.

    Returns:
        The options, or None when the step has nothing to do.
    """
    # A run that is on its way warns about a model that is not sparse enough, it does not stop.
    now, before = (progress(step=k, steps=steps, kind=cfg.schedule) for k in (step, step - 1))
    ratios = {k: _relative(r, now, before) for k, r in cfg.ratios.items()}
    cfg = replace(cfg, ratios=ratios, at=[], every=None, start=None, end=None, steps=None, force=True)
    if cfg.speedup or cfg.params:
        name, size = ("speedup", "gflops") if cfg.speedup else ("params", "params")
        target = 1 - now * (1 - 1 / (cfg.speedup or cfg.params or 1.0))
        wanted = sizes(model, _dense(model)["imgsz"])[size] / (target * _dense(model)[size])
        changed: dict[str, Any] = {name: wanted}
        return replace(cfg, **changed) if wanted > ENOUGH else None
    if cfg.latency:
        left = [1 - p * (1 - 1 / cfg.latency) for p in (before, now)]
        return replace(cfg, latency=left[0] / left[1])
    if cfg.size_mb:
        wanted = _dense(model)["size_mb"] * (1 - now) + cfg.size_mb * now
        return replace(cfg, size_mb=wanted) if wanted * ENOUGH < size_mb(model) else None
    if cfg.max_drop and probes.score:
        room = cfg.max_drop - (_dense(model)["score"] - probes.score(model))
        return replace(cfg, max_drop=room) if room > 0 else None
    return replace(cfg, ratio=_relative(cfg.ratio, now, before)) if cfg.ratio else cfg


def _relative(ratio: float, now: float, before: float) -> float:
    """Return the share to remove of what is left so that `now * ratio` of all is gone after `before * ratio` was."""
    return 1 - (1 - now * ratio) / (1 - before * ratio)


def sizes(model: nn.Module, imgsz: int = 640) -> dict[str, float]:
    """Return `gflops` and `params` of the deployed model."""
    return {
        "gflops": stock.gflops(model, imgsz),
        "params": sum(p.numel() for p in stock.deployed(model).parameters()),
    }


def remember_dense(model: nn.Module, cfg: PruneConfig, probes: Probes, imgsz: int = 640) -> None:
    """Note in the manifest what the targets of all steps count from; a model pruned before is where this run starts."""
    found: dict[str, Any] = {**sizes(model, imgsz), "size_mb": size_mb(model), "imgsz": imgsz}
    if cfg.max_drop and probes.score:
        found["score"] = probes.score(model)
    manifest(model)["dense"] = found


def _dense(model: nn.Module) -> dict[str, Any]:
    return manifest(model)["dense"]


def prune_run(trainer: Any, cfg: PruneConfig, step: int, steps: int, probes: Probes, imgsz: int = 640) -> bool:
    """Prune a training run between two epochs.

    Args:
        trainer: Ultralytics trainer at the start of an epoch; its model, EMA, optimizer and adapters are cut.
        cfg: Pruning options of the run.
        step: Which step this is, counted from 1.
        steps: How many there are.
        probes: What data and the clock can tell.
        imgsz: Side in pixels of the images that FLOPs are counted for.

    Returns:
        Whether channels were removed.

    Raises:
        UsageError: If the target of this step cannot be reached.
        CheckFailed: If the pruned model differs from the masked dense one.
    """
    decided = agreed(lambda: _decide(trainer, cfg, step, steps, probes, imgsz))
    if decided is None:
        LOGGER.info(f"{colorstr('prune: ')}step {step}/{steps}: nothing to remove yet")
        return False
    kept, record = decided
    apply_to_run(trainer, kept, record)
    if probes.images and cfg.recalibrate:
        for model in (unwrap_model(trainer.model), trainer.ema.ema):
            recalibrate(model, probes.images())
    forget_best(trainer)
    last = record["steps"][-1]
    LOGGER.info(
        f"{colorstr('prune: ')}step {step}/{steps} before epoch {trainer.epoch + 1}: "
        f"{int(last['params']):,} parameters, "
        f"{100 * last['gflops'] / _dense(trainer.ema.ema)['gflops']:.1f} % of the FLOPs"
    )
    return True


def copy_of_ema(trainer: Any) -> nn.Module:
    """Return a copy of the EMA in which the layers that the user froze are frozen, and no others."""
    model = deepcopy(trainer.ema.ema).float()
    for p, live in zip(model.parameters(), unwrap_model(trainer.model).parameters()):
        p.requires_grad_(live.requires_grad)
    return model


def _decide(
    trainer: Any, cfg: PruneConfig, step: int, steps: int, probes: Probes, imgsz: int
) -> tuple[Kept, dict] | None:
    model = copy_of_ema(trainer)
    narrowed = step_config(cfg, model, step, steps, probes)
    if narrowed is None:
        return None
    pruned, kept = prune_with_plan(model, narrowed, imgsz, probes)
    record = manifest(pruned)["prune"]
    record["config"] = asdict(cfg)
    record["steps"] = [*record.get("steps", []), {"epoch": trainer.epoch, **sizes(pruned, imgsz)}]
    return (kept, record) if kept else None


def agreed(decide: Callable[[], Any]) -> Any:
    """Return what rank 0 decides; on several devices the others receive it as data."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return decide()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except YoloExtError as e:  # or the others would wait for ever
            box[1] = e
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def apply_to_run(trainer: Any, kept: Kept, record: dict[str, Any]) -> None:
    """Cut everything that a training run holds by one plan.

    Args:
        trainer: Ultralytics trainer.
        kept: Kept positions by module path and dimension, in the numbering of the model as it is.
        record: What the manifest is to say about pruning afterwards.
    """
    live, ema = unwrap_model(trainer.model), trainer.ema.ema
    modules, old = dict(live.named_modules()), dict(live.named_parameters())
    slices = {f"{path}.{name}": s for path, dims in kept.items()
              for name, s in parameter_slices(modules[path], dims).items()}  # fmt: skip
    channels_last = any(p.ndim == 4 and not p.is_contiguous() for p in old.values())
    for model in (live, ema):
        apply_plan(model, kept)
        manifest(model)["prune"] = deepcopy(record)
        set_tripwire(model)
    if channels_last:
        live.to(memory_format=torch.channels_last)
    new = dict(live.named_parameters())
    follow(trainer.optimizer, [(old[n], new[n], s) for n, s in slices.items()])
    if trainer.distiller is not None:
        _cut_adapters(trainer, live, kept)
    stock.restart_ema(trainer.ema)
    stock.rewrap(trainer)


def follow(
    optimizer: torch.optim.Optimizer,
    pairs: Iterable[tuple[nn.Parameter, nn.Parameter, list[tuple[int, list[int]]]]],
) -> None:
    """Make an optimizer go on with cut parameters, its moments cut by the same indices.

    Args:
        optimizer: Any optimizer whose state tensors have the shape of their parameter or none of its dimensions.
        pairs: Old parameter, new parameter and (dimension, kept positions) pairs.
    """
    swap = {old: (new, slices) for old, new, slices in pairs}
    for group in optimizer.param_groups:
        group["params"] = [swap[p][0] if p in swap else p for p in group["params"]]
    for old, (new, slices) in swap.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                k: cut(v, slices) if isinstance(v, torch.Tensor) and v.shape == old.shape else v
                for k, v in optimizer.state.pop(old).items()
            }


def _cut_adapters(trainer: Any, live: nn.Module, kept: Kept) -> None:
    """Cut the student's side of the distillation adapters."""
    paths = stock.level_inputs(live)
    for adapter, level in zip(trainer.distiller.adapters, trainer.distiller.levels):
        index = kept.get(paths[level], {}).get("in")
        if index is None:
            continue
        old = adapter.conv.weight if adapter.conv is not None else None
        adapter.shrink(index)
        if old is not None:
            follow(trainer.optimizer, [(old, adapter.conv.weight, [(1, index)])])


def forget_best(trainer: Any) -> None:
    """Let best.pt and early stopping start anew: what was best before had more channels."""
    trainer.best_fitness = None
    trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch
