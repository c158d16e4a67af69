# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity training: penalties, what they pull on, how far in each step, and what that did to the model."""
