# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Images for calibration and BatchNorm re-estimation: which ones, and how a deployed model sees them."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import imread

from yolo_ext.core.errors import UsageError
from yolo_ext.data.records import list_images
from yolo_ext.stock.load import IMG_FORMATS, CenterCrop, LetterBox

USUAL = 300  # images; TensorRT and Ultralytics advise as many


def calibration_images(
    data: dict[str, Any] | Sequence[str | Path] | str | Path, n: int | None = None, seed: int = 0, at_most: int = USUAL
) -> list[Path]:
    """Choose calibration images.

    Args:
        data: A checked Ultralytics data dict (its train split is used), or what `list_images` takes.
        n: How many images; None takes what is there, up to `at_most`.
        seed: Seed of the choice, which does not depend on the order of the files on disk.
        at_most: Most images where `n` is None.

    Returns:
        Sorted image files, none of them from the validation split: INT8 figures would be flattered.

    Raises:
        UsageError: If there are no such images, or fewer than `n`.
    """
    wanted = at_most if n is None else n
    if wanted < 1:
        raise UsageError(f"Calibration needs at least 1 image, got {wanted}. 128 to 512 are usual.")
    source, held_out = (data.get("train"), data.get("val")) if isinstance(data, dict) else (data, None)
    if not source:
        raise UsageError("The data has no train split to calibrate on. Give 'train' in the data YAML, or images.")
    files = set(list_images(source))
    if not files:
        raise UsageError(f"No calibration images in '{source}'. Legal: {', '.join(sorted(IMG_FORMATS))}.")
    val = {p.resolve() for p in list_images(held_out)} if held_out else set()
    pool = sorted(p for p in files if p.resolve() not in val)
    if not pool:
        raise UsageError(f"All {len(files)} of '{source}' are validation images, which flatter INT8. Give others.")
    if len(pool) < len(files):
        LOGGER.warning(f"Calibration leaves out {len(files) - len(pool)} train images that are validation images too")
    if n is not None and n > len(pool):
        told = f"{n} calibration images are wanted, but '{source}' has {len(pool)}. Ask for {len(pool)} or fewer"
        raise UsageError(f"{told}, give no number to take up to {at_most}, or give more images. 128 to 512 are usual.")
    return sorted(random.Random(seed).sample(pool, min(wanted, len(pool))))


def check_calibration(source: Any, n: int | None = None, seed: int = 0) -> None:
    """Refuse what `calibration_images` and `letterbox_batches` refuse; in most cases one image is read."""
    images = calibration_images(source, n, seed)
    if not any((image := imread(path)) is not None and image.min() < image.max() for path in images):
        for _ in letterbox_batches(images, 32):  # says what is wrong
            pass


def letterbox_batches(paths: list[Path], imgsz: int, batch: int = 16, crop: bool = False) -> Iterator[torch.Tensor]:
    """Yield float32 (batch, 3, imgsz, imgsz), RGB, 0 to 1, as ONNX is fed, letterboxed, or cropped to the middle."""
    letterbox = partial(LetterBox((imgsz, imgsz), auto=False), None)  # it could take labels first
    squares = _squares(paths, CenterCrop(imgsz) if crop else letterbox)
    while images := list(islice(squares, batch)):
        yield torch.from_numpy(np.ascontiguousarray(images)).float() / 255


def _squares(paths: list[Path], fit: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each image as the square RGB (3, H, W) that `fit` makes; some may be broken, all blank is an error."""
    broken = blank = 0
    for path in paths:
        if (image := imread(path)) is not None:
            blank += int(image.min() == image.max())
            yield np.asarray(fit(image))[..., ::-1].transpose(2, 0, 1)
            continue
        broken += 1
        if 2 * broken > len(paths):
            told = f"At least {broken} of the {len(paths)} calibration images cannot be read, such as '{path}'."
            raise UsageError(f"{told} `yolo-ext data check` names them all.")
        LOGGER.warning(f"Skipping calibration image '{path}', which cannot be read")
    if blank == len(paths) - broken:
        raise UsageError(f"Each of the {blank} calibration images is of a single value, as '{paths[0]}'. Give others.")


def list_hash(paths: list[Path]) -> str:
    """Return a short hash of names and contents of the calibration images, for the record of what was used."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).name.encode() + Path(path).read_bytes())
    return digest.hexdigest()[:16]
