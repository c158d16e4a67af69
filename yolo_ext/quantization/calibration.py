# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Calibration: activation ranges from images."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import TQDM

from yolo_ext.errors import UsageError
from yolo_ext.quantization.fake_quant import Ranges, get_ranges, quantizers, set_mode
from yolo_ext.quantization.observers import Histogram, observers


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[torch.Tensor], observer: str = "mse") -> Ranges:
    """Set the activation ranges of a model from data and switch its fake quantization on.

    Args:
        model: A model with fake quantizers; its train or eval mode is left as it was.
        batches: Images of shape (batch, channels, height, width), 0 to 1.
        observer: Name of the observer, or `package.module:function`.

    Returns:
        The ranges, as `get_ranges` gives them.

    Raises:
        UsageError: If there is no such observer or no batch, or if the model has no fake quantizers.
    """
    rule = observers[observer].fn
    sites = list(quantizers(model))
    if not sites:
        raise UsageError("This model has no fake quantizers to calibrate. Insert them first.")
    device = next(model.parameters()).device
    training = [m for m in model.modules() if m.training]
    for *_, q, _ in sites:
        q.histogram = Histogram()
    set_mode(model, "observe")
    model.eval()
    try:
        for images in TQDM(batches, desc="calibrating"):
            model(images.to(device))
    finally:
        histograms = [q.histogram for *_, q, _ in sites]
        for *_, q, _ in sites:
            q.histogram = None
        set_mode(model, "on")
        for m in training:
            m.training = True
    if not any(h and h.batches for h in histograms):
        raise UsageError("Calibration got no images.")
    for (_, site, q, act), h in zip(sites, histograms):
        if not q.fixed and h is not None and h.batches:
            q.set_range(*rule(h, q.qmax, _numpy(act) if site == "output" else None))
    return get_ranges(model)


def _numpy(act: nn.Module) -> Any:
    learned = any(True for _ in act.parameters())
    return None if isinstance(act, nn.Identity) or learned else partial(_apply, act)


def _apply(act: nn.Module, x: np.ndarray) -> np.ndarray:
    return act(torch.from_numpy(x.copy()).float()).numpy().astype(np.float64)
