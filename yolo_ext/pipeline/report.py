# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the report of a run of `compress` shows, gathered from the records of its stages and the files they left."""

import csv
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import DEFAULT_CFG_DICT

import yolo_ext
from yolo_ext import stock
from yolo_ext.core.config import CONFIGS
from yolo_ext.pipeline.run import FINETUNE, Run
from yolo_ext.reporting.figures import side_by_side
from yolo_ext.stock.evidence import Evidence


def contents(run: Run, summary: dict[str, Any], drawn: list[dict[str, str]]) -> dict[str, Any]:
    """Return what `write_report` takes; `drawn` are the paths and captions of pictures."""
    made = {n: f"{n}/int8.onnx" if d.profile else d.weights for n, d in run.done.items() if d.metrics}
    made["base"] = "base/fp32.onnx" if run.quant else run.base.name
    stage, result = run.quantized() if run.quant else ([*made][-1], run.done[[*made][-1]])
    ours = {f"{t}.{name}": value for t, cls in CONFIGS.items() for name, value in asdict(cls()).items()}
    known = {**DEFAULT_CFG_DICT, **FINETUNE, **ours}
    chosen = {k: v for k, v in summary["settings"].items() if v != known.get(k) and k not in ("model", "data")}
    times = {r["name"]: r["median"] for r in run.rows("latency")}
    report = {
        "title": f"Compression report: {run.base.name}",
        "about": _about(run, summary["env"]),
        "summary": summary,
        "files": {**made, "before": made["base"], "after": made[stage]},
        "layers": next((d.layers for d in run.done.values() if d.layers), []),
        "checks": summary["checks"],
        "comparison": [{**r, "ort": times.get(r["timed"])} for r in run.rows("compare")],
        "notes": [note for d in run.done.values() for note in d.notes or []] + run.left_out,
        "curves": [{"name": n, "columns": c} for n in run.done if (c := curves(run.folder / n / "results.csv"))],
        "pictures": drawn,
        "options": {k: (v, known.get(k)) for k, v in chosen.items()},
    }
    if "latency" in run.done:
        how = f"One image of {run.imgsz} px, models in turns, one thread unless said otherwise"
        report["latency"] = {"rows": run.rows("latency"), "note": f"{how}; {run.done['latency'].said or ''}."}
    if run.quant:
        counts = {k: (result.metrics or {})[k] for k in ("convs", "int8_convs")}
        told = {k: getattr(result, k) for k in ("float", "f1", "profile", "calibration")}
        report["quantization"] = {**counts, **told, "parity": run.done["verify"].parity}
    return report


def _about(run: Run, env: dict[str, Any]) -> dict[str, str]:
    """Return the facts in the header of a report."""
    images = {split: len(files) for split, files in run.info.get("images", {}).items()}
    cpu = [env["cpu"], f"{env['threads']} threads", *(k.upper() for k in ("avx2", "vnni") if env[k])]
    others = {k: env[k] for k in ("ultralytics", "torch", "onnx", "onnxruntime", "python")}
    return {
        "Model": f"{run.base.name} ({run.task}, {len(run.load()[0].names)} classes)",
        "Data": Path(run.data).name or "none",
        "Images": ", ".join(f"{n:,} {split}" for split, n in images.items()) or "none",
        "Image size": f"{run.imgsz} px",
        "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Machine": ", ".join(cpu),
        "Load": f"others used {100 * run.busy:.0f} % of the processors when the run began",
        "Versions": ", ".join(f"{k} {v}" for k, v in {"yolo_ext": yolo_ext.__version__, **others}.items()),
    }


def curves(file: Path) -> dict[str, list[float]]:
    """Return losses and metrics of a `results.csv` by column, without those that were never computed."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = list[dict[str, float]]()
    for row in csv.DictReader(lines):
        with suppress(ValueError, TypeError, AttributeError):  # a damaged row
            rows.append({k.strip(): float(v) for k, v in row.items() if v})
    names = [k for k in (rows[0] if rows else ()) if "loss" in k or "metrics" in k]
    found = {k: [r[k] for r in rows if k in r] for k in names}
    return {k: values for k, values in found.items() if any(values)}


def pictures(run: Run, stage: str, proved: dict[str, Any]) -> list[dict[str, str]]:
    """Draw what base and result find, at the confidence judged, in the val images that changed most, side by side."""
    from ultralytics import YOLO

    made: list[dict[str, str]] = []
    new = run.folder / "onnx" / "int8.onnx" if run.quant else run.weights()
    if new == run.base or not proved:
        return made
    options: Any = {"imgsz": run.imgsz, "device": "cpu", "verbose": False, "rect": False, "conf": proved.get("conf")}
    old, now = (Evidence.read(run.folder / name / "evidence.npz") for name in ("base", stage))
    images = {name: f for f in run.info["images"]["val"] for name in (f.name, f"{f.parent.name}/{f.name}")}
    with stock.quiet():
        models = [YOLO(str(p), task=run.task) for p in (run.base, new)]
        for i, name in enumerate(changed(old, now, options["conf"] or 0.0)[:4]):
            path = run.folder / "plots" / f"detections_{i}.png"
            before, after = (m.predict(str(images[name]), **options)[0] for m in models)
            found = side_by_side(before, after, path)
            differs = f"{found['missed']} missed, {found['added']} added"
            if run.task == "classify":
                differs = "another class" if found["missed"] else "the same class"
            made.append({"path": str(path), "caption": f"{name}: {differs}"})
    return made


def changed(base: Evidence, new: Evidence, conf: float) -> list[str]:
    """Return the images, those first in which one of two models finds most targets that the other does not find."""
    shape = len(base.images), len(base.about["names"])

    def right(e: Evidence, kind: str) -> np.ndarray:
        sure = e.hits[kind][:, 0] & (e.conf >= conf)
        return np.bincount(e.image[sure] * shape[1] + e.cls[sure], minlength=shape[0] * shape[1]).reshape(shape)

    moved = np.sum([np.abs(right(new, kind) - right(base, kind)).sum(1) for kind in base.hits], axis=0)
    return [base.images[i] for i in np.argsort(-moved, kind="stable")]
