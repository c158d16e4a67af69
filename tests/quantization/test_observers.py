# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.errors import UsageError
from yolo_ext.quantization.observers import BINS, Histogram, observers, with_zero

values = st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=50)


def seen(*batches: torch.Tensor) -> Histogram:
    h = Histogram()
    for b in batches:
        h.update(b)
    return h


@pytest.mark.parametrize(
    ("name", "lo", "hi", "tolerance"),
    [("minmax", -4.0, 8.0, 1e-6), ("moving_average", -3.0, 6.0, 1e-6), ("percentile", -2.0, 4.0, 0.01)],
)
def test_known_ranges(name, lo, hi, tolerance):
    body = torch.linspace(-2, 4, 40_000)
    spike = torch.cat([body, torch.tensor([-4.0, 8.0])])
    got = observers[name].fn(seen(body, spike), 255, None)
    assert got == pytest.approx((lo, hi), abs=tolerance)


def test_mse_clips_outliers_and_keeps_uniform_data():
    torch.manual_seed(0)
    uniform = torch.rand(100_000) * 4
    assert observers["mse"].fn(seen(uniform), 255, None)[1] == pytest.approx(4, abs=0.05)
    normal = torch.cat([torch.randn(100_000), torch.tensor([12.0])])
    lo, hi = observers["mse"].fn(seen(normal), 15, None)  # at 4 bits the best clip of a normal is near 2.6 sigma
    assert lo == pytest.approx(-2.6, abs=0.4) and hi == pytest.approx(2.6, abs=0.4)


def test_mse_behind_silu_spends_no_codes_on_the_flat_side():
    x = torch.linspace(-12, 6, 50_000)
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    lo, hi = observers["mse"].fn(seen(x), 255, silu)
    assert lo > -9 and hi == pytest.approx(6, abs=0.1)


@pytest.mark.parametrize("name", observers.names())
@given(data=st.lists(values, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_every_observer_gives_a_usable_range(name, data):
    h = seen(*(torch.tensor(v) for v in data))
    lo, hi = with_zero(*observers[name].fn(h, 255, None))
    assert lo <= 0 <= hi and lo < hi and np.isfinite([lo, hi]).all()


@given(data=st.lists(values, min_size=2, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_histogram_forgets_no_value_and_no_order(data, seed):
    batches = [torch.tensor(v) for v in data]
    order = np.random.default_rng(seed).permutation(len(batches))
    a, b = seen(*batches), seen(*(batches[i] for i in order))
    assert a.counts.sum() == sum(map(len, batches))
    assert a.width == b.width and np.abs(a.counts - b.counts).sum() <= 2  # values on a bin edge may round either way
    assert a.counts.size == 2 * BINS


def test_histogram_ignores_what_is_not_finite():
    h = seen(torch.tensor([1.0, float("nan"), float("inf"), -2.0]), torch.tensor([float("nan")]), torch.empty(0))
    assert (h.lo, h.hi, h.counts.sum(), h.batches) == (-2.0, 1.0, 2, 1)


def test_unknown_observer():
    with pytest.raises(UsageError, match="Did you mean 'percentile'"):
        observers["percentil"]
