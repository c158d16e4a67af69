# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization: what a runtime executes (profiles), its simulation in torch, calibration, and the ONNX Q/DQ writer.

The order is `resolve_profile`, `insert_fake_quant`, `calibrate.calibrate` (`prepare` does all three), perhaps training,
`strip`, then an export of the stripped model to FP32 ONNX into which `write_qdq` puts the calibrated ranges.
"""

import importlib
from typing import Any

_HOMES = {  # where public names are; they are imported on first use, because only the writer needs ONNX
    "spec": ("PROFILES", "Profile", "Spec", "convert", "resolve_profile"), "plan": ("make_plan",),
    "fake_quant": ("insert_fake_quant", "strip_fake_quant"), "calibrate": ("findings", "inspect"),
    "qat": ("prepare", "strip"), "search": ("sensitivity",), "qdq": ("write_qdq",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
