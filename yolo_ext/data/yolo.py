# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""YOLO datasets: a data.yaml, images in `images` folders and one text file of labels for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.data.converter import merge_multi_segment
from ultralytics.data.utils import IMG_FORMATS, img2label_paths
from ultralytics.utils import DATASETS_DIR, YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_label, keypoints, label_rows, list_images
from yolo_ext.data.files import walk_files
from yolo_ext.data.records import Annotation, Item, Object, Size, Source, class_names, unique_ids

SPLITS = ("train", "val", "test")
KEPT = ("kpt_shape", "flip_idx", "kpt_names", "channels")  # of a data.yaml, when it is split


def scan_yolo(source: Path, classes: Sequence[str] | None = None) -> Source:
    """Find the images and splits of a YOLO dataset.

    Args:
        source: data.yaml, a folder with one, or a folder with images/, labels/ and maybe classes.txt.
        classes: Class names where the source has none.

    Raises:
        UsageError: There are no images or no class names, or a path of the data.yaml does not exist.
    """
    yamls = [source] if source.is_file() else sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if len(yamls) > 1:
        raise UsageError(f"'{source}' holds {len(yamls)} YAML files. Give source= one of them.")
    content = _load(yamls[0]) if yamls else {}
    folders = _split_folders(content, yamls[0]) if yamls else _plain_folders(source)
    files = {split: _with_ids(where) for split, where in folders.items()}
    images, lists, problems = unique_ids(files)
    if not images:
        raise UsageError(f"'{source}' holds no images. Give a data.yaml, or a folder with images/ and labels/.")
    names = class_names(content["names"]) if yamls else _plain_names(source, classes)
    labels = map(Path, img2label_paths([*map(str, images.values())]))
    items = {i: Item(i, image, label) for (i, image), label in zip(images.items(), labels)}
    extra = {k: content[k] for k in KEPT if k in content}
    columns = 5 + int(np.prod(keypoints(extra, str(source)))) if "kpt_shape" in extra else 0
    read = partial(_read_item, names=names, columns=columns)
    return Source(items, read, images.keys(), lists, names, extra, problems)


def _load(file: Path) -> dict[str, Any]:
    """Return a data.yaml that names classes and at least one split."""
    try:
        content = YAML.load(file)
    except Exception as e:
        raise UsageError(f"Data file '{file}' is not valid YAML: {' '.join(str(e).split())}. Mend the file.") from e
    if not isinstance(content, dict) or not content.get("names") or not any(content.get(s) for s in SPLITS):
        raise UsageError(f"Data file '{file}' needs names, and an image folder for train, val or test.")
    return content


def _split_folders(content: Mapping[str, Any], file: Path) -> dict[str, list[Path]]:
    """Return the folders and list files of each split, resolved as Ultralytics does."""
    root = Path(content.get("path") or file.parent)
    if not root.is_absolute():
        root = next((r for r in (Path.cwd() / root, DATASETS_DIR / root) if r.exists()), file.parent / root)
    folders = {}
    for split in SPLITS:
        given = content.get(split) or []
        paths = [root / g for g in ([given] if isinstance(given, str) else given)]
        if missing := [p for p in paths if not p.exists()]:
            raise UsageError(f"Split '{split}' of '{file}' points to '{missing[0]}', which does not exist.")
        if paths:
            folders[split] = [p.resolve() for p in paths]
    return folders


def _plain_folders(source: Path) -> dict[str, list[Path]]:
    """Return the image folders of a dataset without data.yaml: images/<split>, or images alone."""
    folder = source / "images"
    if not folder.is_dir():
        raise UsageError(f"'{source}' is no YOLO dataset. Give a data.yaml, or a folder with images/ and labels/.")
    splits = {s: [folder / s] for s in SPLITS if (folder / s).is_dir()}
    return splits or {"train": [folder]}


def _plain_names(source: Path, classes: Sequence[str] | None) -> list[str]:
    """Return the class names of a dataset without data.yaml."""
    file = next((f for f in (source / "classes.txt", source / "labels/classes.txt") if f.is_file()), None)
    if classes:
        return list(classes)
    if file is None:
        raise UsageError(f"'{source}' has neither data.yaml nor classes.txt. Give classes=a,b in label order.")
    return [n for n in map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()) if n]


def _with_ids(where: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return images with their path below the folder, or below `images` for those of a list file."""
    found = []
    for path in where:
        for file in walk_files(path, IMG_FORMATS) if path.is_dir() else list_images(path):
            parts = file.with_suffix("").as_posix()
            below = parts.rpartition("/images/")[2] if "/images/" in parts else file.stem
            found.append((file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else below, file))
    return found


def _read_item(item: Item, size: Size, names: Sequence[str], columns: int) -> Annotation:
    """Read a YOLO label file; a missing one means background, as in training."""
    if item.label is None or not item.label.is_file():
        return Annotation()
    try:
        check_label(item.label, len(names), columns)
    except ArithmeticError as e:
        raise ValueError(f"has a label outside the image: {e}") from e
    return Annotation(objects=tuple(_object(row, size, names, columns) for row in label_rows(item.label)))


def _object(row: Sequence[str], size: Size, names: Sequence[str], columns: int) -> Object:
    """Return the object of a YOLO label row; of a pose the box."""
    cls, *values = map(float, row)
    name, text = names[int(cls)], " ".join(row[1:])
    if columns or len(row) == 5:
        x, y, w, h = (v * s for v, s in zip(values, (*size, *size)))
        return Object(name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), row=text)
    polygon = tuple(v * s for v, s in zip(values, size * (len(values) // 2)))
    xs, ys = polygon[::2], polygon[1::2]
    return Object(name, (min(xs), min(ys), max(xs), max(ys)), (polygon,), row=text)


def yolo_row(o: Object, index: int, size: Size, task: str) -> str:
    """Return the YOLO label row of an object.

    Args:
        o: Object inside the image.
        index: Its class number.
        size: (width, height) of the image in pixels.
        task: `segment` for a polygon, else a box.
    """
    if o.row:
        return f"{index} {o.row}"
    if task == "segment":
        parts = merge_multi_segment([*o.polygons]) if len(o.polygons) > 1 else [np.reshape(o.polygons[0], (-1, 2))]
        return f"{index} " + " ".join(f"{v:.6f}" for v in (np.concatenate(parts) / size).ravel())
    x0, y0, x1, y1 = o.box
    w, h = size
    return f"{index} {(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} {(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}"
