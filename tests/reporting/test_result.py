# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a command returns: a dict with files and figures, shown as a table."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from yolo_ext.reporting.result import Result
from yolo_ext.reporting.tables import comparison_rows

BEFORE, AFTER = {"params": 3_000_000, "map": 0.5}, {"params": 1_000_000, "map": 0.4}
FILES = {"best": "weights/best.pt", "onnx": "onnx/fp32.onnx", "int8": "onnx/int8.onnx", "report": "report.html"}


@pytest.fixture
def folder(tmp_path) -> Path:
    for place in FILES.values():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_files_are_those_that_exist(folder, name):
    found = Result(run_dir=str(folder))
    assert getattr(found, name) == folder / FILES[name] and f"{name}: {folder / FILES[name]}" in repr(found)
    (folder / FILES[name]).unlink()
    assert getattr(found, name) is None and f"{name}: " not in repr(found)
    assert getattr(Result(), name) is None and Result().run_dir is None


def test_other_places_of_files(folder):
    for place in FILES.values():
        (folder / place).unlink()
    for name in ("weights/last.pt", "review.html", "a.onnx", "a_int8.onnx"):
        (folder / name).touch()
    found = Result(run_dir=str(folder), files=[folder / "a.onnx", folder / "a_int8.onnx"])
    assert found.best == folder / "weights/last.pt" and found.report == folder / "review.html"
    assert found.onnx == folder / "a.onnx" and found.int8 == folder / "a_int8.onnx"


@pytest.mark.parametrize(
    ("content", "passed"),
    [
        pytest.param({}, True, id="nothing to check"),
        pytest.param({"passed": False}, False, id="said"),
        pytest.param({"passed": True, "checks": [{"name": "a", "passed": False}]}, True, id="said beside checks"),
        pytest.param({"checks": [{"name": "a", "passed": True}]}, True, id="checks met"),
        pytest.param({"checks": [{"name": "a", "passed": True}, {"name": "b", "passed": False}]}, False, id="one not"),
    ],
)
def test_passed(content, passed):
    found = Result(content)
    assert found.passed is passed and found.checks == content.get("checks", [])
    assert ("failed: b" in repr(found)) is any(c["name"] == "b" for c in found.checks)


def test_text_and_page_show_the_figures_of_the_table(folder):
    found = Result(before=BEFORE, after=AFTER, headline="Smaller & <faster>.", run_dir=str(folder))
    text, page = repr(found), found._repr_html_()
    assert text.startswith("Smaller & <faster>.\n") and page.startswith("<p>Smaller &amp; &lt;faster&gt;.</p><table>")
    for row in comparison_rows(BEFORE, AFTER):
        for cell in (row.label, row.before, row.after, row.delta):
            assert cell in text and f"<td>{cell}</td>" in page
    assert str(folder / "onnx/int8.onnx") in text and str(folder / "onnx/int8.onnx") in page
    assert found.metrics == AFTER


@pytest.mark.parametrize("same", [{}, {"before": AFTER, "after": AFTER}], ids=["no figures", "figures that stay"])
def test_without_a_change_there_is_no_table(same):
    found = Result({"files": ["a.onnx", "b.onnx"], "passed": False, "data": None, **same})
    assert repr(found) == "Result\nfiles: 2 in all\npassed: False"
    assert "<p>files: 2 in all<br>passed: False</p>" in found._repr_html_() and "Before" not in found._repr_html_()


def test_it_is_a_dict_that_copies_pickles_and_is_json():
    found = Result(run_dir=Path("a"), rows=[{"n": 1}], after={"map": 0.5})
    plain = found.to_dict()
    assert plain == {"run_dir": "a", "rows": [{"n": 1}], "after": {"map": 0.5}} and type(plain) is dict
    assert json.loads(json.dumps(plain)) == plain
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other == found == dict(found) and isinstance(other, Result) and other.run_dir == Path("a")
