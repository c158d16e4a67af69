# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Decide which image belongs to train, val and test."""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from itertools import combinations
from pathlib import Path

from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import LOGGER

from yolo_ext.data.check import quote
from yolo_ext.errors import UsageError

SPLITS = ("train", "val", "test")


def choose_splits(
    source: Path,
    ids: Collection[str],
    splits: dict[str, str] | None,
    ratios: dict[str, float] | None,
    seed: int,
) -> dict[str, list[str]]:
    """Return the image ids of each split, from the lists of a VOC folder or at random.

    Args:
        source: VOC folder.
        ids: Ids of all annotated images.
        splits: Our split (train, val, test) to name of a list in ImageSets/Main; the lists called train, val and test
            by default.
        ratios: Our split to share of `ids`, ignoring the lists; 0.8 and 0.2 where there are no lists.
        seed: Seed of the random split.

    Raises:
        UsageError: A list or share is illegal, empty or absent, or train and val are the same images.
    """
    lists = {f.stem: f for f in sorted((source / "ImageSets/Main").glob("*.txt"))}
    if splits and ratios:
        raise UsageError("Both lists and ratios are given. Give one of them, e.g. train=trainval val=test.")
    if ratios or (not splits and not lists):
        return _random_splits(sorted(ids), ratios or {"train": 0.8, "val": 0.2}, seed)
    splits = splits or {s: s for s in SPLITS if s in lists}
    wrong = [f"{s}={n}" for s, n in splits.items() if s not in SPLITS or n not in lists]
    if wrong or not {"train", "val"} <= splits.keys():
        raise UsageError(
            f"Splits {quote(wrong or sorted(splits) or ['none'])} do not fit. Needed: train and val, optional: test; "
            f"lists present: {quote(sorted(lists), 20) or 'none'}. Give e.g. train=trainval val=test, or ratio=0.8,0.2."
        )
    chosen = {s: _read_list(lists[splits[s]], ids) for s in SPLITS if s in splits}
    if empty := [splits[s] for s, members in chosen.items() if not members]:
        raise UsageError(f"List {quote(empty)} of '{source}' is empty. Give another list, or ratio=0.8,0.2.")
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


def _read_list(file: Path, ids: Collection[str]) -> list[str]:
    """Return the image ids of an ImageSets list, without the flags of per-class lists and without file suffixes."""
    members: dict[str, None] = {}
    for line in map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()):
        if line and line not in ids:
            line = re.sub(r"\s+(-1|0|1)$", "", line)
        stem, _, suffix = line.rpartition(".")
        members[stem if line not in ids and suffix.lower() in IMG_FORMATS else line] = None
    members.pop("", None)
    return list(members)


def _random_splits(ids: list[str], ratios: dict[str, float], seed: int) -> dict[str, list[str]]:
    """Return a seeded random split of the ids."""
    legal = {"train", "val"} <= ratios.keys() <= set(SPLITS) and all(r > 0 for r in ratios.values())
    if not legal or abs(sum(ratios.values()) - 1) > 1e-6:
        raise UsageError(f"Ratios {ratios} are not legal. Give positive shares that sum to 1, e.g. 0.8,0.2.")
    random.Random(seed).shuffle(ids)
    chosen, start, share = {}, 0, 0.0
    for split in (s for s in SPLITS if s in ratios):
        share += ratios[split]
        stop = round(share * len(ids))
        chosen[split] = sorted(ids[start:stop])
        start = stop
    if empty := [s for s, members in chosen.items() if not members]:
        raise UsageError(f"Ratios {ratios} leave {quote(empty)} empty with {len(ids)} images. Give a larger share.")
    return chosen
