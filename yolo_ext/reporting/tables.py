# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before | After | Delta: the figures of `summary.json` as text, as rows other outputs can use, and in one sentence."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs

NOISE = 0.04  # of the mAP on one image; it falls with the root of their number: 0.005 on the 72 images of BCCD
EPOCHS = 30  # of a fine-tuning, where there was none
ABSENT = "-"
METRIC = {"map_onnx.int8": "mAP50-95", "map": "mAP50-95", "top1": "top-1"}  # accuracy that a verdict is about
Verdict = Literal["better", "worse", "same", ""]


@dataclass(frozen=True)
class Field:
    """One figure of a measurement."""

    key: str  # dotted path inside a measurement of `summary.json`
    label: str
    column: str  # label where the figure is a column
    kind: Literal["share", "score", "latency", "count"]  # by what two values compare: latencies by the ratio of rounds
    spec: str  # format specification of one value
    fallback: tuple[tuple[str, str], ...] = ()  # (key, short name) that stand in where the base has none of this


@dataclass(frozen=True)
class Row:
    """One compared figure, formatted; `verdict` says how the compressed model does against the base."""

    key: str
    label: str
    before: str
    after: str
    delta: str
    verdict: Verdict


_FP32, _ORT = ("map_onnx.fp32", "ONNX FP32"), ("latency_ms.ort", "ORT FP32")
FIELDS = (
    Field("params", "Parameters", "Params", "share", ",.0f"),
    Field("gflops", "GFLOPs", "GFLOPs", "share", ",.2f"),
    Field("size_mb", "File size (MB)", "Size (MB)", "share", ",.2f"),
    Field("map50", "mAP50", "mAP50", "score", ".4f"),
    Field("map", "mAP50-95", "mAP50-95", "score", ".4f"),
    Field("top1", "Top-1 accuracy", "Top-1", "score", ".4f"),
    Field("map_onnx.fp32", "mAP50-95 ONNX FP32", "mAP ONNX FP32", "score", ".4f", (("map", "PyTorch"),)),
    Field("map_onnx.int8", "mAP50-95 ONNX INT8", "mAP ONNX INT8", "score", ".4f", (_FP32, ("map", "PyTorch"))),
    Field("latency_ms.torch", "Latency PyTorch (ms)", "PyTorch (ms)", "latency", ",.2f"),
    Field("latency_ms.ort", "Latency ORT FP32 (ms)", "ORT FP32 (ms)", "latency", ",.2f"),
    Field("latency_ms.ort_int8", "Latency ORT INT8 (ms)", "ORT INT8 (ms)", "latency", ",.2f", (_ORT,)),
    Field("convs", "Convolutions", "Convs", "count", ",.0f"),
    Field("int8_convs", "INT8 convolutions", "INT8 convs", "count", ",.0f"),
)


def figure(measurement: dict[str, Any] | None, key: str) -> float | None:
    """Return the figure at a dotted path of a measurement, such as `latency_ms.ort`; None where it is not finite."""
    value: Any = measurement
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return float(value)


def cell(value: float | None, spec: str) -> str:
    """Format a figure, one that is absent as `-`."""
    return ABSENT if value is None else format(value, spec)


def comparison_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Row]:
    """Compare two measurements; a figure the base lacks is compared with the fallback that its label then names."""
    rows, ratios = [], (after or {}).get("latency_ratio") or {}
    for field in FIELDS:
        old, new, label = _pair(field, before, after)
        if old is not None or new is not None:
            if field.kind == "latency":  # medians of two measurements are never divided
                delta, verdict = speed(ratios.get(field.key.removeprefix("latency_ms.")) if old and new else None)
            else:
                delta, verdict = compare(old, new, field.kind, noise(after, field.key))
            rows.append(Row(field.key, label, cell(old, field.spec), cell(new, field.spec), delta, verdict))
    return rows


