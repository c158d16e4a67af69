# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import ultralytics
from ultralytics.data import augment
from ultralytics.nn.modules import Detect

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.stock import context


@pytest.fixture(autouse=True)
def fresh():
    """Have each test, and what follows, look anew."""
    context.lacking.cache_clear()
    yield
    context.lacking.cache_clear()


@pytest.mark.parametrize(
    ("version", "legal"),
    [("8.4.140", True), ("8.4.999", True), ("8.4.139", False), ("8.5.0", False), ("8.3.200", False), ("9.0.0", False)],
)
def test_supported_versions(monkeypatch, version, legal):
    monkeypatch.setattr(ultralytics, "__version__", version)
    if legal:
        stock.check_stock()
    else:
        with pytest.raises(UsageError, match=rf"{version} is not supported.*pip install"):
            stock.check_stock()


def test_the_installed_version_is_all_that_is_needed():
    stock.check_stock()
    assert context.lacking() == []


def test_what_changed_is_named(monkeypatch):
    def boxed(size):
        """Like a LetterBox that has lost its argument `auto`."""

    calls = [(boxed, n, names) if f is augment.LetterBox else (f, n, names) for f, n, names in context.CALLS]
    monkeypatch.setattr(context, "CALLS", calls)
    monkeypatch.delattr(Detect, "export")
    with pytest.raises(UsageError, match=r"boxed\(\), Detect\.export\. Run: pip install"):
        stock.check_stock()


def test_a_model_is_not_loaded_by_a_version_that_is_not_known(monkeypatch):
    monkeypatch.setattr(ultralytics, "__version__", "9.0.0")
    with pytest.raises(UsageError, match=r"9\.0\.0 is not supported"):
        stock.load_model("yolov8n.yaml")
