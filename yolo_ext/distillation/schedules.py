# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Weight schedules: pure functions of the progress of the run."""

from __future__ import annotations

import math

from yolo_ext.registry import Table

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
