# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Tables, figures and the report of a run: reads plain dicts and files, never a model."""

from yolo_ext.reporting.pages import write_report
from yolo_ext.reporting.review import render_review
from yolo_ext.reporting.tables import comparison_table

__all__ = ["comparison_table", "render_review", "write_report"]
