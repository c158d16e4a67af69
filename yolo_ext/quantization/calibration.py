# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Calibration: activation ranges from images, weight ranges from the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import LOGGER, TQDM

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Row
from yolo_ext.quantization.fake_quant import channel_axis, get_state, quantized_layers, quantizers, set_mode
from yolo_ext.quantization.observers import Histogram, observers, weight_observers
from yolo_ext.quantization.spec import State
from yolo_ext.stock.context import evaluating

SHOWN = 3  # layer names in a message
EMPTY = 2e-5  # just above what `with_zero` makes of one; smaller and the integer bias of a kernel overflows


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    observer: str = "mse",
    weight_observer: str | None = "max",
    total: int | None = None,
) -> State:
    """Set the ranges of a model and switch its fake quantization on; memory does not grow with the number of images.

    Args:
        model: A model with fake quantizers; its train or eval mode is left as it was.
        batches: Images of shape (batch, channels, height, width), 0 to 1.
        observer: Name of the observer, or `package.module:function`; a tensor with one of its own uses that.
        weight_observer: Name of the rule for weights, or `package.module:function`; None keeps their ranges, as after
            AdaRound.
        total: Number of batches, for the progress bar; None where it is not known.

    Returns:
        The specs and ranges, as `get_state` gives them.

    Raises:
        UsageError: If there is no such observer or no batch, if every image is blank, if the model has no fake
            quantizers, or if a tensor never held a finite value.
    """
    sites = list(quantizers(model))
    layers = [layer for _, layer, _ in quantized_layers(model) if layer.weight_spec]
    if not sites and not layers:
        raise UsageError("This model has no fake quantizers to calibrate. Insert them first.")
    rules = [observers[q.spec.observer or observer] for *_, q, _ in sites]
    weight_rule = weight_observers[weight_observer].fn if weight_observer else None
    histograms = _observe(model, batches, total)
    for layer in layers:
        if weight_rule is not None:
            layer.weight_ratio.copy_(weight_rule(weight_rows(layer), layer.weight_spec.qmax).clamp(1e-3, 1.0))
    broken, repaired, ignored = [], [], []
    for (path, site, q, act), h, rule in zip(sites, histograms, rules):
        name = f"{path} ({site})"
        if q.fixed or not h.batches:
            broken += [name] if h.ignored and not q.fixed else []
            continue
        lo, hi, whole = _range(h, rule, q.spec, _numpy(act) if site == "output" else None)
        q.set_range(lo, hi)
        repaired += [] if whole else [name]
        ignored += [name] if h.ignored else []
    _tell(broken, repaired, ignored)
    return get_state(model)


def _observe(model: nn.Module, batches: Iterable[torch.Tensor], total: int | None) -> list[Histogram]:
    """Run the images through the float model and return what each of its quantizers saw."""
    sites = [q for *_, q, _ in quantizers(model)]
    histograms = [Histogram() for _ in sites]
    device, images, blank = next(model.parameters()).device, 0, 0
    for q, h in zip(sites, histograms):
        q.histogram = h
    set_mode(model, "observe")
    try:
        with evaluating(model):
            for x in TQDM(batches, desc="calibrating", total=total):
                images += len(x)
                blank += int((x.amax((1, 2, 3)) == x.amin((1, 2, 3))).sum())
                model(x.to(device))
    finally:
        for q in sites:
            q.histogram = None
        set_mode(model, "on")
    if not images:
        raise UsageError("Calibration got no images.")
    if images == blank:
        raise UsageError(f"Each of the {images} calibration images has a single value. Give images of real scenes.")
    return histograms


def weight_rows(layer: Any) -> torch.Tensor:
    """Return the weight of a quantized layer as its scale sees it.

    Args:
        layer: A quantized convolution or linear layer.

    Returns:
        Float32 of shape (channels, n); per tensor (1, n), with BatchNorm folded into it.
    """
    w = layer.weight.detach().float().transpose(0, channel_axis(layer)).flatten(1)
    if layer.weight_spec.per_channel:
        return w
    fold = layer._fold()
    return (w if fold is None else w * fold[:, None]).reshape(1, -1)


def _range(h: Histogram, rule: Row, spec: Any, transform: Callable | None) -> tuple[float, float, bool]:
    """Return a usable range, and whether it is what the rule gave."""
    lo, hi = (float(v) for v in rule.fn(h, spec, transform))
    if math.isfinite(lo) and math.isfinite(hi) and lo <= hi and max(-lo, hi) >= EMPTY:
        return lo, hi, True
    return (h.lo, h.hi, False) if max(-h.lo, h.hi) >= EMPTY else (0.0, 1.0, False)


def _tell(broken: list[str], repaired: list[str], ignored: list[str]) -> None:
    """Refuse or warn, once for all layers."""

    def some(names: list[str]) -> str:
        return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

    if broken:
        raise UsageError(
            f"Calibration saw nothing but NaN or infinite values in {some(broken)}. The float model is broken there: "
            "predict with it, or keep the layers float with quant.exclude."
        )
    if repaired:
        LOGGER.warning(
            f"Calibration found an empty or infinite range in {some(repaired)}. It was replaced by the smallest and "
            "largest finite value, or by 0 to 1 where there were only zeros."
        )
    if ignored:
        LOGGER.warning(f"Calibration left out NaN and infinite values in {some(ignored)}.")


def _numpy(act: nn.Module | None) -> Callable[[np.ndarray], np.ndarray] | None:
    learned = act is None or any(True for _ in act.parameters())
    return None if isinstance(act, nn.Identity) or learned else partial(_apply, act)


def _apply(act: nn.Module, x: np.ndarray) -> np.ndarray:
    return act(torch.from_numpy(x.copy()).float()).numpy().astype(np.float64)
