# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Time of a fresh Python process that runs one image: `Detector` and Ultralytics on the same ONNX file.

    python benchmarks/cold_start.py model=best_int8.onnx image=img.jpg [rounds=15]

Each round starts every route once, in random order, after one that is not counted. Prints medians with 10 to 90 % of
wall time, CPU time (user and system together, which other processes on the machine hardly change) and peak memory, of
the whole process from start to exit. `imports` loads what the detector needs and does nothing.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from statistics import median, quantiles

ROUTES = {
    "imports": "import cv2, numpy, onnxruntime",
    "Detector": "from yolo_ext.deployment import Detector; print(len(Detector({model!r})({image!r})))",
    "Ultralytics": "from ultralytics import YOLO; "
    "print(len(YOLO({model!r}).predict({image!r}, device='cpu', verbose=False)[0]))",
}


def start(code: str) -> tuple[float, float, float, str]:
    """Run code in a fresh process; return wall seconds, CPU seconds, peak memory in MB and its last line."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    text = process.stdout.read().decode() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"This failed: {code}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, (text.splitlines() or [""])[-1]


def main() -> None:
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    rounds = int(args.get("rounds", 15))
    codes = {name: code.format(model=args["model"], image=args["image"]) for name, code in ROUTES.items()}
    found = {name: start(code)[3] for name, code in codes.items()}
    if found["Detector"] != found["Ultralytics"]:
        raise SystemExit(f"The routes find {found['Detector']} and {found['Ultralytics']} objects.")
    samples: dict[str, list[tuple[float, float, float, str]]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name in random.sample(list(codes), len(codes)):
            samples[name].append(start(codes[name]))
    print(f"{'Route':<14}{'wall s (p10-p90)':<24}{'CPU s (p10-p90)':<24}MB")
    for name, taken in samples.items():
        cells = []
        for column in (0, 1):
            values = [s[column] for s in taken]
            tenths = quantiles(values, n=10)
            cells.append(f"{median(values):.2f} ({tenths[0]:.2f}-{tenths[-1]:.2f})")
        print(f"{name:<14}{cells[0]:<24}{cells[1]:<24}{median(s[2] for s in taken):.0f}")
    print(f"{found['Detector']} objects, {rounds} rounds, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
