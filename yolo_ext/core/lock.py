# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""One process at a time writes into a run folder: the lock file in it says which."""

import hashlib
import json
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from yolo_ext.core.errors import UsageError

LOCK, RUN = ".yolo_ext.lock", "compress.yaml"  # a folder with the latter holds those of its stages
PART = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.(part|tmp)")  # a file or folder that the process of this id writes
_held: set[Path] = set()


def hold(folder: Path) -> None:
    """Take a run folder for this process and its children until `release`; UsageError where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    me, host, lock = psutil.Process(), socket.gethostname(), folder / LOCK
    mine = json.dumps({"pid": me.pid, "host": host, "since": time.strftime("%Y-%m-%d %H:%M:%S"), "born": _born(me)})
    while True:
        for path in (lock, *(p / LOCK for p in folder.parents if (p / RUN).is_file())):
            owner = _owner(path)
            if owner and owner["host"] == host and owner["pid"] in {p.pid for p in (me, *me.parents())}:
                return
            if owner:
                who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
                hint = f"Wait for it or stop it, or give another folder; if it is gone, remove '{path}'"
                raise UsageError(f"'{path.parent}' is in use by {who}. {hint}.")
        try:
            with lock.open("x", encoding="utf-8") as f:
                f.write(mine)
            break
        except FileExistsError:
            if _take_over(lock, mine):
                break
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


def _take_over(lock: Path, mine: str) -> bool:
    """Put `mine` in the place of a dead process's lock; of several processes the one that claims it may."""
    with suppress(FileNotFoundError):  # somebody else was here
        before = lock.read_bytes()
        claim = lock.with_name(f"{LOCK}.{hashlib.sha256(before).hexdigest()[:8]}")
        try:
            with claim.open("x", encoding="utf-8") as f:
                f.write(mine)
        except FileExistsError:
            time.sleep(0.1)
            if not _owner(claim):  # killed in the lines below
                claim.unlink()
            return False
        try:
            time.sleep(0.1)  # for whoever is just writing the lock
            if not _owner(lock) and lock.read_bytes() == before:
                claim.replace(lock)
                return True
        finally:
            claim.unlink(missing_ok=True)
    return False


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
