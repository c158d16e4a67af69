# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Photos and VOC files -> a trained YOLO -> an INT8 file and a report, in the cells of own_dataset.ipynb."""

# %% [markdown]
# # Your own data: photos and VOC files -> a trained YOLO -> an INT8 file and a report
#
# The page [Your own data](../docs/tutorial.md), whose commands are functions here. Set the four values
# below. `python examples/own_dataset.py` runs it as a script, `own_dataset.ipynb` has the same cells.

# %%
from pathlib import Path

import yolo_ext
from yolo_ext.deployment import Detector

PHOTOS = "photos"  # images with VOC files, in one folder or in several
MODEL = "yolov8n.pt"  # what to train from
IMGSZ, EPOCHS = 192, 40

# %% [markdown]
# ## Photos and boxes

# %%
yolo_ext.convert(PHOTOS, "mydata", ratio=[0.8, 0.2], stratify=True)
DATA = "mydata/data.yaml"

# %% [markdown]
# ## Train
#
# An ordinary Ultralytics training. With a trained model of your own, set `best` to it and leave this out.

# %%
base = yolo_ext.train(MODEL, DATA, imgsz=IMGSZ, epochs=EPOCHS, name="base")
best = base.best

# %% [markdown]
# ## Compress
#
# Half of the FLOPs, fine-tuning with the unpruned model as teacher, INT8, verification, latency.

# %%
small = yolo_ext.compress(best, DATA, imgsz=IMGSZ, epochs=max(EPOCHS // 2, 1), prune={"speedup": 2}, name="small")
print(small)

# %% [markdown]
# ## Look, and deploy
#
# `small.report` is the page to read first. `Detector` needs neither torch nor Ultralytics.

# %%
print(small.report, small.int8, "every check passed" if small.passed else "a check failed", sep="\n")
print(Detector(small.int8)(next(Path(PHOTOS).rglob("*.jpg"))))
