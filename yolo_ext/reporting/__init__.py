# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Tables, figures and pages: reads plain dicts and files, never a model."""

from yolo_ext.reporting.pages import write_report
from yolo_ext.reporting.tables import comparison_table
