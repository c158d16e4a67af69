# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning while training: in which epochs, and how much of the target each time. Pure functions, so resume agrees."""

from __future__ import annotations

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Table

schedules = Table("pruning schedule")


@schedules.row(
    "cubic", "Much at first, when weights are redundant, little at the end", paper="Zhu & Gupta, 2017, arXiv:1710.01878"
)
def cubic(*, done: float) -> float:
    """Return the share of the target at `done`, the share of the prunings that are over."""
    return 1.0 - (1.0 - done) ** 3


@schedules.row("linear", "In equal steps")
def linear(*, done: float) -> float:
    """Return the share of the target at `done`, the share of the prunings that are over."""
    return done


def progress(*, step: int, steps: int, kind: str) -> float:
    """Return how much of the target is met after a pruning.

    Args:
        step: Which pruning this is, counted from 1; 0 is before the first.
        steps: Number of prunings.
        kind: Row of `schedules`.

    Returns:
        Share of the target, 0..1; exactly 1 at the last step.
    """
    return float(schedules[kind].fn(done=min(step, steps) / steps))


def epochs_of(cfg: PruneConfig, epochs: int) -> list[int]:
    """Return the epochs that start with a pruning.

    Args:
        cfg: Pruning options: `at`, or `every` and `steps` between `start` (0) and `end` (half of the epochs).
        epochs: Epochs of the run.

    Returns:
        Ascending epochs counted from 0, empty when the model is pruned before the training only.

    Raises:
        UsageError: If an epoch lies outside the run, or the options leave no epoch to prune in.
    """
    given = {"at": max(cfg.at, default=None), "start": cfg.start, "end": cfg.end}
    for name, epoch in given.items():
        if epoch is not None and epoch >= epochs:
            raise UsageError(
                f"'prune.{name}={cfg.at if name == 'at' else epoch}' lies outside a run of {epochs} epochs. "
                f"Legal: 0 to {epochs - 1}. Lower it or raise epochs."
            )
    if cfg.at:
        return list(cfg.at)
    if cfg.every is None and cfg.steps is None:
        if cfg.start is None and cfg.end is None:
            return []
        raise UsageError("'prune.start' and 'prune.end' need 'prune.every' or 'prune.steps', which say how often.")
    start, end = cfg.start or 0, epochs // 2 if cfg.end is None else cfg.end
    if end < start:
        raise UsageError(
            f"'prune.start={start}' leaves no epoch to prune in: 'prune.end' is {end}, half of the epochs. "
            "Lower prune.start or give prune.end."
        )
    if cfg.every is not None:
        return list(range(start, end + 1, cfg.every))[: cfg.steps]
    intervals = max((cfg.steps or 1) - 1, 1)
    return sorted({start + i * (end - start) // intervals for i in range(cfg.steps or 1)})
