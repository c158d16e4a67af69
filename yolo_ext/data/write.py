# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Write a dataset that was read, split by split, as YOLO, Pascal VOC or COCO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ultralytics.utils import YAML

from yolo_ext.data.coco import coco_object, write_coco
from yolo_ext.data.formats import FORMATS, voc_text, yolo_row
from yolo_ext.data.records import Object, Size, Source, link_or_copy, parallel, to_image

Tally = Counter[tuple[str, str]]  # by kind of thing, and image or class


@dataclass(frozen=True)
class Options:
    """How to convert; the words that are legal are in `LEGAL`."""

    format: str = "voc"  # of the source
    to: str = "yolo"
    classes: Sequence[str] | None = None  # in label order; those of the source by default, sorted for VOC
    splits: Mapping[str, str] | None = None  # our split to a list or split of the source, e.g. {"train": "trainval"}
    ratios: Mapping[str, float] | None = None  # our split to its share, for a random split that ignores the lists
    stratify: bool = False  # spread the classes evenly over random splits or folds
    folds: int = 0  # pairs of train and val lists over one image tree; a test split stays apart
    seed: int = 0
    task: str = "detect"  # `segment` writes polygons as YOLO labels
    difficult: str = "keep"  # or `skip` the objects that VOC marks as difficult
    broken: str = "refuse"  # or `skip` and count broken images and annotations
    files: str = "link"  # images where the file system allows it, `copy` them, or `list` those of a YOLO source
    images: Path | None = None  # folder that the file names of COCO start from, where it is not found by itself


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
    if o.files != "list":  # folders come first: a worker that made one would do so even after a failure
        for folder in {place.parent for i in ids for place in _places(plan, split, i)}:
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
    target, *label = _places(plan, split, i)
    if o.files != "list":
        link_or_copy(plan.source.items[i].image or Path(), target, link=o.files == "link")
    if o.to == "coco":
        name = target.relative_to(plan.stage / "images" / split).as_posix()
        return (name, size, [{"category_id": plan.classes[k.name] + 1, **coco_object(k)} for k in kept]), tally
    if o.files != "list":
        rows = (f"{yolo_row(k, plan.classes[k.name], size, o.task)}\n" for k in kept)
        text = "".join(rows) if o.to == "yolo" else voc_text(target.name, size, kept)
        label[0].write_text(text, encoding="utf-8")
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


def _places(plan: Plan, split: str, i: str) -> list[Path]:
    """Return where an image goes, and its label; a folder called images inside would hide these from Ultralytics."""
    kind, image = FORMATS[plan.options.to], plan.source.items[i].image or Path()
    parts = [f"{p}_" if p == "images" and plan.options.to == "yolo" else p for p in i.split("/")]
    below = "/".join(parts if plan.options.to == "voc" else [split, *parts])
    target = plan.stage / kind.images / f"{below}{image.suffix}"
    return [target, plan.stage / kind.labels / f"{below}{kind.suffix}"] if kind.labels else [target]


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
        home = {i: _places(plan, s, i)[0].relative_to(stage).as_posix() for s, ids in chosen.items() for i in ids}
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
