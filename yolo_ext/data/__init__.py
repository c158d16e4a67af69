# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Data: formats and splits, summaries, the generated shapes set, and checks before anything expensive."""

from yolo_ext.data.check import calibration_images, check_data
from yolo_ext.data.convert import convert
from yolo_ext.data.label import label_images
from yolo_ext.data.shapes import make_shapes
from yolo_ext.data.summary import summarise
