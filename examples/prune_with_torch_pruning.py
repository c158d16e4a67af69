# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A plain torch-pruning script for any YOLO: python examples/prune_with_torch_pruning.py best.pt pruned.pt."""

import sys

import torch
import torch_pruning as tp
from ultralytics import YOLO

import yolo_ext

model = YOLO(sys.argv[1]).model
importance = tp.importance.GroupMagnitudeImportance(p=2)
with yolo_ext.on_yolo():
    pruner = tp.pruner.MagnitudePruner(model, torch.rand(1, 3, 640, 640), importance, pruning_ratio=0.3, round_to=8)
pruner.step()
yolo_ext.save_pruned(pruner, sys.argv[2])
