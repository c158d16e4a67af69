# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity training: penalties, the pull over the epochs, its controller, and what it did to the model."""
