# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""BatchNorm statistics re-estimated from images, after pruning or with fake quantization on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Re-estimate BatchNorm statistics from images (Li et al., EagleEye, 2020, arXiv:2007.02491).

    Args:
        model: Model on any device; its running means and variances are replaced.
        batches: Image batches (B, C, H, W) in 0..1.

    Returns:
        Number of images used.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta, training, seen = [m.momentum for m in norms], model.training, 0
    device = next(model.parameters()).device
    model.train()
    try:
        for x in batches:
            if not seen:  # not before: without any image the old statistics stay
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None  # cumulative average over all batches
            model(x.to(device))
            seen += len(x)
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        model.train(training)
    return seen
