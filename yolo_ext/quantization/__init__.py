# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization: what a runtime executes (profiles), its simulation in torch, calibration, and the ONNX Q/DQ writer.

The order is `prepare` (fake-quant with calibrated ranges), perhaps training, `strip`, then an export of the stripped
model to FP32 ONNX into which `write_qdq` puts the ranges.
"""

import importlib
from typing import Any

_HOMES = {"PROFILES": "spec", "resolve_profile": "spec", "prepare": "qat", "strip": "qat", "sensitivity": "search",
          "write_qdq": "qdq"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import public names on first use, because only the writer needs ONNX."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
