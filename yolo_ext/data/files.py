# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files by the hundred thousand: found without endless links, worked on in parallel, written whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from ultralytics.utils import NUM_THREADS, TQDM

from yolo_ext.core.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")
MANY = 1000  # items from which processes pay: XML and image headers are read under the interpreter's lock
_task: tuple[Callable[[Any], Any], Sequence[Any]]


def walk_files(folder: str | Path, suffixes: Collection[str]) -> list[Path]:
    """Return the sorted regular files below a folder, hidden ones left out and linked folders followed.

    Args:
        folder: Folder to walk.
        suffixes: Wanted endings in lower case, without the dot.

    Raises:
        UsageError: A link leads back to a folder above it, which Ultralytics would follow over and over.
    """
    found: list[Path] = []
    stack: list[tuple[str, tuple[str, ...]]] = [(str(folder), (os.path.realpath(folder),))]
    while stack:
        path, above = stack.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                file, link = Path(entry.path), entry.is_symlink()
                if file.is_dir() if link else entry.is_dir():
                    real = os.path.realpath(file)
                    if real in above:
                        raise UsageError(f"'{file}' links back to its own parent '{real}'. Remove the link.")
                    stack.append((entry.path, (*above, real)))
                    continue
                wanted = entry.name.rpartition(".")[2].lower() in suffixes
                if wanted and ((file.is_file() or not file.exists()) if link else entry.is_file()):
                    found.append(file)  # dead links too, to be named as unreadable, but no pipe, which would block
    return sorted(found)


def parallel(work: Callable[[T], R], items: Sequence[T], text: str) -> Iterator[R]:
    """Yield `work(item)` of every item, in order and with a progress bar.

    Many items go to processes where the system forks them, which saves pickling the work; all else goes to threads.

    Args:
        work: What to do; in a process it must not touch torch, whose threads do not survive a fork.
        items: All items.
        text: What the progress bar says.
    """
    if len(items) < MANY or sys.platform != "linux":
        with ThreadPool(NUM_THREADS) as pool:
            yield from TQDM(pool.imap(work, items), text, len(items))
        return
    fork = multiprocessing.get_context("fork")
    with fork.Pool(len(os.sched_getaffinity(0)), _start, (work, items)) as processes:
        yield from TQDM(processes.imap(_call, range(len(items)), chunksize=32), text, len(items))


def _start(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """Keep the work in a new process, and leave Ctrl-C to the parent."""
    global _task
    _task = work, items
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(index: int) -> Any:
    work, items = _task
    return work(items[index])


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out` that becomes `out` on success and vanishes on failure.

    Args:
        out: Final folder; replaced where it exists.
    """
    stage = out.with_name(f".{out.name}.{uuid4().hex[:8]}.tmp")
    stage.mkdir(parents=True)
    try:
        yield stage
        if out.exists():
            old = stage.with_suffix(".old")
            out.rename(old)
            stage.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            stage.rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def link_or_copy(source: Path, target: Path, link: bool = True) -> None:
    """Hard-link a file, or copy it where the file system cannot link or `link` is False."""
    if link:
        try:
            os.link(os.path.realpath(source), target)
            return
        except FileExistsError:  # another image has this name: nothing may be lost
            raise
        except OSError:
            pass
    shutil.copy2(source, target)
