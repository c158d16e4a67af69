# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Data: Pascal VOC conversion, the generated shapes set, and checks that run before anything expensive."""
