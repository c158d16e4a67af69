# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Tables, figures and the report of a run: reads plain dicts and files, never a model."""
