# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Faults in real processes: kills at random moments, a full disk, a second run, SIGTERM, a clock that jumps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.utils import YAML

from yolo_ext import cli
from yolo_ext.checkpoint import save_model
from yolo_ext.stock.load import load_model

KILLS = 20
pytestmark = pytest.mark.timeout(1800)
# A process that has loaded all there is, and forks one for each try: Python starts once.
FORKS = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from ultralytics import YOLO
import yolo_ext
from yolo_ext import cli
from yolo_ext.checkpoint import save_model
from yolo_ext.pipeline import stages
from yolo_ext.stock.load import load_model

entry = {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 10, "samples": [1.0] * 10}
stages.bench = lambda files, imgsz, **options: {name: entry for name in files}  # or most of a run is spent with it
job, rng = json.loads(sys.argv[1]), random.Random(0)
sys.path.insert(0, "")

def start(work, *args):
    "Begin work in a process of its own, which writes errors to said.txt; return its id."
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(job.get("said", "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os._exit(work(*args) or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return pid

def forked(work, *args, kill=None, signal=signal.SIGKILL):
    "Run work in a process of its own, end it after that many seconds; return its exit status, of a signal negative."
    pid = start(work, *args)
    if kill is not None:
        time.sleep(kill)
        os.kill(pid, signal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def said():
    "Return what the last process has written to stderr."
    return Path("said.txt").read_text(encoding="utf-8", errors="replace").strip()[-1500:]

def command(words, folder):
    "Run a command line, which goes on with a run that has begun."
    more = [f"resume={folder}"] if Path(folder, "compress.yaml").exists() else [f"save_dir={folder}"]
    return cli.main([*words.split(), *more])
"""


@pytest.fixture
def forks(place) -> Callable[..., Any]:
    """Return a function that runs code behind `FORKS` with a job, and returns what its last line says as JSON."""

    def run(code: str, *start: str, **job: Any) -> Any:
        words = [*start, sys.executable, "-c", FORKS + code, json.dumps(job)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=1700, check=False)
        assert not done.returncode, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def same(a: Path, b: Path) -> bool:
    """Tell whether two checkpoints hold the same bits."""
    ours, theirs = (load_model(file)[0].state_dict() for file in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


# Kills ----------------------------------------------------------------------------------------------------------------
SAVES = """
def saves(model, file):
    for i in range(10**6):
        for p in model.parameters():
            p.data.fill_(i % 100)
        save_model(model, file)

model, file = load_model("tiny.pt")[0], Path("killed.pt")
save_model(model, file)
whole, written = 0, set()
for _ in range(job["kills"]):
    assert forked(saves, model, file, kill=rng.uniform(0.05, 0.3)) == -9
    found = {float(v) for p in load_model(file)[0].parameters() for v in p.detach().unique()}
    whole += len(found) == 1
    written |= found
print(json.dumps([whole, len(written), [p.name for p in Path().glob(".killed*")]]))
"""


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_a_whole_file(forks, record_property):
    whole, different, left = forks(SAVES, kills=KILLS)
    record_property("reliability", f"{whole} of {KILLS} load, each of one save; {len(left)} kills met one half written")
    assert whole == KILLS and different > 3


COMPRESS = (
    "compress model=tiny.pt data=shapes/data.yaml imgsz=64 device=cpu workers=0 batch=4 plots=False epochs=2 "
    "prune.ratio=0.3 prune.round_to=1 prune.images=4 distill.preflight=False quant.mode=qat quant.calib=4 "
    "quant.epochs=1 quant.max_drop=1"
)
RUNS = """
began = time.monotonic()
assert forked(command, job["words"], "whole") < 2
seconds, kills, runs = time.monotonic() - began, 0, 0
while kills < job["kills"]:
    folder, status, runs = f"run{runs}", -9, runs + 1
    while status == -9:
        status = forked(command, job["words"], folder, kill=rng.uniform(0, seconds))
        kills += status == -9
    assert status in (0, 1), status
print(json.dumps([kills, runs]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_ends_the_same(forks, place, record_property):
    kills, runs = forks(RUNS, words=COMPRESS, kills=KILLS)
    ended = sum(same(place / "whole/weights/best.pt", place / f"run{i}/weights/best.pt") for i in range(runs))
    figures = [json.loads((place / n / "summary.json").read_text())["after"]["map"] for n in ("whole", "run0")]
    record_property("reliability", f"{kills} kills, {ended} of {runs} runs end with the bits of an unbroken one")
    assert ended == runs and figures[0] == figures[1]
    assert not [*place.rglob(".*.pt*")], "half-written files are left"


# Full disks -----------------------------------------------------------------------------------------------------------
EACH_WRITE = """
import re

def fails_once(fd, sync=os.fsync):
    "Fail as a full disk does at the first time that a file is written."
    name = re.sub(r"[.0-9a-f]*(.part)?$", "", os.readlink(f"/proc/self/fd/{fd}"))
    if name not in Path("failed.txt").read_text().splitlines():
        with open("failed.txt", "a") as f:
            f.write(name + chr(10))
        raise OSError(28, os.strerror(28))
    sync(fd)

def work(words, folder):
    os.fsync = fails_once
    return command(words, folder)

Path("failed.txt").touch()
assert forked(command, job["words"], "whole") < 2
found, status, names, before = [], 2, [], -1
while status not in (0, 1) and len(names) > before:  # each try fails at one more file, or two where one is an extra
    before, status = len(names), forked(work, job["words"], "run")
    names = Path("failed.txt").read_text().splitlines()
    found += [(names[-1].rpartition("/.")[2], status, said())] if status not in (0, 1) else []
print(json.dumps([status, found]))
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(forks, place, record_property):
    status, found = forks(EACH_WRITE, words=COMPRESS)
    wrong = [f for f in found if f[1] != 2 or f[0] not in f[2] or os.strerror(errno.ENOSPC) not in f[2]]
    told = f"{len(found)} files fail once: {len(found) - len(wrong)} times exit status 2 and the name of the file"
    record_property("reliability", f"{told}; resumed, the bits of an unbroken run")
    assert status in (0, 1) and not wrong and len(found) > 15, (status, wrong or found[-1:])
    assert same(place / "whole/weights/best.pt", place / "run/weights/best.pt")


NAMESPACE = ("unshare", "-Urm")  # in which everybody may mount
SIZED = """
import shutil, subprocess

def disk(*options):
    os.makedirs("disk", exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", "disk"], check=True)
"""
GROWING = """
assert forked(command, job["words"], "whole") < 2
whole = sum(f.stat().st_size for f in Path("whole").rglob("*") if f.is_file()) // 1000
kb, found, status = 40, [], 2
disk(f"size={kb}k")
while status not in (0, 1) and kb < 4 * whole:
    status = forked(command, job["words"], "disk/run")
    found += [(status, said())]
    kb += whole // job["steps"]
    disk("remount", f"size={kb}k")
shutil.copytree("disk/run", "run")
print(json.dumps([status, found]))
"""
mounts = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], check=False).returncode,
    reason="no namespace of users here",
)


@mounts
@pytest.mark.slow
def test_a_disk_that_is_really_full(forks, place, record_property):
    status, found = forks(SIZED + GROWING, *NAMESPACE, words=COMPRESS, steps=20)
    stopped = [(code, said) for code, said in found if code not in (0, 1)]
    wrong = [(code, said) for code, said in stopped if code != 2 or "disk/run" not in said]
    told = f"a disk that grows: full {len(stopped)} times, {len(stopped) - len(wrong)} times exit status 2 and the file"
    record_property("reliability", f"{told}; resumed, the bits of an unbroken run")
    assert status in (0, 1) and not wrong and len(stopped) > 5, (status, wrong)
    assert same(place / "whole/weights/best.pt", place / "run/weights/best.pt")


READ_ONLY = """
disk("size=50m", "ro")
found = []
for words in job["lines"]:
    found.append((forked(cli.main, words.split()), said()))
print(json.dumps([found, [str(p) for p in Path("runs").glob("*")]]))
"""
LINES = {  # a run of each kind
    "compress": COMPRESS,
    "train": "train model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=1 device=cpu workers=0 batch=4 plots=False",
    "label": "label model=tiny.pt source=shapes/images imgsz=64 device=cpu",
    "sensitivity": "sensitivity model=tiny.pt data=shapes/data.yaml imgsz=64 device=cpu ratios=0.5",
    "export": "export model=tiny.pt imgsz=64",
    "analyze": "analyze model=tiny.pt imgsz=64",
}


@mounts
@pytest.mark.slow
def test_a_folder_that_cannot_be_written(forks, record_property):
    lines = [f"{words} {'out' if name == 'label' else 'save_dir'}=disk/run" for name, words in LINES.items()]
    found, others = forks(SIZED + READ_ONLY, *NAMESPACE, lines=lines)
    wrong = [(code, said) for code, said in found if code != 2 or "disk/run" not in said or "Traceback" in said]
    record_property("reliability", f"{len(found) - len(wrong)} of {len(found)} commands: exit status 2 and the folder")
    assert not wrong and not others


# Others at work -------------------------------------------------------------------------------------------------------
TOGETHER = """
import shutil

for i in range(300):  # or it is over before the second one has begun
    shutil.copy("shapes/images/val/00000.jpg", f"shapes/images/val/more{i}.jpg")
found = []
for words, sign, others in job["lines"]:
    first = start(cli.main, words.split())
    while not Path(sign).exists():
        time.sleep(0.01)
    for more in others:
        found.append((words.split()[0] + " " + more, forked(cli.main, [*words.split(), *more.split()]), said()))
    found.append((words.split()[0], os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), ""))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_on_one_run(forks, place, record_property):
    lines = [
        (f"{COMPRESS} save_dir=a", "a/base/stage.json", ["", "exist_ok=True", "resume=a"]),
        (f"{LINES['train']} epochs=20 save_dir=b", "b/weights/last.pt", ["", "exist_ok=True", "resume=b"]),
        (f"{LINES['label']} out=c", "c/detections.jsonl", ["", "overwrite=True"]),
    ]
    found = forks(TOGETHER, lines=lines)
    first, second = ([f for f in found if bool(f[2]) is refused] for refused in (False, True))
    record_property(
        "reliability", f"the second of two is refused in {len(second)} of 8 ways, the first one ends as alone"
    )
    assert len(first) == 3 and all(status in (0, 1) for _, status, _ in first), found
    assert all(status == 2 and ("in use" in told or "holds a run" in told) for _, status, told in second), second


def rename_a_class(place: Path) -> None:
    YAML.save(
        place / "shapes/data.yaml", {**YAML.load(place / "shapes/data.yaml"), "names": ["disc", "square", "star"]}
    )


def train_a_little(place: Path) -> None:
    model, _ = load_model(place / "tiny.pt")
    model.model[0].conv.weight.data[0] += 1
    save_model(model, place / "tiny.pt")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {  # what changes under a run, and what is said of it
    "other weights under the same name": (train_a_little, "tiny.pt"),
    "images that are gone": (
        lambda p: [f.unlink() for f in (p / "shapes/images/train").glob("*[02468].jpg")],
        "images",
    ),
    "another label": (lambda p: (p / "shapes/labels/train/00000.txt").write_text("0 0.5 0.5 0.2 0.2\n"), "labels"),
    "a renamed class": (rename_a_class, "class"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "word"), CHANGES.values(), ids=CHANGES)
def test_inputs_that_change_under_a_run(place, quick, capsys, record_property, change, word):
    words = "compress model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=0 prune.ratio=0.3 quant=None device=cpu"
    assert cli.main([*words.split(), "save_dir=a"]) in (0, 1)
    before = {f: f.read_bytes() for f in (place / "a").rglob("*") if f.is_file() and f.suffix != ".log"}
    change(place)
    capsys.readouterr()
    assert cli.main(["compress", "resume=a"]) == 2
    assert word in capsys.readouterr().err
    assert before == {f: f.read_bytes() for f in (place / "a").rglob("*") if f.is_file() and f.suffix != ".log"}
    record_property("reliability", f"{len(CHANGES)} changes: refused, nothing of the run is touched")


TERMINATED = """
began = time.monotonic()
assert forked(command, job["words"], "whole") < 2
seconds, found = time.monotonic() - began, []
for share in job["shares"]:
    status = forked(command, job["words"], "run", kill=share * seconds, signal=signal.SIGTERM)
    found.append((status, said()))
print(json.dumps([found, forked(command, job["words"], "run")]))
"""


@pytest.mark.slow
def test_sigterm_is_ctrl_c(forks, place, record_property):
    found, status = forks(TERMINATED, words=COMPRESS, shares=[0.4, 0.3, 0.3])
    right = [code == 130 and said.endswith("yolo-ext: stopped") for code, said in found]
    record_property(
        "reliability", f"{sum(right)} of {len(right)}: exit status 130, resumed with the bits of an unbroken run"
    )
    assert all(right) and status in (0, 1), found
    assert same(place / "whole/weights/best.pt", place / "run/weights/best.pt")


CLOCK = """
def jumping(words, folder, real=time.time):
    time.time = lambda: real() + rng.choice([-1e6, 0, 1e6])
    return command(words, folder)

began = time.monotonic()
assert forked(command, job["words"], "whole") < 2
seconds = time.monotonic() - began
assert forked(jumping, job["words"], "run", kill=0.6 * seconds) == -9
print(json.dumps([forked(jumping, job["words"], "run"), seconds]))
"""


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(forks, place, record_property):
    status, seconds = forks(CLOCK, words=COMPRESS)
    took = [float(v or 0) for v in json.loads((place / "run/summary.json").read_text())["seconds"].values()]
    record_property("reliability", "killed and resumed with a clock that jumps by days: the bits of an unbroken run")
    assert status in (0, 1) and min(took) >= 0 and max(took) < 20 * seconds
    assert same(place / "whole/weights/best.pt", place / "run/weights/best.pt")
