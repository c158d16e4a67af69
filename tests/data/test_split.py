# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Splits: nothing is lost or doubled, shares hold, classes are spread."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.errors import UsageError
from yolo_ext.data.records import by_folds, by_ratio, deal

IDS = [f"i{k}" for k in range(200)]
# a in every image, b in a half, c in 20, d in 5
CLASSES = {i: {"a"} | {n for n, every in (("b", 2), ("c", 10), ("d", 40)) if k % every == 0} for k, i in enumerate(IDS)}


@given(st.integers(2, 60), st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 99), st.booleans())
def test_parts_cover_all_ids_once(n, weights, seed, stratify):
    ids = [f"{k}" for k in range(n)]
    classes = {i: {"x"} if int(i) % 3 else {"x", "y"} for i in ids if int(i) % 5} if stratify else None
    shares = [w / sum(weights) for w in weights]
    parts = deal(ids, shares, seed, classes)
    assert sorted(i for p in parts for i in p) == sorted(ids)
    assert all(abs(len(p) - s * n) <= 1 for p, s in zip(parts, shares))
    assert parts == deal(ids[::-1], shares, seed, classes) and all(p == sorted(p) for p in parts)


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_spread(seed):
    chosen = by_ratio(IDS, {"train": 0.6, "val": 0.2, "test": 0.2}, seed, CLASSES)
    counts = {s: Counter(n for i in ids for n in CLASSES[i]) for s, ids in chosen.items()}
    assert {s: c["d"] for s, c in counts.items()} == {"train": 3, "val": 1, "test": 1}
    assert {s: c["c"] for s, c in counts.items()} == {"train": 12, "val": 4, "test": 4}
    np.testing.assert_allclose([counts[s]["b"] for s in chosen], [60, 20, 20], atol=1)
    for fold in by_folds(IDS, 5, seed, CLASSES):
        assert Counter(n for i in fold["val"] for n in CLASSES[i])["d"] == 1
        assert len(fold["val"]) == 40 and not set(fold["val"]) & set(fold["train"])


def test_at_random_some_fold_lacks_the_rare_class():
    """Or the test above would hold without stratification."""
    folds = [f for seed in range(5) for f in by_folds(IDS, 5, seed)]
    assert any(not any("d" in CLASSES[i] for i in f["val"]) for f in folds)


@pytest.mark.parametrize(("folds", "n"), [(1, 9), (10, 9), (2, 1)])
def test_illegal_folds(folds, n):
    with pytest.raises(UsageError, match=f"'folds={folds}'"):
        by_folds(IDS[:n], folds, 0)
