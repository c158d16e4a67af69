# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Detections as labels, YOLO text, Pascal VOC XML or COCO JSON, in stores that can be read back.

A record is a plain dict: `image` (path relative to the source), `size` (width and height in pixels) and `objects`,
each with `class`, `confidence`, `box` (x1, y1, x2, y2 in pixels) and, from a segmentation model, `polygon`
(x, y, x, y, ...).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.data.coco import coco_object
from yolo_ext.data.records import Object
from yolo_ext.data.voc import voc_text
from yolo_ext.data.yolo import yolo_row

Record = Mapping[str, Any]
Names = Mapping[int, str]


@dataclass(frozen=True)
class Format:
    """One label format.

    Attributes:
        suffix: Of a label file.
        labels: Folder of the labels, empty where one file holds all of them.
        images: Folder of the images beside it.
        render: Turns a record, the class names and "write confidences" into the text of its label.
    """

    suffix: str
    labels: str
    images: str
    render: Callable[[Record, Names, bool], str]


@dataclass(frozen=True)
class Store:
    """Where labels lie: `read` gives the label text of an image or None, `write` sets it, `close` ends the run."""

    read: Callable[[str], str | None]
    write: Callable[[str, str], None]
    close: Callable[[], None]


def _objects(record: Record, names: Names) -> list[Object]:
    return [
        Object(names[o["class"]], tuple(o["box"]), (tuple(o["polygon"]),) if "polygon" in o else ())
        for o in record["objects"]
    ]


def yolo_text(record: Record, names: Names, save_conf: bool) -> str:
    """Return one row for each object: `class x y w h`, or `class x1 y1 x2 y2 ...` for a polygon, normalised."""
    rows = []
    for found, o in zip(record["objects"], _objects(record, names)):
        row = yolo_row(o, found["class"], tuple(record["size"]), "segment" if o.polygons else "detect")
        rows.append(f"{row} {found['confidence']:.4f}\n" if save_conf else f"{row}\n")
    return "".join(rows)


def voc_annotation(record: Record, names: Names, save_conf: bool) -> str:
    """Return a VOC annotation whose objects carry a `confidence`."""
    name = PurePosixPath(record["image"]).name
    head, *boxes = voc_text(name, tuple(record["size"]), _objects(record, names)).split("    <bndbox>")
    marks = [f"    <confidence>{o['confidence']:.4f}</confidence>\n    <bndbox>" for o in record["objects"]]
    return head + "".join(mark + box for mark, box in zip(marks, boxes))


def coco_entry(record: Record, names: Names, save_conf: bool) -> str:
    """Return what COCO says of one image, with a `score`, without the numbers that only the whole file can give."""
    w, h = record["size"]
    rows = []
    for found, o in zip(record["objects"], _objects(record, names)):
        row = {**coco_object(o, 0), "category": o.name, "score": found["confidence"]}
        del row["category_id"]
        rows.append(row)
    return json.dumps({"width": w, "height": h, "annotations": rows}, sort_keys=True)


FORMATS = {
    "yolo": Format(".txt", "labels", "images", yolo_text),
    "voc": Format(".xml", "Annotations", "JPEGImages", voc_annotation),
    "coco": Format(".json", "", "images", coco_entry),
}


def file_store(place: Callable[[str], Path]) -> Store:
    """Return the store of a format with one file for each image.

    Args:
        place: Gives the label file of an image.
    """

    def read(image: str) -> str | None:
        file = place(image)
        return file.read_bytes().decode("utf-8", "replace") if file.is_file() else None

    def write(image: str, text: str) -> None:
        atomic_write(place(image), text.encode("utf-8", "replace"))  # a file name need not be valid text

    return Store(read, write, lambda: None)


def coco_store(file: Path, names: Names) -> Store:
    """Return the store of one COCO file; what it already holds keeps its numbers and its further keys.

    Args:
        file: JSON file, which need not exist.
        names: Class names by class index.

    Raises:
        UsageError: The file is there but is not COCO.
    """
    data = _read_coco(file)
    categories = {c["name"]: c["id"] for c in data["categories"]}
    for index, name in names.items():  # from 1, as in COCO itself and as Ultralytics' converter expects
        free = index + 1 if index + 1 not in categories.values() else max(categories.values()) + 1
        categories.setdefault(name, free)
    by_id = {i: name for name, i in categories.items()}
    images = {str(i["file_name"]): i for i in data["images"]}
    held: dict[int, list[dict[str, Any]]] = {i["id"]: [] for i in data["images"]}
    for a in data["annotations"]:
        held.setdefault(a["image_id"], []).append(a)
    changed: dict[str, dict[str, Any]] = {}

    def read(image: str) -> str | None:
        if image not in images:
            return None
        entry, rows = images[image], []
        for a in held[entry["id"]]:
            plain = {k: v for k, v in a.items() if k not in ("id", "image_id", "category_id")}
            rows.append({**plain, "category": by_id.get(a["category_id"])})
        size = {"width": entry.get("width"), "height": entry.get("height")}
        return json.dumps({**size, "annotations": rows}, sort_keys=True)

    def write(image: str, text: str) -> None:
        changed[image] = json.loads(text)

    def close() -> None:
        if not changed:
            return
        data["categories"] += [{"id": i, "name": n} for n, i in categories.items() if n not in _present(data)]
        gone = {images[name]["id"] for name in changed if name in images}
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] not in gone]
        last_image = max((i["id"] for i in data["images"]), default=0)
        last = max((a["id"] for a in data["annotations"]), default=0)
        for name, found in sorted(changed.items()):
            entry = images.get(name)
            if entry is None:
                last_image += 1
                entry = {"id": last_image, "file_name": name}
                data["images"].append(entry)
            entry.update(width=found["width"], height=found["height"])
            for row in found["annotations"]:
                last += 1
                numbers = {"id": last, "image_id": entry["id"], "category_id": categories[row.pop("category")]}
                data["annotations"].append({**numbers, **row})
        atomic_write(file, json.dumps(data))

    return Store(read, write, close)


def _present(data: Mapping[str, Any]) -> set[str]:
    return {c["name"] for c in data["categories"]}


def _read_coco(file: Path) -> dict[str, Any]:
    """Return the contents of a COCO file, the three lists of an empty one where there is no file."""
    if not file.is_file():
        return {"images": [], "annotations": [], "categories": []}
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
        needed = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id"),
                  "categories": ("id", "name")}  # fmt: skip
        for key, fields in needed.items():
            for item in data[key]:
                _ = [item[f] for f in fields]
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(
            f"'{file}' is not a COCO file with images, annotations and categories ({type(e).__name__}: {e}). "
            "Mend it, move it away, or give another out=."
        ) from e
    return data
