# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Images for calibration and BatchNorm re-estimation: which ones, and how a deployed model sees them."""

from __future__ import annotations

import glob
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.data.augment import LetterBox
from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import imread

from yolo_ext.data import check
from yolo_ext.errors import UsageError


def calibration_images(data: dict[str, Any] | list[str | Path] | str | Path, n: int, seed: int = 0) -> list[Path]:
    """Choose calibration images.

    Args:
        data: A checked Ultralytics data dict (its train split is used), or image files, folders, globs and text files
            that list images, one or many.
        n: How many images; fewer are used when there are fewer.
        seed: Seed of the choice, which does not depend on the order of the files on disk.

    Returns:
        Sorted image files, none of them from the validation split: INT8 figures would be flattered.

    Raises:
        UsageError: If there are no such images.
    """
    if n < 1:
        raise UsageError(f"Calibration needs at least 1 image, got {n}. 128 to 512 are usual.")
    source, held_out = (data.get("train"), data.get("val")) if isinstance(data, dict) else (data, None)
    if not source:
        raise UsageError("The data has no train split to calibrate on. Give 'train' in the data YAML, or images.")
    files = set(list_images(source))
    if not files:
        raise UsageError(f"No calibration images in '{source}'. Legal: {', '.join(sorted(IMG_FORMATS))}.")
    val = {p.resolve() for p in list_images(held_out)} if held_out else set()
    pool = sorted(p for p in files if p.resolve() not in val)
    if not pool:
        raise UsageError(
            f"All {len(files)} calibration images in '{source}' are validation images, which would flatter the INT8 "
            "figures. Give a train split that differs from val, or a folder of other images."
        )
    if len(pool) < len(files):
        LOGGER.warning(f"Calibration leaves out {len(files) - len(pool)} train images that are validation images too")
    return sorted(random.Random(seed).sample(pool, min(n, len(pool))))


def list_images(source: Any) -> list[Path]:
    """Return the image files of a file, folder, glob or text file, or of a list of such.

    Raises:
        UsageError: If something of it does not exist.
    """
    if isinstance(source, (list, tuple)):
        return [p for s in source for p in list_images(s)]
    path = Path(str(source))
    if path.is_dir() or (path.is_file() and path.suffix == ".txt"):
        return check.list_images(path)
    found = [path] if path.is_file() else [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    if not found:
        raise UsageError(f"Cannot find calibration images '{source}'. Give a file, a folder, a glob or a list.")
    return [p for p in found if p.suffix[1:].lower() in IMG_FORMATS]


def letterbox_batches(paths: list[Path], imgsz: int, batch: int = 16) -> Iterator[torch.Tensor]:
    """Yield images as a static ONNX file is fed: square letterbox, RGB, 0 to 1.

    Args:
        paths: Image files; those that cannot be read are skipped with a warning.
        imgsz: Side of the square in pixels.
        batch: Images per batch; the last one may be smaller.

    Yields:
        Float32 tensors of shape (batch, 3, imgsz, imgsz).

    Raises:
        UsageError: If no image can be read.
    """
    letterbox = LetterBox((imgsz, imgsz), auto=False)
    images: list[np.ndarray] = []
    total = 0
    for path in paths:
        image = imread(path)
        if image is None:
            LOGGER.warning(f"Skipping calibration image '{path}', which cannot be read")
            continue
        images.append(np.asarray(letterbox(image=image))[..., ::-1].transpose(2, 0, 1))
        total += 1
        if len(images) == batch:
            yield _tensor(images)
            images = []
    if images:
        yield _tensor(images)
    if not total:
        raise UsageError(f"None of the {len(paths)} calibration images can be read.")


def _tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 255


def list_hash(paths: list[Path]) -> str:
    """Return a short hash of names and contents of the calibration images, for the record of what was used."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).name.encode())
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
