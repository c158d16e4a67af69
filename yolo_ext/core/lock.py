# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""One process at a time writes into a run folder: the lock file in it says which."""

import json
import os
import re
import socket
import time
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import psutil
from filelock import FileLock

from yolo_ext.core.errors import UsageError

LOCK, RUN = ".yolo_ext.lock", "compress.yaml"  # a folder with the latter holds those of its stages
PART = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.(part|tmp)")  # a file or folder that the process of this id writes
_held: set[Path] = set()


def hold(folder: Path) -> None:
    """Take a run folder for this process and its children until `release`; UsageError where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    me, host, lock = psutil.Process(), socket.gethostname(), folder / LOCK
    # Of processes that start together, one looks and takes before the next one looks.
    with FileLock(Path(gettempdir()) / f"yolo_ext_{getattr(os, 'getuid', int)()}.lock"):
        for path in (lock, *(p / LOCK for p in folder.parents if (p / RUN).is_file())):
            owner = _owner(path)
            if owner and owner["host"] == host and owner["pid"] in {p.pid for p in (me, *me.parents())}:
                return
            if owner:
                who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
                hint = f"Wait for it or stop it, or give another folder; if it is gone, remove '{path}'"
                raise UsageError(f"'{path.parent}' is in use by {who}. {hint}.")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        told = {"pid": me.pid, "host": host, "since": since, "born": _born(me)}
        lock.write_text(json.dumps(told), encoding="utf-8")
    _held.add(lock)
    for file in filter(left_over, folder.rglob(".*.part")):
        file.unlink()


def release() -> None:
    """Give back all folders that this process has taken."""
    while _held:
        if (lock := _held.pop()) and _owner(lock).get("pid") == os.getpid():  # not a fork of it
            lock.unlink()


def left_over(path: Path) -> bool:
    """Tell by its name whether a dead process began to write a file or a folder."""
    return (writer := PART.fullmatch(path.name)) is not None and not psutil.pid_exists(int(writer[1]))


def _owner(lock: Path) -> dict[str, Any]:
    """Return what a lock says of its process; nothing where there is none, or this host knows that it is dead."""
    try:
        told = json.loads(lock.read_text(encoding="utf-8"))
        told = {k: told[k] for k in ("pid", "host", "since", "born")}
        if told["host"] != socket.gethostname():
            return told
        process = psutil.Process(told["pid"])
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(_born(process) - told["born"]) < 1
        return told if alive else {}  # its number may be that of another one by now
    except (FileNotFoundError, ValueError, LookupError, TypeError, psutil.Error):
        return {}


def _born(process: psutil.Process) -> float:
    """Return the seconds between the start of the system and that of a process, which no change of the clock moves."""
    return float(process.create_time() - psutil.boot_time())
