# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Rate of the dataset tools on generated files.

    python benchmarks/data.py files=100000 boxes=3 folder=scratch

Writes `files` Pascal VOC annotations of `boxes` boxes each; the images are hard links to 16 JPEG files of 640x480
pixels. Then converts VOC to YOLO, COCO and VOC, splits the YOLO set into stratified folds, and checks it. Prints wall
clock and CPU time of this process and its workers, annotation files and boxes per second, and the most memory that any
of them held. The folder is removed at the end.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolo_ext.data.convert import convert
from yolo_ext.data.formats import voc_text
from yolo_ext.data.records import Object
from yolo_ext.data.summary import summarise
from yolo_ext.reporting.tables import align

SIZE = (640, 480)


def generate(root: Path, files: int, boxes: int) -> None:
    """Write a VOC set."""
    rng = np.random.default_rng(0)
    pictures = []
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for k in range(16):
        picture = cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), SIZE)
        pictures.append(root / f"base{k}.jpg")
        cv2.imwrite(str(pictures[-1]), picture)
    corners = np.sort(rng.random((files, boxes, 2, 2)) * SIZE, axis=2).reshape(files, boxes, 4)
    for i in range(files):
        objects = [Object(f"class{int(b[0]) % 10}", tuple(b)) for b in corners[i].tolist()]
        (root / f"Annotations/{i:06}.xml").write_text(voc_text(f"{i:06}.jpg", SIZE, objects))
        (root / f"JPEGImages/{i:06}.jpg").hardlink_to(pictures[i % 16])


def cpu() -> float:
    """Return CPU seconds of this process and its finished workers."""
    used = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(name: str, work: Callable[[], Any], files: int, boxes: int) -> list[str]:
    """Run once and return a row of the table."""
    wall, busy = time.perf_counter(), cpu()
    work()
    wall, busy = time.perf_counter() - wall, cpu() - busy
    peak = max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3
    return [name, f"{wall:.1f}", f"{busy:.1f}", f"{files / wall:,.0f}", f"{files * boxes / wall:,.0f}", f"{peak:.0f}"]


def main() -> None:
    args = dict(word.split("=", 1) for word in sys.argv[1:])
    files, boxes = int(args.get("files", 100_000)), int(args.get("boxes", 3))
    root = Path(args.get("folder", "data_benchmark")).resolve()
    voc, yolo = root / "voc", root / "yolo"
    try:
        generate(voc, files, boxes)
        runs: dict[str, Callable[[], Any]] = {
            "VOC to YOLO": lambda: convert(voc, yolo, ratios={"train": 0.8, "val": 0.2}),
            "VOC to COCO": lambda: convert(voc, root / "coco", to="coco"),
            "VOC to VOC": lambda: convert(voc, root / "again", to="voc"),
            "YOLO to 5 stratified folds": lambda: convert(yolo, root / "folds", format="yolo", folds=5, stratify=True),
            "YOLO check": lambda: summarise(yolo),
        }
        wanted = args.get("runs", "").split(",") if args.get("runs") else [*runs]
        rows = [measure(name, runs[name], files, boxes) for name in runs if name in wanted]
        print(align(rows, ["Run", "Wall s", "CPU s", "Files/s", "Boxes/s", "Peak MB"]))
        print(f"{files} files of {boxes} boxes, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
