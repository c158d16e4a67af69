# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.errors import UsageError
from yolo_ext.reporting.tradeoff import pareto, plot_tradeoff

A, B, C = {"median": 1.0, "map": 0.4}, {"median": 2.0, "map": 0.5}, {"median": 2.0, "map": 0.3}


@pytest.mark.parametrize(
    ("points", "front"),
    [
        pytest.param([A], [True], id="one"),
        pytest.param([A, B], [True, True], id="trade"),
        pytest.param([A, B, C], [True, True, False], id="beaten-twice"),
        pytest.param([A, A], [True, True], id="equal"),
        pytest.param([B, C], [True, False], id="as-fast"),
    ],
)
def test_pareto(points, front):
    assert pareto(points) == front


@given(st.lists(st.fixed_dictionaries({"median": st.floats(0.1, 9), "map": st.floats(0, 1)}), min_size=1, max_size=8))
def test_the_fastest_and_the_best_are_never_both_beaten(points):
    front = [p for p, best in zip(points, pareto(points)) if best]
    assert min(p["median"] for p in points) in [p["median"] for p in front]
    assert max(p["map"] for p in points) in [p["map"] for p in front]


def test_plot(tmp_path):
    points = [{"name": f"m{i}_$.onnx", **p, "p10": 0.9 * p["median"], "p90": 1.2 * p["median"]} for i, p in
              enumerate((A, B, C))]  # fmt: skip
    file = plot_tradeoff(points, tmp_path / "plots" / "t.png", "96 px")
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_plot(tmp_path):
    with pytest.raises(UsageError, match="No models"):
        plot_tradeoff([], tmp_path / "t.png")
