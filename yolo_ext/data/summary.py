# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Summarise a YOLO dataset: classes, box sizes, broken files, images that are the same or nearly, leaks of splits."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.data.check import attempt, image_probe
from yolo_ext.data.formats import scan_yolo
from yolo_ext.data.records import Source, grouped, parallel, quote
from yolo_ext.stock.load import open_image

BITS = 256
NEAR = 10  # bits of the fingerprint that may differ
AREAS = {"small": 32**2, "medium": 96**2, "large": math.inf}  # square pixels, as COCO counts
KINDS = {  # what is wrong with a file, and how it is told
    "broken": "images cannot be read",
    "malformed": "label files are malformed",
    "outside": "label files have boxes outside the image, Ultralytics leaves these images out",
}


class Seen(NamedTuple):
    """What was seen in one image and its label file."""

    key: bytes = b""  # hash of the file
    print: int = 0  # fingerprint of the picture
    state: str = "unlabelled"  # or `labelled`, `empty` or one of `KINDS`
    problem: str = ""  # in words
    boxes: Mapping[tuple[str, str, int], int] = {}  # by (class, area name, power of two of the side in pixels)


def summarise(data: str | Path, near: int = NEAR) -> dict[str, Any]:
    """Look at every image and label of a dataset, changing nothing.

    Args:
        data: data.yaml, or the folder of one.
        near: How many of 256 bits may differ between the fingerprints of images that are called nearly the same.
    Returns: `splits`, `classes`, `sizes`, `duplicates` and `leaks`, exact and near, files that are broken, malformed or
        outside, and `passed`: no file is broken or malformed and train shares no image with val or test.
    Raises: `UsageError` if the data.yaml or a path in it is unusable.
    """
    if not 0 <= near <= 64:
        raise UsageError(f"'near={near}' is illegal. Legal: 0 to 64 of 256 bits.")
    if not Path(data).exists():
        raise UsageError(f"'{data}' does not exist. Give check= the path of a data.yaml.")
    source = scan_yolo(Path(data))
    if source.problems:
        LOGGER.warning(f"{len(source.problems)} images share a label file: {quote(source.problems)}")
    looks = parallel(partial(_look, source), [*source.images], "Checking images and labels")
    seen = dict(zip(source.images, looks))
    found: dict[str, Any] = {"data": str(data), **_tables(source, seen)}
    for kind in KINDS:
        found[kind] = {str(source.images[i]): s.problem for i, s in seen.items() if s.state == kind}
    for suffix, groups in _groups(source, {i: s for i, s in seen.items() if s.key}, near).items():
        found[f"duplicates{suffix}"], found[f"leaks{suffix}"] = _place(source, groups)
    found["passed"] = not (found["broken"] or found["malformed"] or any(found["leaks"].values()))
    return found


def _look(source: Source, i: str) -> Seen:
    probe, problem = attempt(lambda file: (image_probe(file)[0], *fingerprint(file)), source.images[i])
    if probe is None:
        return Seen(state="broken", problem=problem)
    size, key, bits = probe
    if i not in source.labels:
        return Seen(key, bits)
    try:
        objects = source.read(i, size).objects
    except (ValueError, OSError) as e:
        kind = "outside" if isinstance(e.__cause__, ArithmeticError) else "malformed"
        return Seen(key, bits, kind, f"{source.labels[i].name} {e}")
    boxes: Counter[tuple[str, str, int]] = Counter()
    for o in objects:
        area = max((o.box[2] - o.box[0]) * (o.box[3] - o.box[1]), 0.0)
        boxes[o.name, next(n for n, a in AREAS.items() if area < a), int(math.log2(max(math.sqrt(area), 1)))] += 1
    return Seen(key, bits, "labelled" if objects else "empty", boxes=boxes)


