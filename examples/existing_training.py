# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""An Ultralytics training script as it was, and four lines: python examples/existing_training.py best.pt data.yaml."""

import sys

from ultralytics import YOLO

import yolo_ext  # 1

model = YOLO(sys.argv[1])
model.add_callback("on_fit_epoch_end", lambda trainer: print(trainer.epoch, trainer.fitness))  # whatever was there

prune = {"speedup": 2}  # 2
distill = {"teacher": "self"}  # 3
yolo_ext.attach(model, prune=prune, distill=distill)  # 4: for the next training only

model.train(data=sys.argv[2], epochs=30, imgsz=320)
print(model.val(plots=False).box.map, sum(p.numel() for p in model.model.parameters()))
