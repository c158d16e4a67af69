# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before | After | Delta: the figures of `summary.json` as aligned text and as rows other outputs can use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from ultralytics.utils import LOGGER

from yolo_ext import runs

NOISE = 0.05  # latency ratios below this are not called a difference
ABSENT = "-"
Verdict = Literal["better", "worse", "same", ""]


@dataclass(frozen=True)
class Field:
    """One figure of a measurement."""

    key: str  # dotted path inside a measurement of `summary.json`
    label: str
    column: str  # label where the figure is a column
    kind: Literal["share", "score", "latency", "count"]  # by what two values compare
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


def comparison_rows(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[Row]:
    """Compare two measurements; a figure the base lacks is compared with the fallback that its label then names."""
    rows, unsure = [], ((after or {}).get("latency_ms") or {}).get("unsure") or ()  # whose rounds do not agree
    for field in FIELDS:
        old, new, label = figure(before, field.key), figure(after, field.key), field.label
        if old is None and new is not None:
            others = [(value, n) for k, n in field.fallback if (value := figure(before, k)) is not None]
            if others:
                old, label = others[0][0], f"{label}, before: {others[0][1]}"
        if old is not None or new is not None:
            delta, verdict = compare(old, new, field.kind)
            if old is not None and field.key.removeprefix("latency_ms.") in unsure:
                delta, verdict = compare(new, new, field.kind)
            rows.append(Row(field.key, label, cell(old, field.spec), cell(new, field.spec), delta, verdict))
    return rows


def compare(before: float | None, after: float | None, kind: str) -> tuple[str, Verdict]:
    """Return how far a figure of a `kind` moved, as text, and the verdict; a move that rounds to nothing is `same`."""
    if before is None or after is None or (kind in ("share", "latency") and min(before, after) <= 0):
        return ABSENT, ""
    if kind == "latency":
        faster = before >= after
        ratio = round(before / after if faster else after / before, 2)
        if ratio < 1 + NOISE:  # medians of one run move this much without a cause
            return "about equal", "same"
        return f"{ratio:.2f}x {'faster' if faster else 'slower'}", "better" if faster else "worse"
    digits = {"share": 1, "score": 4, "count": 0}[kind]
    change = round(100 * (after - before) / before if kind == "share" else after - before, digits)
    unit = "%" if kind == "share" else ""
    if change == 0:
        return f"{0:.{digits}f}{unit}", "" if kind == "count" else "same"
    text = f"{change:+,.{digits}f}{unit}"
    if kind == "count":
        return text, ""
    return text, "better" if (change > 0) == (kind == "score") else "worse"


def comparison_table(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Write the aligned table Before | After | Delta of two measurements with the keys of `summary.json`."""
    rows = comparison_rows(before, after)
    marks = [" (worse)" if r.verdict == "worse" and "slower" not in r.delta else "" for r in rows]
    cells = [(r.label, r.before, r.after, r.delta + mark) for r, mark in zip(rows, marks)]
    return align(cells, ("", "Before", "After", "Delta"))


def write_summary(root: Path, before: Mapping[str, Any], after: Mapping[str, Any],
                  stages: Mapping[str, Mapping[str, Any]] | None = None, **told: Any) -> dict[str, Any]:  # fmt: skip
    """Write `summary.json` into a run folder, print it as one table Before | After | Delta, and return it.

    `told` may be `settings` and `seconds` (by stage), which go into the file, and `method`, `ratio`, `training_s` and
    `failed` (names of checks), which with these make up the row of the run in a table of several runs.
    """
    summary = runs.summary(before, after, stages)
    summary |= {"settings": told.get("settings") or {}, "seconds": told.get("seconds") or {}}
    summary["comparison"] = comparison(summary, told)
    runs.write_json(root / "summary.json", summary)
    LOGGER.info("\n" + comparison_table(summary["before"], summary["after"]))
    LOGGER.info(f"Results saved to {root}")
    return summary


def comparison(summary: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a run in a table of several runs: settings, what was done, figures with changes, conclusion."""
    after, rows = summary["after"], {r.key: r for r in comparison_rows(summary["before"], summary["after"])}
    score = next((k for k in ("map_onnx.int8", "top1", "map") if k in rows), "map")
    speed = next((k for k in ("ort_int8", "ort", "torch") if figure(after, f"latency_ms.{k}") is not None), "torch")
    change = {k: None if r.delta == ABSENT else r.delta for k, r in rows.items()}
    keys = [k for k in ("params", "gflops", score, f"latency_ms.{speed}") if change.get(k)]
    name = {k: rows[k].label.partition(",")[0].removesuffix(" (ms)") for k in keys}
    says = [f"{name[k]} {change[k]}" for k in keys if k in (*keys[2:], score) or rows[k].verdict != "same"]
    says += [f"checks failed: {', '.join(told['failed'])}"] if told.get("failed") else []
    return {
        "settings": " ".join(f"{k}={v}" for k, v in summary["settings"].items() if v not in (None, "")),
        "method": told.get("method"), "ratio": told.get("ratio"),
        "params": after.get("params"), "params_change": change.get("params"),
        "gflops": _rounded(after, "gflops"), "gflops_change": change.get("gflops"),
        "size_mb": _rounded(after, "size_mb"), "accuracy": _rounded(after, score), "accuracy_change": change.get(score),
        "latency_ms": _rounded(after, f"latency_ms.{speed}"),
        "latency_batch32_ms": _rounded(after, f"latency_batch32_ms.{speed}"),
        "training_s": told.get("training_s"), "conclusion": f"{'; '.join(says)}." if says else None,
    }  # fmt: skip


def _rounded(measurement: dict[str, Any], key: str) -> float | None:
    """Return a figure of a measurement with four decimals."""
    return None if (value := figure(measurement, key)) is None else round(value, 4)


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
