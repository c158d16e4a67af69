# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`predict compare=`: two models on the same pictures through Ultralytics' pipeline, differences marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.utils import LOGGER

from yolo_ext import runs
from yolo_ext.core.errors import UsageError
from yolo_ext.reporting.figures import Box, side_by_side

TASKS = ("detect", "segment", "pose")
COUNTS = ("base", "new", "missed", "added")
OUTPUT = ("save", "show", "visualize", "project", "name")  # what the base model is not to write or open
IOU = 0.5  # two boxes of one class are the same object from this overlap on; `match_boxes` uses the same


def predict(model: str | Path, compare: str | Path, source: Any, **native: Any) -> dict[str, Any]:
    """Predict as `yolo predict` does, and draw the detections of a base model beside those of the model.

    Args:
        model: ``.pt``, ``.onnx`` or another format of Ultralytics.
        compare: The base model.
        source: Image, video, folder, glob or list of images.
        native: Any prediction argument of Ultralytics; both models take it.

    Returns:
        The contents of ``compare.json``: `model`, `compare`, `iou`, `total` and one row of counts for each picture.

    Raises:
        UsageError: A model or the source is not usable, or the models do not fit together.
    """
    new, base = _load(model, native), _load(compare, native)
    rows: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    options = {"save": True, "verbose": False, **native}  # the command line of Ultralytics saves, too
    if {Path(model).suffix, Path(compare).suffix} != {".pt"}:
        options = {"rect": False, **options}  # a file of fixed size sees the whole frame, so both have to
    for result, boxes, reference in _pairs(new, base, source, options):
        folder = Path(new.predictor.save_dir)
        name = f"{_free_stem(Path(result.path).stem, taken)}.jpg"
        missed, added = side_by_side(result.orig_img, reference, boxes, result.names, folder / "compare" / name)
        counts = dict(zip(COUNTS, (len(reference), len(boxes), missed, added)))
        rows.append({"source": result.path, "picture": name, **counts})
        LOGGER.info(f"{name}: {_words(counts)}")
    if not rows:
        raise UsageError(f"No readable images found in 'source={source}'.")
    total = {k: sum(row[k] for row in rows) for k in COUNTS}
    found = {"model": model, "compare": compare, "iou": IOU, "total": total, "images": rows}
    runs.write_json(folder / "compare.json", found)
    LOGGER.info(f"Total of {len(rows)} images: {_words(total)}. Pictures saved to {folder / 'compare'}")
    return found


def _words(counts: dict[str, int]) -> str:
    return f"base {counts['base']}, model {counts['new']} objects, {counts['missed']} missed, {counts['added']} added"


def _load(path: str | Path, native: dict[str, Any]) -> YOLO:
    """Return the model, which has to be there: Ultralytics would look for a missing one on the net."""
    if not Path(path).exists():
        raise UsageError(f"Model '{path}' does not exist. Give a file such as best.pt or best_int8.onnx.")
    try:
        model = YOLO(str(path), task=native.get("task"))
    except Exception as error:  # whatever unpickling and parsing raise
        raise UsageError(f"Model '{path}' cannot be loaded ({type(error).__name__}: {error}).") from error
    if model.task not in TASKS:
        raise UsageError(f"'compare' draws boxes; '{path}' is a '{model.task}' model. Legal: {', '.join(TASKS)}.")
    return model


def _pairs(new: YOLO, base: YOLO, source: Any, options: dict[str, Any]) -> Iterator[tuple[Any, list[Box], list[Box]]]:
    """Yield each result of the model with its boxes and those of the base, classes numbered alike."""
    quiet = {k: v for k, v in options.items() if not k.startswith(OUTPUT)}
    classes: dict[int, int] = {}
    for result in new.predict(source, stream=True, **options):
        found = base.predict(result.orig_img, **{**quiet, "imgsz": new.predictor.imgsz, "verbose": False})[0]
        classes = classes or _renumber(found.names, result.names)
        yield result, _boxes(result), [(*row[:5], classes[int(row[5])]) for row in _boxes(found)]


def _boxes(result: Any) -> list[Box]:
    return result.boxes.data[:, :6].tolist()


def _renumber(base: dict[int, str], new: dict[int, str]) -> dict[int, int]:
    """Return the class index of the model for each class index of the base, by name."""
    if base == new:
        return {i: i for i in base}
    index = {name: i for i, name in new.items()}
    if set(base.values()) != set(index):
        raise UsageError(
            f"The models have different classes: {', '.join(base.values())} and {', '.join(index)}. "
            "Compare models of one dataset."
        )
    return {i: index[name] for i, name in base.items()}


def _free_stem(stem: str, taken: Counter[str]) -> str:
    """Return a file stem that no other picture has: those of two folders, or the frames of a video, may share one."""
    taken[stem] += 1
    return stem if taken[stem] == 1 else _free_stem(f"{stem}-{taken[stem]}", taken)
