# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ranges: activations from images, weights from themselves; and what is wrong with them afterwards."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import LOGGER, TQDM

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Row
from yolo_ext.data.records import quote
from yolo_ext.quantization.fake_quant import get_state, insert_plan, quantized_layers, quantizers, set_mode
from yolo_ext.quantization.layers import channel_axis, weight_rows
from yolo_ext.quantization.observers import Histogram, observers, weight_observers
from yolo_ext.quantization.spec import Plan, State
from yolo_ext.stock.context import evaluating

SHOWN = 3  # layer names in a message
EMPTY = 2e-5  # just above what `with_zero` makes of one; smaller and the integer bias of a kernel overflows
CLIPPED = 0.02  # share of values outside the range; 0.1 % is usual
WIDE = 4.0  # range / range of the data: two of the bits are never used; 1.8 is usual in a layer that sees few images
UNLIKE = 200.0  # largest channel / median channel: of 8 bits the median channel has one code; 7 is usual
Found = dict[str, Any]


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[torch.Tensor], observer: str = "mse", weight_observer: str | None = "max",
    total: int | None = None,
) -> State:  # fmt: skip
    """Set all ranges by images (B, C, H, W), 0 to 1, and return the state; weight observer None keeps theirs."""
    sites = list(quantizers(model))
    layers = [layer for _, layer, _ in quantized_layers(model) if layer.weight_spec]
    if not sites and not layers:
        raise UsageError("This model has no fake quantizers to calibrate. Insert them first.")
    rules = [observers[q.spec.observer or observer] for *_, q, _ in sites]
    weight_rule = weight_observers[weight_observer].fn if weight_observer else None
    histograms = _observe(model, [q for *_, q, _ in sites], batches, total)
    for layer in layers if weight_rule else ():
        layer.weight_ratio.copy_(weight_rule(weight_rows(layer), layer.weight_spec.qmax).clamp(1e-3, 1.0))  # type: ignore[misc]
    broken, repaired, ignored = (list[str]() for _ in range(3))
    for (path, site, q, act), h, rule in zip(sites, histograms, rules):
        if q.fixed:
            continue
        if h.ignored:
            (ignored if h.batches else broken).append(f"{path} ({site})")
        if h.batches and not _set_range(q, h, rule, _numpy(act) if site == "output" else None):
            repaired.append(f"{path} ({site})")
    if broken:
        remedy = "The float model is broken there: predict with it, or keep the layers float with quant.exclude."
        raise UsageError(f"Calibration saw nothing but NaN or infinite values in {quote(broken, SHOWN)}. {remedy}")
    if repaired:
        now = "It was replaced by the smallest and largest finite value, or by 0 to 1 where there were only zeros."
        LOGGER.warning(f"Calibration found an empty or infinite range in {quote(repaired, SHOWN)}. {now}")
    if ignored:
        LOGGER.warning(f"Calibration left out NaN and infinite values in {quote(ignored, SHOWN)}.")
    return get_state(model)


def known(plan: Plan, state: State) -> State:
    """Return what a state has of the sites of a plan."""
    return {path: {s: state[path][s] for s in sites if s in state.get(path, {})} for path, sites in plan.items()}


def calibrate_rest(model: nn.Module, plan: Plan, given: State, batches: Iterable[torch.Tensor], *how: Any) -> State:
    """Insert a plan into a float model, and return its state: the given ranges, and those that calibration finds."""
    insert_plan(model, plan)
    found = calibrate(model, batches, *how)
    return {path: {**sites, **given[path]} for path, sites in found.items()}


def _observe(model: nn.Module, sites: list[Any], batches: Iterable[torch.Tensor], total: int | None) -> list[Histogram]:
    """Run the images through the float model and return what each of its quantizers saw."""
    device, images, histograms = next(model.parameters()).device, 0, [Histogram() for _ in sites]
    seen = [(q, h) for q, h in zip(sites, histograms) if not q.fixed]
    handles = [q.register_forward_pre_hook(lambda _, x, h=h: h.update(*x)) for q, h in seen]
    set_mode(model, "float")
    try:
        with evaluating(model, handles):
            for x in TQDM(batches, desc="Calibrating", total=total):
                images += len(x)
                model(x.to(device))
    finally:
        set_mode(model, "on")
    if not images:
        raise UsageError("Calibration got no images.")
    return histograms


def _set_range(q: Any, h: Histogram, rule: Row, transform: Callable[..., Any] | None) -> bool:
    """Give a quantizer the range of a rule, or a usable one; tell which."""
    lo, hi = (float(v) for v in rule.fn(h, q.spec, transform))
    usable = math.isfinite(lo) and math.isfinite(hi) and lo <= hi and max(-lo, hi) >= EMPTY
    q.set_range(*((lo, hi) if usable else (h.lo, h.hi) if max(-h.lo, h.hi) >= EMPTY else (0.0, 1.0)))
    return usable


def _numpy(act: nn.Module | None) -> Callable[..., Any] | None:
    """Return an activation without parameters as a function of arrays, None where it changes nothing."""
    if act is None or isinstance(act, nn.Identity) or any(True for _ in act.parameters()):
        return None
    return lambda x: act(torch.from_numpy(x.copy()).float()).numpy().astype(np.float64)


@dataclass
class _Seen:
    """What went through one quantizer: how often each code, how many values, their ends, the largest by channel."""

    codes: torch.Tensor
    total: int = 0
    clipped: int = 0
    low: float = 0.0
    high: float = 0.0
    channels: torch.Tensor = torch.zeros(())


