# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figures: they are written, sized for their content, and mark the boxes that differ."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.engine.results import Results

from yolo_ext.reporting import figures

NAMES = {0: "cell", 1: "Zelle ü"}
GREY = 127


def found(size: int = 320, **parts: list | torch.Tensor) -> Results:
    """Return a result of Ultralytics on a grey picture, its parts as rows."""
    data = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in parts.items()}
    return Results(np.full((240, size, 3), GREY, np.uint8), "a.jpg", NAMES, **data)


def has(image: np.ndarray, color: tuple[int, int, int], x: float, y: float) -> bool:
    """Tell whether an edge of this colour is at a place of a picture that was enlarged twice."""
    return bool((image[round(2 * y), round(2 * x) - 2 : round(2 * x) + 3] == color).all(-1).any())


def halves(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = cv2.imread(str(path))
    assert image.shape == (480 + 34, 640 * 2 + 8, 3)
    return image[34:, :640], image[34:, 648:]


def test_class_names() -> None:
    assert figures._enlarged(found()).names == {0: "cell", 1: "class 1"}, "OpenCV writes ASCII only"


SAME, MISSED, ADDED = (10, 20, 60, 70, 0.9, 0), (100, 40, 180, 120, 0.8, 1), (220, 140, 300, 220, 0.7, 0)


def test_side_by_side_marks_missed_and_added(tmp_path: Path) -> None:
    path = tmp_path / "side ü.png"
    base, new = found(boxes=[SAME, MISSED]), found(boxes=[ADDED, SAME])
    assert figures.side_by_side(base, new, path) == {"base": 2, "new": 2, "missed": 1, "added": 1}
    assert (base.orig_img == GREY).all() and (new.orig_img == GREY).all() and base.names == NAMES
    left, right = halves(path)
    for half, color, box, there in (
        (right, figures.MISSED, MISSED, True), (right, figures.ADDED, ADDED, True),
        (left, figures.MISSED, MISSED, False),
        (right, figures.MISSED, SAME, False), (right, figures.ADDED, SAME, False),
    ):  # fmt: skip
        assert has(half, color, box[2], (box[1] + box[3]) / 2) is there


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    other = found(boxes=[(*SAME[:5], 1)])
    other.names = {1: "cell", 0: "Zelle ü"}
    assert figures.side_by_side(found(boxes=[SAME]), other, tmp_path / "x.png")["missed"] == 0


BOTH = [SAME, MISSED]
MASK = torch.zeros(2, 120, 160)
MASK[0, 10:35, 5:30], MASK[1, 20:60, 50:90] = 1, 1
POINTS = [[(20, 30, 0.9), (50, 60, 0.9)], [(110, 50, 0.9), (170, 110, 0.9)]]
TURNED = [(60, 60, 80, 40, 0.6, 0.9, 0), (200, 150, 60, 30, 1.2, 0.8, 1)]  # centre, size, angle


@pytest.mark.parametrize(
    ("both", "less", "place"),
    [
        pytest.param({"boxes": BOTH, "masks": MASK}, {"boxes": [SAME], "masks": MASK[:1]}, (20, 30), id="masks"),
        pytest.param({"boxes": BOTH, "keypoints": POINTS}, {"boxes": [SAME], "keypoints": POINTS[:1]}, (20, 30),
                     id="skeletons"),
        pytest.param({"obb": TURNED}, {"obb": TURNED[:1]}, None, id="rotated boxes"),
    ],
)  # fmt: skip
def test_each_task_is_drawn(both: dict, less: dict, place: tuple | None, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    assert figures.side_by_side(found(**both), found(**less), path) == {"base": 2, "new": 1, "missed": 1, "added": 0}
    left, right = halves(path)
    assert (left != GREY).any() and (right == figures.MISSED).all(-1).sum() > 200
    if place:  # inside of a box
        assert (left[2 * place[1], 2 * place[0]] != GREY).any() and (right[2 * place[1], 2 * place[0]] != GREY).any()


@pytest.mark.parametrize(("probs", "missed"), [([0.2, 0.8], 1), ([0.6, 0.4], 0)])
def test_classes_of_pictures(probs: list, missed: int, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    counts = figures.side_by_side(found(probs=[0.9, 0.1]), found(probs=probs), path)
    assert counts == {"base": 1, "new": 1, "missed": missed, "added": missed}
    assert all((half == GREY).all() for half in halves(path)), "named above the pictures"


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
