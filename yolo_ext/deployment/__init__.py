# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Deployment: export, proof that the file equals the model, latency, and a detector that needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported on its first use: all but the detector need torch
    from yolo_ext.deployment.detector import Detections, Detector
    from yolo_ext.deployment.export import export_onnx, export_openvino
    from yolo_ext.deployment.latency import bench, measure, speedup
    from yolo_ext.deployment.runtime import conv_report, describe, predictor

__all__ = [
    "Detections",
    "Detector",
    "bench",
    "conv_report",
    "describe",
    "export_onnx",
    "export_openvino",
    "measure",
    "predictor",
    "speedup",
]
_HOMES = ("detector", "latency", "runtime", "export")  # where they are, the lightest first


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'yolo_ext.deployment' has no attribute '{name}'")
    homes = (importlib.import_module(f"yolo_ext.deployment.{home}") for home in _HOMES)
    return next(getattr(home, name) for home in homes if hasattr(home, name))
