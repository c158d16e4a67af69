# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where the time of a model goes: operators inside ONNX Runtime, and the letterbox and NMS around it."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from yolo_ext.deployment.latency import check_fits, noise
from yolo_ext.deployment.processing import postprocess, preprocess
from yolo_ext.deployment.runtime import describe, predictor, run, session


def operators(path: str | Path, imgsz: int, *, threads: int = 1, batch: int = 1, runs: int = 20) -> dict[str, Any]:
    """Profile an ONNX file with ONNX Runtime's own profiler.

    Args:
        path: ``.onnx`` file.
        imgsz: Side of the square input in pixels.
        threads: Threads within an operator.
        batch: Images per call.
        runs: Profiled calls; a first one, which warms up, is left out.

    Returns:
        ``nodes`` (``name, op, ms, share`` of each node after ONNX Runtime's optimisations) and ``ops`` (``op, count,
        ms, share`` summed by operator), both the slowest first, with the mean ms of a call.

    Raises:
        UsageError: The file is missing, broken, or does not fit ``batch`` and ``imgsz``.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = session(path, threads, profile=Path(folder) / "profile")
        legal = model.get_inputs()[0].shape
        try:
            check_fits(Path(path), legal, imgsz, batch)
            x = noise(batch, legal[1] if isinstance(legal[1], int) else 3, imgsz)
            for _ in range(runs + 1):
                run(model, x)
        finally:
            file = model.end_profiling()
        events = [e for e in json.loads(Path(file).read_text()) if e.get("name", "").endswith("_kernel_time")]
    first = len(events) // (runs + 1)  # of the warm-up; every call runs the same nodes
    times: Counter[tuple[str, str]] = Counter()
    for event in events[first:]:
        times[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]] += event["dur"]
    total = sum(times.values()) or 1
    nodes: list[dict[str, Any]] = [
        {"name": name, "op": op, "ms": t / runs / 1e3, "share": t / total} for (name, op), t in times.most_common()
    ]
    ops: list[dict[str, Any]] = []
    for op in {n["op"] for n in nodes}:
        rows = [n for n in nodes if n["op"] == op]
        sums = {k: sum(n[k] for n in rows) for k in ("ms", "share")}
        ops.append({"op": op, "count": len(rows), **sums})
    return {"nodes": nodes, "ops": sorted(ops, key=lambda row: -row["ms"])}


def around(path: str | Path, image: np.ndarray, imgsz: int, rounds: int = 20) -> dict[str, float]:
    """Time what surrounds a model: letterbox before it, NMS on its own output after it.

    Args:
        path: ``.pt`` or ``.onnx`` file.
        image: Picture (height, width, 3) in BGR; how many objects it shows decides how long NMS takes.
        imgsz: Side of the square input in pixels.
        rounds: Timed calls of each.

    Returns:
        Medians ``pre_ms`` and ``post_ms`` in ms, the latter 0 for classification, and ``detections``.
    """
    meta = describe(path)
    pre = _median(lambda: preprocess(image, imgsz), rounds)
    if meta["task"] == "classify":
        return {"pre_ms": pre, "post_ms": 0.0, "detections": 0}
    y = predictor(path, end2end=meta["end2end"])(preprocess(image, imgsz))[0]
    post = _median(lambda: postprocess(y, meta, 0.25, 0.7), rounds)
    return {"pre_ms": pre, "post_ms": post, "detections": len(postprocess(y, meta, 0.25, 0.7))}


def _median(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[1:]))