def _tables(source: Source, seen: Mapping[str, Seen]) -> dict[str, Any]:
    """Return the counts of each split, boxes by class, split and area, and the histogram of their sides."""
    splits, classes = {}, {name: dict.fromkeys([*source.lists, *AREAS], 0) for name in source.names or ()}
    sides: Counter[int] = Counter()
    for split, ids in source.lists.items():
        states = Counter(seen[i].state for i in ids)
        boxes = [item for i in ids for item in seen[i].boxes.items()]
        total = {"images": len(ids), "boxes": sum(n for _, n in boxes)}
        splits[split] = {**total, **{k: states[k] for k in ("unlabelled", "empty", *KINDS)}}
        for (name, area, side), n in boxes:
            classes[name][split] += n
            classes[name][area] += n
            sides[side] += n
    powers = range(min(sides, default=0), max(sides, default=-1) + 1)
    sizes = {f"{2**p}-{2 ** (p + 1)}": sides[p] for p in powers}
    return {"splits": splits, "classes": classes, "sizes": sizes}


def _groups(source: Source, seen: Mapping[str, Seen], near: int) -> dict[str, list[list[str]]]:
    """Return groups of images that are exactly and nearly the same; an image in two splits is a group of its own."""
    exact = [ids for ids in grouped(seen, lambda i: seen[i].key).values() if len(ids) > 1]
    member = Counter(i for ids in source.lists.values() for i in set(ids) if i in seen)
    copies = {i for ids in exact for i in ids}
    exact += [[i] for i, n in member.items() if n > 1 and i not in copies]
    alone = {s.key: i for i, s in reversed([*seen.items()])}  # exact copies count once
    prints = {i: seen[i].print for i in alone.values()}
    first = {p: i for i, p in prints.items()}
    alike = [ids for ids in grouped(prints, lambda i: prints[i]).values() if len(ids) > 1]
    return {"": exact, "_near": alike + [[first[a], first[b]] for a, b in near_pairs(first, near)]}


def _place(source: Source, groups: Sequence[Sequence[str]]) -> tuple[list[list[str]], dict[str, list[list[str]]]]:
    """Tell duplicates inside a split from leaks between splits; each is a pair of image files."""
    splits = {split: set(ids) for split, ids in source.lists.items()}
    inside: list[list[str]] = []
    leaks: dict[str, list[list[str]]] = {f"{a}/{b}": [] for a, b in combinations(splits, 2)}
    for group in groups:
        members = {split: [str(source.images[i]) for i in group if i in ids] for split, ids in splits.items()}
        inside += [[files[0], file] for files in members.values() for file in files[1:]]
        for (a, files), (b, others) in combinations(members.items(), 2):
            leaks[f"{a}/{b}"] += [[file if file in files else files[0], file] for file in others if files]
    return inside, leaks


def fingerprint(file: Path) -> tuple[bytes, int]:
    """Return a hash of an image's bytes, and 256 bits that say where its picture gets brighter to the right (dHash)."""
    raw = file.read_bytes()
    with refused("cannot be decoded ({e})", error=ValueError), open_image(BytesIO(raw)) as im:
        im.draft("L", (64, 64))  # JPEG: decode to an eighth
        deep = im.mode.startswith("I") or im.mode == "F"
        gray = im.convert("I").convert("F") if deep else im.convert("L")
        small = np.asarray(gray.resize((17, 16), Image.Resampling.BOX))
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return hashlib.blake2b(raw, digest_size=16).digest(), int.from_bytes(bits.tobytes(), "big")


def near_pairs(prints: Iterable[int], limit: int = NEAR) -> list[tuple[int, int]]:
    """Return the pairs of different fingerprints of 256 bits of which at most `limit` bits differ."""
    distinct = sorted(set(prints))
    width = -(-BITS // (limit + 1))  # of limit + 1 bands: a pair within the limit has at least one of them in common
    found: set[tuple[int, int]] = set()
    for start in range(0, BITS, width):
        for members in grouped(distinct, lambda p: p >> start & (1 << width) - 1).values():  # noqa: B023  used at once
            found.update((a, b) for a, b in combinations(members, 2) if (a ^ b).bit_count() <= limit)
    return sorted(found)
