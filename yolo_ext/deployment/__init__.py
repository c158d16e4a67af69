# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Deployment: export, proof that the file equals the model, latency, and a detector that needs no torch."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "detector": ("Detections", "Detector"),
    "export": ("export_onnx", "export_openvino"),
    "footprint": ("peak_memory",),
    "latency": ("bench", "measure", "speedup"),
    "operators": ("saved_ms",),
    "runtime": ("conv_report", "describe", "predictor"),
    "verify": ("verify_detections", "verify_int8", "verify_tensors"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Import public names on first use: the detector needs no torch, all else does."""
    if name not in _HOME:
        raise AttributeError(f"module 'yolo_ext.deployment' has no attribute '{name}'")
    return getattr(importlib.import_module(f"yolo_ext.deployment.{_HOME[name]}"), name)
