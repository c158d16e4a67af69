# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Compression for stock Ultralytics YOLO: prune, distill, quantize, export, verify and measure."""

__version__ = "0.1.0"
