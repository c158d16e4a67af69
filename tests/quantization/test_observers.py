# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.observers import BINS, Histogram, observers, weight_observers, with_zero
from yolo_ext.quantization.spec import Spec

SPECS = [Spec(), Spec(symmetric=True), Spec(bits=4), Spec(bits=2, symmetric=True), Spec(bits=16)]
NAMES = [f"{s.bits}{'s' if s.symmetric else 'u'}" for s in SPECS]
values = st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=50)


def seen(*batches: torch.Tensor) -> Histogram:
    h = Histogram()
    for b in batches:
        h.update(b)
    return h


@pytest.mark.parametrize(
    ("name", "lo", "hi", "tolerance"),
    [("minmax", -4.0, 8.0, 1e-6), ("percentile", -2.0, 4.0, 0.01)],
)
def test_known_ranges(name, lo, hi, tolerance):
    body = torch.linspace(-2, 4, 40_000)
    spike = torch.cat([body, torch.tensor([-4.0, 8.0])])
    got = observers[name].fn(seen(body, spike), Spec(), None)
    assert got == pytest.approx((lo, hi), abs=tolerance)


def test_mse_clips_outliers_and_keeps_uniform_data():
    torch.manual_seed(0)
    uniform = torch.rand(100_000) * 4
    assert observers["mse"].fn(seen(uniform), Spec(), None)[1] == pytest.approx(4, abs=0.05)
    normal = torch.cat([torch.randn(100_000), torch.tensor([12.0])])
    lo, hi = observers["mse"].fn(seen(normal), Spec(bits=4), None)  # the best clip of a normal is near 2.6 sigma
    assert lo == pytest.approx(-2.6, abs=0.4) and hi == pytest.approx(2.6, abs=0.4)


def test_mse_behind_silu_spends_no_codes_on_the_flat_side():
    x = torch.linspace(-12, 6, 50_000)
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    lo, hi = observers["mse"].fn(seen(x), Spec(), silu)
    assert lo > -9 and hi == pytest.approx(6, abs=0.1)


@pytest.mark.parametrize("name", observers.names())
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@given(data=st.lists(values, min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_every_observer_gives_a_usable_range_within_the_data(name, spec, data):
    h = seen(*(torch.tensor(v) for v in data))
    lo, hi = observers[name].fn(h, spec, None)
    assert with_zero(h.lo, h.hi)[0] <= lo and hi <= with_zero(h.lo, h.hi)[1]
    lo, hi = with_zero(lo, hi)
    assert lo <= 0 <= hi and lo < hi and np.isfinite([lo, hi]).all()


def heavy_tailed() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(200_000, generator=generator)
    return torch.cat([body, torch.tensor([40.0, -30.0])])


@pytest.mark.parametrize("spec", SPECS[:3], ids=NAMES[:3])
def test_single_outliers_do_not_set_a_searched_range(spec):
    lo, hi = observers["mse"].fn(seen(heavy_tailed()), spec, None)
    assert hi < 0.95 * 40 and lo > -0.95 * 30


@pytest.mark.parametrize("name", ["mse", "percentile"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_low_end_of_silu_results_stays(name, bits):
    x = torch.nn.functional.silu(3 * torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    h = seen(x)
    lo, hi = observers[name].fn(h, Spec(bits=bits), None)
    assert h.lo == pytest.approx(-0.2785, abs=1e-3) and lo == h.lo and hi < h.hi
    wide = seen(x, torch.tensor([-3.0]))  # a value below shows that this is not SiLU's
    assert name != "mse" or observers[name].fn(wide, Spec(bits=bits), None)[0] > -3


def test_a_symmetric_range_has_one_threshold():
    h = seen(heavy_tailed())
    lo, hi = observers["mse"].fn(h, Spec(symmetric=True), None)
    assert lo == -hi
    h = seen(torch.linspace(-1, 4, 10_000))
    assert observers["mse"].fn(h, Spec(symmetric=True), None) == pytest.approx((-1, 4), abs=0.1)


def test_a_rule_of_the_user(monkeypatch):
    import sys
    import types

    module = types.ModuleType("users_rules")
    module.half = lambda h, spec, transform=None: (h.lo / 2, h.hi / 2)
    monkeypatch.setitem(sys.modules, "users_rules", module)
    assert observers["users_rules:half"].fn(seen(torch.tensor([-2.0, 4.0])), Spec()) == (-1, 2)


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
    assert (h.lo, h.hi, h.counts.sum(), h.batches, h.ignored) == (-2.0, 1.0, 2, 1, 3)


def test_unknown_observer():
    with pytest.raises(UsageError, match="Did you mean 'percentile'"):
        observers["percentil"]


def quantized(w: torch.Tensor, ratio: torch.Tensor, qmax: int) -> torch.Tensor:
    scale = ratio[:, None] * w.abs().amax(1, keepdim=True).clamp_min(1e-12) / qmax
    return (w / scale).round().clamp(-qmax, qmax) * scale


@pytest.mark.parametrize(("qmax", "gain"), [(1, 0.5), (7, 0.9), (127, 1.0)], ids=["2 bit", "4 bit", "8 bit"])
def test_mse_weights_are_never_worse_than_max(qmax, gain):
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w[0] = 0
    ratio = weight_observers["mse"].fn(w, qmax)
    assert ratio.shape == (32,) and ratio[0] == 1 and ((ratio >= 0.3) & (ratio <= 1)).all()
    best, plain = ((quantized(w, r, qmax) - w).square().sum(1) for r in (ratio, weight_observers["max"].fn(w, qmax)))
    assert (best <= plain).all() and best.sum() <= gain * plain.sum()


def test_mse_weights_find_the_grid_that_they_are_on():
    """One outlier per channel; all others lie on a grid that ends at 0.5."""
    w = torch.randint(-7, 8, (16, 2000), generator=torch.Generator().manual_seed(0)) / 14.0
    w[:, 0] = 1.0
    w[:, 1] = 0.5
    assert weight_observers["mse"].fn(w, 7).tolist() == pytest.approx([0.5] * 16, abs=0.01)
