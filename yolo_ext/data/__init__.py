# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Data: formats and splits, summaries, the generated shapes set, and checks before anything expensive."""

from yolo_ext.data.calibration import calibration_images, letterbox_batches
from yolo_ext.data.check import check_data
from yolo_ext.data.convert import Summary, convert
from yolo_ext.data.label import Labelled, find_images, label_images
from yolo_ext.data.shapes import make_shapes
from yolo_ext.data.summary import summarise
from yolo_ext.data.write import Options

__all__ = [
    "Labelled",
    "Options",
    "Summary",
    "calibration_images",
    "check_data",
    "convert",
    "find_images",
    "label_images",
    "letterbox_batches",
    "make_shapes",
    "summarise",
]
