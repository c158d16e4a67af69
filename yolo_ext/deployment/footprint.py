# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Peak memory of a process that does nothing but run one model: ``python -m yolo_ext.deployment.footprint FILE ...``.

Light on purpose: exported models are run without importing torch, as in deployment.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RUNS = 3


def peak_memory(path: str | Path, imgsz: int, threads: int = 1, batch: int = 1) -> dict[str, float] | None:
    """Return the memory in MB (10^6 bytes) of a process that runs a ``.pt``, ``.onnx`` or ``*_openvino_model``.

    That is ``peak_mb`` (largest resident memory) and ``runtime_mb`` (of the runtime before it loads the model); None
    where the system does not tell (no /proc) or the process failed.
    """
    words = [sys.executable, "-m", "yolo_ext.deployment.footprint", str(Path(path).resolve())]
    words += [str(n) for n in (imgsz, threads, batch)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    last = ran.stdout.strip().splitlines()[-1:]
    return json.loads(last[0]) if ran.returncode == 0 and last else None


def _status(key: str) -> float:
    """Return a figure of this process in MB; not of getrusage, whose maximum is inherited from the parent process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def _run(path: Path, imgsz: int, threads: int, batch: int) -> dict[str, float]:
    """Run a model a few times and return the memory, see `peak_memory`."""
    load = _load_openvino if path.is_dir() else _load_onnx if path.suffix == ".onnx" else _load_torch
    before, runner = load(path, imgsz, threads, batch)
    for _ in range(RUNS):
        runner()
    return {"peak_mb": _status("VmHWM"), "runtime_mb": before}


def _load_openvino(path: Path, imgsz: int, threads: int, batch: int) -> tuple[float, Callable[[], Any]]:
    """Return the memory with OpenVINO alone, and a function that runs the model once."""
    import openvino

    before = _status("VmRSS")
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(str(next(path.glob("*.xml"))), "CPU", options)
    request = model.create_infer_request()
    pixels: Any = np.zeros((batch, 3, imgsz, imgsz), np.float32)
    return before, lambda: request.infer([pixels])


def _load_onnx(path: Path, imgsz: int, threads: int, batch: int) -> tuple[float, Callable[[], Any]]:
    """Return the memory with ONNX Runtime alone, and a function that runs the model once."""
    import onnxruntime as ort

    before = _status("VmRSS")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    node = session.get_inputs()[0]
    shape = [n if isinstance(n, int) else d for n, d in zip(node.shape, (batch, 3, imgsz, imgsz))]
    x: Any = np.zeros(shape, np.float32)
    return before, lambda: session.run(None, {node.name: x})


def _load_torch(path: Path, imgsz: int, threads: int, batch: int) -> tuple[float, Callable[[], Any]]:
    """Return the memory with torch and Ultralytics alone, and a function that runs the model once."""
    import torch

    from yolo_ext.deployment.latency import RUNNERS
    from yolo_ext.stock import load  # noqa: F401  part of the runtime, not of the model

    torch.set_num_threads(threads)
    before = _status("VmRSS")
    return before, RUNNERS["torch"](path, imgsz, threads, batch)


if __name__ == "__main__":
    print(json.dumps(_run(Path(sys.argv[1]), *(int(n) for n in sys.argv[2:5]))))
