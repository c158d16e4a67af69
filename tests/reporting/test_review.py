# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The review sheet: what needs work first, filters without scripts, everything from outside escaped, bytes repeat."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolo_ext.reporting.pages import class_counts, in_order, lowest, render_review

NAMES = {0: "cell", 1: "<b>bad</b>"}


def record(image: str, *objects: tuple[int, float]) -> dict:
    found = [{"class": c, "confidence": p, "box": [1.0, 2.0, 20.0, 30.0]} for c, p in objects]
    return {"image": image, "size": [64, 48], "objects": found}


RECORDS = [
    record("sure.jpg", (0, 0.9)),
    record("empty.jpg"),
    record("d ä/<i>.jpg", (0, 0.8), (1, 0.26)),
    record("low.jpg", (0, 0.45), (0, 0.95)),
]
PREVIEWS = {r["image"]: f"previews/{r['image']}" for r in RECORDS}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    (tmp_path / "x.jpg").write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
    return {r["image"]: tmp_path / "x.jpg" for r in RECORDS}


def test_two_doubtful_boxes_are_more_work_than_one_that_is_worse():
    records = [record("one.jpg", (0, 0.26)), record("two.jpg", (0, 0.45), (0, 0.4), (0, 0.9))]
    assert [r["image"] for r in in_order(records)] == ["two.jpg", "one.jpg"]


def test_order_and_counts():
    assert [r["image"] for r in in_order(RECORDS)] == ["d ä/<i>.jpg", "low.jpg", "empty.jpg", "sure.jpg"]
    assert [lowest(r) for r in RECORDS] == [0.9, None, 0.26, 0.45]
    assert class_counts(RECORDS, NAMES) == {
        "cell": {"boxes": 4, "images": 3, "mean_confidence": 0.775, "low": 1},
        "<b>bad</b>": {"boxes": 1, "images": 1, "mean_confidence": 0.26, "low": 1},
    }


class Page(HTMLParser):
    """Collect the tags, and check that they close."""

    VOID = {"meta", "input", "br", "image"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(files):
    text = render_review(
        "Review <1>", RECORDS, files, NAMES, notes=["a & b"], skipped={"x<y>": "cut"}, previews=PREVIEWS
    )
    page = Page(text)
    shots = [a["class"] for t, a in page.tags if t == "figure"]
    assert shots == ["shot c0 c1", "shot c0", "shot none", "shot c0"]
    assert [a["class"] for t, a in page.tags if t == "rect"] == ["box", "box low", "box low", "box", "box"]
    assert re.findall(r"<text [^>]*>([\d.]+)</text>", text) == ["0.80", "0.26", "0.45", "0.95", "0.90"]  # no hover
    links = [a["href"] for t, a in page.tags if t == "a" and a.get("class") != "skip"]
    assert links[0] == "previews/d%20%C3%A4/%3Ci%3E.jpg"
    images = [a["href"] for t, a in page.tags if t == "image"]
    assert len(images) == 4 and all(i.startswith("data:image/webp;base64,") for i in images)
    assert "<b>bad" not in text and "x<y>" not in text and "a &amp; b" in text and "Review &lt;1&gt;" in text
    assert [t for t, _ in page.tags].count("script") == 1 and not re.search(r"https?://", text)
    labels = re.findall(r'<label for="f\d">(?:<i [^>]*></i>)?([^<]+)', text)
    assert labels == ["All · 4", "cell · 3", "&lt;b&gt;bad&lt;/b&gt; · 1", "Nothing found · 1"]
    assert text == render_review(
        "Review <1>", RECORDS, files, NAMES, notes=["a & b"], skipped={"x<y>": "cut"}, previews=PREVIEWS
    )


def test_every_filter_has_its_rules(files):
    text = render_review("t", RECORDS, files, NAMES)
    buttons = re.findall(r'type="radio" name="f" id="(f\d)"', text)
    assert buttons == ["f0", "f1", "f2", "f3"]
    for button, key in zip(buttons[1:], ("c0", "c1", "none")):
        assert f"#{button}:checked~.sheet .shot:not(.{key})" in text
    assert "--c0:8000;--c1:2600" in text  # the order among the images of one class


def test_limit_and_lost_images(files):
    text = render_review("t", RECORDS, {**files, "low.jpg": Path("gone.jpg")}, NAMES, limit=2)
    assert text.count("<figure") == 2 and "The first 2 of 4 are shown." in text
    assert text.count("<a ") == 1  # to the content


def test_nothing_labelled():
    Page(render_review("t", [], {}, NAMES))
