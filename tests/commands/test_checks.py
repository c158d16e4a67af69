# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext checks`: versions beside those supported, and each step of a compression on a small model."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

import pytest
import ultralytics

import yolo_ext
from yolo_ext import cli, pruning
from yolo_ext.stock.context import LEGAL

STEPS = ["build", "trace", "prune", "fake-quant", "export", "INT8"]
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def steps(said: str) -> dict[str, str]:
    """Return what is said of each step."""
    rows = dict(re.findall(r"(?m)^([\w-]+) {2,}(.*)$", said))
    return {name: rows[name] for name in STEPS}


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", logger="ultralytics")
    return lambda: "\n".join(r.getMessage() for r in caplog.records)


@pytest.mark.slow
def test_every_step_is_tried(said, record_property):
    found = yolo_ext.checks()
    assert found.passed and not found["problems"]
    assert all(told.startswith("ok, ") for told in steps(said()).values())
    assert int(re.search(r"(\d+) of \d+ convolutions in integers", said())[1]) > 0
    record_property("reliability", f"{len(STEPS)} of {len(STEPS)} steps on a small model")


def test_a_step_that_fails_is_named_with_its_reason_and_ends_the_rest(said, monkeypatch, capsys):
    monkeypatch.delattr(pruning, "build_graph")
    assert cli.main(["checks"]) == 1
    found = steps(said())
    assert found.pop("build").startswith("ok, ") and "build_graph" in found.pop("trace")
    assert set(found.values()) == {"not tried"}
    assert "1 problems" in said()


def test_another_ultralytics_is_a_problem(said, monkeypatch):
    monkeypatch.setattr(ultralytics, "__version__", "9.0.0")
    (problem,) = yolo_ext.checks()["problems"]
    assert "9.0.0 is not supported" in problem and LEGAL in problem
    assert set(steps(said()).values()) == {problem.removeprefix("build "), "not tried"}


def test_versions_stand_beside_those_supported(said, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    monkeypatch.delattr(pruning, "build_graph")
    problems = yolo_ext.checks()["problems"]
    assert "python 3.9.1 is not supported. Legal: >=3.10" in problems
    assert re.search(rf"(?m)^ultralytics +{re.escape(metadata.version('ultralytics'))} +\S*>=8\.4\.140", said())


def test_what_is_checked_is_what_is_installed():
    assert f'"ultralytics{LEGAL}"' in PROJECT.read_text()
