# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Range observers: a streaming histogram per tensor and the rules that turn it into a quantization range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from yolo_ext.registry import Table

observers = Table("observer")

BINS = 2048  # per side of zero


@dataclass
class Histogram:
    """Counts of a tensor's values, in memory that does not grow with the number of images.

    The grid is anchored at zero and its width is a power of two, so growing the range merges pairs of bins exactly:
    the result does not depend on the order of the batches.

    Attributes:
        counts: Count per bin, shape (2 * BINS,), for values from `-BINS * width` to `BINS * width`.
        width: Width of a bin; 0 before the first update.
        lo: Smallest value seen.
        hi: Largest value seen.
        mean_lo: Mean over the batches of the smallest value.
        mean_hi: Mean over the batches of the largest value.
        batches: Number of updates.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS))
    width: float = 0.0
    lo: float = math.inf
    hi: float = -math.inf
    mean_lo: float = 0.0
    mean_hi: float = 0.0
    batches: int = 0

    def update(self, x: torch.Tensor) -> None:
        """Add the finite values of `x` (any shape)."""
        x = x.detach().float().flatten()
        lo, hi = (v.item() for v in torch.aminmax(x)) if x.numel() else (math.nan, math.nan)
        if not (math.isfinite(lo) and math.isfinite(hi)):
            x = x[x.isfinite()]
            if not x.numel():
                return
            lo, hi = (v.item() for v in torch.aminmax(x))
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.batches += 1
        self.mean_lo += (lo - self.mean_lo) / self.batches
        self.mean_hi += (hi - self.mean_hi) / self.batches
        self._grow(max(-lo, hi))
        limit = BINS * self.width
        self.counts += torch.histc(x, 2 * BINS, -limit, limit).cpu().numpy()

    def _grow(self, bound: float) -> None:
        width = 2.0 ** math.ceil(math.log2(max(bound, 1e-12) / BINS))
        if self.width == 0:
            self.width = width
        while self.width < width:
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(half, BINS // 2)
            self.width *= 2

    @property
    def centers(self) -> np.ndarray:
        """Return the centre of every bin, shape (2 * BINS,)."""
        return (np.arange(-BINS, BINS) + 0.5) * self.width


Transform = Callable[[np.ndarray], np.ndarray]


@observers.row("minmax", "Smallest and largest value seen")
def minmax(h: Histogram, qmax: int, transform: Transform | None = None) -> tuple[float, float]:
    """Return the range of all values seen."""
    return h.lo, h.hi


@observers.row(
    "moving_average", "Mean over the batches of their smallest and largest values", paper="Jacob et al., 2018"
)
def moving_average(h: Histogram, qmax: int, transform: Transform | None = None) -> tuple[float, float]:
    """Return the average range of a batch, which forgives single outliers."""
    return h.mean_lo, h.mean_hi


@observers.row("percentile", "Range that leaves 0.005 % of the values outside on either side", paper="Wu et al., 2020")
def percentile(h: Histogram, qmax: int, transform: Transform | None = None) -> tuple[float, float]:
    """Return the range between the 0.005 and the 99.995 percentile."""
    below = np.cumsum(h.counts) / h.counts.sum()
    first, last = np.searchsorted(below, 5e-5, side="right"), np.searchsorted(below, 1 - 5e-5)
    return max(h.lo, (first - BINS) * h.width), min(h.hi, (last + 1 - BINS) * h.width)


@observers.row("mse", "Range with the least mean squared error after the activation", paper="Choukroun et al., 2019")
def mse(h: Histogram, qmax: int, transform: Transform | None = None) -> tuple[float, float]:
    """Return the range that minimises the mean squared quantization error.

    Args:
        h: What was seen.
        qmax: Largest activation code.
        transform: The activation between the quantizer and its consumers; the error is taken behind it.

    Returns:
        Low and high end.
    """
    used = h.counts > 0
    x, weight = h.centers[used], h.counts[used]
    target = transform(x) if transform else x

    def error(lo: float, hi: float) -> float:
        scale = max(hi - lo, 1e-8) / qmax
        zero = round(-lo / scale)
        y = (np.clip(np.rint(x / scale) + zero, 0, qmax) - zero) * scale
        return float(weight @ ((transform(y) if transform else y) - target) ** 2)

    low, high = with_zero(h.lo, h.hi)
    shrink = np.linspace(1.0, 0.2, 81)
    # Two rounds of one end at a time: a grid over both ends gives the same range for 40 times the work.
    lo, hi = low, high
    for _ in range(2):
        hi = min((high * s for s in shrink), key=lambda v: error(lo, v)) if high > 0 else hi
        lo = min((low * s for s in shrink), key=lambda v: error(v, hi)) if low < 0 else lo
    return lo, hi


def with_zero(lo: float, hi: float) -> tuple[float, float]:
    """Return the range widened until it holds zero and is not empty.

    Padding and dead channels are exactly zero, so zero must have a code of its own.
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    return lo, max(hi, lo + 1e-5)