def _pair(field: Field, before: Any, after: Any) -> tuple[float | None, float | None, str]:
    """Return a figure of base and result, and its label, which names what stands in for that of the base."""
    old, new = figure(before, field.key), figure(after, field.key)
    if old is None and new is not None:
        for key, name in field.fallback:
            if (old := figure(before, key)) is not None:
                return old, new, f"{field.label}, before: {name}"
    return old, new, field.label


def noise(measured: Mapping[str, Any] | None, key: str) -> float:
    """Return up to which difference a split cannot tell two accuracies apart; 0 where its images are not known."""
    if not (images := figure(measured, "images")):
        return 0.0
    least = round(1 / images, 4) if key == "top1" else 0.0  # one image
    return max(float(f"{NOISE / math.sqrt(images):.1g}"), least)


def speed(found: Mapping[str, Any] | None) -> tuple[str, Verdict]:
    """Return a ratio of `deployment.latency.speedup` in words that claim no more than it shows, and the verdict."""
    if not found:
        return ABSENT, ""
    ratio, spread = found["ratio"], f"{found['p10']:.2f} to {found['p90']:.2f}"
    if not found["significant"] or round(ratio, 2) == 1:
        return f"same ({spread}x)", "same"
    return (f"{ratio:.2f}x faster ({spread})", "better") if ratio > 1 else (f"{ratio:.2f}x as fast ({spread})", "worse")


def compare(before: float | None, after: float | None, kind: str, noise: float = 0.0) -> tuple[str, Verdict]:
    """Return how far a figure of a `kind` moved, as text, and the verdict; a move within the noise is `same`."""
    if before is None or after is None or (kind == "share" and min(before, after) <= 0):
        return ABSENT, ""
    digits = {"share": 1, "score": 4, "count": 0}[kind]
    change = round(100 * (after - before) / before if kind == "share" else after - before, digits)
    unit = "%" if kind == "share" else ""
    text = f"{change:+,.{digits}f}{unit}" if change else f"{0:.{digits}f}{unit}"
    if kind == "count":
        return text, ""
    if not change or (kind == "score" and abs(change) <= noise):
        return f"{text} (same)" if change else text, "same"
    return text, "better" if (change > 0) == (kind == "score") else "worse"


