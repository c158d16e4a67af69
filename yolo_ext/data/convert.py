# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Convert and split datasets between YOLO, Pascal VOC and COCO without touching the source."""

import json
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from os.path import commonpath, relpath
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ultralytics.utils import LOGGER, YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.data.check import image_probe, label_places, no_labels
from yolo_ext.data.coco import coco_object, scan_coco, write_coco
from yolo_ext.data.formats import FORMATS, format_of, scan_voc, scan_yolo, to_image, voc_text, yolo_row

from yolo_ext.data.records import (  # isort: skip
    SPLITS, Size, Source, Splits, by_folds, by_ratio, link_or_copy, parallel, quote, staged_folder,
)  # fmt: skip
from yolo_ext.runs import saved

Tally = Counter[tuple[str, str]]  # by kind of thing, and image or class
TEXTS = Path(__file__).with_name("notes.txt").read_text(encoding="utf-8").splitlines()
NOTES = dict(line.split(": ", 1) for line in TEXTS)  # what may be changed or left out, and how it is told
RECORD = "convert.json"  # in the output folder, names everything that `NOTES` counts
SCANS = {"voc": scan_voc, "coco": scan_coco, "yolo": scan_yolo}


@dataclass(frozen=True)
class Options:
    """How to convert."""

    format: Literal["auto", "voc", "coco", "yolo"] = "auto"  # of the source, by what its files hold
    to: Literal["yolo", "voc", "coco"] = "yolo"
    classes: Sequence[str] | None = None  # in label order; those of the source by default, sorted for VOC
    splits: Mapping[str, str] | None = None  # our split to a list or split of the source, e.g. {"train": "trainval"}
    ratios: Mapping[str, float] | None = None  # our split to its share, for a random split that ignores the lists
    stratify: bool = False  # spread the classes evenly over random splits or folds
    folds: int = 0  # pairs of train and val lists over one image tree; a test split stays apart
    seed: int = 0
    task: Literal["detect", "segment"] = "detect"  # `segment` writes polygons as YOLO labels
    difficult: Literal["keep", "skip"] = "keep"  # or `skip` the objects that VOC marks as difficult
    broken: Literal["refuse", "skip"] = "refuse"  # or `skip` and count broken images and annotations
    files: Literal["link", "copy", "list"] = "link"  # images; `list` leaves those of a YOLO source where they are
    images: Path | None = None  # folder of the images, where it is not found by itself
    annotations: Path | None = None  # folder or COCO file of the annotations, where they are not found by themselves


@dataclass(frozen=True)
class Plan:
    """What every worker knows: the source, size and orientation of each image, class numbers, what to write where."""

    source: Source
    found: Mapping[str, tuple[Size, int]]
    classes: Mapping[str, int]
    stage: Path
    options: Options


