# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization: what a runtime executes (profiles), its simulation in torch, calibration, and the ONNX Q/DQ writer.

The order is always the same: `resolve_profile`, `insert_fake_quant`, `calibrate.calibrate`, optionally train on, then
export the stripped model to FP32 ONNX and let `write_qdq` put the calibrated ranges into it. `prepare` and `strip` do
that for a model with options and a manifest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported on its first use: only the writer needs ONNX
    from yolo_ext.quantization.calibrate import findings, inspect
    from yolo_ext.quantization.fake_quant import insert_fake_quant, strip_fake_quant
    from yolo_ext.quantization.plan import make_plan
    from yolo_ext.quantization.qat import prepare, strip
    from yolo_ext.quantization.qdq import write_qdq
    from yolo_ext.quantization.search import sensitivity
    from yolo_ext.quantization.spec import PROFILES, Profile, Spec, resolve_profile

__all__ = [
    "PROFILES", "Profile", "Spec", "findings", "insert_fake_quant", "inspect", "make_plan",
    "prepare", "resolve_profile", "sensitivity", "strip", "strip_fake_quant", "write_qdq",
]  # fmt: skip
_HOMES = ("spec", "plan", "fake_quant", "calibrate", "qat", "search", "qdq")  # where they are, the lightest first


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'yolo_ext.quantization' has no attribute '{name}'")
    homes = (importlib.import_module(f"yolo_ext.quantization.{home}") for home in _HOMES)
    return next(getattr(home, name) for home in homes if hasattr(home, name))
