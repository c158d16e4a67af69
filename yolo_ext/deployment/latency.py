# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Latency side by side: models take turns, so that a change of clock or load meets them all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import TQDM

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.decode import Size, height_width

MIN_ROUNDS = 10


def measure(
    runners: dict[str, Callable[[], Any]], *, rounds: int = 60, warmup: int = 10, seconds: float | None = None
) -> dict[str, dict[str, Any]]:
    """Time functions interleaved, in a fresh random order each round.

    A rotating order is not enough: it lets each model always follow the same other one, whose leftovers in the cache
    alone made one file look 2.6 % faster than itself.

    Args:
        runners: Name to a function that runs the model once.
        rounds: Timed calls of each function.
        warmup: Untimed calls of each beforehand.
        seconds: Stop after this time even if ``rounds`` is not reached, though not before 10 rounds.

    Returns:
        Per name ``median, p10, p90`` in ms, ``n`` rounds, and ``samples``, the ms of each round for `speedup`.

    Raises:
        UsageError: Nothing to measure, or fewer than one round.
    """
    if not runners or rounds < 1:
        raise UsageError(f"Cannot measure {len(runners)} models over {rounds} rounds. Give at least one of each.")
    names = list(runners)
    for name in names:
        for _ in range(warmup):
            runners[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of one call would be charged to that model
    start = time.perf_counter()
    try:
        for r in TQDM(range(rounds), desc="Latency", leave=False):
            for name in order.permutation(names).tolist():
                t = time.perf_counter()
                runners[name]()
                samples[name].append((time.perf_counter() - t) * 1e3)
            if seconds is not None and r + 1 >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: {**_spread(values), "n": len(values), "samples": values} for name, values in samples.items()}


def _spread(values: Any) -> dict[str, float]:
    """Return the median and the 10 and 90 % quantiles of some values."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def speedup(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Compare two models that were measured together, and say whether the difference exceeds the noise.

    The rounds are paired: each gives one ratio ``before / after``, so that load which hits both cancels. The
    difference is significant if the 10-90 % range of those ratios excludes 1, that is if at least nine in ten rounds
    agree on which model is faster, over at least 10 rounds.

    Args:
        before: Entry of `measure` for the reference.
        after: Entry of the same `measure` call for the model to judge.

    Returns:
        ``ratio`` (median; above 1 means ``after`` is faster), its ``p10`` and ``p90``, and ``significant``.

    Raises:
        UsageError: The two were not measured in the same rounds.
    """
    a, b = np.asarray(before["samples"]), np.asarray(after["samples"])
    if len(a) != len(b):
        raise UsageError(f"Runs of {len(a)} and {len(b)} rounds cannot be paired. Measure both in one call.")
    ratio = _spread(a / b)
    outside = ratio["p10"] > 1 or ratio["p90"] < 1
    return {
        "ratio": ratio["median"],
        "p10": ratio["p10"],
        "p90": ratio["p90"],
        "significant": outside and len(a) >= MIN_ROUNDS,
    }


def check_fits(path: Path, legal: list[Any], imgsz: Size, batch: int) -> None:
    """Refuse images that a graph of input shape ``legal`` (B, C, H, W), open where no number stands, does not take."""
    want = (batch, *height_width(imgsz))
    if any(isinstance(size, int) and size != w for w, size in zip(want, (legal[0], *legal[2:]))):
        raise UsageError(
            f"'{path}' is a static graph of shape {legal}; batch={batch} and imgsz={imgsz} do not fit. "
            "Use its own batch and imgsz, or export it anew, with dynamic=True for any."
        )


def _onnx_runner(path: Path, imgsz: Size, threads: int, batch: int) -> Callable[[], Any]:
    """Return a function that runs a file once in ONNX Runtime."""
    from yolo_ext.deployment.runtime import run, session

    model = session(path, threads)
    legal = model.get_inputs()[0].shape
    check_fits(path, legal, imgsz, batch)
    x = noise(batch, legal[1] if isinstance(legal[1], int) else 3, imgsz)
    return lambda: run(model, x)


