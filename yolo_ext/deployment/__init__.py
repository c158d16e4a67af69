# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Deployment: export, proof that the file equals the model, latency, and a detector that needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported on its first use: all but the detector need torch
    from yolo_ext.deployment.detector import Detections, Detector
    from yolo_ext.deployment.export import export_onnx, export_openvino
    from yolo_ext.deployment.latency import bench, speedup
    from yolo_ext.deployment.runtime import predictor

__all__ = ["Detections", "Detector", "bench", "export_onnx", "export_openvino", "predictor", "speedup"]


def __getattr__(name: str) -> Any:
    """Import public names on first use, from the lightest file that has them."""
    if name not in __all__:
        raise AttributeError(f"module 'yolo_ext.deployment' has no attribute '{name}'")
    homes = (importlib.import_module(f"{__name__}.{home}") for home in ("detector", "runtime", "export", "latency"))
    return next(getattr(home, name) for home in homes if hasattr(home, name))
