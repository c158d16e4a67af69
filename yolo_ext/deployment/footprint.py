# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Peak memory of a process that only runs one model, without torch for exported ones: ``python -m ...footprint``."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RUNS = 3


def peak_memory(path: str | Path, imgsz: int, threads: int = 1, batch: int = 1) -> dict[str, float] | None:
    """Return the resident MB (10^6 bytes) of a process that runs a model, and before it loads it; None if unknown."""
    words = [sys.executable, "-m", "yolo_ext.deployment.footprint", str(Path(path).resolve())]
    words += [str(n) for n in (imgsz, threads, batch)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)  # nosec B603  # no shell
    last = ran.stdout.strip().splitlines()[-1:]
    return json.loads(last[0]) if ran.returncode == 0 and last else None


def _status(key: str) -> float:
    """Return a figure of this process in MB; not of getrusage, whose maximum is inherited from the parent process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def _openvino(path: Path, imgsz: int, threads: int, batch: int, ready: Callable[[], Any]) -> Callable[[], Any]:
    import openvino

    ready()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(str(next(path.glob("*.xml"))), "CPU", options)
    request = model.create_infer_request()
    pixels: Any = np.zeros((batch, model.input(0).partial_shape[1].get_length(), imgsz, imgsz), np.float32)
    return lambda: request.infer([pixels])


def _onnx(path: Path, imgsz: int, threads: int, batch: int, ready: Callable[[], Any]) -> Callable[[], Any]:
    import onnxruntime as ort

    ready()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    node = session.get_inputs()[0]
    shape = [n if isinstance(n, int) else d for n, d in zip(node.shape, (batch, 3, imgsz, imgsz))]
    x: Any = np.zeros(shape, np.float32)
    return lambda: session.run(None, {node.name: x})


def torch_runner(path: Path, imgsz: int | Sequence[int], threads: int, batch: int,
                 ready: Callable[[], Any] = lambda: None) -> Callable[[], Any]:  # fmt: skip
    """Return a function that runs a ``.pt`` once in torch, fused, and give torch that many threads."""
    import torch

    from yolo_ext.stock import input_channels, load, quiet

    torch.set_num_threads(threads)
    ready()
    with quiet():
        model = load.as_exported(load.float_model(path).fuse())
    size = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    x = torch.from_numpy(np.random.default_rng(0).random((batch, input_channels(model), *size), dtype=np.float32))
    return torch.inference_mode()(lambda: model(x))


if __name__ == "__main__":
    file, (size, threads, batch), before = Path(sys.argv[1]), (int(n) for n in sys.argv[2:5]), list[float]()
    load = _openvino if file.is_dir() else _onnx if file.suffix == ".onnx" else torch_runner
    runner = load(file, size, threads, batch, lambda: before.append(_status("VmRSS")))
    for _ in range(RUNS):
        runner()
    print(json.dumps({"peak_mb": _status("VmHWM"), "runtime_mb": before[0]}))
