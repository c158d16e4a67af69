# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What is wrong with the ranges of a quantized model: values outside, codes that nothing uses, unlike channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from yolo_ext.quantization.calibration import weight_rows
from yolo_ext.quantization.fake_quant import quantized_layers, quantizers
from yolo_ext.quantization.layers import channel_axis
from yolo_ext.quantization.spec import Spec
from yolo_ext.stock.context import evaluating

Row = dict[str, Any]
CLIPPED = 0.02  # share of values outside the range; 0.1 % is usual
WIDE = 4.0  # range / range of the data: two of the bits are never used; 1.8 is usual in a layer that sees few images
UNLIKE = 200.0  # largest channel / median channel: of 8 bits the median channel has one code; 7 is usual
SHOWN = 3  # layers that a sentence names


@dataclass
class _Seen:
    """What went through one quantizer."""

    codes: torch.Tensor
    total: int = 0
    clipped: int = 0
    low: float = 0.0
    high: float = 0.0
    channels: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@torch.no_grad()
def inspect(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[Row]:
    """Look at what every quantizer of a model gets.

    Args:
        model: A model with calibrated fake quantizers, which run in the mode that they are in; left as it was.
        batches: Images (B, C, H, W), 0 to 1.

    Returns:
        A row for each layer and site: `path`, `site`, `bits`, ends `lo` and `hi` of the range, `low` and `high` of the
        data (zero included), `clip` (share of values outside the range, without what a lower bound cuts on purpose),
        `used` (share of the codes that occur, of those that could), `wide` (range / range of the data) and `channels`
        (largest magnitude of a channel / median over the channels).
    """
    sites = [(path, site, q) for path, site, q, _ in quantizers(model) if q.ready]
    seen: dict[int, _Seen] = {}
    handles = [q.register_forward_pre_hook(_observer(seen)) for *_, q in sites]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for images in batches:
                model(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
    rows = [_weight_row(path, layer) for path, layer, _ in quantized_layers(model) if layer.weight_spec]
    return rows + [_row(path, site, q, seen[id(q)]) for path, site, q in sites if id(q) in seen]


def _codes(x: torch.Tensor, lo: float, hi: float, spec: Spec) -> torch.Tensor:
    """Return codes counted from 0, before they are clipped to `0 .. qmax - qmin`."""
    if spec.symmetric:
        return (x / max(-lo, hi, 1e-12) * spec.qmax).round() - spec.qmin
    scale = max(hi - lo, 1e-12) / spec.qmax
    return (x / scale).round() + round(-lo / scale)


def _observer(seen: dict[int, _Seen]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def hook(q: Any, args: tuple[torch.Tensor, ...]) -> None:
        x, spec = args[0].detach().float(), q.spec
        levels = spec.qmax - spec.qmin + 1
        row = seen.setdefault(id(q), _Seen(torch.zeros(levels, dtype=torch.long)))
        if not x.isfinite().all():
            row.low = row.high = math.nan
            return
        codes = _codes(x, float(q.lo), float(q.hi), spec)
        # Behind a lower limit lies what SiLU makes of nearly nothing: to clip it is the purpose of the limit.
        outside = (codes > levels - 1) | ((codes < 0) & (q.lower == -math.inf))
        row.total += codes.numel()
        row.clipped += int(outside.sum())
        row.codes += torch.bincount(codes.clamp(0, levels - 1).long().flatten().cpu(), minlength=levels)
        bounded = x.clamp(min=q.lower)
        row.low, row.high = min(row.low, float(bounded.min())), max(row.high, float(bounded.max()))
        largest = (x.abs().amax((0, 2, 3)) if x.ndim == 4 else x.abs().flatten(0, -2).amax(0)).cpu()
        row.channels = torch.maximum(row.channels, largest) if row.channels.numel() else largest

    return hook


def _row(path: str, site: str, q: Any, seen: _Seen) -> Row:
    lo, hi = float(q.lo), float(q.hi)
    width = 2 * max(-lo, hi) if q.spec.symmetric else hi - lo
    data = 2 * max(-seen.low, seen.high) if q.spec.symmetric else seen.high - seen.low
    could = max(min(len(seen.codes), seen.total), 1)
    return {
        "path": path, "site": site, "bits": q.spec.bits, "lo": lo, "hi": hi, "low": seen.low, "high": seen.high,
        "clip": seen.clipped / max(seen.total, 1), "used": int((seen.codes > 0).sum()) / could,
        "wide": width / data if data > 0 else math.inf, "channels": _unlike(seen.channels),
    }  # fmt: skip


def _weight_row(path: str, layer: Any) -> Row:
    spec, rows = layer.weight_spec, weight_rows(layer).cpu()
    channels = rows.reshape(layer.weight.shape[channel_axis(layer)], -1).abs().amax(1)
    ends = rows.abs().amax(1) * layer.weight_ratio.cpu()
    codes = rows / ends.reshape(-1, 1).clamp_min(1e-12) * spec.qmax
    used = codes.round().clamp(-spec.qmax, spec.qmax).unique().numel() / min(2 * spec.qmax + 1, max(rows.numel(), 1))
    return {
        "path": path, "site": "weight", "bits": spec.bits, "lo": -float(ends.max()), "hi": float(ends.max()),
        "low": float(rows.min()), "high": float(rows.max()),
        "clip": float((codes.abs() > spec.qmax + 0.5).float().mean()),
        "used": used, "wide": 1.0,
        "channels": 1.0 if spec.per_channel else _unlike(channels),
    }  # fmt: skip


def _unlike(channels: torch.Tensor) -> float:
    """Return the largest channel / the median of those that are not dead."""
    alive = channels[channels > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0


def findings(rows: Sequence[Row]) -> list[str]:
    """Say what is wrong in sentences, the worst layers first; none when all is well.

    Args:
        rows: What `inspect` returned.
    """
    bad = [r for r in rows if not math.isfinite(r["low"] + r["high"])]
    sound = [r for r in rows if math.isfinite(r["low"] + r["high"])]
    found = [
        _sentence("Values that are not finite reach", bad, "low", "The model is broken there."),
        _sentence(
            f"More than {CLIPPED:.0%} of the values are clipped in",
            [r for r in sound if r["clip"] > CLIPPED and r["site"] != "weight"],
            "clip",
            "Calibrate on more images, or with quant.observer=minmax.",
            "{clip:.1%}",
        ),
        _sentence(
            f"The range is more than {WIDE:g} times as wide as the data in",
            [r for r in sound if r["wide"] > WIDE and r["site"] != "weight"],
            "wide",
            "Calibrate on images like those that the model will see.",
            "{used:.0%} of the codes used",
        ),
        _sentence(
            f"The largest channel is more than {UNLIKE:g} times the median one in",
            [r for r in sound if r["channels"] > UNLIKE],
            "channels",
            "One range cannot hold them: leave these layers float with quant.exclude.",
            "{channels:.0f} times",
        ),
    ]
    return [sentence for sentence in found if sentence]


def _sentence(what: str, rows: list[Row], key: str, advice: str, figure: str = "") -> str:
    if not rows:
        return ""
    worst = sorted(rows, key=lambda r: -r[key])[:SHOWN]
    names = [f"{r['path']} {r['site']}" + (f" ({figure.format(**r)})" if figure else "") for r in worst]
    more = f" and {len(rows) - len(worst)} more" if len(rows) > len(worst) else ""
    return f"{what} {', '.join(names)}{more}. {advice}"
