# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before | After | Delta: the figures of `summary.json` as text, as rows other outputs can use, and in one sentence."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs
from yolo_ext.stock.context import cpu_info
from yolo_ext.stock.model import METRIC

UNCLEAR = 1.25  # rounds that name no faster model and spread further than this do not show that both are as fast
ABSENT = "-"
COMPARED = ("before", "after", "contract")  # of `summary.json`
INT8 = "_onnx.int8"  # behind a metric: that of the INT8 file
Verdict = Literal["better", "worse", "same", "undecided", ""]
Figures = Mapping[str, Any] | None  # a measurement
TEXT = Environment(loader=FileSystemLoader(Path(__file__).with_name("templates")), trim_blocks=True, lstrip_blocks=True)  # nosec B701  # text


@dataclass(frozen=True)
class Field:
    """One figure of a measurement."""

    key: str  # dotted path inside a measurement of `summary.json`
    label: str
    column: str  # label where the figure is a column
    kind: Literal["share", "score", "latency", "count"]  # by what two values compare: latencies by the ratio of rounds
    spec: str  # format specification of one value
    fallback: tuple[tuple[str, str], ...] = ()  # (key, short name) that stand in where the base has none of this
    slack: float = 0.0  # change that means nothing


@dataclass(frozen=True)
class Row:
    """One compared figure, formatted; `verdict` says how the compressed model does against the base."""

    key: str
    label: str
    before: str
    after: str
    delta: str
    verdict: Verdict


def _accuracies(key: str, word: str) -> list[Field]:
    """Return a metric of the model, and of its ONNX files."""
    word = word if word.startswith("mAP") else word[0].upper() + word[1:]
    label, short = word + " accuracy" * word.startswith("Top"), word.removesuffix("50-95")
    back = ((f"{key}_onnx.fp32", "ONNX FP32"), (key, "PyTorch"))
    files = ((key, "", ()), (f"{key}_onnx.fp32", " ONNX FP32", back[1:]), (key + INT8, " ONNX INT8", back))
    return [Field(k, label + of, (short if of else word) + of, "score", ".4f", others) for k, of, others in files]


_ORT = (("latency_ms.ort", "ORT FP32"),)
FIELDS = (
    Field("params", "Parameters", "Params", "share", ",.0f"),
    Field("gflops", "GFLOPs", "GFLOPs", "share", ",.2f"),
    Field("size_mb", "File size (MB)", "Size (MB)", "share", ",.2f", slack=1.0),  # %: notes beside the weights
    Field("map50", "mAP50", "mAP50", "score", ".4f"),
    *(field for metric in METRIC.items() for field in _accuracies(*metric)),
    Field("latency_ms.torch", "Latency PyTorch (ms)", "PyTorch (ms)", "latency", ",.2f"),
    Field("latency_ms.ort", "Latency ORT FP32 (ms)", "ORT FP32 (ms)", "latency", ",.2f"),
    Field("latency_ms.ort_int8", "Latency ORT INT8 (ms)", "ORT INT8 (ms)", "latency", ",.2f", _ORT),
    Field("convs", "Convolutions", "Convs", "count", ",.0f"),
    Field("int8_convs", "INT8 convolutions", "INT8 convs", "count", ",.0f"),
)


def figure(measurement: Mapping[str, Any] | None, key: str) -> float | None:
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


def comparison_rows(before: Figures, after: Figures, contract: Figures = None) -> list[Row]:
    """Compare two measurements; a figure the base lacks is compared with the fallback that its label then names."""
    rows, ratios = [], (after or {}).get("latency_ratio") or {}
    known = {c["name"]: c for c in (contract or {}).get("changes", ())}
    # The intervals are those of the file to deploy.
    known |= {k + INT8: known.pop(k) for k in METRIC if k in known and figure(after, k + INT8) is not None}
    for field in FIELDS:
        old, new, label = figure(before, field.key), figure(after, field.key), field.label
        if old is None and new is not None:
            others = [(value, n) for k, n in field.fallback if (value := figure(before, k)) is not None]
            if others:
                old, label = others[0][0], f"{label}, before: {others[0][1]}"
        if old is not None or new is not None:
            if field.kind == "latency":  # medians of two measurements are never divided
                delta, verdict = speed(ratios.get(field.key.removeprefix("latency_ms.")) if old and new else None)
            else:
                delta, verdict = compare(old, new, field.kind, field.slack, known.get(field.key))
            rows.append(Row(field.key, label, cell(old, field.spec), cell(new, field.spec), delta, verdict))
    return rows


