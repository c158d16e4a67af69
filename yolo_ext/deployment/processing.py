# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What surrounds a model, as Ultralytics' predictor does it: letterbox before, NMS after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.patches import imread

from yolo_ext.core.errors import UsageError

Size: TypeAlias = int | Sequence[int]  # side of a square, or height and width, in pixels
Predict = Callable[[np.ndarray], list[np.ndarray]]

NMS = {"conf": 0.25, "iou": 0.7, "max_det": 300, "agnostic_nms": False}  # Ultralytics' defaults of embedded NMS


def height_width(imgsz: Size) -> tuple[int, int]:
    """Return height and width in pixels; one number means a square."""
    h, w = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    return int(h), int(w)


def load_image(path: str | Path, imgsz: Size) -> np.ndarray:
    """Read one image as the predictor does: letterbox, RGB, 0..1.

    Args:
        path: Image file.
        imgsz: Size in pixels: the side of a square, or height and width.

    Returns:
        Array (1, 3, height, width), float32.

    Raises:
        UsageError: The file is not a readable image.
    """
    image = imread(str(path))
    if image is None:
        raise UsageError(f"Image '{path}' does not exist or cannot be read. Give readable image files.")
    return preprocess(image, imgsz)


def preprocess(image: np.ndarray, imgsz: Size) -> np.ndarray:
    """Letterbox an image as the predictor does.

    Args:
        image: Picture (height, width, 3) in BGR, 0..255.
        imgsz: Size in pixels: the side of a square, or height and width.

    Returns:
        Array (1, 3, height, width) in RGB, float32 in 0..1.
    """
    boxed: Any = LetterBox(height_width(imgsz), auto=False)(image=image)
    return np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1)[None], dtype=np.float32) / 255


def detect(predict: Predict, x: np.ndarray, meta: dict[str, Any], conf: float, iou: float) -> torch.Tensor:
    """Run one image and Ultralytics' NMS, which only thresholds the output of an NMS-free head.

    Args:
        predict: From `predictor`.
        x: Image (1, C, H, W), float32 in 0..1.
        meta: From `describe`.
        conf: Confidence threshold.
        iou: NMS IoU threshold.

    Returns:
        Detections (N, 6+): x1, y1, x2, y2 in pixels of ``x`` (OBB: centre and size), score, class, and what the task
        adds.
    """
    return postprocess(predict(x)[0], meta, conf, iou)


def postprocess(y: np.ndarray, meta: dict[str, Any], conf: float, iou: float) -> torch.Tensor:
    """Return the detections in the first output (1, ...) of a model, see `detect`."""
    final = meta["end2end"] or bool(meta["nms"])
    options = {"nc": meta["nc"], "end2end": final, "rotated": meta["task"] == "obb", "max_det": 300}
    return non_max_suppression(torch.from_numpy(y), conf, iou, **options)[0]
