# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.config import DistillConfig
from yolo_ext.core.schedules import constant, cosine, decays, linear

ROWS = [pytest.param(row.fn, id=row.name) for row in decays]


@pytest.mark.parametrize("schedule", ROWS)
@given(final=st.floats(0, 1), a=st.floats(0, 1), b=st.floats(0, 1))
def test_starts_at_one_never_rises_and_stays_above_its_end(schedule, final, a, b):
    assert schedule(progress=0.0, final=final) == pytest.approx(1.0)
    early, late = (schedule(progress=p, final=final) for p in sorted((a, b)))
    assert late <= early + 1e-12
    assert final - 1e-12 <= late <= early <= 1 + 1e-12


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [(constant, 0.5, 1.0), (constant, 1.0, 1.0), (linear, 0.5, 0.6), (linear, 1.0, 0.2), (cosine, 0.5, 0.6),
     (cosine, 0.25, 0.2 + 0.8 * 0.8535534), (cosine, 1.0, 0.2)],
)  # fmt: skip
def test_values(schedule, progress, expected):
    assert schedule(progress=progress, final=0.2) == pytest.approx(expected)


@pytest.mark.parametrize("name", decays.names())
def test_every_row_can_be_chosen(name):
    from yolo_ext.core.config import parse

    assert parse({"distill": {"schedule": name}})["distill"] == DistillConfig(schedule=name)
