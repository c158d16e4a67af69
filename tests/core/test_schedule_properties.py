# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Schedules have no jumps but those that options ask for, and stay between 0 and 1."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.schedules import decays, loss_factor, pruned_share, removals

STEEPEST = {"cubic": 3.0, "linear": 1.0, "constant": 0.0, "cosine": math.pi / 2}  # slope of a row, from 0 to 1


@pytest.mark.parametrize("name", removals.names())
@given(done=st.floats(0, 1), more=st.floats(0, 1))
def test_removals_are_continuous_and_bounded(name, done, more):
    low, high = sorted((done, more))
    a, b = (removals[name].fn(done=d) for d in (low, high))
    assert 0 <= a <= b <= 1 and b - a <= STEEPEST[name] * (high - low) + 1e-12


@pytest.mark.parametrize("name", decays.names())
@given(progress=st.floats(0, 1), more=st.floats(0, 1), final=st.floats(0, 1))
def test_decays_are_continuous_and_bounded(name, progress, more, final):
    low, high = sorted((progress, more))
    a, b = (decays[name].fn(progress=p, final=final) for p in (low, high))
    assert 0 <= b <= a + 1e-12 <= 1 + 2e-12 and a - b <= STEEPEST[name] * (1 - final) * (high - low) + 1e-12


@pytest.mark.parametrize("name", decays.names())
@given(
    epochs=st.integers(1, 60), start=st.integers(0, 59), length=st.none() | st.integers(1, 60),
    warmup=st.integers(0, 5), final=st.floats(0, 1),
)  # fmt: skip
def test_factors_of_a_run_have_no_jumps_inside(name, epochs, start, length, warmup, final):
    start = min(start, epochs - 1)
    end = None if length is None else start + length
    found = [loss_factor(epoch=e, epochs=epochs, schedule=name, final=final, start=start, end=end, warmup=warmup)
             for e in range(epochs)]  # fmt: skip
    inside = found[start:end]
    assert all(0 <= v <= 1 for v in found) and not any(found[:start]) and not any(found[end or epochs :])
    span = max((epochs if end is None else end) - 1 - start, 1)
    limit = 1 / (warmup + 1) * (warmup > 0) + STEEPEST[name] * (1 - final) / span
    assert all(abs(b - a) <= limit + 1e-12 for a, b in pairwise(inside))


@pytest.mark.parametrize("name", removals.names())
@given(steps=st.integers(1, 100), step=st.integers(0, 120))
def test_one_more_step_never_takes_more_than_the_steepest_share(name, steps, step):
    now, then = (pruned_share(step=s, steps=steps, kind=name) for s in (step, step + 1))
    assert 0 <= now <= then <= 1 and then - now <= STEEPEST[name] / steps + 1e-12
