# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a pruning plan may ask of data and of the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Probes:
    """Ways to look at a model from outside; each is None where there are no data to look with.

    Attributes:
        batches: Labelled train batches as `model.loss` takes them (images in 0..1, on the device of the model), anew
            and in the same order at each call.
        images: Train image batches (B, C, H, W) in 0..1 for BatchNorm, anew at each call.
        score: mAP50-95 (top-1 accuracy for classification) of a model on the val split; the model is not changed.
        speed: Measured latency of the first model over that of the second.
    """

    batches: Callable[[], Iterable[dict[str, Any]]] | None = None
    images: Callable[[], Iterable[torch.Tensor]] | None = None
    score: Callable[[nn.Module], float] | None = None
    speed: Callable[[nn.Module, nn.Module], float] | None = None


NO_PROBES = Probes()
