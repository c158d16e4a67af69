# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ultralytics' own reading of data: transforms, checks, paths of labels, datasets with labels."""

from pathlib import Path
from typing import Any

from PIL import Image
from ultralytics.data import ClassificationDataset, YOLODataset, build_yolo_dataset
from ultralytics.data.augment import CenterCrop, LetterBox
from ultralytics.data.converter import merge_multi_segment
from ultralytics.data.utils import (
    IMG_FORMATS,
    check_cls_dataset,
    check_det_dataset,
    exif_size,
    find_dataset_yaml,
    img2label_paths,
)
from ultralytics.utils import patches

from yolo_ext.stock.context import get_cfg, quiet

LABEL_ARGS = ("overlap_mask", "mask_ratio", "single_cls")  # how a model's own training read the labels
# Ultralytics replaces Image.open by one that pip-installs pi-heif as soon as a corrupt file is met
open_image = getattr(patches, "_image_open", Image.open)


def labelled_dataset(
    info: dict[str, Any], task: str, imgsz: int, batch: int, stride: int = 32, given: dict[str, Any] | None = None
) -> tuple[Any, list[Path]]:
    """Return the train split of a checked dataset dict, square and not augmented, and its image files in order.

    Of the training arguments `given` of a model, those count that say how masks and classes are read.
    """
    chosen = {k: v for k, v in (given or {}).items() if k in LABEL_ARGS}
    hyp = get_cfg(overrides={"task": task, "imgsz": imgsz, **chosen})
    with quiet():
        if task == "classify":
            data: Any = ClassificationDataset(root=str(info["train"]), args=hyp, augment=False, prefix="train")
            return data, [Path(sample[0]) for sample in data.samples]
        data = build_yolo_dataset(hyp, info["train"], batch, info, mode="val", rect=False, stride=stride)
    return data, [Path(f) for f in data.im_files]
