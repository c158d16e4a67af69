# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figures: they are written, sized for their content, and mark the boxes that differ."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.core.errors import UsageError
from yolo_ext.reporting import figures

NAMES = {0: "cell", 1: "Zelle ü"}
GREY = 127


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture ü.png"
    figures.imwrite(path, np.full((240, 320, 3), GREY, np.uint8))
    return path


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda d: figures.side_by_side(d / "none.jpg", [], [], NAMES, d / "x.png"), id="no picture"),
        pytest.param(lambda d: figures.side_by_side(d, [], [], NAMES, d / "x.png"), id="folder"),
    ],
)
def test_wrong_input_is_a_usage_error(call, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        call(tmp_path)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("name", "cls", "expected"),
    [
        pytest.param(NAMES, 0, "cell", id="known"),
        pytest.param(NAMES, 1, "class 1", id="not ASCII"),
        pytest.param(NAMES, 5, "class 5", id="unknown"),
        pytest.param(["a", "b"], 1, "b", id="list"),
        pytest.param(["a", "b"], 2, "class 2", id="past the list"),
    ],
)
def test_class_names(name, cls: int, expected: str) -> None:
    assert figures._name(name, cls) == expected


def test_side_by_side_marks_missed_and_added(picture: Path, tmp_path: Path) -> None:
    same, missed, added = (10, 20, 60, 70, 0.9, 0), (100, 40, 180, 120, 0.8, 0), (220, 140, 300, 220, 0.7, 0)
    path = tmp_path / "side.png"
    assert figures.side_by_side(picture, [same, missed], [added, same], NAMES, path) == (1, 1)
    image = cv2.imread(str(path))
    assert image.shape == (480 + 34, 640 * 2 + 8, 3)
    left, right = image[34:, :640], image[34:, 648:]

    def has(half: np.ndarray, color: tuple[int, int, int], box: tuple) -> bool:
        x, y = round(2 * box[2]), round(box[1] + box[3])  # middle of the right edge, enlarged twice
        return bool((half[y, x - 2 : x + 3] == color).all(-1).any())

    assert has(right, figures.MISSED, missed) and not has(left, figures.MISSED, missed)
    assert has(right, figures.ADDED, added) and not has(left, figures.ADDED, added)
    assert not has(right, figures.MISSED, same) and not has(right, figures.ADDED, same)


def test_side_by_side_takes_an_array_and_leaves_it_alone(tmp_path: Path) -> None:
    array = np.full((700, 700, 3), GREY, np.uint8)
    assert figures.side_by_side(array, [], [], NAMES, tmp_path / "side.jpg") == (0, 0)
    assert (array == GREY).all()


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        pytest.param([], [], ([], []), id="empty"),
        pytest.param([(0, 0, 10, 10, 0.9, 0)], [], ([0], []), id="missed"),
        pytest.param([], [(0, 0, 10, 10, 0.9, 0)], ([], [0]), id="added"),
        pytest.param([(0, 0, 10, 10, 0.9, 0)], [(0, 0, 10, 10, 0.9, 1)], ([0], [0]), id="other class"),
        pytest.param([(0, 0, 10, 10, 0.9, 0)], [(0, 0, 10, 5.1, 0.9, 0)], ([], []), id="IoU 0.51"),
        pytest.param([(0, 0, 10, 10, 0.9, 0)], [(0, 0, 10, 4.9, 0.9, 0)], ([0], [0]), id="IoU 0.49"),
        pytest.param(
            [(0, 0, 10, 10, 0.9, 0)], [(0, 0, 10, 8, 0.9, 0), (0, 0, 10, 9, 0.1, 0)], ([], [0]), id="best overlap wins"
        ),
    ],
)
def test_match_boxes(base: list, new: list, expected: tuple) -> None:
    assert figures.match_boxes(base, new) == expected


box = st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(51, 99)] * 2, st.floats(0, 1), st.integers(0, 2))
boxes = st.lists(box, max_size=8)


@given(boxes, boxes)
def test_matching_is_one_to_one(base: list, new: list) -> None:
    missed, added = figures.match_boxes(base, new)
    assert len(base) - len(missed) == len(new) - len(added)
    assert figures.match_boxes(base, base) == ([], [])


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
    assert figures.pareto(points) == front


@given(st.lists(st.fixed_dictionaries({"median": st.floats(0.1, 9), "map": st.floats(0, 1)}), min_size=1, max_size=8))
def test_the_fastest_and_the_best_are_never_both_beaten(points):
    front = [p for p, best in zip(points, figures.pareto(points)) if best]
    assert min(p["median"] for p in points) in [p["median"] for p in front]
    assert max(p["map"] for p in points) in [p["map"] for p in front]


NEAR = [*(A, B, C), {"median": 2.01, "map": 0.5001}, {"median": 2.02, "map": 0.4999}, B]


def test_tradeoff(tmp_path, monkeypatch):
    """All points are named, those that are beaten are hollow, and the front is a staircase, each point of it once."""
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
    points = [{"name": f"m{i}_$.onnx", **p, "p10": 0.9 * p["median"], "p90": 1.2 * p["median"]} for i, p in
              enumerate(NEAR)]  # fmt: skip
    file = figures.plot_tradeoff(points, tmp_path / "plots" / "t.png", "96 px", "top-1")
    assert file.read_bytes()[:4] == b"\x89PNG"
    (ax,) = drawn[0].axes
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["Pareto front", *(p["name"] for p in points)]
    hollow = [c.lines[0].get_markerfacecolor() == "white" for c in ax.containers]
    assert hollow == [not best for best in figures.pareto(points)] and any(hollow)
    front = ax.lines[0]
    assert front.get_drawstyle() == "steps-post" and front.get_xdata().tolist() == [1.0, 2.0, 2.01]
