# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Compression for stock Ultralytics YOLO: prune, distill, quantize, export, verify and measure."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "trainers": (
        "ClassificationTrainer", "CompressionMixin", "DetectionTrainer", "OBBTrainer", "PoseTrainer",
        "SegmentationTrainer", "trainer_for",
    ),
    "callbacks": ("attach",),
    "core.config": ("DistillConfig", "PruneConfig", "QuantConfig", "SparsityConfig"),
    "core.errors": ("CheckFailed", "UsageError", "YoloExtError"),
    "pipeline": ("compress",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'yolo_ext' has no attribute '{name}'")
    return getattr(importlib.import_module(f"yolo_ext.{_HOME[name]}"), name)
