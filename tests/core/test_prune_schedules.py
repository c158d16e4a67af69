# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.config import PruneConfig, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import prune_epochs, pruned_share, removals


def configured(**options) -> PruneConfig:
    return parse({"prune": {"speedup": 2.0, **options}})["prune"]


@given(steps=st.integers(1, 200))
@pytest.mark.parametrize("kind", removals.names())
def test_share_rises_to_exactly_one(kind, steps):
    shares = [pruned_share(step=i, steps=steps, kind=kind) for i in range(steps + 1)]
    assert shares[0] == 0.0 and shares[-1] == 1.0
    assert all(a < b for a, b in pairwise(shares))
    assert pruned_share(step=steps + 3, steps=steps, kind=kind) == 1.0


def test_every_schedule_of_the_options_has_a_row():
    field = PruneConfig.__dataclass_fields__["schedule"]
    assert set(removals.names()) == set(field.metadata["choices"])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param("cubic", [1 - 0.75**3, 0.875, 1 - 0.25**3, 1.0], id="zhu-gupta"),
        pytest.param("linear", [0.25, 0.5, 0.75, 1.0], id="linear"),
    ],
)
def test_shares_of_four_steps(kind, expected):
    assert [pruned_share(step=i, steps=4, kind=kind) for i in range(1, 5)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "epochs", "expected"),
    [
        pytest.param({}, 20, [], id="before the training only"),
        pytest.param({"at": [5, 10, 15]}, 20, [5, 10, 15], id="at"),
        pytest.param({"at": [0]}, 1, [0], id="at the only epoch"),
        pytest.param({"every": 5}, 20, [0, 5, 10], id="every, to half of the run"),
        pytest.param({"every": 5, "start": 3, "end": 13}, 20, [3, 8, 13], id="end counts"),
        pytest.param({"every": 2, "steps": 2}, 20, [0, 2], id="every, at most steps"),
        pytest.param({"steps": 3}, 20, [0, 5, 10], id="steps, spread evenly"),
        pytest.param({"steps": 1, "start": 4}, 20, [4], id="one step"),
        pytest.param({"steps": 9, "start": 2, "end": 4}, 20, [2, 3, 4], id="more steps than epochs"),
        pytest.param({"steps": 4, "start": 7, "end": 7}, 20, [7], id="one epoch"),
        pytest.param({"every": 1}, 1, [0], id="run of one epoch"),
    ],
)
def test_epochs(options, epochs, expected):
    assert prune_epochs(cfg=configured(**options), epochs=epochs) == expected


@given(
    start=st.none() | st.integers(0, 30),
    end=st.none() | st.integers(0, 30),
    every=st.none() | st.integers(1, 9),
    steps=st.none() | st.integers(1, 9),
    epochs=st.integers(1, 30),
)
def test_epochs_stay_inside_or_are_refused(start, end, every, steps, epochs):
    cfg = PruneConfig(speedup=2.0, start=start, end=end, every=every, steps=steps)
    try:
        found = prune_epochs(cfg=cfg, epochs=epochs)
    except UsageError:
        return
    assert found == sorted(set(found))
    assert all((start or 0) <= e <= (epochs // 2 if end is None else end) and e < epochs for e in found)
    assert bool(found) == (every is not None or steps is not None)
    assert len(found) <= (steps or epochs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"at": [5, 20]}, r"'prune.at=\[5, 20\]' lies outside a run of 20 epochs. Legal: 0 to 19", id="at"),
        pytest.param({"every": 2, "start": 20}, "'prune.start=20' lies outside", id="start"),
        pytest.param({"every": 2, "end": 25}, "'prune.end=25' lies outside", id="end"),
        pytest.param({"every": 2, "start": 15}, "leaves no epoch to prune in: 'prune.end' is 10", id="nothing left"),
        pytest.param({"start": 3}, "need 'prune.every' or 'prune.steps'", id="how often"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UsageError, match=message):
        prune_epochs(cfg=configured(**options), epochs=20)
