# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Convert and split datasets between YOLO, Pascal VOC and COCO without touching the source."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.data.check import image_probe
from yolo_ext.data.coco import scan_coco
from yolo_ext.data.formats import SPLITS, scan_voc, scan_yolo
from yolo_ext.data.records import Item, Size, Source, parallel, quote, staged_folder
from yolo_ext.data.write import Options, Plan, Tally, write_lists, write_split

LEGAL = {
    "format": ("voc", "coco", "yolo"),
    "to": ("yolo", "voc", "coco"),
    "task": ("detect", "segment"),
    "difficult": ("keep", "skip"),
    "broken": ("refuse", "skip"),
    "files": ("link", "copy", "list"),
}
NOTES = {  # what may be changed or left out, and how it is told
    "clipped": "boxes clipped at the image border",
    "swapped": "boxes with swapped corners turned round",
    "degenerate": "boxes without area dropped",
    "class": "objects of other classes skipped",
    "difficult": "difficult objects skipped",
    "crowd": "crowd regions skipped",
    "polygon": "objects without a polygon skipped",
    "background": "listed images have no annotation and are kept as background",
    "resized": "images differ in size from their annotation, check rotation",
    "rotated": "photos turned by their EXIF tag, annotated unturned: boxes turned with them",
    "broken": "broken images or annotations left out",
    "unused": "annotated images are in no split",
}


@dataclass
class Summary:
    """What a conversion wrote and what it left out."""

    out: Path  # folder
    names: list[str]  # classes in label order
    data: list[Path]  # the data.yaml files written, one for each fold; none for VOC and COCO
    images: dict[str, int]  # per split
    boxes: dict[str, int]  # per class; an image in two splits counts once
    notes: dict[str, dict[str, int]]  # counts by image id, class or problem, of every kind in `NOTES` that occurred


def convert(source: Path, out: Path, **options: Any) -> Summary:
    """Convert the dataset `source` into a new one in `out`; the same format on both sides splits it anew.

    Pixels count from 0, without the shift of the original VOC convention, as in today's annotation tools. VOC and YOLO
    annotations are read one by one, twice, so that no more than ids and sizes of all images are in memory. A failure
    leaves nothing behind.

    Args:
        source: Dataset, only read.
        out: New or empty folder, outside `source`.
        options: Fields of `Options`.

    Returns:
        Counts of what was written and left out.

    Raises:
        UsageError: The source is broken or incomplete, or an option is illegal.
    """
    o = Options(**options)
    source, out = Path(source).resolve(), Path(out).resolve()
    _check_options(source, out, o)
    data = _scan(source, o)
    listed = _listed(data, o)
    used = sorted(set().union(*listed.values())) if listed else sorted(data.annotated)
    found, kinds, problems = _probe(data, used)
    if problems and o.broken == "refuse":
        raise UsageError(
            f"'{source}': {len(problems)} problems, nothing was written. {quote(problems, 10)}. Mend these, or leave "
            "them out with broken=skip."
        )
    names = _choose_classes(kinds, data.names, o.classes)
    chosen, folds = _splits(found, listed, kinds, o)
    if empty := [s for s, ids in chosen.items() if not ids]:
        raise UsageError(
            f"Nothing readable is left for {quote(empty)} of '{source}': {quote(problems) or 'no images'}."
        )
    tally: Tally = Counter({("broken", p): 1 for p in problems})
    tally.update(("unused", i) for i in set(data.annotated) - set(used))
    with staged_folder(out) as stage:
        plan = Plan(data, found, {n: k for k, n in enumerate(names)}, stage, o)
        seen: set[str] = set()
        for split, ids in chosen.items():
            tally += write_split(plan, split, ids, seen)
            seen.update(ids)
        boxes = {name: tally["box", name] for name in names}
        if not any(boxes.values()):
            raise UsageError(
                f"No box of the classes {quote(names) or '(none)'} is left in '{source}'. Check the classes and splits."
            )
        write_lists(plan, out, chosen, folds)
        yamls = [out / p.name for p in sorted(stage.glob("*.yaml"))]
    notes = {kind: {i: n for (k, i), n in sorted(tally.items()) if k == kind} for kind in NOTES}
    images = {split: len(ids) for split, ids in chosen.items()}
    summary = Summary(out, names, yamls, images, boxes, {k: n for k, n in notes.items() if n})
    _report(summary)
    return summary


