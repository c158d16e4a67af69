# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The report of a run: `report.json` and one self-contained `report.html` that opens offline, without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any

from yolo_ext.checkpoint import atomic_write
from yolo_ext.reporting import markup as ui
from yolo_ext.reporting.tables import ABSENT, FIELDS, Row, comparison_rows, figure, stage_rows

DIFFERENCES = ("box_mean", "box_max", "score_mean", "score_max")
PARITY = {
    "torch": "Fake-quantized PyTorch and the INT8 file simulated in float",
    "simulation": "The INT8 file as it runs and simulated in float",
    "float": "The INT8 file as it runs and FP32: what quantization does",
}
Report = Mapping[str, Any]
Render = Callable[[Report, Path], str]


def write_report(run_dir: str | Path, report: Report) -> Path:
    """Write `report.json` and `report.html` of a run.

    Args:
        run_dir: Folder of the run; pictures with a relative path are looked up in it.
        report: `title`, `command`, `summary` (the contents of `summary.json`), `layers`, `checks`, `comparison`,
            `pictures`, `plots`, `latency`, `quantization`, `plan` and `notes`, each optional: what is absent is left
            out or shown as not measured.

    Returns:
        Path of `report.html`.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = _plain(report)
    atomic_write(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    atomic_write(folder / "report.html", render(report, folder))
    return folder / "report.html"


def render(report: Report, run_dir: Path) -> str:
    """Render a report as one HTML page.

    Args:
        report: See `write_report`.
        run_dir: Folder in which relative picture paths are looked up.

    Returns:
        The page, with style and pictures embedded.
    """
    title = str(report.get("title") or "Compression report")
    bodies = {name: body for name, part in SECTIONS.items() if (body := part(report, run_dir))}
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in bodies)
    sections = "".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{body}</section>' for name, body in bodies.items()
    )
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    # The policy makes a browser refuse every request and script, so the page stays offline whatever it contains.
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>Compression report: base model against compressed model</p>"
        f"<nav>{links}</nav></header>{_verdict(report)}{_cards(report)}{sections}"
        '<footer class="muted">Written by yolo_ext. The same figures are in report.json.</footer>'
        "</main></body></html>\n"
    )


def _verdict(report: Report) -> str:
    """Say in one strip per finding whether the checks passed and where the result is worse than the base."""
    checks = report.get("checks") or []
    failed = [str(c.get("name")) for c in checks if not c.get("passed")]
    worse = [f"{r.label} {r.delta}" for r in _rows(report) if r.verdict == "worse"]
    strips = []
    if failed:
        strips.append(("bad", f"✗ {len(failed)} of {len(checks)} checks did not pass: {', '.join(failed)}"))
    elif checks:
        strips.append(("", f"✓ {len(checks)} of {len(checks)} checks passed"))
    if worse:
        strips.append(("warn", f"▼ Worse than the base model: {' · '.join(worse)}"))
    return "".join(f'<div class="verdict {tone}">{escape(text)}</div>' for tone, text in strips)


def _cards(report: Report) -> str:
    """Show the five key figures; the latency card takes INT8 where it was measured, and then INT8 mAP is named too."""
    rows, after = {row.key: row for row in _rows(report)}, _side(report, "after")
    speed = next((k for k in ("ort_int8", "ort", "torch") if figure(after, f"latency_ms.{k}")), "torch")
    int8 = rows.get("map_onnx.int8")
    note = f"; INT8 {int8.delta}" if int8 and int8.delta != ABSENT else ""
    if speed == "ort_int8" and not note:
        note = f"; INT8 {ui.MISSING}"
    cards = []
    for key, suffix in (("params", ""), ("gflops", ""), ("size_mb", ""), ("map", note), (f"latency_ms.{speed}", "")):
        label = next(f.label for f in FIELDS if f.key == key)
        row = rows.get(key) or Row(key, label, ABSENT, ABSENT, ABSENT, "")
        value = f"<b>{escape(row.delta)}</b>" if row.delta != ABSENT else f'<b class="none">{ui.MISSING}</b>'
        mark = ' <span class="mark bad">▼ worse</span>' if row.verdict == "worse" else ""
        sides = f"{ui.value(row.before)} → {ui.value(row.after)}{escape(suffix)}"
        cards.append(f'<div class="card {row.verdict}"><p>{escape(row.label)}{mark}</p>{value}<p>{sides}</p></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _figures(report: Report, _: Path) -> str:
    rows = [
        (ui.text(r.label), ui.value(r.before), ui.value(r.after), f'<span class="delta {r.verdict}">{_delta(r)}</span>')
        for r in _rows(report)
    ]
    return ui.table(("Figure", "Before", "After", "Delta"), rows) if rows else ""


def _notes(report: Report, _: Path) -> str:
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in report.get("notes") or [])
    return f"<ul>{notes}</ul>" if notes else ""


def _stages(report: Report, _: Path) -> str:
    stages = dict((report.get("summary") or {}).get("stages") or {})
    if not stages:
        return ""
    if _side(report, "before") and not {"base", "before"} & stages.keys():
        stages = {"base": _side(report, "before"), **stages}
    header, rows = stage_rows(stages)
    cells = [[ui.text(name), *(ui.value(v, "–") for v in values)] for name, *values in rows]
    latencies = [f for f in reversed(FIELDS) if f.kind == "latency"]  # of two that are equal the one nearer to use
    latency = max(latencies, key=lambda f: sum(figure(m, f.key) is not None for m in stages.values()))
    fields = [f for f in FIELDS if f.key in ("gflops", "map", latency.key)]
    charts = [ui.line_chart(f.label, [(n, figure(m, f.key)) for n, m in stages.items()], f.spec) for f in fields]
    note = f"– means {ui.MISSING} at that stage; charts leave such stages out. The dashed line is the first value."
    return f'{ui.table(header, cells)}<p class="muted">{note}</p><div class="charts">{"".join(charts)}</div>'


def _detections(report: Report, run_dir: Path) -> str:
    return "".join(ui.embed(p, run_dir) for p in report.get("pictures") or [])


def _latency(report: Report, _: Path) -> str:
    latency = report.get("latency") or {}
    rows = latency.get("rows") or []
    longest = max((v for r in rows for k in ("median", "p90") if (v := figure(r, k))), default=1.0)
    cells = []
    for row in rows:
        median, low, high = (figure(row, key) for key in ("median", "p10", "p90"))
        bar = ui.bar(median or 0, longest, "new")
        if low is not None and high is not None:
            start, width = ui.percent(low, longest), ui.percent(high - low, longest)
            bar += f'<i class="spread" style="left:{start};width:{width}"></i>'
        numbers = (ui.MISSING if v is None else f"{v:,.2f}" for v in (median, low, high))
        cells.append((ui.text(row.get("name")), f'<div class="track">{bar}</div>', *numbers))
    note = f'<p class="muted">{escape(str(latency["note"]))}</p>' if latency.get("note") else ""
    if not cells:
        return note
    header = ("Model", "|bar|Median, with p10 to p90", "Median (ms)", "p10 (ms)", "p90 (ms)")
    return ui.table(header, cells) + note


def _checks(report: Report, _: Path) -> str:
    rows = []
    for check in report.get("checks") or []:
        passed = check.get("passed")
        word = "not run" if passed is None else "✓ pass" if passed else "✗ fail"
        mark = f'<span class="mark{"" if passed else " bad"}">{word}</span>'
        rows.append((ui.text(check.get("name")), ui.number(check.get("value")), ui.number(check.get("limit")), mark))
    return ui.table(("Check", "Value", "Limit", "Result"), rows) if rows else ""


def _channels(report: Report, _: Path) -> str:
    layers = report.get("layers") or []
    if not layers:
        return ""
    widest = max(layer["before"] for layer in layers)
    rows, pruned = [], 0
    for layer in layers:
        before, after = layer["before"], layer["after"]
        smaller = after < before
        pruned += smaller
        bar = ui.bar(before, widest, "") + ui.bar(after, widest, "new" if smaller else "kept")
        kept = f"{100 * after / before:.0f}%" if before else ABSENT
        coupled = layer.get("coupled") or []
        beside = f"coupled with {', '.join(coupled[:3])}{' ...' if len(coupled) > 3 else ''}" if coupled else ""
        name, reason = ui.text(layer["name"]), ui.text(layer.get("reason") or beside)
        rows.append((name, f'<div class="track">{bar}</div>', f"{before:,}", f"{after:,}", kept, reason))
    total = [sum(layer[side] for layer in layers) for side in ("before", "after")]
    keys = (("base", "before"), ("accent", "after"), ("kept", "not pruned"))
    legend = "".join(f'<i class="key" style="background:var(--{c})"></i>{t}' for c, t in keys)
    text = f"{pruned} of {len(layers)} layers pruned, {total[0]:,} → {total[1]:,} output channels."
    header = ("Layer", "|bar|Channels", "Before", "After", "Kept", "|text|Reason or couplings")
    return f"<p>{text}<span class='muted'>{legend}</span></p>" + ui.fold(ui.table(header, rows), len(rows), "layers")


def _comparison(report: Report, _: Path) -> str:
    """Show the pruned model beside what else costs as much: is pruning worth it?"""
    rows = []
    for row in report.get("comparison") or []:
        cells = []
        for key, spec in (("params", ",.0f"), ("gflops", ",.2f"), ("map", ".4f"), ("ort", ",.2f")):
            value = figure(row, key)
            cells.append(ABSENT if value is None else format(value, spec))
        rows.append((ui.text(row.get("name")), *cells))
    if not rows:
        return ""
    note = "A model without mAP was not trained: it shows what the same FLOPs cost without pruning."
    header = ("Model", "Parameters", "GFLOPs", "mAP50-95", "ONNX Runtime (ms)")
    return ui.table(header, rows) + f'<p class="muted">{note}</p>'


def _quantization(report: Report, _: Path) -> str:
    quantization = report.get("quantization")
    if not quantization:
        return ""
    total, integer = (ui.number(quantization.get(key)) for key in ("convs", "int8_convs"))
    text = f"<p>Convolutions that run in INT8: <b>{integer}</b> of <b>{total}</b>.</p>"
    rows = [(ui.text(name), ui.text(reason)) for name, reason in (quantization.get("float") or {}).items()]
    floats = ui.fold(ui.table(("Left in float", "|text|Reason"), rows), len(rows), "float layers")
    return text + _made_with(quantization) + _parity(quantization.get("parity") or {}) + (floats if rows else "")


def _made_with(quantization: Mapping[str, Any]) -> str:
    """Show what an INT8 file was made with, and the threshold that suits it."""
    made, f1, rows = quantization.get("calibration") or {}, quantization.get("f1") or {}, []
    if quantization.get("profile"):
        rows.append(("Profile", ui.text(quantization["profile"])))
    if made:
        images, imgsz, seed, digest = (ui.text(made.get(k)) for k in ("images", "imgsz", "seed", "hash"))
        rows.append(("Calibration", f"{images} images of {imgsz} px, seed {seed}, hash {digest}"))
        rows.append(("Observers", f"{ui.text(made.get('observer'))}; of weights {ui.text(made.get('weights'))}"))
    if best := [
        f"{_fixed(f1[k], 'f1')} at {_fixed(f1[k], 'f1_conf')} ({k.upper()})" for k in ("fp32", "int8") if k in f1
    ]:
        rows.append(("Best F1 at confidence", ", ".join(best)))
    return ui.table(("INT8 file", "|text|"), rows) if rows else ""


def _parity(found: Mapping[str, Any]) -> str:
    """Show how far what should be equal lies apart, and what quantization itself does."""
    rows = [(name, *(_fixed(found[key], k) for k in DIFFERENCES)) for key, name in PARITY.items() if found.get(key)]
    header = ("Difference between", "Mean box (px)", "Largest box (px)", "Mean score", "Largest score")
    return ui.table(header, rows) if rows else ""


def _fixed(found: Any, key: str) -> str:
    value = figure(found, key)
    return ui.MISSING if value is None else f"{value:.3f}"


def _plots(report: Report, run_dir: Path) -> str:
    return "".join(ui.embed(p, run_dir) for p in report.get("plots") or [])


def _plan(report: Report, _: Path) -> str:
    lines = "\n".join(f"{name}: {json.dumps(step)}" for name, step in (report.get("plan") or {}).items())
    return f"<details><summary>Show the options</summary><pre>{escape(lines)}</pre></details>" if lines else ""


def _reproduce(report: Report, _: Path) -> str:
    summary = report.get("summary") or {}
    command = report.get("command") or summary.get("command")
    rows = [(ui.text(key), ui.text(value)) for key, value in (summary.get("env") or {}).items()]
    environment = ui.table(("Environment", "|text|Value"), rows) if rows else ""
    return (f"<pre>{escape(str(command))}</pre>" if command else "") + environment


SECTIONS: dict[str, Render] = {
    "Before and after": _figures,
    "Notes": _notes,
    "Stages": _stages,
    "Checks": _checks,
    "Detections": _detections,
    "Latency": _latency,
    "For comparison": _comparison,
    "Channels per layer": _channels,
    "Quantization": _quantization,
    "Plots": _plots,
    "Options": _plan,
    "Reproduce": _reproduce,
}


def _side(report: Report, side: str) -> dict[str, Any]:
    return (report.get("summary") or {}).get(side) or {}


def _rows(report: Report) -> list[Row]:
    return comparison_rows(_side(report, "before"), _side(report, "after"))


def _delta(row: Row) -> str:
    delta = escape(row.delta)
    return f"▼&nbsp;{delta} worse" if row.verdict == "worse" else delta


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _plain(value: Any) -> Any:
    """Reduce a value to what JSON holds: NaN and infinity become null, paths and unknown objects text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
