# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where the time of a model goes: operators inside ONNX Runtime, and the letterbox and NMS around it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from yolo_ext.deployment.latency import check_fits, noise
from yolo_ext.deployment.runtime import describe, postprocess, predictor, preprocess, run, session
from yolo_ext.stock import module_path


def operators(path: str | Path, imgsz: int, *, threads: int = 1, batch: int = 1, runs: int = 20) -> dict[str, Any]:
    """Profile an ONNX file over ``runs`` calls with ONNX Runtime's own profiler.

    Returned are ``nodes`` (``name, op, ms, share`` of each node after ONNX Runtime's optimisations) and ``ops`` (``op,
    count, ms, share`` summed by operator), both the slowest first, with the mean ms of a call.
    """
    times = {key: sum(calls) / runs for key, calls in _profile(path, imgsz, threads, batch, runs).items()}
    total = sum(times.values()) or 1
    nodes: list[dict[str, Any]] = [
        {"name": name, "op": op, "ms": ms, "share": ms / total}
        for (name, op), ms in sorted(times.items(), key=lambda item: -item[1])
    ]
    ops: list[dict[str, Any]] = []
    for op in {n["op"] for n in nodes}:
        rows = [n for n in nodes if n["op"] == op]
        sums = {k: sum(n[k] for n in rows) for k in ("ms", "share")}
        ops.append({"op": op, "count": len(rows), **sums})
    return {"nodes": nodes, "ops": sorted(ops, key=lambda row: -row["ms"])}


def _profile(path: str | Path, imgsz: int, threads: int, batch: int, runs: int) -> dict[tuple[str, str], list[float]]:
    """Return the ms of each call of each node by name and operator, without those of the first, which warms up."""
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
    times: dict[tuple[str, str], list[float]] = {}
    for event in events[len(events) // (runs + 1) :]:  # every call runs the same nodes
        key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
        times.setdefault(key, []).append(event["dur"] / 1e3)
    return times


def saved_ms(
    fp32: str | Path, int8: str | Path, layers: Iterable[str], imgsz: int, *, runs: int = 30
) -> dict[str, float]:
    """Return how many ms on one thread each layer (module path) gains by INT8, negative where INT8 is slower.

    That is the time of its nodes in the FP32 file less that in the Q/DQ file made from it. The Q/DQ nodes and the
    activation of a layer count with it; what lies between layers does not.
    """
    layers = list(layers)
    before, after = (_by_layer(_profile(file, imgsz, 1, 1, runs), layers) for file in (fp32, int8))
    return {path: before[path] - after[path] for path in layers}


def _by_layer(times: dict[tuple[str, str], list[float]], layers: list[str]) -> dict[str, float]:
    """Return the median ms of each layer's block from the names of nodes, which follow module paths."""
    blocks = {path.removesuffix(".conv"): path for path in layers}
    found = dict.fromkeys(layers, 0.0)
    for (name, _), calls in times.items():
        path = module_path(name)
        while path and path not in blocks:
            path = path.rpartition(".")[0]
        if path:
            found[blocks[path]] += float(np.median(calls))  # other work on the machine hits single calls
    return found


def around(path: str | Path, image: np.ndarray, imgsz: int, rounds: int = 20) -> dict[str, float]:
    """Time the letterbox before a model and the NMS after it, on its own output for a picture (height, width, 3).

    Returned are the medians ``pre_ms`` and ``post_ms``, the latter 0 for classification, and ``detections``, of which
    there are as many as the picture shows, which decides how long NMS takes.
    """
    meta = describe(path)
    pre = _median(lambda: preprocess(image, imgsz), rounds)
    if meta["task"] == "classify":
        return {"pre_ms": pre, "post_ms": 0.0, "detections": 0}
    y = predictor(path, end2end=meta["end2end"])(preprocess(image, imgsz))[0]
    post = _median(lambda: postprocess(y, meta, 0.25, 0.7), rounds)
    return {"pre_ms": pre, "post_ms": post, "detections": len(postprocess(y, meta, 0.25, 0.7))}


def _median(work: Callable[[], Any], rounds: int) -> float:
    """Return the median ms of a call, the first one left out."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[1:]))
