# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Deployment: ONNX export, proof that the file equals the model, latency, and a detector that needs no torch."""

from __future__ import annotations

from typing import Any

__all__ = ["Detections", "Detector"]


def __getattr__(name: str) -> Any:
    """Import the detector on first use; the other modules of this package need torch."""
    if name in __all__:
        from yolo_ext.deployment import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'yolo_ext.deployment' has no attribute '{name}'")
