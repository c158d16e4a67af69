# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""One process at a time has a run folder; the lock of a dead one is taken over, and what it was writing is swept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from yolo_ext.core.errors import UsageError
from yolo_ext.core.lock import LOCK, PART, _born, hold
from yolo_ext.core.log import log_to, logged


@pytest.fixture
def other():
    """Return a process that is neither this one nor one above it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(process.pid)
    process.kill()
    process.communicate()


def dead() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(folder: Path, **told: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps({"host": socket.gethostname(), "since": "then", "born": 1.0, **told}))


def test_a_living_process_keeps_its_folder(tmp_path, other):
    folder = tmp_path / "run"
    write(folder, pid=other.pid, born=_born(other))
    with pytest.raises(UsageError, match=rf"in use by process {other.pid} on .* since then.*give another folder"):
        hold(folder)
    assert json.loads((folder / LOCK).read_text())["pid"] == other.pid


def test_a_run_of_compress_has_the_folders_of_its_stages(tmp_path, other):
    write(tmp_path, pid=other.pid, born=_born(other))
    with logged():
        hold(tmp_path / "beside")  # a folder that only happens to lie there
    (tmp_path / "compress.yaml").touch()
    with pytest.raises(UsageError, match="in use"), logged():
        hold(tmp_path / "compare" / "random")


def end(process: psutil.Process) -> None:
    """End a child, whose parent does not ask how it ended."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


STALE = {
    "dead": lambda folder, other: write(folder, pid=dead()),
    "its number is another one's by now": lambda folder, other: write(folder, pid=other.pid, born=_born(other) - 60),
    "an ended child": lambda folder, other: (write(folder, pid=other.pid, born=_born(other)), end(other)),
    "this process, in an earlier life": lambda folder, other: write(folder, pid=os.getpid()),
    "empty": lambda folder, other: (folder / LOCK).touch(),
    "foreign": lambda folder, other: (folder / LOCK).write_text("[1]"),
    "keys are missing": lambda folder, other: (folder / LOCK).write_text("{}"),
}


@pytest.mark.parametrize("make", STALE.values(), ids=STALE)
def test_a_stale_lock_is_taken_over_and_given_back(tmp_path, other, make):
    make(tmp_path, other)
    with logged():
        log_to(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with logged():
            log_to(tmp_path)  # once more, of an inner block
        assert (tmp_path / LOCK).exists()
    assert not [*tmp_path.glob(f"{LOCK}*")]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt], ids=["done", "an error", "Ctrl-C"])
def test_a_folder_is_given_back_however_a_block_ends(tmp_path, error):
    try:
        with logged():
            log_to(tmp_path)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_another_machine_is_believed(tmp_path):
    write(tmp_path, pid=dead(), host="elsewhere")
    with pytest.raises(UsageError, match=r"on elsewhere since .* if it is gone, remove"):
        hold(tmp_path)


def test_children_of_a_process_have_its_folder(tmp_path):
    code = f"from pathlib import Path; from yolo_ext.core.lock import hold, release; hold(Path({str(tmp_path)!r})); "
    with logged():
        log_to(tmp_path)
        subprocess.run([sys.executable, "-c", f"{code}release()"], check=True)
        assert (tmp_path / LOCK).exists()


def test_of_processes_that_start_together_one_gets_a_stale_folder(tmp_path, record_property):
    write(tmp_path, pid=dead())
    code = (
        "import sys; from pathlib import Path; from yolo_ext.core.lock import hold; sys.stdin.readline()\n"
        f"try: hold(Path({str(tmp_path)!r})); print('mine', flush=True); sys.stdin.readline()\n"
        "except ValueError: print('refused', flush=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(4)]
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()
    with ThreadPoolExecutor(4) as pool:
        said = sorted(pool.map(lambda p: p.stdout.readline().strip(), processes))
    for p in processes:
        p.communicate("\n")
    record_property("reliability", f"{said.count('mine')} of {len(said)} processes that start at once gets the folder")
    assert said == ["mine", "refused", "refused", "refused"]


def test_only_what_a_dead_writer_left_is_swept(tmp_path):
    left = [f".best.pt.{dead()}.0123abcd.part", f".best.pt.{os.getpid()}.0123abcd.part", ".notes.part", "a.part"]
    (tmp_path / "weights").mkdir()
    for name in left:
        (tmp_path / "weights" / name).touch()
    assert [bool(PART.fullmatch(name)) for name in left] == [True, True, False, False]
    with logged():
        log_to(tmp_path)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == sorted(left[1:])
