# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Prune a model with a block of one's own: cd examples/custom_module && python prune.py [data.yaml]."""

import sys

import yolo_ext

MODULES = "fork"  # which has to be importable here, and wherever the pruned .pt is loaded
groups = yolo_ext.analyze("fork.yaml", modules=MODULES, imgsz=64)
print(groups)  # each group of coupled channels, and why one stays
target = {"speedup": 1.5, "min_channels": 4}
if len(sys.argv) > 1:  # with data: train it, then prune it and train on
    base = yolo_ext.train("fork.yaml", sys.argv[1], modules=MODULES, epochs=20, imgsz=64)
    pruned = yolo_ext.prune(base.best, sys.argv[1], modules=MODULES, epochs=20, prune=target)
else:
    pruned = yolo_ext.prune("fork.yaml", modules=MODULES, epochs=0, imgsz=64, prune=target)
print(pruned.best)
