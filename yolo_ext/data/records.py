# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What every dataset format is read into and written from: images, and objects in pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yolo_ext.core.errors import UsageError

Box = tuple[float, float, float, float]
Size = tuple[int, int]
Point = Callable[[float, float], tuple[float, float]]


class Object(NamedTuple):
    """One object of an image.

    Attributes:
        name: Class name.
        box: (xmin, ymin, xmax, ymax) in pixels, counted from 0.
        polygons: Outlines, each x1, y1, x2, y2, ... in pixels.
        difficult: VOC flag: left out of the evaluation.
        truncated: VOC flag: goes on outside the image.
        row: The YOLO label row behind its class, to be written as it was read.
    """

    name: str
    box: Box
    polygons: tuple[tuple[float, ...], ...] = ()
    difficult: bool = False
    truncated: bool = False
    row: str = ""


class Annotation(NamedTuple):
    """The annotation of one image.

    Attributes:
        size: (width, height) in pixels that the objects refer to, or None where the source does not say.
        objects: All objects.
        crowds: How many crowd regions, which are no single objects, were left out.
    """

    size: tuple[float, float] | None = None
    objects: tuple[Object, ...] = ()
    crowds: int = 0


class Item(NamedTuple):
    """One image of a source; `id` is its path below the image folder without suffix, `label` its annotation file."""

    id: str
    image: Path | None
    label: Path | None


@dataclass
class Source:
    """A dataset that was found but not yet read.

    Attributes:
        items: Images by id.
        read: Annotation of an item whose image has the given size in pixels; raises ValueError where it is broken.
        annotated: Ids to be split where there are no lists.
        lists: Ids by name of a split or list.
        names: Class names in label order, None where they are found by reading.
        extra: Keys of a data.yaml to be kept.
        problems: What is wrong already.
    """

    items: dict[str, Item]
    read: Callable[[Item, Size], Annotation]
    annotated: Collection[str]
    lists: dict[str, list[str]] = field(default_factory=dict)
    names: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def unique_ids(files: dict[str, list[tuple[str, Path]]]) -> tuple[dict[str, Path], dict[str, list[str]], list[str]]:
    """Give images of several splits ids that differ.

    Args:
        files: (wanted id, image) by split.

    Returns:
        Image by id, ids by split, and what is wrong: two images of one split with the same id would share a label.
    """
    owner: dict[str, Path] = {}
    clash = any(owner.setdefault(i, f) != f for members in files.values() for i, f in members)
    images: dict[str, Path] = {}
    lists: dict[str, list[str]] = {}
    problems = []
    for split, members in files.items():
        for i, file in members:
            i = f"{split}_{i}" if clash and len(files) > 1 else i
            if images.setdefault(i, file) != file:
                problems.append(f"{images[i].name} and {file.name} have the same id")
            lists.setdefault(split, []).append(i)
    return images, lists, problems


def to_image(annotation: Annotation, size: Size, orientation: int) -> tuple[list[Object], Counter[str]]:
    """Bring objects into the pixels of the image as training sees it, upright and cut at its border.

    Args:
        annotation: Objects as annotated.
        size: (width, height) of the upright image in pixels.
        orientation: EXIF orientation; an annotation made on the stored pixels of a turned photo is turned with it.

    Returns:
        Objects that have an area, and how many were clipped, swapped, degenerate, resized, rotated or crowds.
    """
    tally = Counter({"crowd": annotation.crowds}) if annotation.crowds else Counter()
    w, h = annotation.size or size
    move: Point | None = None
    if (w, h) != size:
        turned = (h, w) == size and orientation in (6, 8)
        tally["rotated" if turned else "resized"] += 1
        sx, sy = size[0] / w, size[1] / h
        turns: dict[int, Point] = {6: lambda x, y: (h - y, x), 8: lambda x, y: (y, w - x)}
        move = turns[orientation] if turned else lambda x, y: (x * sx, y * sy)
    objects = []
    for o in annotation.objects:
        tally["swapped"] += o.box[0] > o.box[2] or o.box[1] > o.box[3]
        (x0, y0), (x1, y1) = (move(*o.box[:2]), move(*o.box[2:])) if move else (o.box[:2], o.box[2:])
        whole = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        box = max(whole[0], 0.0), max(whole[1], 0.0), min(whole[2], size[0]), min(whole[3], size[1])
        if (box[2] - box[0]) / size[0] < 1e-6 or (box[3] - box[1]) / size[1] < 1e-6:  # would be written as 0
            tally["degenerate"] += 1
            continue
        tally["clipped"] += any(abs(a - b) > 1e-5 * max(size) for a, b in zip(box, whole))  # six digits were rounded
        polygons = tuple(_outline(p, move, size) for p in o.polygons)
        objects.append(o._replace(box=box, polygons=polygons))
    return objects, tally


def _outline(polygon: tuple[float, ...], move: Point | None, size: Size) -> tuple[float, ...]:
    """Return a polygon moved into the image and cut at its border."""
    points = [move(x, y) if move else (x, y) for x, y in zip(polygon[::2], polygon[1::2])]
    return tuple(min(max(v, 0.0), s) for point in points for v, s in zip(point, size))


def finite(values: Collection[float]) -> bool:
    """Return whether all values are finite."""
    return all(map(math.isfinite, values))


def class_names(given: Any) -> list[str]:
    """Return class names of a data.yaml's `names`, a list or numbers from 0 to names.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(given, dict) and sorted(given) == list(range(len(given))):
        given = [given[i] for i in range(len(given))]
    if not isinstance(given, list) or not given:
        raise UsageError(f"Class names '{given}' are illegal. Legal: a list, or one name for each number from 0.")
    return [str(n) for n in given]
