# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The run folder: where it lies, the records of stages that are done once, and the figures of its summary."""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER

from yolo_ext import stock
from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import FILE, let_go, log_to
from yolo_ext.stock.context import cpu_info, get_save_dir

METRICS = ("params", "gflops", "size_mb", "map50", "map", "top1", "latency_ms", "latency_batch32_ms", "latency_ratio",
           "map_onnx", "convs", "int8_convs", "imgsz", "images")  # fmt: skip
NESTED = {**dict.fromkeys(("latency_ms", "latency_batch32_ms", "latency_ratio"), ("torch", "ort", "ort_int8")),
          "map_onnx": ("fp32", "int8")}  # fmt: skip
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """What a stage leaves behind in its `stage.json`; None where it has nothing to say."""

    metrics: dict[str, Any] | None = None  # figures of `summary.json`
    weights: str | None = None  # newest float model, relative to the run folder
    layers: Rows | None = None  # channels of each layer before and after pruning
    checks: Rows | None = None  # name, value, limit and outcome
    said: str | None = None  # what was done, for the line about the stage
    notes: list[str] | None = None  # sentences for the report
    rows: Rows | None = None  # measurements side by side: latencies, or other models
    ratios: dict[str, dict[str, Any]] | None = None  # speed against the base by name: median, spread, significance
    f1: dict[str, dict[str, float]] | None = None  # best F1 and its confidence of the FP32 and the INT8 file
    float: dict[str, str] | None = None  # reason by path of each layer that stays float
    planned: int | None = None  # convolutions that should run as INT8
    accidents: dict[str, str] | None = None  # reason by path of each of them that does not
    chosen: str | None = None  # float weights that the ONNX files were written from
    calibration: dict[str, Any] | None = None  # what the ranges were measured on
    profile: str | None = None  # of quantization
    better: bool | None = None  # whether QAT beats PTQ
    skipped: str | None = None  # why a stage had nothing to do
    parity: dict[str, Any] | None = None  # differences between the INT8 file, its simulation and PyTorch
    seconds: Any = None  # a number: what the stage took

    def write(self, path: Path) -> None:
        """Write what the stage has to say."""
        write_json(path, {k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a `stage.json`; keys of other versions are left out."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{f.name: found.get(f.name) for f in fields(cls)})


def folder(place: Mapping[str, Any], *, task: str, mode: str, resume: bool = False) -> Path:
    """Make the run folder of the user's `place`, by default `mode`, as Ultralytics would, or `resume` in one."""
    args = SimpleNamespace(task=task, mode=mode, project=place.get("project"), name=place.get("name"),
                           save_dir=place.get("save_dir"), exist_ok=bool(place.get("exist_ok")) or resume)  # fmt: skip
    path = Path(get_save_dir(args))
    if resume and not (path / "compress.yaml").exists():
        raise UsageError(f"Nothing to resume in '{path}'. Give the name= (and project=) of an unfinished compress run.")
    path.mkdir(parents=True, exist_ok=True)
    log_to(path)
    return path


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused, unless it holds more than Ultralytics puts there at once."""
    if {p.name for p in folder.rglob("*")} <= {"args.yaml", "weights", FILE}:
        let_go()
        shutil.rmtree(folder)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON atomically; paths become strings."""
    atomic_write(path, json.dumps(content, indent=2, default=str))


def write_csv(path: Path, rows: Rows) -> None:
    """Write rows, which need not have the same columns, atomically."""
    text, columns = io.StringIO(), dict.fromkeys(k for r in rows for k in r)
    csv.writer(text, lineterminator="\n").writerows([columns, *([r.get(k) for k in columns] for r in rows)])
    atomic_write(path, text.getvalue())


def saved(where: Path | str, use: str = "") -> None:
    """Say as the last line of a command where its files lie, and which command makes sense next."""
    LOGGER.info(f"Results saved to {where}{f'. Next: {use}' if use else ''}")


def stage(root: Path, name: str, work: Callable[[], Record]) -> Record:
    """Do a stage once: its record `<name>/stage.json` is written when it is done and read on resume."""
    file = root / name / "stage.json"
    if file.exists():
        LOGGER.info(f"{name}: done already, not repeated")
    else:
        start = time.monotonic()
        replace(work(), seconds=round(time.monotonic() - start, 1)).write(file)
    return Record.read(file)


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all that is in a folder, in MB (10^6 bytes)."""
    files = Path(path).rglob("*") if Path(path).is_dir() else [Path(path)]
    return sum(f.stat().st_size for f in files) / 1e6


def model_figures(model: nn.Module, path: Path | None, imgsz: int) -> dict[str, Any]:
    """Return `params` and `gflops` (at `imgsz` pixels) of the deployed model, and `size_mb` of its file."""
    params = sum(p.numel() for p in stock.deployed(model).parameters())
    size = size_mb(path) if path and Path(path).suffix != ".yaml" and Path(path).is_file() else None
    return {"params": params, "gflops": stock.gflops(model, imgsz), "size_mb": size, "imgsz": imgsz}


def metrics(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the full set of figures of `summary.json`, None where one was not measured."""
    nested = {key: {n: (found.get(key) or {}).get(n) for n in names} for key, names in NESTED.items()}
    return {k: nested.get(k, found.get(k)) for k in METRICS}


def summary(before: Mapping[str, Any], after: Mapping[str, Any],
            stages: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:  # fmt: skip
    """Return what `summary.json` always holds: figures before, after and by stage, environment and command."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    by_stage = {k: metrics(v) for k, v in (stages or {}).items()}
    compared = {"before": metrics(before), "after": metrics(after), "stages": by_stage}
    return {**compared, "env": cpu_info(), "command": command}
