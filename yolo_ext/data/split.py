# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Decide which image belongs to train, val and test."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import quote

SPLITS = ("train", "val", "test")


def from_lists(
    lists: Mapping[str, Sequence[str]], splits: Mapping[str, str] | None, needed: Collection[str] = ("train", "val")
) -> dict[str, list[str]]:
    """Return the image ids of each split, from the lists of a dataset.

    Args:
        lists: Image ids by name of a list.
        splits: Our split (train, val, test) to name of a list; the lists called train, val and test by default.
        needed: Splits that there must be.

    Raises:
        UsageError: A list is unknown or empty, or train and val are the same images.
    """
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
    """Return a seeded random split.

    Args:
        ids: Image ids.
        ratios: Split (train, val, test) to share of the ids; the shares sum to 1.
        seed: Seed of the split, which does not depend on the order of the ids.
        classes: Classes of each image, to be spread over the splits in the same shares.

    Raises:
        UsageError: A share is illegal or leaves a split empty.
    """
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
    """Return `folds` splits into train and val, in which every image is validated once.

    Args:
        ids: Image ids.
        folds: How many folds.
        seed: Seed of the split.
        classes: Classes of each image, to be spread over the folds evenly.

    Raises:
        UsageError: There are fewer images than folds.
    """
    if not 2 <= folds <= len(ids):
        raise UsageError(f"'folds={folds}' is illegal with {len(ids)} images. Legal: 2 to {max(len(ids), 2)}.")
    parts = deal(ids, [1 / folds] * folds, seed, classes)
    return [{"train": sorted(i for p in parts if p is not part for i in p), "val": part} for part in parts]


def deal(
    ids: Collection[str], shares: Sequence[float], seed: int, classes: Mapping[str, Collection[str]] | None = None
) -> list[list[str]]:
    """Deal ids into parts of the given shares, at random or class by class.

    Class by class follows iterative stratification (Sechidis et al., 2011): the rarest class comes first, and each
    image goes to the part that lacks most images of that class. Every part keeps its share of all images.

    Args:
        ids: Image ids.
        shares: Share of each part; they sum to 1.
        seed: Seed of the order.
        classes: Classes of each image.

    Returns:
        Sorted ids of each part.
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
