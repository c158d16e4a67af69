# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.spec import Spec, plan_of


@pytest.mark.parametrize(
    ("bits", "symmetric", "ends"),
    [(8, False, (0, 255)), (8, True, (-127, 127)), (7, True, (-63, 63)), (2, True, (-1, 1)), (16, False, (0, 65535))],
)
def test_codes(bits, symmetric, ends):
    spec = Spec(bits, symmetric)
    assert (spec.qmin, spec.qmax) == ends


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32, 7.0, "8", None, True], ids=repr)
def test_bits_out_of_range(bits):
    with pytest.raises(UsageError, match=f"quant_bits={bits!r} is illegal. Legal: a whole number, 2 to 16"):
        Spec(bits)


@given(st.integers(2, 16), st.booleans(), st.booleans(), st.sampled_from([None, "mse", "a.b:c"]))
def test_round_trip_through_json(bits, symmetric, per_channel, observer):
    spec = Spec(bits, symmetric, per_channel, observer)
    entry = json.loads(json.dumps({**spec.as_dict(), "lo": -1.0, "hi": 2.0, "ratio": [1.0]}))
    assert Spec.of(entry) == spec
    assert plan_of({"a.conv": {"input": entry}}) == {"a.conv": {"input": spec}}
    assert ("observer" in spec.as_dict()) is (observer is not None)
