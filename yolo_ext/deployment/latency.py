# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Latency of models side by side, and where their time goes: operators, and the letterbox and NMS around them."""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from ultralytics.utils import TQDM

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.decode import Size, height_width
from yolo_ext.deployment.export import SUFFIX
from yolo_ext.deployment.footprint import torch_runner
from yolo_ext.deployment.runtime import compiled, describe, postprocess, predictor, preprocess, run, session
from yolo_ext.reporting.tables import speed
from yolo_ext.stock import module_path

Calls: TypeAlias = dict[tuple[str, str], list[float]]  # ms of each call of a node, by its name and operator
MIN_ROUNDS = 10


def measure(runners: dict[str, Callable[[], Any]], *, rounds: int = 60, warmup: int = 10,
            seconds: float | None = None, name: str = "Latency") -> dict[str, dict[str, Any]]:  # fmt: skip
    """Time functions that take turns, so that a change of clock or load meets them all, after untimed calls of each."""
    if not runners or rounds < 1:
        raise UsageError(f"Cannot measure {len(runners)} models over {rounds} rounds. Give at least one of each.")
    for runner in runners.values():
        for _ in range(warmup):
            runner()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order = np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of one call would be charged to that model
    start = time.perf_counter()
    try:
        for r in (bar := TQDM(range(rounds), desc=name, leave=False)):
            # In a rotating order each model follows the same other one; its cache made a file 2.6 % faster than itself.
            for model in order.permutation(list(runners)).tolist():
                t = time.perf_counter()
                runners[model]()
                samples[model].append((time.perf_counter() - t) * 1e3)
            if seconds is not None and r + 1 >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                bar.total = r + 1
                bar.update()
                break
    finally:
        if collecting:
            gc.enable()
    return {name: {**_spread(values), "n": len(values), "samples": values} for name, values in samples.items()}