def judged(rows: Sequence[Row]) -> Row | None:
    """Return the accuracy that counts, of the INT8 file, else of the model: that of the metric that lost most."""
    known = {r.key: r for r in rows if r.after != ABSENT}
    return max(filter(None, (known.get(k + INT8) or known.get(k) for k in METRIC)), key=loss, default=None)


def loss(row: Row) -> float:
    """Return what the figure of a row has lost as it is shown, minus infinity where the base has none."""
    return -math.inf if ABSENT in (row.before, row.after) else round(float(row.before) - float(row.after), 4)


def speed(found: Mapping[str, Any] | None) -> tuple[str, Verdict]:
    """Return a ratio of `deployment.latency.speedup` in words that claim no more than it shows, and the verdict."""
    if not found:
        return ABSENT, ""
    ratio, spread = found["ratio"], f"{found['p10']:.2f} to {found['p90']:.2f}"
    if not found["significant"] or round(ratio, 2) == 1:
        alike = found["p10"] > 1 / UNCLEAR and found["p90"] < UNCLEAR
        return f"{'same' if alike else 'unclear'} ({spread}x)", "same"
    return (f"{ratio:.2f}x faster ({spread})", "better") if ratio > 1 else (f"{ratio:.2f}x as fast ({spread})", "worse")


def compare(
    before: float | None, after: float | None, kind: str, slack: float = 0.0, shown: Mapping[str, Any] | None = None
) -> tuple[str, Verdict]:
    """Return how far a figure of a `kind` moved, as text, and the verdict: of an accuracy what a split has `shown`."""
    if before is None or after is None or (kind == "share" and min(before, after) <= 0):
        return ABSENT, ""
    digits = {"share": 1, "score": 4, "count": 0}[kind]
    if kind == "score":  # the difference of what is shown
        before, after = round(before, digits), round(after, digits)
    change = round(100 * (after - before) / before if kind == "share" else after - before, digits)
    unit = "%" if kind == "share" else ""
    text = f"{change:+,.{digits}f}{unit}" if change else f"{0:.{digits}f}{unit}"
    if kind == "score" and shown:
        word = {"undecided": "not decidable"}.get(shown["verdict"], shown["verdict"])
        return f"{text} ({shown['low']:+.4f} to {shown['high']:+.4f}: {word})", shown["verdict"]
    if kind != "share":
        return text, ""
    if abs(change) <= slack:
        return f"{text} (same)" if change else text, "same"
    return text, "worse" if change > 0 else "better"


def comparison_table(before: Figures, after: Figures, contract: Figures = None) -> str:
    """Write the aligned table Before | After | Delta of two measurements with the keys of `summary.json`."""
    rows = comparison_rows(before, after, contract)
    marks = [" (worse)" if r.verdict == "worse" and ")" not in r.delta else "" for r in rows]
    cells = [(r.label, r.before, r.after, r.delta + mark) for r, mark in zip(rows, marks)]
    return align(cells, ("", "Before", "After", "Delta"))


def note(after: Figures, contract: Figures = None) -> str:
    """Return on what the figures of a comparison were measured, and what the intervals of accuracies are."""
    size, images = figure(after, "imgsz"), figure(after, "images")
    said = (f" at {size:.0f} px (square images)" if size else "") + (f" on {images:.0f} images" if images else "")
    interval = " In brackets: what an accuracy may change by on other images like these." if contract else ""
    return f"{f'Measured{said}.' if said else ''}{interval}".strip()


# The summary of a run ------------------------------------------------------------------------------------------------
def write_summary(root: Path, before: Mapping[str, Any], after: Mapping[str, Any],
                  stages: Mapping[str, Mapping[str, Any]] | None = None, *, table: bool = True,
                  **told: Any) -> dict[str, Any]:  # fmt: skip
    """Write `summary.json` of a run with all that is `told` of it, and print it as one table Before | After | Delta."""
    program = Path(sys.argv[0])
    command = shlex.join(["yolo-ext" if program.parent.name == "yolo_ext" else program.name, *sys.argv[1:]])
    by_stage = {k: runs.metrics(v) for k, v in (stages or {}).items()}
    summary: dict[str, Any] = {"before": runs.metrics(before), "after": runs.metrics(after), "stages": by_stage}
    summary |= {"env": cpu_info(), "command": command}
    summary |= {k: told.get(k) or {} for k in ("settings", "seconds")} | {"checks": told.get("checks") or []}
    summary |= {"contract": told.get("contract") or {}, "deploy": told.get("deploy")}
    summary["passed"] = all(c["passed"] for c in summary["checks"])
    summary["headline"], summary["next"] = headline(summary, told) if table else (None, None)
    summary["comparison"] = comparison(summary, told)
    runs.write_json(root / "summary.json", summary)
    if table:
        shown = summary["after"], summary["contract"]
        LOGGER.info(f"\n{comparison_table(summary['before'], *shown)}\n{note(*shown)}")
    return summary