def _openvino_runner(path: Path, imgsz: Size, threads: int, batch: int) -> Callable[[], Any]:
    """Return a function that runs a file once in OpenVINO."""
    from yolo_ext.deployment.export import compiled

    model = compiled(path, threads)
    legal = [d.get_length() if d.is_static else None for d in model.input(0).partial_shape]
    check_fits(path, legal, imgsz, batch)
    x, request = noise(batch, legal[1] or 3, imgsz), model.create_infer_request()
    return lambda: request.infer([x])


def _torch_runner(path: Path, imgsz: Size, threads: int, batch: int) -> Callable[[], Any]:
    """Return a function that runs a file once in torch, fused."""
    import torch

    from yolo_ext.stock.context import quiet
    from yolo_ext.stock.load import as_exported, float_model

    with quiet():
        model = as_exported(float_model(path).fuse())
    x = torch.from_numpy(noise(batch, model.yaml.get("channels", 3), imgsz))

    def runner() -> None:
        with torch.inference_mode():
            model(x)

    return runner


def noise(batch: int, channels: int, imgsz: Size) -> np.ndarray:
    """Return random images (batch, channels, height, width), float32 in 0..1."""
    return np.random.default_rng(0).random((batch, channels, *height_width(imgsz)), dtype=np.float32)


RUNNERS = {"ort": _onnx_runner, "torch": _torch_runner, "openvino": _openvino_runner}


def runtime_of(path: str | Path) -> str:
    """Return which runtime a file is measured in, "ort", "torch" or "openvino"; UsageError where none reads it."""
    path = Path(path)
    kinds = {".onnx": "ort", ".pt": "torch"}
    if path.suffix not in kinds and not path.name.endswith("_openvino_model"):
        raise UsageError(f"Cannot measure '{path}'. Legal: .onnx and .pt files and *_openvino_model folders.")
    return kinds.get(path.suffix, "openvino")


def bench(
    models: Mapping[str, str | Path],
    imgsz: Size,
    *,
    threads: int = 1,
    batch: int = 1,
    rounds: int = 60,
    warmup: int = 10,
    seconds: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure files side by side on the CPU.

    ``.onnx`` runs in ONNX Runtime, ``.pt`` in torch (fused, eval, inference mode), ``*_openvino_model`` in OpenVINO.

    Args:
        models: Name to file.
        imgsz: Input size in pixels: the side of a square, or height and width.
        threads: Threads within an operator, for every runtime.
        batch: Images per call; a static ONNX file has a fixed one.
        rounds: Timed calls of each model.
        warmup: Untimed calls of each beforehand.
        seconds: Time limit of the timed part, see `measure`.

    Returns:
        Per name what `measure` gives, in ms per call, and ``runtime`` (see `runtime_of`), ``threads``, ``batch`` and
        ``imgsz``.

    Raises:
        UsageError: A file is missing, of another kind, or does not fit ``batch`` and ``imgsz``.
    """
    import torch

    runtimes = {name: runtime_of(file) for name, file in models.items()}
    runners = {name: RUNNERS[runtimes[name]](Path(file), imgsz, threads, batch) for name, file in models.items()}
    # The last session that is opened runs 1 to 3 % faster than copies of it; here that is one which is not measured.
    last = next((name for name in reversed(list(models)) if runtimes[name] == "ort"), None)
    spare = RUNNERS["ort"](Path(models[last]), imgsz, threads, batch) if last else None
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = measure(runners, rounds=rounds, warmup=warmup, seconds=seconds)
    finally:
        torch.set_num_threads(torch_threads)
        del spare
    setting = {"threads": threads, "batch": batch, "imgsz": imgsz}
    return {name: {**entry, "runtime": runtimes[name], **setting} for name, entry in found.items()}
