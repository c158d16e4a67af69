# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Boxes that go through another format come back: from COCO as they were, from VOC to the pixel."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ultralytics.utils import LOGGER

from yolo_ext.data.convert import convert

W, H = 64, 48
JPEG = cv2.imencode(".jpg", np.full((H, W, 3), 90, np.uint8))[1].tobytes()
NAMES = ["cat", "dog"]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, float, float, float, float]:
    """Return class and corners in pixels of a box that is wider and higher than a pixel."""
    left, top = draw(st.floats(0, W - 2)), draw(st.floats(0, H - 2))
    return draw(st.integers(0, 1)), left, top, draw(st.floats(left + 1.5, W)), draw(st.floats(top + 1.5, H))


def write(root: Path, images: list[list[tuple[int, float, float, float, float]]]) -> Path:
    """Write a YOLO set with the same images for both splits."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for k, found in enumerate(images):
            (root / f"images/{split}/{k}.jpg").write_bytes(JPEG)
            rows = (f"{c} {(a + x) / 2 / W:.6f} {(b + y) / 2 / H:.6f} {(x - a) / W:.6f} {(y - b) / H:.6f}\n"
                    for c, a, b, x, y in found)  # fmt: skip
            (root / f"labels/{split}/{k}.txt").write_text("".join(rows))
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {NAMES}\n")
    return root


def read(root: Path) -> list[tuple[float, ...]]:
    """Return class and corners in pixels of all objects, by image."""
    found = list[tuple[float, ...]]()
    for file in sorted((root / "labels").rglob("*.txt")):
        for row in file.read_text().splitlines():
            c, x, y, w, h = map(float, row.split())
            found.append((c, (x - w / 2) * W, (y - h / 2) * H, (x + w / 2) * W, (y + h / 2) * H))
    return found


@pytest.mark.parametrize(("to", "tolerance"), [("coco", 1e-3), ("voc", 0.501)])
@given(images=st.lists(st.lists(boxes(), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_boxes_come_back(tmp_path_factory, monkeypatch, to, tolerance, images):
    monkeypatch.setattr(LOGGER, "warning", lambda *_: None)
    place = tmp_path_factory.mktemp("trip")
    source = write(place / "yolo", images)
    there = convert(source, place / to, format="yolo", to=to)
    back = convert(place / to, place / "back", format=to, classes=NAMES)
    assert there["boxes"] == back["boxes"] and there["images"] == back["images"]
    expected, found = read(source), read(place / "back")
    assert [r[0] for r in found] == [r[0] for r in expected]
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=tolerance)
