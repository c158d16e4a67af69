# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Deployment: ONNX export, proof that the file equals the model, and latency on the target runtime."""
