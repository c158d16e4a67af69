# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.core.config import SparsityConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import pulls
from yolo_ext.sparsity.sparsifier import Controller


@settings(deadline=None)
@given(
    epochs=st.integers(1, 60), start=st.integers(0, 59), length=st.integers(1, 60), warmup=st.integers(0, 5),
    schedule=st.sampled_from(["constant", "linear", "cosine"]), final=st.floats(0, 1), coefficient=st.floats(1e-3, 50),
)  # fmt: skip
def test_epochs_share_the_coefficient(epochs, start, length, warmup, schedule, final, coefficient):
    start = min(start, epochs - 1)
    end = min(start + length, epochs)
    cfg = SparsityConfig(start=start, end=end, warmup=warmup, schedule=schedule, final=final)
    found = pulls(cfg=cfg, coefficient=coefficient, epochs=epochs)
    assert len(found) == epochs
    assert sum(found) == pytest.approx(coefficient)
    assert min(found) >= 0
    assert not any(found[:start]) and not any(found[end:])
    assert found[start] > 0


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"warmup": 0}, [1, 1, 1, 1]),
        ({"warmup": 1}, [0.5, 1, 1, 1]),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1]),
        ({"warmup": 0, "schedule": "linear", "final": 0.1}, [1, 0.7, 0.4, 0.1]),
        ({"warmup": 0, "schedule": "cosine", "final": 0.0}, [1, 0.75, 0.25, 0]),
        ({"warmup": 0, "start": 1, "end": 3}, [0, 1, 1, 0]),
    ],
    ids=["constant", "warmup", "long warmup", "linear", "cosine", "window"],
)
def test_shapes(options, shape):
    found = pulls(cfg=SparsityConfig(**options), coefficient=2.0, epochs=4)
    assert found == pytest.approx([2 * s / sum(shape) for s in shape])


@pytest.mark.parametrize(("end", "last"), [(None, 3), (6, 6)])
def test_ends_at_the_first_pruning_unless_told(end, last):
    found = pulls(cfg=SparsityConfig(end=end), coefficient=1.0, epochs=8, first_pruning=3)
    assert all(found[:last]) and not any(found[last:])


@pytest.mark.parametrize(
    ("options", "first", "near"),
    [
        ({"start": 5}, None, "leaves no epoch for sparsity training: the end is at epoch 5"),
        ({"start": 3}, 2, "the first pruning is at epoch 2"),
        ({}, 0, "the first pruning is at epoch 0"),
        ({"end": 9}, None, "'sparsity.end=9' lies outside a run of 5 epochs. Legal: 1 to 5"),
    ],
)
def test_refuses(options, first, near):
    with pytest.raises(UsageError, match=near.replace("(", r"\(")):
        pulls(cfg=SparsityConfig(**options), coefficient=1.0, epochs=5, first_pruning=first)


@pytest.mark.parametrize(
    ("rows", "gains"),
    [
        ([(0.1, 0.5)] * 3, [1.5, 2.25, 3.375]),
        ([(0.1, 0.5), (0.5, 0.5), (0.1, 0.5)], [1.5, 0.75, 0.375]),
        ([(0.1, 0.5), (0.2, 0.44), (0.2, 0.6)], [1.5, 0.75, 0.375]),
        ([(0.1, 0.5), (0.2, 0.46)], [1.5, 2.25]),
    ],
    ids=["on", "target", "drop", "small drop"],
)
def test_controller_turns_once(rows, gains):
    c, found = Controller(target=0.5, max_drop=0.05), []
    for share, fitness in rows:
        c.update(share, fitness)
        found.append(c.gain)
    assert found == pytest.approx(gains)
