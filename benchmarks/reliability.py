# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What yolo_ext promises of its reliability, each item with its figure.

    python benchmarks/reliability.py [only=kills,load] [images=20000] [folder=scratch]

Runs the tests that prove an item and reads the figure that they record, `record_property("reliability", "20 of 20")`;
where they record none, it counts them. Measures the load itself. Prints one line per item, and writes the table of
docs/reliability.md, in which a run of some items leaves the rows of the others. Exit status 1 where an item fails.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import psutil

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
PACKAGES = ("yolo-ext", "ultralytics", "torch", "torch-pruning", "onnxruntime")
TOP = """# Reliability

What is promised, what is done to prove it, and what came out. `python benchmarks/reliability.py` writes this page;
`only=` makes rows anew of some groups. A test is run by `python -m pytest -m "" TEST`.

{machine}

| group | item | what is done | figure | shown by |
|---|---|---|---|---|
"""


class Item(NamedTuple):
    """One row: its group, what is promised, what is done, and the tests that do it; without tests `load` does."""

    group: str
    name: str
    done: str
    tests: str = ""


FAULTS, GUEST = "tests/reliability/test_faults.py::test_", "tests/reliability/test_guest.py::test_"
ITEMS = (
    Item("kills", "A save that is killed", "SIGKILL at 20 random moments of a process that saves without a pause; the "
         "file must load and be of one save", f"{FAULTS}a_save_that_is_killed"),
    Item("kills", "A run that is killed", "SIGKILL at 20 random moments of compress (prune, fine-tune, QAT) in real "
         "processes, resumed until it is finished", f"{FAULTS}a_run_that_is_killed"),
    Item("kills", "A training that is killed at any write", "stopped at each change of a file in turn, resumed",
         "tests/integration/test_kills.py::test_a_training_that_is_killed_anywhere_ends_the_same"),
    Item("kills", "A compress run that is killed at any write", "stopped at each change of a file in turn, resumed",
         "tests/integration/test_kills.py::test_a_compress_run_that_is_killed_anywhere_goes_on"),
    Item("load", "Calibration", "`quantize` with all train images for calibration"),
    Item("load", "Sensitivity", "`sensitivity` over the val split"),
    Item("load", "Data check", "`data check`"),
    Item("load", "Labelling", "`label` of the train images"),
)  # fmt: skip


# Load -----------------------------------------------------------------------------------------------------------------
LOADS = {  # by item
    "Calibration": "quantize model={model} data={data} imgsz=64 device=cpu quant.mode=ptq quant.calib={train} "
    "quant.max_drop=1 quant.profile=ort-x86 save_dir={out}",
    "Sensitivity": "sensitivity model={model} data={data} imgsz=64 ratios=0.5 prune.include=model.4 save_dir={out}",
    "Data check": "data check={data} save_dir={out}",
    "Labelling": "label model={model} source={source} imgsz=64 device=cpu out={out}",
}
SIDE, FEWER = 64, 10  # pixels of an image, and the share of the images that the peak is compared with


def peak(words: list[str]) -> float:
    """Run a command line in a process of its own; return the most memory that it or one of its workers held, in MB."""
    process, most = psutil.Popen([sys.executable, "-m", "yolo_ext", *words], stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        for p in (process, *process.children(recursive=True)):
            with suppress(OSError, IndexError):  # it has just ended
                status = Path(f"/proc/{p.pid}/status").read_text(encoding="utf-8")
                most = max(most, int(status.split("VmHWM:")[1].split()[0]) / 1e3)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"This failed: yolo-ext {' '.join(words)}")
    return most


