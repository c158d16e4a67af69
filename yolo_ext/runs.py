# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The run folder: where it lies, what its summary holds, and stages that are done once."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, YAML

from yolo_ext import stock
from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError

METRICS = ("params", "gflops", "size_mb", "map50", "map", "latency_ms", "map_onnx", "convs", "int8_convs")
NESTED = {"latency_ms": ("torch", "ort", "ort_int8"), "map_onnx": ("fp32", "int8")}


def folder(place: Mapping[str, Any], *, task: str, mode: str, resume: bool = False) -> Path:
    """Make the run folder as Ultralytics would, ``runs/<task>/<name>``.

    Args:
        place: `project`, `name`, `exist_ok` and `save_dir` as the user gave them, None where not.
        task: Ultralytics task.
        mode: Default name of the run.
        resume: Use the folder that is there.

    Returns:
        The folder, which exists.

    Raises:
        UsageError: If there is nothing to resume.
    """
    from ultralytics.cfg import get_save_dir

    args = SimpleNamespace(task=task, mode=mode, project=place.get("project"), name=place.get("name"),
                           save_dir=place.get("save_dir"), exist_ok=bool(place.get("exist_ok")) or resume)  # fmt: skip
    path = Path(get_save_dir(args))
    if resume and not (path / "compress.yaml").exists():
        raise UsageError(f"Nothing to resume in '{path}'. Give the name= (and project=) of an unfinished compress run.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused, unless it holds more than Ultralytics puts there at once."""
    if {p.name for p in folder.rglob("*")} <= {"args.yaml", "weights"}:
        shutil.rmtree(folder)


def read(path: Path) -> dict[str, Any]:
    """Return a YAML file as a dict, empty when it is missing."""
    return YAML.load(path) if path.exists() else {}


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON atomically; paths become strings."""
    atomic_write(path, json.dumps(content, indent=2, default=str))


def stage(root: Path, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a stage once: its record `<name>/stage.json` is written when it is done and read on resume."""
    record = root / name / "stage.json"
    if record.exists():
        LOGGER.info(f"{name}: done already, not repeated")
        return json.loads(record.read_text(encoding="utf-8"))
    done = work()
    write_json(record, done)
    return json.loads(record.read_text(encoding="utf-8"))


def is_unfinished(last: Path) -> bool:
    """Tell whether a training checkpoint still holds the state to go on."""
    try:
        ckpt = torch.load(last, map_location="cpu", weights_only=False)
    except Exception:  # a file of a killed writer is no checkpoint
        return False
    return ckpt.get("epoch", -1) >= 0 and ckpt.get("optimizer") is not None


def size_mb(path: Path) -> float:
    """Return a file's size in MB (10^6 bytes)."""
    return Path(path).stat().st_size / 1e6


def has_boxes(model: nn.Module) -> bool:
    """Tell whether mAP can be measured: classification has none."""
    return stock.task_of(model) != "classify"


def model_figures(model: nn.Module, path: Path | None, imgsz: int) -> dict[str, Any]:
    """Return `params` and `gflops` of the deployed model, and `size_mb` of its file.

    Args:
        model: Float model.
        path: Its file, None when it has none.
        imgsz: Side of the square input in pixels, for the FLOPs.
    """
    params = sum(p.numel() for p in stock.deployed(model).parameters())
    size = size_mb(path) if path and Path(path).suffix != ".yaml" and Path(path).is_file() else None
    return {"params": params, "gflops": stock.gflops(model, imgsz), "size_mb": size}


def metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the full set of figures of `summary.json`, None where one was not measured."""
    full: dict[str, Any] = {k: found.get(k) for k in METRICS}
    for key, names in NESTED.items():
        full[key] = {n: (found.get(key) or {}).get(n) for n in names}
    return full


def command() -> str:
    """Return the command line of this process, fit for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_summary(
    root: Path,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write `summary.json` and print the same as one table Before | After | Delta.

    Args:
        root: Run folder.
        before: Figures of the base model.
        after: Figures of the result.
        stages: Figures by stage.

    Returns:
        What was written.
    """
    from yolo_ext.reporting.tables import comparison_table
    from yolo_ext.stock.context import cpu_info

    summary: dict[str, Any] = {
        "before": metrics(before),
        "after": metrics(after),
        "stages": {k: metrics(v) for k, v in (stages or {}).items()},
        "env": cpu_info(),
        "command": command(),
    }
    write_json(root / "summary.json", summary)
    LOGGER.info("\n" + comparison_table(summary["before"], summary["after"]))
    LOGGER.info(f"Results saved to {root}")
    return summary