@torch.no_grad()
def inspect(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[Found]:
    """Return what every quantizer of a model makes of images (B, C, H, W): a row for each layer and site.

    Its figures are the ends `lo` and `hi` of the range, `low` and `high` of the data (zero included), `clip` (share of
    values outside the range, without what a lower bound cuts on purpose), `used` (share of the codes that occur, of
    those that could), `wide` (range / range of the data) and `channels` (largest magnitude of one / their median).
    """
    sites = [(path, site, q) for path, site, q, _ in quantizers(model) if q.ready]
    seen: dict[int, _Seen] = {}
    handles = [q.register_forward_pre_hook(partial(_see, seen)) for *_, q in sites]
    with evaluating(model, handles):
        for images in batches:
            model(images.to(next(model.parameters()).device))
    rows = [_weight_row(path, layer) for path, layer, _ in quantized_layers(model) if layer.weight_spec]
    return rows + [_row(path, site, q, seen[id(q)]) for path, site, q in sites if id(q) in seen]


def _see(seen: dict[int, _Seen], q: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Note what a quantizer is going to quantize."""
    x, spec = args[0].detach().float(), q.spec
    levels = spec.qmax - spec.qmin + 1
    row = seen.setdefault(id(q), _Seen(torch.zeros(levels, dtype=torch.long)))
    if not x.isfinite().all():
        row.low = row.high = math.nan
        return
    lo, hi = float(q.lo), float(q.hi)
    if spec.symmetric:  # codes are counted from 0, and not clipped yet
        codes = (x / max(-lo, hi, 1e-12) * spec.qmax).round() - spec.qmin
    else:
        scale = max(hi - lo, 1e-12) / spec.qmax
        codes = (x / scale).round() + round(-lo / scale)
    # Behind a lower limit lies what SiLU makes of nearly nothing: to clip it is the purpose of the limit.
    outside = (codes > levels - 1) | ((codes < 0) & (q.lower == -math.inf))
    row.total += codes.numel()
    row.clipped += int(outside.sum())
    row.codes += torch.bincount(codes.clamp(0, levels - 1).long().flatten().cpu(), minlength=levels)
    bounded = x.clamp(min=q.lower)
    row.low, row.high = min(row.low, float(bounded.min())), max(row.high, float(bounded.max()))
    largest = (x.abs().amax((0, 2, 3)) if x.ndim == 4 else x.abs().flatten(0, -2).amax(0)).cpu()
    row.channels = largest.clamp(min=row.channels)


def _row(path: str, site: str, q: Any, seen: _Seen) -> Found:
    lo, hi = float(q.lo), float(q.hi)
    width, data = (2 * max(-a, b) if q.spec.symmetric else b - a for a, b in ((lo, hi), (seen.low, seen.high)))
    could = max(min(len(seen.codes), seen.total), 1)
    return {
        "path": path, "site": site, "bits": q.spec.bits, "lo": lo, "hi": hi, "low": seen.low, "high": seen.high,
        "clip": seen.clipped / max(seen.total, 1), "used": int((seen.codes > 0).sum()) / could,
        "wide": width / data if data > 0 else math.inf, "channels": _unlike(seen.channels),
    }  # fmt: skip


def _weight_row(path: str, layer: Any) -> Found:
    spec, rows = layer.weight_spec, weight_rows(layer).cpu()
    channels = rows.reshape(layer.weight.shape[channel_axis(layer)], -1).abs().amax(1)
    ends = rows.abs().amax(1) * layer.weight_ratio.cpu()
    codes = rows / ends.reshape(-1, 1).clamp_min(1e-12) * spec.qmax
    used = codes.round().clamp(-spec.qmax, spec.qmax).unique().numel() / min(2 * spec.qmax + 1, max(rows.numel(), 1))
    return {
        "path": path, "site": "weight", "bits": spec.bits, "lo": -float(ends.max()), "hi": float(ends.max()),
        "low": float(rows.min()), "high": float(rows.max()), "used": used, "wide": 1.0,
        "clip": float((codes.abs() > spec.qmax + 0.5).float().mean()),
        "channels": 1.0 if spec.per_channel else _unlike(channels),
    }  # fmt: skip


def _unlike(channels: torch.Tensor) -> float:
    """Return the largest channel / the median of those that are not dead."""
    alive = channels[channels > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0


def findings(rows: Sequence[Found]) -> list[str]:
    """Say what is wrong in what `inspect` returned, in sentences, the worst layers first; none when all is well."""
    broken = [r for r in rows if not math.isfinite(r["low"] + r["high"])]
    sound = [r for r in rows if r not in broken]
    outputs = [r for r in sound if r["site"] != "weight"]
    problems = (
        ("Values that are not finite reach", broken, "low", "", "The model is broken there."),
        (f"More than {CLIPPED:.0%} of the values are clipped in", [r for r in outputs if r["clip"] > CLIPPED],
         "clip", " ({clip:.1%})", "Calibrate on more images, or with quant.observer=minmax."),
        (f"The range is more than {WIDE:g} times as wide as the data in", [r for r in outputs if r["wide"] > WIDE],
         "wide", " ({used:.0%} of the codes used)", "Calibrate on images like those that the model will see."),
        (f"The largest channel is more than {UNLIKE:g} times the median one in",
         [r for r in sound if r["channels"] > UNLIKE], "channels", " ({channels:.0f} times)",
         "One range cannot hold them: leave these layers float with quant.exclude."),
    )  # fmt: skip
    said = []
    for what, found, key, figure, advice in problems:
        worst = sorted(found, key=lambda r: -r[key])
        names = [f"{r['path']} {r['site']}{figure.format(**r)}" for r in worst]
        said += [f"{what} {quote(names, SHOWN)}. {advice}"] if found else []
    return said
