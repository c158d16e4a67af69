# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`compress`: the whole path from a trained model to a smaller, verified one."""

from yolo_ext.pipeline.stages import compress
