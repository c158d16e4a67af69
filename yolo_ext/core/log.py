# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""compress.log: what Ultralytics' logger says from the start of a command on, once there is a run folder."""

import logging
import os
import re
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path

from yolo_ext.core.errors import YoloExtError
from yolo_ext.core.lock import hold, release

FILE, MOST, OLD = "compress.log", 5_000_000, 3  # name, bytes, and how many older ones are kept
LOGGER = logging.getLogger("ultralytics")  # that of Ultralytics, without its import
COLOUR = re.compile(r"\x1b\[[\d;]*m")


class RunLog(MemoryHandler):
    """Lines that wait for the folder of their run."""

    stopped: tuple[str, Path, str] | None = None  # the words that go on with a run, its folder, what has to be in it

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record with date and time, without colours."""
        when = logging.Formatter().formatTime(record, "%Y-%m-%d %H:%M:%S")
        return f"{when} {COLOUR.sub('', record.getMessage()).strip()}"


def tell_time(what: str, seconds: float, each: str) -> None:
    """Say how long something is going to take, and what."""
    if seconds:
        LOGGER.info(f"{what}: about {f'{seconds / 60:.0f} min' if seconds > 99 else f'{seconds:.0f} s'}: {each}")


@contextmanager
def logged() -> Iterator[None]:
    """Keep the log of a block, and the folders that it takes, for `log_to`; of nested blocks the outermost counts."""
    if _open():
        yield
        return
    handler = RunLog(capacity=1)  # which holds everything until it has a target
    LOGGER.addHandler(handler)
    try:
        yield
    except BaseException as e:
        foreseen = isinstance(e, (YoloExtError, OSError, KeyboardInterrupt))
        told = f"{type(e).__name__}: {e}" if foreseen else traceback.format_exc()
        handler.handle(logging.makeLogRecord({"msg": told, "levelno": logging.ERROR}))
        if folder := log_folder():
            e.log = folder / FILE  # type: ignore[attr-defined]
        if handler.stopped and any(handler.stopped[1].glob(handler.stopped[2])):
            LOGGER.info(f"What is finished is kept. Go on with: {handler.stopped[0]}")
        raise
    finally:
        let_go()
        LOGGER.removeHandler(handler)
        release()


def log_to(folder: Path) -> None:
    """Take this folder, and write the log of the block around into it, unless it is written elsewhere already."""
    if not (handler := _open()):
        return
    hold(folder)
    if not handler.target:
        file = RotatingFileHandler(folder / FILE, maxBytes=MOST, backupCount=OLD, encoding="utf-8", delay=True)
        file.format = handler.format  # type: ignore[method-assign]
        handler.setTarget(file)


def log_folder() -> Path | None:
    """Return the folder that the log of the block around is written into."""
    handler = _open()
    return Path(handler.target.baseFilename).parent if handler and handler.target else None  # type: ignore[attr-defined]


def resumes(command: str, folder: Path, files: str) -> None:
    """Have the block around say how its run goes on, should it stop with such files there; the outermost counts."""
    if (handler := _open()) and not handler.stopped:
        shorter = min(str(folder), os.path.relpath(folder), key=len)
        handler.stopped = f"yolo-ext {command} resume={shlex.quote(shorter)}", folder, files


def let_go() -> None:
    """Close the file, before its folder is removed."""
    if (handler := _open()) and handler.target:
        handler.flush()
        handler.target.close()
        handler.setTarget(None)


def _open() -> RunLog | None:
    return next((h for h in LOGGER.handlers if isinstance(h, RunLog)), None)
