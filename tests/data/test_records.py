# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files: walks that end, parallel work in order, whole folders only, also when stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from yolo_ext.core.errors import UsageError
from yolo_ext.data import records
from yolo_ext.data.records import link_or_copy, list_images, parallel, quote, staged_folder, walk_files


def test_walk(tmp_path):
    for name in ("b.JPG", "sub/a.png", ".hidden/c.jpg", "note.txt", "x.jpg/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "none")
    found = [p.relative_to(tmp_path).as_posix() for p in walk_files(tmp_path, {"jpg", "png"})]
    assert found == ["b.JPG", "dead.jpg", "linked/a.png", "sub/a.png", "x.jpg/d.png"]


def test_list_images(tmp_path):
    for name in ("b.JPG", "sub/a.png", ".hidden/c.jpg", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["b.JPG", "a.png"]
    (tmp_path / "list.txt").write_text("\ufeff./b.JPG\nsub/x.md\n\n")
    assert list_images([tmp_path / "list.txt"]) == [tmp_path / "b.JPG"]
    assert list_images([f"{tmp_path}/*/*.png", tmp_path / "b.JPG"]) == [tmp_path / "sub/a.png", tmp_path / "b.JPG"]
    with pytest.raises(UsageError, match=r"Cannot find .*none"):
        list_images(tmp_path / "none")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UsageError, match="cannot be read"):
        list_images(tmp_path / "list.txt")


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UsageError, match=r"a\.jpg' cannot be read \(Not a directory\)"):
        walk_files(tmp_path / "a.jpg", {"jpg"})


def test_quote():
    assert quote(["a", "b"]) == "a, b"
    assert quote(list("abcdefg")) == "a, b, c, d, e and 2 more"


@pytest.mark.timeout(10)
@pytest.mark.parametrize("links", [{"a/up": ""}, {"a/x": "b", "b/y": "a"}, {"a/p": "a", "a/q": "a"}], ids=str)
def test_loops_are_refused(tmp_path, links):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match="links back to its own parent"):
        walk_files(tmp_path, {"jpg"})


@pytest.mark.parametrize("many", [False, True], ids=["threads", "processes"])
def test_parallel_keeps_order_and_errors(monkeypatch, many):
    monkeypatch.setattr(records, "MANY", 10 if many else 1000)
    offset = 1
    assert list(parallel(lambda x: x + offset, range(200), "Counting")) == list(range(1, 201))
    pids = set(parallel(lambda x: time.sleep(0.002) or os.getpid(), range(100), "Asking"))
    assert (os.getpid() not in pids) == (many and sys.platform == "linux")
    with pytest.raises(ValueError, match="x 7"):
        list(parallel(lambda x: int("x 7") if x == 7 else x, range(50), "Failing"))


def test_staged_folder_and_links(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "l").symlink_to("a")
    for link, name in ((True, "linked"), (False, "copied")):
        link_or_copy(tmp_path / "l", tmp_path / name, link)
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).samefile(tmp_path / "a") == link
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as stage:
        (stage / "x").touch()
        _ = 1 / 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "copied", "l", "linked"]


SCRIPT = """
import sys, time
from pathlib import Path
from yolo_ext.data import convert, records
records.MANY = 10
write = sys.modules["yolo_ext.data.convert"]
real = write._write_one
def slow(*a):
    time.sleep(0.05)
    return real(*a)
write._write_one = slow
print("ready", flush=True)
convert(Path(sys.argv[1]), Path(sys.argv[2]), format="voc")
"""


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_ctrl_c_leaves_nothing_half(tmp_path):
    from test_voc import digest, make_voc

    source = make_voc(tmp_path / "s", 300)
    before = digest(source)
    words = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not list(tmp_path.glob(".out*/labels/train/*.txt")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        process.wait(30)
    assert process.returncode != 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and digest(source) == before


def test_a_worker_ends_by_sigterm_though_its_parent_has_a_handler(monkeypatch):
    """The handler of Python runs behind a wait for a lock, so a worker at the end of the work could wait for ever."""
    monkeypatch.setattr(records, "MANY", 10)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        kinds = (signal.SIGTERM, signal.SIGINT)
        asked = parallel(lambda _: tuple(map(signal.getsignal, kinds)), range(20), "Asking")
        assert set(asked) == {(signal.SIG_DFL, signal.SIG_IGN)}
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("many", [False, True], ids=["threads", "processes"])
def test_bar_ends_at_100_percent_though_nobody_asks_for_more(monkeypatch, capsys, many):
    monkeypatch.setattr(records, "MANY", 0 if many else 1000)
    for _ in zip(range(3), parallel(abs, range(3), "Counting")):
        pass
    assert "Counting: 100%" in capsys.readouterr().out.split("\r")[-1]
