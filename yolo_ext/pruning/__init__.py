# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Structured pruning: couplings as data (labels, graph), scores (criteria), targets, and replayable surgery."""
