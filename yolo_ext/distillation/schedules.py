# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Weight schedules: pure functions of the progress of the run."""

from __future__ import annotations

import math

from yolo_ext.core.registry import Table

schedules = Table("distillation schedule")


@schedules.row("constant", "The same weight in every epoch")
def constant(*, progress: float, final: float) -> float:
    """Return 1."""
    return 1.0


@schedules.row("linear", "From 1 to `final` in equal steps")
def linear(*, progress: float, final: float) -> float:
    """Return the factor at `progress` (0 first epoch, 1 last epoch)."""
    return 1.0 + (final - 1.0) * progress


@schedules.row("cosine", "From 1 to `final` along half a cosine over the whole run")
def cosine(*, progress: float, final: float) -> float:
    """Return the factor at `progress` (0 first epoch, 1 last epoch)."""
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def scale(epoch: int, epochs: int, *, schedule: str, final: float, start: int, end: int | None, warmup: int) -> float:
    """Return the factor on a weight in one epoch, without memory, so that a resumed run goes on with the same.

    Args:
        epoch: Epoch, counted from 0.
        epochs: Epochs of the run.
        schedule: Row of `schedules`, run through from the first to the last active epoch.
        final: Factor at the last active epoch.
        start: First active epoch.
        end: First epoch that is not active any more; None is the end of the run.
        warmup: Active epochs over which the factor rises besides.

    Returns:
        A factor from 0 to 1; 0 outside of the active epochs.
    """
    if epoch < start or (end is not None and epoch >= end):
        return 0.0
    last = (epochs if end is None else end) - 1
    progress = min((epoch - start) / max(last - start, 1), 1.0)
    return min(1.0, (epoch - start + 1) / (warmup + 1)) * schedules[schedule].fn(progress=progress, final=final)
