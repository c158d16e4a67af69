# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Write a dataset that was read: images linked, labels as YOLO, Pascal VOC or COCO, and the lists of its splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ultralytics.utils import YAML

from yolo_ext.data.check import jpeg_is_whole
from yolo_ext.data.coco import coco_object, write_coco
from yolo_ext.data.files import link_or_copy, parallel
from yolo_ext.data.records import Size, Source, to_image
from yolo_ext.data.voc import voc_text
from yolo_ext.data.yolo import yolo_row

Tally = Counter[tuple[str, str]]  # by kind of thing, and image or class


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


LEGAL = {
    "format": ("voc", "coco", "yolo"),
    "to": ("yolo", "voc", "coco"),
    "task": ("detect", "segment"),
    "difficult": ("keep", "skip"),
    "broken": ("refuse", "skip"),
    "files": ("link", "copy", "list"),
}


@dataclass(frozen=True)
class Plan:
    """What every worker knows: the source, size and orientation of each image, class numbers, what to write where."""

    source: Source
    found: Mapping[str, tuple[Size, int]]
    classes: Mapping[str, int]
    stage: Path
    options: Options


def write_split(plan: Plan, split: str, ids: Sequence[str], seen: Collection[str]) -> Tally:
    """Write images and annotations of one split.

    Args:
        plan: What to write where.
        split: Name of the split.
        ids: Its image ids.
        seen: Ids of other splits, which were counted there.

    Returns:
        Boxes by class, and what was changed or left out.
    """
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
    o, item, (size, orientation) = plan.options, plan.source.items[i], plan.found[i]
    tally: Tally = Counter()
    annotation = plan.source.read(item, size)
    objects, changes = to_image(annotation, size, orientation)
    same = o.format == o.to == "yolo"  # rows are kept word for word
    tally.update({(kind, i): n for kind, n in changes.items() if n and not (same and kind == "clipped")})
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
    target = _target(plan, split, i)
    if o.to == "yolo":
        text = "".join(f"{yolo_row(obj, plan.classes[obj.name], size, o.task)}\n" for obj in kept)
    else:
        text = voc_text(target.name, size, kept) if o.to == "voc" else ""
    if o.files != "list":
        image = item.image or Path()
        # Ultralytics rewrites a JPEG that is not whole at training; a link would let that reach the source
        link_or_copy(image, target, link=o.files == "link" and jpeg_is_whole(image))
        if o.to != "coco":
            _label(plan, split, i).write_text(text, encoding="utf-8")
    name = target.relative_to(plan.stage / "images" / split).as_posix() if o.to == "coco" else ""
    return (name, size, [coco_object(k, plan.classes[k.name] + 1) for k in kept] if name else []), tally


def _target(plan: Plan, split: str, i: str) -> Path:
    """Return where an image goes; a folder called images inside would hide its labels from Ultralytics."""
    image = plan.source.items[i].image or Path()
    parts = [f"{p}_" if p == "images" and plan.options.to == "yolo" else p for p in i.split("/")]
    folder = "JPEGImages" if plan.options.to == "voc" else f"images/{split}"
    return plan.stage / folder / "/".join([*parts[:-1], f"{parts[-1]}{image.suffix}"])


def _label(plan: Plan, split: str, i: str) -> Path:
    """Return where the label file of an image goes."""
    old, new, suffix = (
        ("JPEGImages", "Annotations", ".xml") if plan.options.to == "voc" else ("images", "labels", ".txt")
    )
    target = _target(plan, split, i).relative_to(plan.stage / old)
    return plan.stage / new / target.with_suffix(suffix)


def write_lists(plan: Plan, out: Path, chosen: dict[str, list[str]], folds: list[dict[str, list[str]]]) -> None:
    """Write what names the splits: data.yaml and list files of YOLO, ImageSets of VOC.

    Args:
        plan: What was written.
        out: Where the staged folder will lie.
        chosen: Ids of each image folder.
        folds: Ids of train, val and test of each fold.
    """
    o, stage = plan.options, plan.stage
    if o.to == "coco":
        return
    lists = dict(chosen) if not folds else {f"fold{k}_{s}": ids for k, f in enumerate(folds, 1) for s, ids in f.items()}
    if o.to == "voc":
        if {"train", "val"} <= lists.keys():
            lists["trainval"] = sorted({*lists["train"], *lists["val"]})
        (stage / "ImageSets/Main").mkdir(parents=True)
        for name, ids in lists.items():
            (stage / f"ImageSets/Main/{name}.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
        return
    where = {s: f"images/{s}" for s in chosen}
    if folds or o.files == "list":
        home = {i: _target(plan, s, i).relative_to(stage).as_posix() for s, ids in chosen.items() for i in ids}
        for name, ids in lists.items():
            rows = [str(plan.source.items[i].image) if o.files == "list" else f"./{home[i]}" for i in ids]
            (stage / f"{name}.txt").write_text("".join(f"{r}\n" for r in rows), encoding="utf-8")
        where = {name: f"{name}.txt" for name in lists}
    tail = {**plan.source.extra, "names": {k: n for n, k in plan.classes.items()}}
    for k in range(1, len(folds) + 1):
        YAML.save(
            stage / f"fold{k}.yaml", {"path": str(out), **{s: where[f"fold{k}_{s}"] for s in folds[k - 1]}, **tail}
        )
    if not folds:
        YAML.save(stage / "data.yaml", {"path": str(out), **where, **tail})
