# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Range observers: a streaming histogram per tensor and the rules that turn it into a quantization range.

A rule gets the histogram, the `Spec` of the tensor and the activation behind it, if any; it returns both ends. One of
weights gets a weight (channels, n) and the largest code, and returns the covered share of the largest magnitudes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from yolo_ext.core.registry import Table
from yolo_ext.quantization.spec import Spec

observers = Table("observer")
weight_observers = Table("weight observer")

BINS = 2048  # per side of zero
SILU_MINIMUM = -0.2786  # just below that of SiLU: many values are near it and none are lower
SHRINK = np.linspace(1.0, 0.05, 96)  # searched shares of a range
WEIGHT_SHRINK = np.linspace(1.0, 0.3, 71)


@dataclass
class Histogram:
    """Counts of a tensor's values, whose memory does not grow, and which the order of the batches does not change."""

    # The grid is anchored at zero and its width is a power of two: growing the range merges pairs of bins exactly.
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * BINS))  # from `-BINS * width` to `BINS * width`
    width: float = 0.0  # of a bin; 0 before the first update
    lo: float = math.inf  # smallest and largest value seen
    hi: float = -math.inf
    batches: int = 0
    ignored: int = 0  # values that were NaN or infinite

    def update(self, x: torch.Tensor) -> None:
        """Add the finite values of `x` (any shape)."""
        x = x.detach().float().flatten()
        lo, hi = (v.item() for v in torch.aminmax(x)) if x.numel() else (math.nan, math.nan)
        if not (math.isfinite(lo) and math.isfinite(hi)):
            finite = x[x.isfinite()]
            self.ignored += x.numel() - finite.numel()
            if finite.numel():
                self.update(finite)
            return
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.batches += 1
        width = 2.0 ** math.ceil(math.log2(max(-lo, hi, 1e-12) / BINS))
        self.width = self.width or width
        while self.width < width:
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 2)
            self.width *= 2
        limit = BINS * self.width
        self.counts += torch.histc(x, 2 * BINS, -limit, limit).cpu().numpy()

    @property
    def bounded(self) -> bool:
        """Return whether these are results of SiLU, as far as their low end can tell."""
        return SILU_MINIMUM <= self.lo < 0


Transform = Callable[[np.ndarray], np.ndarray]


@observers.row("minmax", "Smallest and largest value seen")
def minmax(h: Histogram, spec: Spec, transform: Transform | None = None) -> tuple[float, float]:
    """Return the range of all values seen."""
    return h.lo, h.hi


@observers.row("percentile", "Range that leaves 0.005 % of the values outside on either side", paper="Wu et al., 2020")
def percentile(h: Histogram, spec: Spec, transform: Transform | None = None) -> tuple[float, float]:
    """Return the range between the 0.005 and the 99.995 percentile."""
    below = np.cumsum(h.counts) / h.counts.sum()
    first, last = np.searchsorted(below, 5e-5, side="right"), np.searchsorted(below, 1 - 5e-5)
    lo = h.lo if h.bounded else max(h.lo, (first - BINS) * h.width)
    return lo, min(h.hi, (last + 1 - BINS) * h.width)


@observers.row("mse", "Range with the least mean squared error after the activation", paper="Choukroun et al., 2019")
def mse(h: Histogram, spec: Spec, transform: Transform | None = None) -> tuple[float, float]:
    """Return the range that minimises the mean squared quantization error, taken behind the activation `transform`.

    The low end of SiLU results stays (Q-YOLO, Wang et al., 2023).
    """
    used = h.counts > 0
    x, weight = ((np.arange(-BINS, BINS) + 0.5) * h.width)[used], h.counts[used]
    target = transform(x) if transform else x

    def error(lo: float, hi: float) -> float:
        span = max(-lo, hi) if spec.symmetric else hi - lo
        scale = max(span, 1e-8) / spec.qmax
        zero = 0 if spec.symmetric else round(-lo / scale)
        y = (np.clip(np.rint(x / scale) + zero, spec.qmin, spec.qmax) - zero) * scale
        return float(weight @ ((transform(y) if transform else y) - target) ** 2)

    low, high = with_zero(h.lo, h.hi)
    if spec.symmetric:
        end = min(max(-low, high) * SHRINK, key=lambda v: error(-v, v))
        return max(low, -float(end)), min(high, float(end))
    # Two rounds of one end at a time: a grid over both ends gives the same range for 40 times the work.
    lo, hi = low, high
    for _ in range(2):
        hi = min(high * SHRINK, key=lambda v: error(lo, v)) if high > 0 else hi
        lo = min(low * SHRINK, key=lambda v: error(v, hi)) if low < 0 and not h.bounded else lo
    return float(lo), float(hi)


def with_zero(lo: float, hi: float) -> tuple[float, float]:
    """Return the range widened until it is not empty and holds zero, which padding and dead channels are exactly."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    return lo, max(hi, lo + 1e-5)


@weight_observers.row("max", "The largest magnitude of the channel: nothing is clipped")
def weight_max(weight: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return 1 for every channel."""
    return torch.ones(len(weight), device=weight.device)


@weight_observers.row("mse", "Range of the channel with the least mean squared error", paper="Choukroun et al., 2019")
def weight_mse(weight: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return the share, 0.3 to 1, of each channel's largest magnitude with the least squared quantization error."""
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best = torch.full((len(weight),), math.inf, device=weight.device)
    ratio = torch.ones_like(best)
    for share in WEIGHT_SHRINK.tolist():
        scale = share * largest / qmax
        error = ((weight / scale).round().clamp(-qmax, qmax) * scale - weight).square().sum(1)
        better = error < best
        best, ratio = torch.where(better, error, best), torch.where(better, share, ratio)
    return ratio
