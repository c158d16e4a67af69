# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization: what a runtime executes (profiles), its simulation in torch, calibration, and the ONNX Q/DQ writer.

The order is always the same: `resolve_profile`, `insert_fake_quant`, `calibrate`, optionally train on, then export the
stripped model to FP32 ONNX and let `write_qdq` put the calibrated ranges into it.
"""
