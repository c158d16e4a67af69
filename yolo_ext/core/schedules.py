# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Schedules of pruning, losses and sparsity: functions of the epoch without memory, so that a resumed run goes on."""

import math
from typing import Any

from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import PruneConfig, SparsityConfig
from yolo_ext.core.registry import Table

removals = Table("pruning schedule")  # row: share of the prunings that are over -> share of the target
decays = Table("distillation schedule")  # row: progress of the run, last factor -> factor


@removals.row("cubic", "Much at first, with redundant weights, then less", paper="Zhu & Gupta, 2017, arXiv:1710.01878")
def cubic_removal(*, done: float) -> float:
    """Return the share of the target at `done`, the share of the prunings that are over."""
    return 1.0 - (1.0 - done) ** 3


@removals.row("linear", "In equal steps")
def linear_removal(*, done: float) -> float:
    """Return the share of the target at `done`, the share of the prunings that are over."""
    return done


def pruned_share(*, step: int, steps: int, kind: str) -> float:
    """Return how much of the target, 0..1, is met after pruning `step` of `steps` (0 is before the first)."""
    return float(removals[kind].fn(done=min(step, steps) / steps))


def prune_epochs(*, cfg: PruneConfig | None, epochs: int) -> list[int]:
    """Return the epochs that start with a pruning, counted from 0; none when only the start of a run prunes."""
    if cfg is None:
        return []
    for name, epoch in {"at": max(cfg.at, default=None), "start": cfg.start, "end": cfg.end}.items():
        if epoch is not None and epoch >= epochs:
            why = f"lies outside a run of {epochs} epochs. Legal: 0 to {epochs - 1}. Lower it or raise epochs."
            raise UsageError(f"'prune.{name}={getattr(cfg, name)}' {why}")
    if cfg.at:
        return list(cfg.at)
    if cfg.every is None and cfg.steps is None:
        if cfg.start is None and cfg.end is None:
            return []
        raise UsageError("'prune.start' and 'prune.end' need 'prune.every' or 'prune.steps', which say how often.")
    start, end = cfg.start or 0, epochs // 2 if cfg.end is None else cfg.end
    if end < start:
        why = f"leaves no epoch to prune in: 'prune.end' is {end}, half of the epochs"
        raise UsageError(f"'prune.start={start}' {why}. Lower prune.start or give prune.end.")
    if cfg.every is not None:
        return list(range(start, end + 1, cfg.every))[: cfg.steps]
    intervals = max((cfg.steps or 1) - 1, 1)
    return sorted({start + i * (end - start) // intervals for i in range(cfg.steps or 1)})


@decays.row("constant", "The same weight in every epoch")
def constant(*, progress: float, final: float) -> float:
    """Return 1."""
    return 1.0


@decays.row("linear", "From 1 to `final` in equal steps")
def linear(*, progress: float, final: float) -> float:
    """Return the factor at `progress` (0 first epoch, 1 last epoch)."""
    return 1.0 + (final - 1.0) * progress


@decays.row("cosine", "From 1 to `final` along half a cosine over the whole run")
def cosine(*, progress: float, final: float) -> float:
    """Return the factor at `progress` (0 first epoch, 1 last epoch)."""
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def loss_factor(
    *, epoch: int, epochs: int, schedule: str, final: float, start: int, end: int | None, warmup: int
) -> float:
    """Return the factor, 0..1, on a weight in one epoch: from `start` to before `end` one of `decays`, 0 elsewhere."""
    if epoch < start or (end is not None and epoch >= end):
        return 0.0
    last = (epochs if end is None else end) - 1
    progress = min((epoch - start) / max(last - start, 1), 1.0)
    return min(1.0, (epoch - start + 1) / (warmup + 1)) * float(decays[schedule].fn(progress=progress, final=final))


def pulls(*, cfg: SparsityConfig, coefficient: float, epochs: int, first_pruning: int | None = None) -> list[float]:
    """Return the pull of each epoch, `coefficient` in sum, until `first_pruning` unless `cfg.end` says otherwise."""
    end = cfg.end if cfg.end is not None else epochs if first_pruning is None else first_pruning
    if cfg.end is not None and cfg.end > epochs:
        raise UsageError(f"'sparsity.end={cfg.end}' lies outside a run of {epochs} epochs. Legal: 1 to {epochs}.")
    if cfg.start >= end:
        what = "the first pruning" if cfg.end is None and first_pruning is not None else "the end"
        why = f"leaves no epoch for sparsity training: {what} is at epoch {end}"
        raise UsageError(f"'sparsity.start={cfg.start}' {why}. Lower it, raise epochs, or prune later.")
    timing: dict[str, Any] = {k: getattr(cfg, k) for k in ("schedule", "final", "start", "warmup")}
    factors = [loss_factor(epoch=e, epochs=epochs, end=end, **timing) for e in range(epochs)]
    return [coefficient / sum(factors) * f for f in factors]