def conclude(root: Path, summary: Mapping[str, Any]) -> None:
    """Say as the last lines of a command what a run has come to, where its result lies and what that is good for."""
    LOGGER.info(colorstr("bold", summary["headline"]))
    runs.saved(root / (summary["deploy"] or ""), summary["next"] or "")


def headline(summary: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what a result is, what it cost and what to do next, a failed check first; and the next command if good."""
    after, rows, epochs, qat = summary["after"], _rows(summary), told.get("epochs") or 0, told.get("qat") or 0
    failed, accuracy = [c for c in summary["checks"] if not c["passed"]], judged([*rows.values()])
    metric = accuracy.key.removesuffix(INT8) if accuracy else ""
    shown = {"rows": rows, "accuracy": accuracy, "metric": METRIC.get(metric), "failed": failed, "after": after}
    shown |= {"checks": summary["checks"], "deploy": told.get("deploy"), "untrained": told.get("epochs") == 0}
    said = TEXT.get_template("headline.txt.j2").render(shown).strip()
    lost = accuracy.verdict == "worse" if accuracy else shown["untrained"]
    if lost or any("max_drop" in c["name"] or c["name"].startswith("contract") for c in failed):
        by_int8 = accuracy is not None and accuracy.key.endswith(INT8)
        if accuracy and by_int8 and epochs:  # what the float model lost, or what INT8 lost on top of that
            by_int8 = loss(accuracy) - loss(rows[metric]) > max(loss(rows[metric]), 0)
        options: dict[str, Any] = {} if accuracy else {"data": "data.yaml"}
        options |= {"quant.mode": "qat", "quant.epochs": 2 * qat or 10} if by_int8 else {"epochs": 2 * epochs or 30}
        program, *words = shlex.split(summary["command"])
        kept = [w for w in words if w.lstrip("-").partition("=")[0] not in (*options, "resume")]
        words = [*([program, *kept] if program == "yolo-ext" else []), *(f"{k}={v}" for k, v in options.items())]
        what = "Train the INT8 model" if by_int8 else "Fine-tune"
        return f"{said} {what}{' longer' if (qat if by_int8 else epochs) else ''}: {shlex.join(words)}", None
    return (said, None) if failed or not shown["deploy"] else (f"{said} Deploy {shown['deploy']}.", told.get("next"))


def _rows(summary: Mapping[str, Any]) -> dict[str, Row]:
    """Return what `summary.json` compares by key."""
    return {r.key: r for r in comparison_rows(*(summary.get(k) for k in COMPARED))}


def comparison(summary: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a run in a table of several runs: settings, what was done, figures with changes, conclusion."""
    after, rows = summary["after"], _rows(summary)
    score = accuracy.key if (accuracy := judged([*rows.values()])) else "map"
    speed = next((k for k in ("ort_int8", "ort", "torch") if figure(after, f"latency_ms.{k}") is not None), "torch")
    change = {k: None if r.delta == ABSENT else r.delta for k, r in rows.items()}
    row = {
        "settings": " ".join(f"{k}={v}" for k, v in summary["settings"].items() if v not in (None, "")),
        "method": told.get("method"), "ratio": told.get("ratio"),
        "params": after.get("params"), "params_change": change.get("params"),
        "gflops": figure(after, "gflops"), "gflops_change": change.get("gflops"), "size_mb": figure(after, "size_mb"),
        "accuracy": figure(after, score), "accuracy_change": change.get(score),
        "latency_ms": figure(after, f"latency_ms.{speed}"),
        "latency_batch32_ms": figure(after, f"latency_batch32_ms.{speed}"),
        "training_s": told.get("training_s"), "conclusion": summary["headline"],
    }  # fmt: skip
    return {k: round(value, 4) if isinstance(value, float) else value for k, value in row.items()}


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


TEXT.filters.update(cell=cell, align=align)
