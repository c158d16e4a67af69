# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""How the pull towards zero is spread over the epochs, by plan or steered by what training shows."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_ext.core.config import SparsityConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.schedules import schedules

RAISE, LOWER = 1.5, 0.5  # what `auto` multiplies the pull by after an epoch


def pulls(cfg: SparsityConfig, coefficient: float, epochs: int, first_pruning: int | None = None) -> list[float]:
    """Return the pull of each epoch, in units of what is pulled; their sum is the coefficient.

    Args:
        cfg: Sparsity options.
        coefficient: How far the whole run pulls a parameter that the loss does not defend.
        epochs: Epochs of the run.
        first_pruning: Epoch that starts with the first pruning, where the pull ends unless `cfg.end` says otherwise.

    Returns:
        One pull for each epoch, zero where there is none.

    Raises:
        UsageError: If the active epochs lie outside the run, or there are none.
    """
    end = cfg.end if cfg.end is not None else epochs if first_pruning is None else first_pruning
    if cfg.end is not None and cfg.end > epochs:
        raise UsageError(f"'sparsity.end={end}' lies outside a run of {epochs} epochs. Legal: 1 to {epochs}.")
    if cfg.start >= end:
        what = "the first pruning" if cfg.end is None and first_pruning is not None else "the end"
        raise UsageError(
            f"'sparsity.start={cfg.start}' leaves no epoch for sparsity training: {what} is at epoch {end}. "
            "Lower sparsity.start, raise epochs, or prune later."
        )
    shape = []
    for i in range(end - cfg.start):
        ramp = min(1.0, (i + 1) / (cfg.warmup + 1))
        shape.append(ramp * schedules[cfg.schedule].fn(progress=i / max(end - cfg.start - 1, 1), final=cfg.final))
    unit = coefficient / sum(shape)
    return [0.0] * cfg.start + [unit * s for s in shape] + [0.0] * (epochs - end)


@dataclass
class Controller:
    """Steers the pull: up until enough channels are gone or the fitness has dropped too far, then down for good.

    Attributes:
        target: Share of channels below the threshold to reach.
        max_drop: Largest drop of the fitness.
        gain: What the pull of the schedule is multiplied by.
        reference: Fitness after the first epoch, from which drops are counted.
        lowering: Whether the turning point is over.
    """

    target: float
    max_drop: float
    gain: float = 1.0
    reference: float | None = None
    lowering: bool = False

    def update(self, share: float, fitness: float) -> None:
        """Set the gain for the next epoch.

        Args:
            share: Share of prunable channels below the threshold, 0..1.
            fitness: Fitness of the epoch that is over, larger is better.
        """
        if self.reference is None:
            self.reference = fitness
        self.lowering = self.lowering or share >= self.target or self.reference - fitness > self.max_drop
        self.gain *= LOWER if self.lowering else RAISE
