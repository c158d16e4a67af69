# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Inside of its range, quantizing moves a value by half a step at most: by every observer, at every width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.layers import RangeQuantizer, weight_rows
from yolo_ext.quantization.observers import Histogram, observers, weight_observers
from yolo_ext.quantization.spec import Spec

HALF = 0.5005  # of a step: the rest is rounding of float32
BITS = [2, 3, 4, 7, 8, 12, 16]
values = st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=40)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", observers.names())
@given(bits=st.sampled_from(BITS), data=values)
@settings(max_examples=25, deadline=None)
def test_activations(name, symmetric, bits, data):
    spec, x, seen = Spec(bits, symmetric), torch.tensor(data), Histogram()
    seen.update(x)
    q = RangeQuantizer(spec)
    q.set_range(*observers[name].fn(seen, spec, None))
    lo, hi = float(q.lo), float(q.hi)
    step = (max(-lo, hi) if symmetric else hi - lo) / spec.qmax
    zero = 0 if symmetric else round(-lo / step)  # codes end where the rounded zero point puts them
    low, high = (spec.qmin - zero) * step, (spec.qmax - zero) * step
    inside = (x >= low) & (x <= high)
    assert ((q(x) - x).abs()[inside] <= HALF * step + 1e-6 * x.abs()[inside]).all()
    assert low <= lo + HALF * step and high >= hi - HALF * step
    outside = q(x)[~inside] - x[~inside].clamp(low, high)
    assert (outside.abs() <= 1e-3 * step + 1e-6 * max(-low, high)).all()


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", weight_observers.names())
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 10_000), spread=st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_weights(name, per_channel, bits, seed, spread):
    net = nn.Sequential(nn.Conv2d(3, 5, 3))
    net[0].weight.normal_(generator=torch.Generator().manual_seed(seed)).mul_(spread)
    fq.insert_plan(net, {"0": {"weight": Spec(bits, True, per_channel)}})
    layer, qmax = net[0], Spec(bits, True).qmax
    rows = weight_rows(layer)
    layer.weight_ratio.copy_(weight_observers[name].fn(rows, qmax))
    codes = layer.quantized_weight().reshape(rows.shape)
    limit = rows.abs().amax(1, keepdim=True) * layer.weight_ratio.reshape(-1, 1)
    clipped = rows.clamp(-limit, limit)
    assert ((codes - clipped).abs() <= HALF * limit / qmax + 2e-7 * limit).all()  # the latter of float32
    assert (codes.abs() <= limit * (1 + 1e-6)).all()