def _spread(values: Any) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def speedup(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Compare two models by their ratio in each round, and put it into words that claim no more than `significant`.

    That is so if nine in ten rounds, of 10 or more, name the same model as the faster one.

    Args:
        before: What `bench` gives for the reference.
        after: What the same call gives for the model to judge.
    Returns: ``ratio`` (median; above 1: ``after`` is faster), its ``p10`` and ``p90``, ``significant``, and ``words``.
    Raises: `UsageError`: The two were not measured in the same rounds.
    """
    a, b = np.asarray(before["samples"]), np.asarray(after["samples"])
    if len(a) != len(b):
        raise UsageError(f"Runs of {len(a)} and {len(b)} rounds cannot be paired. Measure both in one call.")
    found = _spread(a / b)  # of one round, so that load which hits both cancels
    significant = len(a) >= MIN_ROUNDS and bool(found["p10"] > 1 or found["p90"] < 1)
    result = {"ratio": found.pop("median"), **found, "significant": significant}
    return {**result, "words": speed(result)[0]}


def _noise(path: str | Path, legal: list[Any], imgsz: Size, batch: int) -> np.ndarray:
    """Return random images for a graph of input shape ``legal`` (B, C, H, W), open where no number stands."""
    h, w = height_width(imgsz)
    if any(isinstance(size, int) and size != want for want, size in zip((batch, h, w), (legal[0], *legal[2:]))):
        text = f"{batch=} and {imgsz=} do not fit. Export with dynamic=True for any"
        raise UsageError(f"'{path}' is a static graph of shape {legal}; {text}.")
    shape = (batch, legal[1] if isinstance(legal[1], int) else 3, h, w)
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def _onnx_runner(path: Path, imgsz: Size, threads: int, batch: int) -> Callable[[], Any]:
    model = session(path, threads)
    x = _noise(path, model.get_inputs()[0].shape, imgsz, batch)
    return lambda: run(model, x)


def _openvino_runner(path: Path, imgsz: Size, threads: int, batch: int) -> Callable[[], Any]:
    model = compiled(path, threads)
    x = _noise(path, [d.get_length() if d.is_static else None for d in model.input(0).partial_shape], imgsz, batch)
    request = model.create_infer_request()
    return lambda: request.infer([x])


RUNNERS = {"ort": _onnx_runner, "torch": torch_runner, "openvino": _openvino_runner}


def runtime_of(path: str | Path) -> str:
    """Return which runtime a file is measured in, "ort", "torch" or "openvino"; UsageError where none reads it."""
    path = Path(path)
    kinds = {".onnx": "ort", ".pt": "torch"}
    if path.suffix not in kinds and not path.name.endswith(SUFFIX):
        raise UsageError(f"Cannot measure '{path}'. Legal: .onnx and .pt files and *_openvino_model folders.")
    return kinds.get(path.suffix, "openvino")


def bench(models: Mapping[str, str | Path], imgsz: Size, *, threads: int = 1, batch: int = 1, rounds: int = 60,
          seconds: float | None = None) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Measure files side by side on the CPU.

    ``.onnx`` runs in ONNX Runtime, ``.pt`` in torch (fused, eval, inference mode), ``*_openvino_model`` in OpenVINO.

    Args:
        models: Name to file.
        imgsz: Input size in pixels: the side of a square, or height and width.
        threads: Threads within an operator, for every runtime.
        batch: Images per call; a static ONNX file has a fixed one.
        rounds: Timed calls of each model.
        seconds: Time after which the measurement ends, though not before 10 rounds.
    Returns: By name ``median, p10, p90`` in ms per call, ``n`` rounds, ``samples`` (ms of each), ``runtime``
        ("ort", "torch" or "openvino"), ``threads``, ``batch`` and ``imgsz``.
    Raises: `UsageError`: A file is missing, of another kind, or does not fit ``batch`` and ``imgsz``.
    """
    runtimes = {name: runtime_of(file) for name, file in models.items()}
    threads_before = torch.get_num_threads()
    try:
        runners = {name: RUNNERS[runtimes[name]](Path(file), imgsz, threads, batch) for name, file in models.items()}
        # The last session that is opened runs 1 to 3 % faster than copies of it; let it be one that is not measured.
        last = next((file for name, file in reversed(list(models.items())) if runtimes[name] == "ort"), None)
        spare = RUNNERS["ort"](Path(last), imgsz, threads, batch) if last else None
        setting = {"threads": threads, "batch": batch, "imgsz": imgsz}
        name = f"Latency ({', '.join(dict.fromkeys(runtimes.values()))}, {threads=}, {batch=})"
        found = measure(runners, rounds=rounds, seconds=seconds, name=name)
        del spare
    finally:
        torch.set_num_threads(threads_before)
    return {name: {**entry, "runtime": runtimes[name], **setting} for name, entry in found.items()}


def operators(path: str | Path, imgsz: int, *, threads: int = 1, batch: int = 1, runs: int = 20) -> dict[str, Any]:
    """Return mean ms of the ``nodes`` that ONNX Runtime runs, and of the ``ops`` that they sum up to, slowest first."""
    times = {key: sum(calls) / runs for key, calls in _profile(path, imgsz, threads, batch, runs).items()}
    total = sum(times.values()) or 1
    ranked, ops = sorted(times.items(), key=lambda item: -item[1]), list[dict[str, Any]]()
    nodes: list[dict[str, Any]] = [{"name": n, "op": op, "ms": ms, "share": ms / total} for (n, op), ms in ranked]
    for op in {n["op"] for n in nodes}:
        rows = [n for n in nodes if n["op"] == op]
        ops.append({"op": op, "count": len(rows), **{k: sum(n[k] for n in rows) for k in ("ms", "share")}})
    return {"nodes": nodes, "ops": sorted(ops, key=lambda row: -row["ms"])}


def _profile(path: str | Path, imgsz: int, threads: int, batch: int, runs: int) -> Calls:
    """Return the ms of the calls of an ONNX file but the first, which warms up."""
    with tempfile.TemporaryDirectory() as folder:
        model = session(path, threads, profile=Path(folder) / "profile")
        try:
            x = _noise(path, model.get_inputs()[0].shape, imgsz, batch)
            for _ in range(runs + 1):
                run(model, x)
        finally:
            file = model.end_profiling()
        events = [e for e in json.loads(Path(file).read_text()) if e.get("name", "").endswith("_kernel_time")]
    times: Calls = {}
    for event in events[len(events) // (runs + 1) :]:  # every call runs the same nodes
        key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
        times.setdefault(key, []).append(event["dur"] / 1e3)
    return times


def saved_ms(fp32: str | Path, int8: str | Path, layers: Collection[str], imgsz: int, *,
             runs: int = 30) -> dict[str, float]:  # fmt: skip
    """Return how many ms on one thread each layer (path), with its activation and Q/DQ nodes, gains by INT8."""
    before, after = (_by_layer(_profile(file, imgsz, 1, 1, runs), layers) for file in (fp32, int8))
    return {path: before[path] - after[path] for path in layers}


def _by_layer(times: Calls, layers: Collection[str]) -> dict[str, float]:
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
    """Time letterbox and NMS (0 in classification) of a model, on its own output for a picture (height, width, 3)."""
    meta = describe(path)
    work: dict[str, Callable[[], Any]] = {"pre": lambda: preprocess(image, imgsz)}
    if meta["task"] != "classify":
        y = predictor(path, end2end=meta["end2end"])(preprocess(image, imgsz))[0]
        work["post"] = lambda: postprocess(y, meta, 0.25, 0.7)
    found = measure(work, rounds=rounds, warmup=1, name="Letterbox and NMS")
    times = {f"{name}_ms": found[name]["median"] if name in found else 0.0 for name in ("pre", "post")}
    return {**times, "detections": len(work["post"]()) if "post" in work else 0}
