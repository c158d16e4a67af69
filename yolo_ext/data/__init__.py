# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Data: formats and splits, summaries, the generated shapes set, and checks before anything expensive."""
