# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The command bench: models side by side in time, memory and accuracy."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_ext.commands import LOGGER, Count, command, numbers
from yolo_ext.core.config import comma_list
from yolo_ext.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

BUSY = 0.75  # load of a processor from which on others noticeably slow a measurement down
TOP = 10  # operators of a profile that are printed
TIMES = ("runtime", "threads", "batch", "median", "p10", "p90", "n")
EXTRAS = {"size_mb": ".2f", "pre_ms": ".2f", "post_ms": ".2f", "detections": "d", "peak_mb": ".0f",
          "runtime_mb": ".0f", "map": ".4f"}  # fmt: skip
PROFILE = (("ops", "time by operator", {"op": "Operator", "count": "Nodes"}),
           ("nodes", "slowest nodes", {"name": "Node", "op": "Operator"}))  # fmt: skip


@command("Measure latency, memory and mAP of .pt, .onnx and OpenVINO models side by side")
def bench(
    models: str | list[str], imgsz: Count | None = None, threads: Any = 1, batch: Any = 1, rounds: Count = 100,
    data: str | None = None, source: str | None = None, profile: bool = False, memory: bool = True, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure files side by side, print the tables and write them.

    Args:
        models: ``.pt`` and ``.onnx`` files and ``*_openvino_model`` folders, a list or separated by commas; the first
            one is the reference.
        imgsz: Side of the square input in pixels; by default that of the first model.
        threads: Threads of each runtime, one number or several to try.
        batch: Images per call, one number or several to try.
        rounds: Timed calls of each model.
        data: Dataset YAML; adds mAP and a plot of mAP against latency.
        source: Image for which letterbox and NMS are timed, by default one of `data`, else noise.
        profile: Also print and write the time of each operator inside ONNX Runtime.
        memory: Also measure peak memory, each model in a process of its own.

    Returns: The contents of ``bench.json``: ``rows`` (by model, threads and batch), ``models``, ``env``, ``profile``.
    Raises: `UsageError` if a file is missing or does not fit.
    """
    from ultralytics.utils import TQDM

    from yolo_ext import runs
    from yolo_ext.deployment.latency import runtime_of
    from yolo_ext.reporting.figures import plot_tradeoff
    from yolo_ext.reporting.tables import write_summary

    files = comma_list(models)
    if missing := [f for f in files if not Path(f).exists()]:
        raise UsageError(f"Model files do not exist: {', '.join(missing)}. Give models=a.pt,b.onnx.")
    for file in files:
        runtime_of(file)
    counts, batches = (
        [*dict.fromkeys(numbers(k, v, int, lambda n: n >= 1, f"whole numbers of at least 1, such as {k}=1,2"))]
        for k, v in {"threads": threads, "batch": batch}.items()
    )
    first = (counts[0], batches[0])
    size = _size(files[0], imgsz)
    env = _environment()
    image, name = _image(data, source, size)
    rows = [row for t in counts for b in batches for row in _measure(files, size, t, b, rounds)]
    about = {f: _about(f, image, size, first, data, memory) for f in TQDM(files, desc="Models")}
    _print(rows, about, f"{size} px, {rounds} interleaved rounds", name)
    folder = runs.folder(place, task="detect", mode="bench")
    found: dict[str, Any] = {"env": env, "imgsz": size, "rounds": rounds, "image": name, "rows": rows, "models": about}
    if profile:
        found["profile"] = _profile(files, size, *first)
    runs.write_json(folder / "bench.json", found)
    _write_csv(folder / "bench.csv", [{**r, **about[r["model"]]} for r in rows])
    if data:
        points = [{**r, "name": Path(r["model"]).name, "map": about[r["model"]]["map"]}
                  for r in rows if (r["threads"], r["batch"]) == first]  # fmt: skip
        plot_tradeoff(points, folder / "tradeoff.png", f"{size} px, batch {first[1]}, threads {first[0]}")
    figures = {r["model"]: _figures(r, about[r["model"]]) for r in reversed(rows)}  # the first setting wins
    write_summary(folder, figures[files[0]], figures[files[-1]], {Path(f).name: figures[f] for f in files})
    return found


def _environment() -> dict[str, Any]:
    """Return and print what the figures depend on, and warn of a machine that is busy."""
    from yolo_ext.stock import cpu_info

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    env = {**cpu_info(), "load": load}
    LOGGER.info(", ".join(f"{k} {v}" for k, v in env.items()))
    if (load or 0) > BUSY * (os.cpu_count() or 1):
        LOGGER.warning(f"The machine is busy (load {load:.1f}): ratios are fair, times in ms are too long.")
    return env


def _size(file: str, given: int | None) -> int:
    """Return the side of the input in pixels that the user asks for, else that of the file."""
    from yolo_ext import stock

    if file.endswith(".pt"):
        return stock.image_size(*stock.load_model(file), given)
    if given is None and file.endswith(".onnx"):
        from yolo_ext.deployment.runtime import describe

        return describe(file)["imgsz"][0]
    return given or 640


def _measure(files: list[str], size: int, threads: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each model in one setting; the first model is the reference."""
    from yolo_ext.deployment.latency import bench, speedup

    found = bench({f: Path(f) for f in files}, size, threads=threads, batch=batch, rounds=rounds)
    rows = []
    for f in files:
        ratio = speedup(found[files[0]], found[f])
        rows.append({"model": f, **{k: found[f][k] for k in TIMES}, "speedup": ratio["ratio"],
                     "speedup_p10": ratio["p10"], "speedup_p90": ratio["p90"],
                     "significant": bool(ratio["significant"])})  # fmt: skip
    return rows


def _image(data: str | None, source: str | None, size: int) -> tuple[np.ndarray, str]:
    """Return a picture (height, width, 3) for letterbox and NMS, and its name."""
    import numpy as np
    from ultralytics.utils.patches import imread

    from yolo_ext.data.check import check_data
    from yolo_ext.data.records import list_images

    if not data and not source:
        noise = np.random.default_rng(0).integers(0, 255, (size * 3 // 4, size, 3), dtype=np.uint8)
        return noise, "noise, on which NMS has little to do: give source=image"
    for file in list_images(source) if source else check_data(str(data))["images"]["val"]:
        if (image := imread(str(file))) is not None:
            return image, str(file)
    raise UsageError(f"No image in '{source or data}' can be read. Give source=image.")


def _about(
    file: str, image: np.ndarray, size: int, setting: tuple[int, int], data: str | None, memory: bool
) -> dict[str, Any]:
    """Return what is measured once for each model: size, surroundings, memory with (threads, batch), accuracy."""
    from yolo_ext import runs
    from yolo_ext.deployment.footprint import peak_memory
    from yolo_ext.deployment.latency import around
    from yolo_ext.deployment.runtime import conv_report
    from yolo_ext.stock.accuracy import accuracy

    path = Path(file)
    convs = conv_report(path) if path.suffix == ".onnx" else {}
    return {
        "size_mb": runs.size_mb(path),
        **(around(path, image, size) if path.is_file() else {}),
        **{k: convs[k] for k in ("convs", "int8_convs") if k in convs},
        **((memory and peak_memory(path, size, *setting)) or {}),
        **(accuracy(path, data, size) if data else {}),
    }


def _print(rows: list[dict[str, Any]], about: dict[str, Any], setting: str, image: str) -> None:
    """Print the times, and below them what is measured once for each model."""
    from yolo_ext.reporting.tables import align, cell

    cells = []
    for r in rows:
        verdict = f"{r['speedup']:.2f}x" if r["significant"] else "within the spread"
        verdict = "reference" if r["model"] == rows[0]["model"] else verdict
        times = (f"{r[k]:.2f}" for k in ("median", "p10", "p90"))
        cells.append([r["model"], r["threads"], r["batch"], *times, verdict])
    LOGGER.info(align(cells, ["Model", "Threads", "Batch", "Median ms", "p10", "p90", "Speed"]) + f"\n{setting}\n")
    head = ["Model", "Size MB", "Letterbox ms", "NMS ms", "Objects", "Peak MB", "of it runtime", "mAP50-95"]
    cells = [[f, *(cell(a.get(k), spec) for k, spec in EXTRAS.items())] for f, a in about.items()]
    LOGGER.info(align(cells, head) + f"\nImage: {image}\n")


def _profile(files: list[str], size: int, threads: int, batch: int) -> dict[str, Any]:
    """Return and print the time of each operator inside ONNX Runtime, by file."""
    from yolo_ext.deployment.latency import operators
    from yolo_ext.reporting.tables import align

    found = {f: operators(f, size, threads=threads, batch=batch) for f in files if f.endswith(".onnx")}
    for file, each in found.items():
        for key, title, head in PROFILE:
            cells = [[*(r[k] for k in head), f"{r['ms']:.3f}", f"{100 * r['share']:.1f} %"] for r in each[key][:TOP]]
            LOGGER.info(f"{file}: {title}\n{align(cells, [*head.values(), 'ms', 'Share'])}\n")
    return found


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that need not have the same columns."""
    from yolo_ext.checkpoint import atomic_write

    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def _figures(row: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of `summary.json` of one model."""
    key = {"torch": "torch", "ort": "ort_int8" if about.get("int8_convs") else "ort"}.get(row["runtime"])
    found = {k: about.get(k) for k in ("size_mb", "map50", "map", "convs", "int8_convs")}
    return {**found, "latency_ms": {key: row["median"]} if key else {}}
