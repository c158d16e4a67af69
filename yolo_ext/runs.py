# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The run folder: where it lies, the records of stages that are done once, and the figures of its summary."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from torch import nn
from ultralytics.utils import LOGGER

from yolo_ext import stock
from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.config import CONFIGS, read_options
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.lock import LOCK, RUN, hold
from yolo_ext.core.log import FILE, let_go, log_to
from yolo_ext.core.options import listed
from yolo_ext.core.plain_yaml import plain_yaml
from yolo_ext.stock.context import TASKS, get_save_dir
from yolo_ext.stock.evidence import hash_of, hashed
from yolo_ext.stock.load import img2label_paths
from yolo_ext.stock.model import METRIC

NESTED = {**dict.fromkeys(("latency_ms", "latency_batch32_ms", "latency_ratio"), ("torch", "ort", "ort_int8")),
          **dict.fromkeys([f"{key}_onnx" for key in METRIC], ("fp32", "int8"))}  # fmt: skip
METRICS = ("params", "gflops", "size_mb", "map50", *METRIC, *NESTED, "convs", "int8_convs", "imgsz", "images")
Rows = list[dict[str, Any]]
TRAININGS = ("train", "distill")
OPTIONS = {**dict.fromkeys((*TRAININGS, "sensitivity"), "args.yaml"), "label": "detections.jsonl"}  # else RUN
PLACE = ("project", "name", "exist_ok", "save_dir", "out")
# Keys that may be other ones when a run goes on.
FREE = ("device", "workers", "verbose", "plots", "modules", "max_drop", "contract", "confidence", "mode", "task")
INPUTS = "inputs.json"
AT_ONCE = {"args.yaml", INPUTS, "base_evidence.npz", "weights", FILE, LOCK}  # there before a run has done anything
CHECKED = (".pt", ".onnx", ".npz", ".json")  # ends of what a stage writes for later ones; nothing reads a last.pt
KINDS = {"dict": dict, "list": list, "Rows": list, "str": str, "int": int, "bool": bool, "Any": object}
RESULTS = (INPUTS, "summary.json", "report.json", "report.md", "report.html", "weights/best.pt", "onnx/fp32.onnx",
           "onnx/int8.onnx", "plots/stages.*", "plots/channels.*", "plots/detections_*")  # fmt: skip


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
    start: str | None = None  # hash of the float weights that it started from
    files: Any = None  # what it wrote, relative to its folder, each with a hash where it is checked

    def write(self, path: Path) -> None:
        """Write what the stage has to say."""
        write_json(path, {k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a `stage.json`, an empty record where it is damaged; keys of other versions are left out."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            told = {f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None}
        except (ValueError, AttributeError):
            return cls()
        kinds = {f.name: KINDS[re.split(r"\W", str(f.type))[0]] for f in fields(cls)}
        return cls(**told) if all(isinstance(v, kinds[k]) for k, v in told.items()) else cls()


def located(place: Mapping[str, Any], task: str, mode: str) -> Path:
    """Return the run folder of the user's `place`, by default `mode`, as Ultralytics would choose it."""
    given = {k: place.get(k) for k in ("project", "name", "exist_ok", "save_dir")}
    return Path(get_save_dir(SimpleNamespace(task=task, mode=mode, **given)))


def folder(place: Mapping[str, Any], *, task: str, mode: str) -> Path:
    """Make the run folder of the user's `place`, and write the log there."""
    path = located(place, task, mode)
    path.mkdir(parents=True, exist_ok=True)
    log_to(path)
    return path


def make_way(root: Path, stages: Iterable[str], again: bool) -> None:
    """Refuse a folder that is not empty, unless a run starts over there: what that one wrote goes, and nothing else."""
    if not root.exists() or {p.name for p in root.iterdir() if p.name[0] != "."} <= AT_ONCE:
        return
    if not (root / RUN).exists():
        raise UsageError(f"'{root}' holds files that are not those of such a run. Give another name= or save_dir=.")
    if not again:
        raise UsageError(f"'{root}' holds a run: add resume=True to go on with it, or exist_ok=True to start over.")
    hold(root)
    gone = [file for name in RESULTS for file in root.glob(name)]
    for stage in map(root.joinpath, stages):
        if (file := stage / "stage.json").exists():
            gone += [*(stage / name for name in Record.read(file).files or ()), file]
        gone += [file for name in ("last.pt", "best.pt") for file in stage.rglob(f"weights/{name}")]
    for file in gone:
        if file.resolve().is_relative_to(root):
            file.unlink(missing_ok=True)
    for path in sorted((p for stage in stages for p in (root / stage).rglob("**/")), reverse=True):
        with suppress(OSError):  # not empty
            path.rmdir()


def record(file: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a run, from where `resumed` reads them."""
    atomic_write(file, yaml.safe_dump(plain(options), sort_keys=False))


def plain(given: Any, place: bool = False) -> Any:
    """Return plain values, each file that exists by its whole path; one without a suffix where a `place` is meant."""
    if isinstance(given, Mapping):
        return {k: plain(v, k in ("data", "source", "out")) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return [plain(v, place) for v in given]
    if given in (None, "") or isinstance(given, (int, float)):
        return given
    path = Path(str(given))
    return str(path.resolve() if (place or path.suffix) and path.exists() else given)


def resumed(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the run that `resume`, a place or, of a training, `model` means; refuse other ones."""
    given = {k: v for k, v in options.items() if k not in (*PLACE, "resume") and v not in (None, "")}
    trains, resume = command in TRAININGS, options["resume"]
    if trains and resume is True and not {*PLACE} & {*options}:
        resume = given.get("model", True)
    if trains and Path(str(resume)).suffix == ".pt":
        return {**options, "model": str(resume), "resume": str(resume)}
    path = _stopped(command, options)
    before = saved_options(path / OPTIONS.get(command, RUN))
    for k in (k for k in CONFIGS if isinstance(before.get(k), dict)):  # options that came or went since do not count
        before[k] = {f.name: before[k][f.name] for f in fields(CONFIGS[k]) if f.name in before[k]}
    counts = CONFIGS if trains else {*given} - {*FREE}  # Ultralytics says itself what it ignores
    if changed := sorted(k for k, v in given.items() if k in counts and _differs(k, before.get(k), v)):
        found = f"'{path}' holds a run with other options ({', '.join(changed)} changed)"
        raise UsageError(f"{found}. Leave them out to go on with it, or give another name=.")
    if trains:
        own = dict.fromkeys(("model", "resume"), str(path / "weights" / "last.pt"))
        more = {k: v for k, v in given.items() if k not in CONFIGS}
        return {"modules": before.get("modules"), **more, **own, "save_dir": str(path)}
    free = {k: v for k, v in given.items() if k in FREE}
    return {**before, **free, "resume": True, "out" if command == "label" else "save_dir": str(path)}


def saved_options(file: Path) -> dict[str, Any]:
    """Return the options that a file of a run folder holds."""
    with refused(f"'{file}' is damaged ({{why}}). Restore it, or start over in another folder."):
        text = file.read_text(encoding="utf-8")
        return dict(json.loads(text.splitlines()[0])["options"] if file.suffix == ".jsonl" else plain_yaml(text))


def _stopped(command: str, options: Mapping[str, Any]) -> Path:
    """Return the only folder with a run of a command that `resume` or the place can mean."""
    told = options.get("out") if options["resume"] is True else options["resume"]
    where = {Path(str(told)).resolve()} if told else {located({**options, "exist_ok": True}, t, command) for t in TASKS}
    sign = "weights/last.pt" if command in TRAININGS else OPTIONS.get(command, RUN)
    found = [path for path in where if (path / sign).exists()]
    if len(found) != 1:
        what = f"'{told or options.get('name') or command}' is {'more than one run' if found else 'no stopped run'}"
        raise UsageError(f"Nothing to resume: {what} of '{command}'. Give the folder of one: resume=FOLDER.")
    return found[0]


def _differs(key: str, told: Any, given: Any) -> bool:
    """Tell whether an option is given otherwise than before; of a technique only the options that are given count."""
    if key not in CONFIGS:
        return plain({key: given}) != plain({key: told})
    if isinstance(given, bool) or not told:
        return bool(given) != bool(told)
    now, was = (read_options(key, v if isinstance(v, Mapping) else asdict(v))[0] for v in (given, told))
    was = {**asdict(CONFIGS[key]()), **was}
    return plain({**was, **now}) != plain(was)


def inputs(options: Mapping[str, Any], images: Mapping[str, Sequence[Path]], names: Any) -> dict[str, str]:
    """Return what a run reads: hashes of files of options, classes, count and hash of images (by size) and labels."""
    flat = [pair for k, v in options.items() for pair in (v.items() if isinstance(v, Mapping) else [(k, v)])]
    files = [(k, Path(v)) for k, several in flat for v in listed(several) if isinstance(v, (str, Path)) and v]
    found = {f"{k} {file.name}": hash_of(file) for k, file in files if k != "data" and file.is_file()}
    found["classes"] = ", ".join(map(str, names.values()))
    for split, paths in images.items():
        paths = sorted(paths)
        labels = [p for p in map(Path, img2label_paths([*map(str, paths)])) if p.is_file()]
        seen = hashed(f"{p.parent.name}/{p.name} {p.stat().st_size}".encode() for p in paths)
        read = hashed(part for p in labels for part in (p.name.encode(), p.read_bytes()))
        found[f"images of {split}"], found[f"labels of {split}"] = f"{len(paths)} ({seen})", f"{len(labels)} ({read})"
    return found


def refuse_others(folder: Path, before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Refuse to go on with other inputs than a run began with; files that are gone are missed where they are read."""
    if changed := [f"{k} ({v} then, {now[k]} now)" for k, v in (before or {}).items() if now.get(k, v) != v]:
        other = f"'{folder}' cannot be gone on with, as other inputs would mix: {', '.join(changed)}"
        raise UsageError(f"{other}. Bring back what it began with, or start over: exist_ok=True or another name=.")


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused, unless it holds more than Ultralytics puts there at once."""
    if {p.name for p in folder.rglob("*")} <= AT_ONCE:
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


def stage(root: Path, name: str, work: Callable[[], Record], start: str, again: list[str]) -> Record:
    """Do a stage once: its record `<name>/stage.json` is written when it is done and read on resume.

    It is done again where its files are not as it wrote them, or the weights that it starts from are not (by their
    hash, empty where they are random), and behind a stage that is done again, which `again` names.
    """
    file = root / name / "stage.json"
    if file.exists():
        done = Record.read(file)
        if not (why := _outdated(file.parent, done, start, again)):
            LOGGER.info(f"{name}: done already, not repeated")
            return done
        LOGGER.warning(f"{name}: done again, as {why}")
        again.append(name)
        file.unlink()
    begin = time.monotonic()
    done = replace(work(), seconds=round(time.monotonic() - begin, 1), start=start)
    written = sorted(f for f in file.parent.rglob("*") if f.is_file())
    hashes = [hash_of(f) if f.suffix in CHECKED and f.name != "last.pt" else "" for f in written]
    replace(done, files={str(f.relative_to(file.parent)): h for f, h in zip(written, hashes)}).write(file)
    return Record.read(file)


def _outdated(folder: Path, done: Record, start: str, again: Sequence[str]) -> str:
    """Return why a stage has to be done again, and remove weights that it would take for its own; "" if it has not."""
    files: dict[str, str] = done.files if isinstance(done.files, dict) else {}  # a list in runs of yolo_ext 0.1
    lost = [name for name, digest in files.items() if digest and hash_of(folder / name) != digest]
    moved = done.start and start and done.start != start
    if moved or any(name.endswith(".pt") for name in lost):
        for name in (name for name in files if name.endswith(".pt")):
            (folder / name).unlink(missing_ok=True)
    reasons = {
        "its record is damaged": done == Record(), f"{', '.join(lost)} is gone or changed": lost,
        "it began with other weights": moved, f"{' and '.join(again)} were": again,
    }  # fmt: skip
    return next((why for why, holds in reasons.items() if holds), "")


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
