# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Errors, method tables, options and how they are read: plain Python that every room may use."""