def load(images: int, folder: Path, names: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield the name, the figure and the outcome of each command on a generated set, against a tenth of the images."""
    from ultralytics import YOLO

    from yolo_ext.data.shapes import make_shapes

    sets = {
        n: make_shapes(folder / str(n), train=n * 9 // 10, val=n // 10, imgsz=SIDE) for n in (images // FEWER, images)
    }
    few, model = sets[images // FEWER], folder / "model" / "weights" / "best.pt"
    if not model.exists():
        given = {"epochs": 4, "imgsz": SIDE, "batch": 32, "workers": 0, "device": "cpu", "plots": False}
        YOLO("yolov8n.yaml").train(data=str(few), save_dir=str(model.parents[1]), exist_ok=True, **given)
    for name in names:
        found = []
        for n, data in sets.items():
            source, out = data.parent / "images" / "train", folder / f"{name} {n}"
            shutil.rmtree(out, ignore_errors=True)
            words = LOADS[name].split()
            found.append(
                peak([w.format(model=model, data=data, train=n * 9 // 10, source=source, out=out) for w in words])
            )
        few_mb, all_mb = found
        more = all_mb / few_mb - 1
        yield name, f"{all_mb:.0f} MB, {few_mb:.0f} MB with {images // FEWER:,} images: {more:+.1%}", more <= 0.1


# Tests ----------------------------------------------------------------------------------------------------------------
def tested(items: list[Item]) -> Iterator[tuple[str, str, bool]]:
    """Yield the name, the figure and the outcome of each item that tests prove."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.xml"
        ids = dict.fromkeys(word for item in items for word in item.tests.split())
        words = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--strict-markers", f"--junitxml={file}", *ids]
        subprocess.run(words, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        cases = [*ElementTree.parse(file).iter("testcase")] if file.exists() else []
    for item in items:
        starts = tuple(
            f"{word.removesuffix('.py').replace('/', '.').replace('.py::', '::')}" for word in item.tests.split()
        )
        own = [case for case in cases if f"{case.get('classname')}::{case.get('name')}".startswith(starts)]
        yield item.name, *outcome(own)


def outcome(cases: list[ElementTree.Element]) -> tuple[str, bool]:
    """Return the figures that test cases recorded, or how many passed, and whether all did."""
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [found.get("message", "") for case in cases if (found := case.find("skipped")) is not None]
    ran = len(cases) - len(skipped)
    if wrong or not ran:
        return f"**failed**: {len(wrong)} of {ran} cases" if ran else f"not run: {skipped or 'no such test'}", not wrong
    said = [p.get("value", "") for case in cases for p in case.iter("property") if p.get("name") == "reliability"]
    return "; ".join(dict.fromkeys(said)) or f"{ran} of {ran} cases hold", True


# Page -----------------------------------------------------------------------------------------------------------------
def machine() -> str:
    """Return what the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), "")
    hardware = f"{platform.system()}, {cpu or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
    return f"{hardware}. {', '.join(versions)}."


def row(item: Item, figure: str, images: int) -> str:
    """Return the row of an item."""
    shown = "<br>".join(f"`{word}`" for word in item.tests.split()) or "`python benchmarks/reliability.py only=load`"
    done = item.done if item.tests else f"{item.done}, {images:,} images of {SIDE} px: peak memory"
    return f"| {item.group} | {item.name} | {done} | {figure} | {shown} |"


def main() -> None:
    args = {"images": "20000", **dict(a.split("=", 1) for a in sys.argv[1:])}
    groups = args.get("only", ",".join(i.group for i in ITEMS)).split(",")
    if unknown := {*groups} - {i.group for i in ITEMS}:
        raise SystemExit(
            f"Unknown groups {sorted(unknown)}. Legal: {', '.join(dict.fromkeys(i.group for i in ITEMS))}."
        )
    chosen, images, failed = [i for i in ITEMS if i.group in groups], int(args["images"]), False
    before = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    rows = {line.split(" | ")[1]: line for line in before if line.startswith("| ")}
    with tempfile.TemporaryDirectory() as tmp:
        found = [*(tested(tests) if (tests := [i for i in chosen if i.tests]) else ())]
        loads = [i.name for i in chosen if not i.tests]
        found += load(images, Path(args.get("folder", tmp)).resolve(), loads) if loads else []
    for name, figure, passed in found:
        item = next(i for i in ITEMS if i.name == name)
        rows[name] = row(item, figure, images)
        failed |= not passed
        print(f"{item.group}: {name}: {figure}", flush=True)
    page = [rows[i.name] for i in ITEMS if i.name in rows]
    PAGE.write_text(TOP.format(machine=machine()) + "\n".join(page) + "\n", encoding="utf-8")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
