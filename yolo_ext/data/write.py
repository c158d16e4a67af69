# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Write labels as YOLO text, Pascal VOC XML or COCO JSON: whole datasets that were read, and what a model detects.

The record of a detection is a plain dict: `image` (path relative to the source), `size` (width and height in pixels)
and `objects`, each with `class`, `confidence`, `box` (x1, y1, x2, y2 in pixels) and, from a segmentation model,
`polygon` (x, y, x, y, ...).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ultralytics.utils import YAML

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.data.coco import coco_object, write_coco
from yolo_ext.data.formats import voc_text, yolo_row
from yolo_ext.data.records import Object, Size, Source, link_or_copy, parallel, to_image

Tally = Counter[tuple[str, str]]  # by kind of thing, and image or class
Record = Mapping[str, Any]
Names = Mapping[int, str]  # class names by class index


@dataclass(frozen=True)
class Options:
    """How to convert.

    Args:
        format: Format of the source: voc, coco or yolo.
        to: Format to write: yolo, voc or coco.
        classes: Wanted classes in label order; those of the source by default, sorted for VOC.
        splits: Our split (train, val, test) to name of a list or split of the source, e.g. {"train": "trainval"}.
        ratios: Our split to share of the images, for a seeded random split that ignores the lists.
        stratify: Spread the classes evenly over random splits or folds.
        folds: Write this many pairs of train and val lists over one image tree; a test split stays apart.
        seed: Seed of the random split.
        task: `segment` writes polygons as YOLO labels, `detect` boxes.
        difficult: `keep` or `skip` the objects that VOC marks as difficult.
        broken: `refuse` the dataset because of broken images and annotations, or `skip` and count these.
        files: `link` images where the file system allows it, `copy` them, or `list` those of a YOLO source.
        images: Folder that the file names of COCO start from, where it is not found by itself.
    """

    format: str = "voc"
    to: str = "yolo"
    classes: Sequence[str] | None = None
    splits: Mapping[str, str] | None = None
    ratios: Mapping[str, float] | None = None
    stratify: bool = False
    folds: int = 0
    seed: int = 0
    task: str = "detect"
    difficult: str = "keep"
    broken: str = "refuse"
    files: str = "link"
    images: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What every worker knows: the source, size and orientation of each image, class numbers, what to write where."""

    source: Source
    found: Mapping[str, tuple[Size, int]]
    classes: Mapping[str, int]
    stage: Path
    options: Options


def write_split(plan: Plan, split: str, ids: Sequence[str], seen: Collection[str]) -> Tally:
    """Write images and annotations of one split; return what was written or left out, but of the ids seen before."""
    o = plan.options
    tally: Tally = Counter()
    if o.files != "list":
        places = [_target(plan, split, i) for i in ids] + [_label(plan, split, i) for i in ids if o.to != "coco"]
        for folder in {place.parent for place in places}:
            folder.mkdir(parents=True, exist_ok=True)
    results = parallel(partial(_write_one, plan, split), ids, f"Writing {split}")

    def counted() -> Iterator[tuple[str, Size, list[dict[str, Any]]]]:
        for i, (row, counts) in zip(ids, results):
            if i not in seen:
                tally.update(counts)
            yield row

    if o.to == "coco":
        (plan.stage / "annotations").mkdir(exist_ok=True)
        write_coco(plan.stage / f"annotations/instances_{split}.json", [*plan.classes], counted())
    else:
        for _ in counted():
            pass
    return tally


def _write_one(plan: Plan, split: str, i: str) -> tuple[tuple[str, Size, list[dict[str, Any]]], Tally]:
    """Write one image with its annotation; return its COCO record and what was counted."""
    o, (size, _) = plan.options, plan.found[i]
    kept, tally = _kept(plan, i)
    target = _target(plan, split, i)
    if o.files != "list":
        link_or_copy(plan.source.items[i].image or Path(), target, link=o.files == "link")
    if o.to == "coco":
        name = target.relative_to(plan.stage / "images" / split).as_posix()
        return (name, size, [coco_object(k, plan.classes[k.name] + 1) for k in kept]), tally
    if o.files != "list":
        rows = (f"{yolo_row(k, plan.classes[k.name], size, o.task)}\n" for k in kept)
        text = "".join(rows) if o.to == "yolo" else voc_text(target.name, size, kept)
        _label(plan, split, i).write_text(text, encoding="utf-8")
    return ("", size, []), tally


def _kept(plan: Plan, i: str) -> tuple[list[Object], Tally]:
    """Return the objects of an image that are to be written, and what was changed, left out and kept."""
    o, item, (size, orientation) = plan.options, plan.source.items[i], plan.found[i]
    objects, changes = to_image(plan.source.read(item, size), size, orientation)
    same = o.format == o.to == "yolo"  # rows are kept word for word
    tally: Tally = Counter({(kind, i): n for kind, n in changes.items() if n and not (same and kind == "clipped")})
    if o.format == "voc" and item.label is None:
        tally["background", i] += 1
    kept = []
    for obj in objects:
        if obj.name not in plan.classes:
            tally["class", obj.name] += 1
        elif obj.difficult and o.difficult == "skip":
            tally["difficult", i] += 1
        elif o.task == "segment" and o.to == "yolo" and not (obj.polygons or obj.row):
            tally["polygon", i] += 1
        else:
            tally["box", obj.name] += 1
            kept.append(obj)
    return kept, tally


def _target(plan: Plan, split: str, i: str) -> Path:
    """Return where an image goes; a folder called images inside would hide its labels from Ultralytics."""
    image = plan.source.items[i].image or Path()
    parts = [f"{p}_" if p == "images" and plan.options.to == "yolo" else p for p in i.split("/")]
    folder = "JPEGImages" if plan.options.to == "voc" else f"images/{split}"
    return plan.stage / folder / "/".join([*parts[:-1], f"{parts[-1]}{image.suffix}"])


def _label(plan: Plan, split: str, i: str) -> Path:
    """Return where the label file of an image goes."""
    kind = FORMATS[plan.options.to]
    below = _target(plan, split, i).relative_to(plan.stage / kind.images)
    return plan.stage / kind.labels / below.with_suffix(kind.suffix)


def write_lists(plan: Plan, out: Path, chosen: dict[str, list[str]], folds: list[dict[str, list[str]]]) -> None:
    """Write what names the splits of the folder `out` to be: data.yaml and list files of YOLO, ImageSets of VOC."""
    o, stage = plan.options, plan.stage
    if o.to == "coco":
        return
    lists = dict(chosen) if not folds else {f"fold{k}_{s}": ids for k, f in enumerate(folds, 1) for s, ids in f.items()}
    if o.to == "voc":
        if {"train", "val"} <= lists.keys():
            lists["trainval"] = sorted({*lists["train"], *lists["val"]})
        (stage / "ImageSets/Main").mkdir(parents=True)
        for name, ids in lists.items():
            _write_lines(stage / f"ImageSets/Main/{name}.txt", ids)
        return
    where = {s: f"images/{s}" for s in chosen}
    if folds or o.files == "list":
        home = {i: _target(plan, s, i).relative_to(stage).as_posix() for s, ids in chosen.items() for i in ids}
        for name, ids in lists.items():
            rows = [str(plan.source.items[i].image) if o.files == "list" else f"./{home[i]}" for i in ids]
            _write_lines(stage / f"{name}.txt", rows)
        where = {name: f"{name}.txt" for name in lists}
    tail = {**plan.source.extra, "names": {k: n for n, k in plan.classes.items()}}
    for k, fold in enumerate(folds, 1):
        YAML.save(stage / f"fold{k}.yaml", {"path": str(out), **{s: where[f"fold{k}_{s}"] for s in fold}, **tail})
    if not folds:
        YAML.save(stage / "data.yaml", {"path": str(out), **where, **tail})


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    """Write a text file of lines."""
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Format:
    """One label format: where its files lie, and how the record of an image becomes the text of its label."""

    suffix: str  # of a label file
    labels: str  # folder of the labels, empty where one file holds all of them
    images: str  # folder of the images beside it
    render: Callable[[Record, Names, bool], str]  # of a record, the class names and "write confidences"


@dataclass(frozen=True)
class Store:
    """Where labels lie: `read` gives the label text of an image or None, `write` sets it, `close` ends the run."""

    read: Callable[[str], str | None]
    write: Callable[[str, str], None]
    close: Callable[[], None]


def _objects(record: Record, names: Names) -> list[Object]:
    """Return the objects of a record."""
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
    """Return the store of a format with one label file for each image, which `place` names."""

    def read(image: str) -> str | None:
        file = place(image)
        return file.read_bytes().decode("utf-8", "replace") if file.is_file() else None

    def write(image: str, text: str) -> None:
        atomic_write(place(image), text.encode("utf-8", "replace"))  # a file name need not be valid text

    return Store(read, write, lambda: None)


def coco_store(file: Path, names: Names) -> Store:
    """Return the store of one COCO file; what it already holds keeps its numbers and its further keys."""
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
        if changed:
            _update_coco(data, categories, changed)
            atomic_write(file, json.dumps(data))

    return Store(read, write, close)


def _update_coco(data: dict[str, Any], categories: Mapping[str, int], changed: Mapping[str, dict[str, Any]]) -> None:
    """Replace the annotations of the changed images in a COCO file's content, and number what is new."""
    present = {c["name"] for c in data["categories"]}
    data["categories"] += [{"id": i, "name": n} for n, i in categories.items() if n not in present]
    images = {str(i["file_name"]): i for i in data["images"]}
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


def _read_coco(file: Path) -> dict[str, Any]:
    """Return the contents of a COCO file, the three lists of an empty one where there is none; UsageError if broken."""
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