def _check_options(source: Path, out: Path, o: Options) -> None:
    """Refuse illegal options, and an output folder that would endanger anything."""
    for key, legal in LEGAL.items():
        if (value := getattr(o, key)) not in legal:
            raise UsageError(f"'{key}={value}' is illegal.{suggest(value, [*legal])} Legal: {', '.join(legal)}.")
    if o.splits and o.ratios:
        raise UsageError("Both lists and ratios are given. Give one of them, e.g. train=trainval val=test.")
    if o.folds and (o.ratios or o.to == "coco"):
        raise UsageError("Folds go with neither ratio= nor to=coco. Give folds=5 alone, with to=yolo or to=voc.")
    if o.files == "list" and (o.format != "yolo" or o.to != "yolo" or o.classes):
        raise UsageError("'files=list' leaves images and labels where they are, so it needs a YOLO source and classes.")
    if not source.exists():
        raise UsageError(f"The source '{source}' does not exist. Give the folder or file of a dataset.")
    if out.is_relative_to(source):
        raise UsageError(f"Output folder '{out}' lies inside the source '{source}'. Give a folder outside it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"Output folder '{out}' exists and is not empty. Give a new folder or empty this one.")


def _scan(source: Path, o: Options) -> Source:
    """Find the files of the source."""
    if o.format == "coco":
        return scan_coco(source, o.images)
    return scan_voc(source) if o.format == "voc" else scan_yolo(source, o.classes)


def _listed(data: Source, o: Options) -> dict[str, list[str]]:
    """Return the splits that the source or the user lists, none where they are to be random."""
    if o.ratios or not (o.splits or len(data.lists) > 1):
        return {}
    if o.stratify and not o.folds:
        raise UsageError("'stratify=True' needs random splits. Give ratio=0.8,0.2 or folds=5 with it.")
    return from_lists(data.lists, o.splits, ("train",) if o.folds else ("train", "val"))


def _probe(data: Source, used: Sequence[str]) -> tuple[dict[str, tuple[Size, int]], dict[str, set[str]], list[str]]:
    """Read every image header and annotation; return size and orientation, and classes, by id, and what is broken."""
    items = [data.items.get(i) or Item(i, None, None) for i in used]
    found, kinds, problems = {}, {}, list(data.problems)
    for item, (probe, names, problem) in zip(items, parallel(partial(_probe_one, data), items, "Reading")):
        if probe:
            found[item.id], kinds[item.id] = probe, {sys.intern(n) for n in names}
        else:
            problems.append(problem)
    return found, kinds, problems


def _probe_one(data: Source, item: Item) -> tuple[tuple[Size, int] | None, set[str], str]:
    """Return size and orientation of one image and the classes in it, or what is wrong."""
    if item.image is None:
        return None, set(), f"{item.id} has no image"
    file = item.image
    try:
        probe = image_probe(file)
        file = item.label or file
        return probe, {o.name for o in data.read(item, probe[0]).objects}, ""
    except (ValueError, OSError) as e:
        return None, set(), f"{file.name}: {e}"


def _choose_classes(
    kinds: Mapping[str, Collection[str]], known: list[str] | None, wanted: Sequence[str] | None
) -> list[str]:
    """Return the class names in label order."""
    found = set().union(*kinds.values())
    if wanted is None:
        return known or sorted(found)
    names = list(wanted)
    present = sorted(found | set(known or ()))
    if not names or len(set(names)) < len(names) or not set(names) & set(present):
        raise UsageError(f"Classes {names} are not legal. Give each once, from those present: {quote(present, 30)}.")
    if absent := [n for n in names if n not in found]:
        LOGGER.warning(f"Classes without any object: {quote(absent)}; present: {quote(sorted(found), 30)}")
    return names


def _splits(
    found: Collection[str], listed: Mapping[str, Sequence[str]], kinds: Mapping[str, Collection[str]], o: Options
) -> tuple[dict[str, list[str]], list[dict[str, list[str]]]]:
    """Return the ids of each image folder to write, and the train and val ids of each fold."""
    chosen = {split: [i for i in ids if i in found] for split, ids in listed.items()}
    classes = kinds if o.stratify else None
    if not o.folds:
        return chosen or by_ratio(found, o.ratios or {"train": 0.8, "val": 0.2}, o.seed, classes), []
    test = {"test": chosen["test"]} if "test" in chosen else {}
    pool = set().union(*chosen.values()) if chosen else set(found)
    pool -= set(test.get("test", ()))
    return {"all": sorted(pool), **test}, [{**f, **test} for f in by_folds(pool, o.folds, o.seed, classes)]


def _report(s: Summary) -> None:
    """Log what was written, and warn about what was left out."""
    counts = ", ".join(f"{n} {split}" for split, n in s.images.items())
    where = s.data[0] if len(s.data) == 1 else s.out
    LOGGER.info(f"Converted {counts} images, {sum(s.boxes.values())} boxes in {len(s.names)} classes to '{where}'")
    for kind, counted in s.notes.items():
        named = [f"{i} ({n})" if n > 1 else i for i, n in counted.items()]
        LOGGER.warning(f"{sum(counted.values())} {NOTES[kind]}: {quote(named)}")


def from_lists(
    lists: Mapping[str, Sequence[str]], splits: Mapping[str, str] | None, needed: Collection[str] = ("train", "val")
) -> dict[str, list[str]]:
    """Return the image ids of each split of the lists in a dataset, named by `splits` (ours to theirs) or alike."""
    splits = splits or {s: s for s in SPLITS if s in lists}
    wrong = [f"{s}={n}" for s, n in splits.items() if s not in SPLITS or n not in lists]
    if wrong or not set(needed) <= splits.keys():
        raise UsageError(
            f"Splits {quote(wrong or sorted(splits) or ['none'])} do not fit. Needed: {' and '.join(needed)}, legal: "
            f"{', '.join(SPLITS)}; lists present: {quote(sorted(lists), 20) or 'none'}. Give e.g. train=trainval "
            "val=test, or ratio=0.8,0.2."
        )
    chosen = {s: list(dict.fromkeys(lists[splits[s]])) for s in SPLITS if s in splits}
    if empty := [splits[s] for s, members in chosen.items() if not members]:
        raise UsageError(f"List {quote(empty)} is empty. Give another list, or ratio=0.8,0.2.")
    for a, b in combinations(chosen, 2):
        shared = set(chosen[a]) & set(chosen[b])
        if shared and {a, b} == {"train", "val"} and set(chosen[a]) == set(chosen[b]):
            raise UsageError(
                f"Lists '{splits[a]}' and '{splits[b]}' hold the same {len(shared)} images, so validation would repeat "
                f"the training set. Lists present: {quote(sorted(lists), 20)}; or give ratio=0.8,0.2."
            )
        if shared:
            LOGGER.warning(
                f"{a} ('{splits[a]}') and {b} ('{splits[b]}') share {len(shared)} images, so accuracy will be "
                f"overstated: {quote(sorted(shared))}"
            )
    return chosen


def by_ratio(
    ids: Collection[str], ratios: Mapping[str, float], seed: int, classes: Mapping[str, Collection[str]] | None = None
) -> dict[str, list[str]]:
    """Return a seeded random split by shares that sum to 1, the `classes` of each image spread alike if given."""
    legal = {"train", "val"} <= ratios.keys() <= set(SPLITS) and all(r > 0 for r in ratios.values())
    if not legal or abs(sum(ratios.values()) - 1) > 1e-6:
        raise UsageError(f"Ratios {dict(ratios)} are not legal. Give positive shares that sum to 1, e.g. 0.8,0.2.")
    names = [s for s in SPLITS if s in ratios]
    chosen = dict(zip(names, deal(ids, [ratios[s] for s in names], seed, classes)))
    if empty := [s for s, members in chosen.items() if not members]:
        raise UsageError(
            f"Ratios {dict(ratios)} leave {quote(empty)} empty with {len(ids)} images. Give a larger share."
        )
    return chosen


def by_folds(
    ids: Collection[str], folds: int, seed: int, classes: Mapping[str, Collection[str]] | None = None
) -> list[dict[str, list[str]]]:
    """Return `folds` seeded splits into train and val, in which every image is validated once."""
    if not 2 <= folds <= len(ids):
        raise UsageError(f"'folds={folds}' is illegal with {len(ids)} images. Legal: 2 to {max(len(ids), 2)}.")
    parts = deal(ids, [1 / folds] * folds, seed, classes)
    return [{"train": sorted(i for p in parts if p is not part for i in p), "val": part} for part in parts]


def deal(
    ids: Collection[str], shares: Sequence[float], seed: int, classes: Mapping[str, Collection[str]] | None = None
) -> list[list[str]]:
    """Return the sorted ids of parts of the given shares, which sum to 1, dealt at random or class by class.

    Class by class follows iterative stratification (Sechidis et al., 2011): the rarest class comes first, and each
    image goes to the part that lacks most images of that class. Every part keeps its share of all images.
    """
    order = sorted(ids)
    random.Random(seed).shuffle(order)
    stops = [round(sum(shares[: k + 1]) * len(order)) for k in range(len(shares))]
    free = [stop - start for start, stop in zip([0, *stops], stops)]
    if classes is None:
        return [sorted(order[stop - n : stop]) for stop, n in zip(stops, free)]
    members: dict[str, list[str]] = {}
    for i in order:
        for name in classes.get(i, ()):
            members.setdefault(name, []).append(i)
    rarest = sorted(members, key=lambda name: (len(members[name]), name))
    lack = [Counter({name: share * len(members[name]) for name in rarest}) for share in shares]  # type: ignore[misc]
    parts: list[list[str]] = [[] for _ in shares]
    done: set[str] = set()
    for i, name in [(i, n) for n in rarest for i in members[n]] + [(i, "") for i in order]:
        if i in done:
            continue
        done.add(i)
        k = max((k for k, n in enumerate(free) if n), key=lambda k: (lack[k][name], free[k]))
        parts[k].append(i)
        free[k] -= 1
        lack[k].subtract(classes.get(i, ()))
    return [sorted(part) for part in parts]
