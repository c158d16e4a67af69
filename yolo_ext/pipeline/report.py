# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The end of `compress`: weights to deliver, summary, and the report with its pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from yolo_ext.core.config import as_plain
from yolo_ext.pipeline.run import Run
from yolo_ext.reporting.figures import plot_channels, plot_stages, side_by_side
from yolo_ext.reporting.pages import write_report
from yolo_ext.reporting.tables import write_summary
from yolo_ext.stock.context import quiet

PICTURES = 4
LATENCIES = {  # figures of `summary.json` by what was measured
    "before": {"torch": "base torch", "ort": "base FP32"},
    "after": {"torch": "compressed torch", "ort": "compressed FP32", "ort_int8": "compressed INT8"},
}


def finish(run: Run) -> dict[str, Any]:
    """Write weights/best.pt, summary.json and the report, print the table, and return the summary."""
    stages = {name: dict(d.metrics) for name, d in run.done.items() if d.metrics}
    floats = [name for name in stages if name not in ("ptq", "qat")]
    last = run.quantized()[0] if run.quant else floats[-1]
    before, after = stages["base"], dict(stages[last])
    if "latency" in run.done:
        times = {r["name"]: r["median"] for r in run.done["latency"].rows or []}
        for side, figures in (("before", before), ("after", after)):
            figures["latency_ms"] = {k: times.get(name) for k, name in LATENCIES[side].items()}
    if run.weights() != run.base:
        (run.folder / "weights").mkdir(exist_ok=True)
        shutil.copyfile(run.weights(), run.folder / "weights" / "best.pt")
    stages[last] = after
    summary = write_summary(run.folder, before, after, stages)
    checks = [c for d in run.done.values() for c in d.checks or []]
    page = _report(run, summary, checks)
    LOGGER.info(f"Report: {page}")
    return {**summary, "run_dir": str(run.folder), "checks": checks}


def _report(run: Run, summary: dict[str, Any], checks: list[dict[str, Any]]) -> Path:

    layers = next((d.layers for d in run.done.values() if d.layers), [])
    report = {
        "title": f"Compression report: {run.base.name}",
        "command": summary["command"],
        # The report puts the base in front of the stages itself.
        "summary": {**summary, "stages": {k: v for k, v in summary["stages"].items() if k != "base"}},
        "layers": layers,
        "checks": checks,
        "comparison": run.done["compare"].rows if "compare" in run.done else [],
        "notes": [note for d in run.done.values() for note in d.notes or []],
        "plots": _plots(run, summary, layers),
        "pictures": _pictures(run) if run.data else [],
        "plan": {k: v for k, v in as_plain(run.configs).items() if v},
        **(_latency(run) if "latency" in run.done else {}),
        **(_quantization(run) if run.quant else {}),
    }
    return write_report(run.folder, report)


def _plots(run: Run, summary: dict[str, Any], layers: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Draw figures by stage and channels by layer, and return path and caption of these and of the training curves."""
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    plots = {plot_stages(summary["stages"], folder / "stages.png"): "Stage by stage"}
    if layers:
        plots[plot_channels(layers, folder / "channels.png")] = "Channels before and after"
    curves = {run.folder / name / "results.png": f"Training curves: {name}" for name in run.done}
    plots.update({path: caption for path, caption in curves.items() if path.exists()})
    return [{"path": str(path), "caption": caption} for path, caption in plots.items()]


def _latency(run: Run) -> dict[str, Any]:
    """Return the report's section on latency, with what INT8 gains, or else pruning."""
    record = run.done["latency"]
    name, ratio = list((record.ratios or {}).items())[-1]
    note = (
        f"1 thread unless said otherwise, batch 1, {run.imgsz} px, interleaved. In ONNX Runtime, {name} "
        f"is {ratio['ratio']:.2f}x as fast as base FP32 (10 to 90 %: {ratio['p10']:.2f} to {ratio['p90']:.2f})."
    )
    return {"latency": {"rows": record.rows, "note": note}}


def _quantization(run: Run) -> dict[str, Any]:
    """Return the report's section on what runs in INT8."""
    record = run.quantized()[1]
    counts = {k: (record.metrics or {})[k] for k in ("convs", "int8_convs")}
    told = {k: getattr(record, k) for k in ("float", "f1", "profile", "calibration")}
    return {"quantization": {**counts, **told, "parity": run.done["verify"].parity}}


def _pictures(run: Run) -> list[dict[str, str]]:
    """Draw base and compressed detections side by side on the first val images."""
    from ultralytics import YOLO

    new = run.folder / "onnx" / "int8.onnx" if run.quant else run.weights()
    made: list[dict[str, str]] = []
    if run.task not in ("detect", "segment", "pose") or new == run.base:
        return made
    with quiet():
        models = [YOLO(str(p), task=run.task) for p in (run.base, new)]
        for i, image in enumerate(run.info["images"]["val"][:PICTURES]):
            found: list[Any] = []
            for m in models:
                boxes = m.predict(str(image), imgsz=run.imgsz, device="cpu", verbose=False, rect=False)[0].boxes
                found.append([tuple(r) for r in boxes.data.tolist()] if boxes is not None else [])
            path = run.folder / "plots" / f"detections_{i}.png"
            missed, added = side_by_side(str(image), found[0], found[1], run.info["names"], path)
            made.append({"path": str(path), "caption": f"{Path(image).name}: {missed} missed, {added} added"})
    return made