def convert(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Convert the dataset `source` into a new one in `out`; the same format on both sides splits it anew.

    Pixels count from 0, without the shift of the original VOC convention. A failure leaves nothing behind. Returned are
    the folder `out`, the classes (`names`), a `data` YAML for each fold (none of VOC and COCO), counts of `images` by
    split and of `boxes` by class (an image in two splits counts once), and `notes` by kind of `NOTES` and by name.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    o = _checked(source, out, Options(**options))
    more = {"classes": o.classes} if o.format == "yolo" else {}
    data = SCANS[o.format](source, images=o.images, annotations=o.annotations, **more)
    _tell(data, o.format, source)
    if o.files == "list":
        _check_places(data)
    listed = _listed(data.lists, o)
    used = sorted(set().union(*listed.values())) if listed else sorted(data.annotated)
    found, kinds, problems = _probe(data, used)
    if problems and o.broken == "refuse":
        told = f"'{source}': {len(problems)} problems, nothing was written. {quote(problems, 10)}."
        raise UsageError(f"{told} Mend these, or leave them out with broken=skip.")
    names = _choose_classes(set().union(*kinds.values()), data.names, o.classes)
    chosen, folds = _splits(listed, kinds, o)
    if empty := [s for s, ids in chosen.items() if not ids]:
        raise UsageError(f"Nothing readable is left for {quote(empty)} in '{source}': {quote(problems) or 'no image'}.")
    bare = data.images.keys() - {*data.annotated, *used}
    left = {"broken": problems, "unused": {*data.annotated} - {*used}, "unannotated": bare, **data.notes}
    tally: Tally = Counter((kind, name) for kind, names in left.items() for name in names)
    with staged_folder(out) as stage:
        plan = Plan(data, found, {n: k for k, n in enumerate(names)}, stage, o)
        seen: set[str] = set()
        for split, ids in chosen.items():
            tally += _write_split(plan, split, ids, seen)
            seen.update(ids)
        boxes = {name: tally["box", name] for name in names}
        if not any(boxes.values()):
            raise UsageError(f"No box of {quote(names) or 'any class'} is left in '{source}'. Check classes, splits.")
        _write_lists(plan, out, chosen, folds)
        yamls = [out / p.name for p in sorted(stage.glob("*.yaml"))]
        notes = {kind: {i: n for (k, i), n in sorted(tally.items()) if k == kind} for kind in NOTES}
        images = {split: len(ids) for split, ids in chosen.items()}
        notes = {k: n for k, n in notes.items() if n}
        named = {k: {"what": NOTES[k], "count": sum(n.values()), "names": n} for k, n in notes.items()}
        record = {"source": str(source), "images": images, "boxes": boxes, "notes": named}
        if named:  # names every image, class or file that something was changed or left out of
            (stage / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    done: dict[str, Any] = {"out": out, "names": names, "data": yamls, "images": images, "boxes": boxes, "notes": notes}
    _report(**done)
    return done


def _checked(source: Path, out: Path, o: Options) -> Options:
    """Return options with the format of the source; refuse illegal ones, and a folder that would endanger anything."""
    for key, kind in get_type_hints(Options).items():
        legal, value = get_args(kind), getattr(o, key)
        if get_origin(kind) is Literal and value not in legal:
            raise UsageError(f"'{key}={value}' is illegal.{suggest(value, [*legal])} Legal: {', '.join(legal)}.")
    if o.splits and o.ratios:
        raise UsageError("Both lists and ratios are given. Give one of them, e.g. train=trainval val=test.")
    if o.folds and (o.ratios or o.to == "coco"):
        raise UsageError("Folds go with neither ratio= nor to=coco. Give folds=5 alone, with to=yolo or to=voc.")
    if o.files == "list" and (o.format != "yolo" or o.to != "yolo" or o.classes):
        raise UsageError("'files=list' leaves images and labels where they are, so it needs a YOLO source and classes.")
    o = replace(o, **{k: v.resolve() for k in ("images", "annotations") if (v := getattr(o, k))})
    for key, place in (("source", source), ("images", o.images), ("annotations", o.annotations)):
        if place and not place.exists():
            raise UsageError(f"'{key}={place}' does not exist. Give the folder or file of a dataset.")
    if out.is_relative_to(source):
        raise UsageError(f"Output folder '{out}' lies inside the source '{source}'. Give a folder outside it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"Output folder '{out}' exists and is not empty. Give a new folder or empty this one.")
    found: Any = format_of(o.annotations or source) if o.format == "auto" else o.format
    return replace(o, format=found)


def _tell(data: Source, format: str, source: Path) -> None:
    """Say what was found where; no annotation at all is an error."""
    if not data.files:
        looked = no_labels(label_places(data.images.values()))
        raise UsageError(f"'{source}' has {len(data.images)} images: {looked}. Give annotations=FOLDER.")
    start, places = source if source.is_dir() else source.parent, []
    for kind, files in (("images", [*data.images.values()]), (f"{format} annotation files", data.files)):
        places.append(f"{kind}: {len(files)} in '{relpath(commonpath([f.parent for f in files]), start)}'")
    lists = [f"lists: {quote(sorted(data.lists), 20)}"] if len(data.lists) > 1 else []
    LOGGER.info(f"Found in '{source}': {', '.join([*places, *lists])}")


def _check_places(data: Source) -> None:
    """Refuse labels that training would not find, where images and labels are to stay."""
    places = label_places(data.images[i] for i in data.labels)
    if lost := [f"'{label}'" for label, place in zip(data.labels.values(), places) if label != place]:
        told = f"{len(lost)} labels lie where training does not look, such as {lost[0]}"
        raise UsageError(f"{told}. Give files=link, which makes a dataset of them.")


def _listed(lists: Splits, o: Options) -> Splits:
    """Return the image ids of the splits that the source or the user lists, none where they are to be random."""
    if o.ratios or not (o.splits or len(lists) > 1):
        return {}
    if o.stratify and not o.folds:
        raise UsageError("'stratify=True' needs random splits. Give ratio=0.8,0.2 or folds=5 with it.")
    needed = ("train",) if o.folds else ("train", "val")
    splits = o.splits or {s: s for s in SPLITS if s in lists}  # ours to those of the source
    wrong = [f"{s}={n}" for s, n in splits.items() if s not in SPLITS or n not in lists]
    if wrong or not set(needed) <= splits.keys():
        told = f"Splits {quote(wrong or sorted(splits) or ['none'])} do not fit. Needed: {' and '.join(needed)}, "
        told += f"legal: {', '.join(SPLITS)}; lists present: {quote(sorted(lists), 20) or 'none'}."
        raise UsageError(f"{told} Give e.g. train=trainval val=test, or ratio=0.8,0.2.")
    chosen = {s: list(dict.fromkeys(lists[splits[s]])) for s in SPLITS if s in splits}
    if empty := [splits[s] for s, members in chosen.items() if not members]:
        raise UsageError(f"List {quote(empty)} is empty. Give another list, or ratio=0.8,0.2.")
    for a, b in combinations(chosen, 2):
        shared = sorted({*chosen[a]} & {*chosen[b]})
        if shared and (a, b) == ("train", "val") and len(shared) == len(chosen[a]) == len(chosen[b]):
            told = f"Lists '{splits[a]}' and '{splits[b]}' hold the same {len(shared)} images."
            raise UsageError(f"{told} Lists present: {quote(sorted(lists), 20)}; or give ratio=0.8,0.2.")
        if shared:
            both = f"{a} ('{splits[a]}') and {b} ('{splits[b]}')"
            LOGGER.warning(f"{both} share {len(shared)} images, so accuracy is overstated: {quote(shared)}")
    return chosen


def _probe(data: Source, used: Sequence[str]) -> tuple[dict[str, tuple[Size, int]], dict[str, set[str]], list[str]]:
    """Read every image header and annotation; return size and orientation, and classes, by id, and what is broken."""
    found, kinds, problems = {}, {}, list(data.problems)
    for i, (probe, names, problem) in zip(used, parallel(partial(_probe_one, data), used, "Reading")):
        if probe:
            found[i], kinds[i] = probe, {sys.intern(n) for n in names}
        else:
            problems.append(problem)
    return found, kinds, problems


def _probe_one(data: Source, i: str) -> tuple[tuple[Size, int] | None, set[str], str]:
    """Return size, orientation and classes of one image, or what is wrong; it is read anew later, to save memory."""
    file = data.images.get(i)
    if file is None:
        return None, set(), f"{i} has no image"
    try:
        probe = image_probe(file)
        file = data.labels.get(i, file)
        return probe, {o.name for o in data.read(i, probe[0]).objects}, ""
    except (ValueError, OSError) as e:
        return None, set(), f"{file.name}: {e}"


def _choose_classes(found: set[str], known: list[str] | None, wanted: Sequence[str] | None) -> list[str]:
    """Return the class names in label order."""
    if wanted is None:
        return known or sorted(found)
    names, present = list(wanted), sorted(found | set(known or ()))
    if not names or len(set(names)) < len(names) or not set(names) & set(present):
        raise UsageError(f"Classes {names} are not legal. Give each once, from those present: {quote(present, 30)}.")
    if absent := [n for n in names if n not in found]:
        LOGGER.warning(f"Classes without any object: {quote(absent)}; present: {quote(sorted(found), 30)}")
    return names


def _splits(listed: Splits, kinds: Mapping[str, Collection[str]], o: Options) -> tuple[Splits, list[Splits]]:
    """Return the ids of each image folder to write, and the train and val ids of each fold."""
    chosen = {split: [i for i in ids if i in kinds] for split, ids in listed.items()}
    classes = kinds if o.stratify else None
    if not o.folds:
        return chosen or by_ratio(kinds, o.ratios or {"train": 0.8, "val": 0.2}, o.seed, classes), []
    test = {"test": chosen["test"]} if "test" in chosen else {}
    pool = set().union(*(chosen.values() or [kinds])) - set(test.get("test", ()))
    return {"all": sorted(pool), **test}, [{**f, **test} for f in by_folds(pool, o.folds, o.seed, classes)]


def _report(
    out: Path, names: Sequence[str], data: Sequence[Path], images: Mapping[str, int], boxes: Mapping[str, int],
    notes: Mapping[str, Mapping[str, int]],
) -> None:  # fmt: skip
    counts = ", ".join(f"{n} {split}" for split, n in images.items())
    LOGGER.info(f"Converted {counts} images, {sum(boxes.values())} boxes in {len(names)} classes")
    for kind, counted in notes.items():
        named = [f"{i} ({n})" if n > 1 else i for i, n in counted.items()]
        LOGGER.warning(f"{sum(counted.values())} {NOTES[kind]}: {quote(named)}")
    if notes:
        LOGGER.info(f"All of them are named in '{out / RECORD}'")
    saved(data[0] if len(data) == 1 else out, f"yolo-ext data check={data[0]}" if data else "")


def _write_split(plan: Plan, split: str, ids: Sequence[str], seen: Collection[str]) -> Tally:
    """Write images and annotations of one split; return what was written or left out, but of the ids seen before."""
    o, tally = plan.options, Tally()
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
        write_coco(plan.stage / f"annotations/instances_{split}.json", [*plan.classes], counted())
    else:
        deque(counted(), 0)
    return tally


def _write_one(plan: Plan, split: str, i: str) -> tuple[tuple[str, Size, list[dict[str, Any]]], Tally]:
    """Write one image with its annotation; return its COCO record, and what was changed, left out and kept."""
    o, data, (size, orientation) = plan.options, plan.source, plan.found[i]
    objects, changes = to_image(data.read(i, size), size, orientation)
    same = o.format == o.to == "yolo"  # rows are kept word for word
    tally: Tally = Counter({(kind, i): n for kind, n in changes.items() if n and not (same and kind == "clipped")})
    tally["background", i] += i not in data.labels
    kept = []
    for obj in objects:
        if obj.name not in plan.classes:
            tally["class", obj.name] += 1
        elif obj.difficult and o.difficult == "skip":
            tally["difficult", i] += 1
        elif o.task == "segment" and o.to == "yolo" and not (obj.polygons or obj.row):
            tally["polygon", i] += 1
        else:
            pose = not obj.polygons and len(obj.row.split()) > 4
            whole = {"voc": False, "coco": not pose, "yolo": bool(obj.row) or o.task == "segment"}[o.to]
            tally["boxed", i] += bool(obj.polygons or pose) and not whole
            tally["box", obj.name] += 1
            kept.append(obj)
    target, *label = _places(plan, split, i)
    if o.files != "list":
        link_or_copy(data.images[i], target, link=o.files == "link")
    if o.to == "coco":
        name = target.relative_to(plan.stage / "images" / split).as_posix()
        return (name, size, [{"category_id": plan.classes[k.name] + 1, **coco_object(k)} for k in kept]), tally
    if o.files != "list":
        rows = (f"{yolo_row(k, plan.classes[k.name], size, o.task)}\n" for k in kept)
        text = "".join(rows) if o.to == "yolo" else voc_text(target.name, size, kept)
        label[0].write_text(text, encoding="utf-8")
    return ("", size, []), tally


def _places(plan: Plan, split: str, i: str) -> list[Path]:
    """Return where an image goes, and its label; a folder called images inside would hide these from Ultralytics."""
    kind, image = FORMATS[plan.options.to], plan.source.images[i]
    parts = [f"{p}_" if p == "images" and plan.options.to == "yolo" else p for p in i.split("/")]
    below = "/".join(parts if plan.options.to == "voc" else [split, *parts])
    target = plan.stage / kind.images / f"{below}{image.suffix}"
    return [target, plan.stage / kind.labels / f"{below}{kind.suffix}"] if kind.labels else [target]


def _write_lists(plan: Plan, out: Path, chosen: Splits, folds: list[Splits]) -> None:
    """Write what names the splits of the folder `out` to be: data.yaml and list files of YOLO, ImageSets of VOC."""
    o, stage = plan.options, plan.stage
    if o.to == "coco":
        return
    lists = {f"fold{k}_{s}": ids for k, fold in enumerate(folds, 1) for s, ids in fold.items()} or dict(chosen)
    where = {s: f"images/{s}" for s in chosen}
    if o.to == "voc" or folds or o.files == "list":
        if o.to == "voc" and {"train", "val"} <= lists.keys():
            lists["trainval"] = sorted({*lists["train"], *lists["val"]})
        where = {name: f"ImageSets/Main/{name}.txt" if o.to == "voc" else f"{name}.txt" for name in lists}
        rows = {i: i if o.to == "voc" else f"./{_places(plan, s, i)[0].relative_to(stage).as_posix()}"
                for s, ids in chosen.items() for i in ids}  # fmt: skip
        rows |= {i: str(plan.source.images[i]) for i in rows} if o.files == "list" else {}
        for name, ids in lists.items():
            (stage / where[name]).parent.mkdir(parents=True, exist_ok=True)
            (stage / where[name]).write_text("".join(f"{rows[i]}\n" for i in ids), encoding="utf-8")
    extra = dict(plan.source.extra)
    names, same = {k: n for n, k in plan.classes.items()}, extra.pop("names", None)
    tail = {**extra, "names": names if o.classes else same or names}
    yamls = {f"fold{k}": {s: where[f"fold{k}_{s}"] for s in fold} for k, fold in enumerate(folds, 1)} or {"data": where}
    for name, splits in yamls.items() if o.to == "yolo" else ():
        YAML.save(stage / f"{name}.yaml", {"path": str(out), **splits, **tail})