def comparison_table(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Write the aligned table Before | After | Delta of two measurements with the keys of `summary.json`."""
    rows = comparison_rows(before, after)
    marks = [" (worse)" if r.verdict == "worse" and "x as fast" not in r.delta else "" for r in rows]
    cells = [(r.label, r.before, r.after, r.delta + mark) for r, mark in zip(rows, marks)]
    return align(cells, ("", "Before", "After", "Delta"))


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the figures that a stage changed in one line, latencies aside, and what they were before it."""
    told = []
    for f in (f for f in FIELDS if f.kind != "latency"):
        old, new = figure(before, f.key), figure(after, f.key)
        if new is not None and new != old:
            told.append(f"{f.label} {'' if old is None else f'{old:{f.spec}} -> '}{new:{f.spec}}")
    size = figure(after, "imgsz")
    return f"{', '.join(told)} at {size:.0f} px" if told and size else ", ".join(told)


def note(after: Mapping[str, Any] | None) -> str:
    """Return on what the figures of a comparison were measured, and which of their differences mean nothing."""
    key = "top1" if figure(after, "top1") is not None else "map"
    size, images, told = figure(after, "imgsz"), figure(after, "images"), list[str]()
    if size:
        told.append(f"GFLOPs{f' and {METRIC[key]}' if images else ''} at {size:.0f} px (square images).")
    if images:
        within = f"up to {noise(after, key):g} are within the noise of these {images:.0f} images"
        told.append(f"{METRIC[key]} differences {within}.")
    if any(((after or {}).get("latency_ratio") or {}).values()):
        told.append("Speed: base and result in turns, median (10 to 90 %) of the ratio of each round.")
    return "\n".join(told)


def delivered(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[str, Any, Any]:
    """Return key and values before and after of the accuracy that counts: of the INT8 file, else of the model."""
    fields = {f.key: f for f in FIELDS}
    key = next((k for k in ("map_onnx.int8", "top1") if figure(after, k) is not None), "map")
    return (key, *_pair(fields[key], before, after)[:2])


# The summary of a run ------------------------------------------------------------------------------------------------
def write_summary(root: Path, before: Mapping[str, Any], after: Mapping[str, Any],
                  stages: Mapping[str, Mapping[str, Any]] | None = None, *, table: bool = True,
                  **told: Any) -> dict[str, Any]:  # fmt: skip
    """Write `summary.json` into a run folder, print it as one table Before | After | Delta, and return it.

    Args:
        root: Run folder.
        before: Figures of the base, see `runs.METRICS`.
        after: Figures of the result.
        stages: Figures by stage.
        table: Whether anything changed that a table could show.
        told: `checks` (name, value, limit, passed), `settings`, `seconds` (by stage) and `deploy`, the file of the
            result in the folder, which go into the file; `epochs` of fine-tuning and of QAT (`qat`) and the `next`
            command, for the headline; `method`, `ratio` and `training_s`, for the row in a table of several runs.
    """
    summary = runs.summary(before, after, stages)
    summary |= {k: told.get(k) or {} for k in ("settings", "seconds")} | {"checks": told.get("checks") or []}
    summary |= {"deploy": told.get("deploy"), "passed": all(c["passed"] for c in summary["checks"])}
    summary["headline"], summary["next"] = headline(summary, told) if table else (None, None)
    summary["comparison"] = comparison(summary, told)
    runs.write_json(root / "summary.json", summary)
    if table:
        LOGGER.info(f"\n{comparison_table(summary['before'], summary['after'])}\n{note(summary['after'])}")
    return summary


def conclude(root: Path, summary: Mapping[str, Any]) -> None:
    """Say as the last lines of a command what a run has come to, where its result lies and what that is good for."""
    LOGGER.info(colorstr("bold", summary["headline"]))
    runs.saved(root / (summary["deploy"] or ""), summary["next"] or "")


def headline(summary: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what a result is, what it cost and what to do next, a failed check first; and the next command."""
    before, after, checks = summary["before"], summary["after"], summary["checks"]
    rows, (key, old, new) = {r.key: r for r in comparison_rows(before, after)}, delivered(before, after)
    failed = [f"{c['name']} {c['value']:.4g} (limit {c['limit']:.4g})" for c in checks if not c["passed"]]
    size = f"{after['size_mb']:.2f} MB" if after.get("size_mb") else ""
    said = ", ".join(part for part in (_speed(rows), size, _accuracy(key, old, new, after)) if part) + "."
    if failed:
        said = f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}. {said}"
    if told.get("epochs") == 0:
        said += " Nothing was fine-tuned."
    if str(told.get("deploy")).endswith(".onnx") and key != "map_onnx.int8":
        said += " The accuracy of the INT8 file was not measured."
    lost = {k for k, row in rows.items() if row.verdict == "worse"}
    if key in lost or "max_drop" in "".join(failed) or (told.get("epochs") == 0 and new is None):
        words, options = _advice(key == "map_onnx.int8" and "map" not in lost, told)
        options = options if new is not None else {"data": "data.yaml", **options}
        command = _again(summary["command"], options)
        return f"{said} {words}: {command or ' '.join(f'{k}={v}' for k, v in options.items())}", command
    if failed or not told.get("deploy"):
        return f"{said} Look at the failed checks first." if failed else said, told.get("next")
    return f"{said} Deploy {told['deploy']}.", told.get("next")


def _speed(rows: Mapping[str, Row]) -> str:
    """Return the speed-up of the file nearest to use in words, else the change of FLOPs."""
    for key, name in {"ort_int8": "ONNX Runtime INT8", "ort": "ONNX Runtime", "torch": "PyTorch"}.items():
        row = rows.get(f"latency_ms.{key}")
        if row and row.verdict:
            return f"{row.delta.replace('same', 'as fast as the base')} in {name}"
    flops = rows.get("gflops")
    return f"GFLOPs {flops.delta}" if flops and flops.verdict in ("better", "worse") else ""


def _accuracy(key: str, old: float | None, new: float | None, after: Mapping[str, Any]) -> str:
    """Return what became of the accuracy in words."""
    if new is None:
        return "accuracy not measured"
    metric, size, within = METRIC[key], figure(after, "imgsz"), noise(after, key)
    at = f" at {size:.0f} px" if size else ""
    if old is None:
        return f"{metric} {new:.4f}{at}"
    (text, verdict), moved = compare(old, new, "score", within), f"{old:.4f} -> {new:.4f}{at}"
    if verdict == "worse":
        return f"{metric} fell by {text[1:]} ({moved})"
    same = f"same within {within:g}" if within else "same"
    return f"{metric} {moved} ({same if verdict == 'same' else text})"


def _advice(by_int8: bool, told: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what to do about an accuracy that INT8 or pruning lost, and the options of the run that does it."""
    epochs, qat = told.get("epochs") or 0, told.get("qat") or 0
    if by_int8 and qat:
        return "Train the INT8 model longer", {"quant.epochs": 2 * qat}
    if by_int8:
        return "Train the INT8 model", {"quant.mode": "qat"}
    return "Fine-tune longer" if epochs else "Fine-tune", {"epochs": 2 * epochs or EPOCHS}


def _again(command: str, options: Mapping[str, Any]) -> str | None:
    """Return a command line of ours with other options; None where a script was run."""
    program, *words = shlex.split(command)
    kept = [w for w in words if w.lstrip("-").partition("=")[0] not in (*options, "resume")]
    return shlex.join([program, *kept, *(f"{k}={v}" for k, v in options.items())]) if program == "yolo-ext" else None


def comparison(summary: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a run in a table of several runs: settings, what was done, figures with changes, conclusion."""
    after, rows = summary["after"], {r.key: r for r in comparison_rows(summary["before"], summary["after"])}
    score, _, _ = delivered(summary["before"], after)
    speed = next((k for k in ("ort_int8", "ort", "torch") if figure(after, f"latency_ms.{k}") is not None), "torch")
    change = {k: None if r.delta == ABSENT else r.delta for k, r in rows.items()}
    return {
        "settings": " ".join(f"{k}={v}" for k, v in summary["settings"].items() if v not in (None, "")),
        "method": told.get("method"), "ratio": told.get("ratio"),
        "params": after.get("params"), "params_change": change.get("params"),
        "gflops": _rounded(after, "gflops"), "gflops_change": change.get("gflops"),
        "size_mb": _rounded(after, "size_mb"), "accuracy": _rounded(after, score), "accuracy_change": change.get(score),
        "latency_ms": _rounded(after, f"latency_ms.{speed}"),
        "latency_batch32_ms": _rounded(after, f"latency_batch32_ms.{speed}"),
        "training_s": told.get("training_s"), "conclusion": summary["headline"],
    }  # fmt: skip


def _rounded(measurement: dict[str, Any], key: str) -> float | None:
    """Return a figure of a measurement with four decimals."""
    return None if (value := figure(measurement, key)) is None else round(value, 4)


# Tables --------------------------------------------------------------------------------------------------------------
def stage_rows(stages: Mapping[str, dict[str, Any] | None]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the figures of each stage; figures that no stage has get no column."""
    fields = [f for f in FIELDS if any(figure(m, f.key) is not None for m in stages.values())]
    rows = [[name, *(cell(figure(m, f.key), f.spec) for f in fields)] for name, m in stages.items()]
    return ["Stage", *(f.column for f in fields)], rows


def align(rows: Sequence[Sequence[object]], header: Sequence[object]) -> str:
    """Align cells below a header, the first column to the left, the others to the right, no spaces at line ends."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(c) for c in column) for column in zip(*cells)]
    places = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = [" | ".join(put(c, w) for put, c, w in zip(places, row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "-+-".join("-" * w for w in widths), *lines[1:]])
