# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""compress.log: all lines of a command, in its run folder, and nothing behind it."""

from __future__ import annotations

import logging
import re

import pytest

from yolo_ext.core import log
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import FILE, LOGGER, let_go, log_to, logged, tell_time


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    monkeypatch.setattr(LOGGER, "level", logging.INFO)


def lines(folder) -> list[str]:
    """Return the lines of a log without their date and time."""
    read = (folder / FILE).read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in read)
    return [line[20:] for line in read]


def test_lines_before_the_folder_is_known_are_kept_and_colours_are_not(tmp_path):
    handlers = list(LOGGER.handlers)
    with logged():
        LOGGER.info("first")
        log_to(tmp_path)
        assert not (tmp_path / FILE).exists()  # a folder without anything stays one until something is said
        LOGGER.info("\x1b[1m\x1b[34mprune: \x1b[0msecond")
    LOGGER.info("after")
    assert lines(tmp_path) == ["first", "prune: second"]
    assert LOGGER.handlers == handlers


def test_the_outermost_block_and_the_first_folder_count(tmp_path):
    (tmp_path / "stage").mkdir()
    with logged():
        log_to(tmp_path)
        with logged():
            log_to(tmp_path / "stage")
            LOGGER.info("inside")
        LOGGER.info("outside")
    assert lines(tmp_path) == ["inside", "outside"] and not (tmp_path / "stage" / FILE).exists()


def test_a_run_that_goes_on_goes_on_with_its_log(tmp_path):
    for word in ("one", "two"):
        with logged():
            log_to(tmp_path)
            LOGGER.info(word)
    assert lines(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("kind", [UsageError, PermissionError, KeyboardInterrupt, ValueError])
def test_what_ends_a_run_is_its_last_line_and_an_error_of_ours_with_its_traceback(tmp_path, kind):
    with pytest.raises(kind) as e, logged():
        log_to(tmp_path)
        raise kind("out of reach")
    said = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert said[-1].endswith(f"{kind.__name__}: out of reach") and e.value.log == tmp_path / FILE
    assert ("Traceback" in said[0], len(said) > 1) == (kind is ValueError, kind is ValueError)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logged():
        LOGGER.info("a")
    log_to(tmp_path)  # outside of a block
    LOGGER.info("b")
    with logged():
        log_to(tmp_path)
        LOGGER.info("c")
        let_go()
        (tmp_path / FILE).unlink()
        LOGGER.info("d")
    assert not list(tmp_path.iterdir())


def test_a_long_log_rotates(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MOST", 1000)
    with logged():
        log_to(tmp_path)
        for i in range(100):
            LOGGER.info(f"line {i} " + 50 * "x")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [FILE, *(f"{FILE}.{n}" for n in (1, 2, 3))]
    assert all(p.stat().st_size <= 1000 for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(189.0, ["sensitivity: about 3 min: 63 groups"]), (7.1, ["sensitivity: about 7 s: 63 groups"]), (0.0, [])],
)
def test_time_that_something_is_going_to_take(tmp_path, seconds, said):
    with logged():
        log_to(tmp_path)
        LOGGER.info("first")
        tell_time("sensitivity", seconds, "63 groups")
    assert lines(tmp_path) == ["first", *said]
