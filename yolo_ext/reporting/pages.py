# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The report of a run: `report.json` and one self-contained `report.html` that opens offline, without scripts."""

from __future__ import annotations

import base64
import json
import math
import mimetypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from yolo_ext.checkpoint import atomic_write
from yolo_ext.reporting.tables import ABSENT, FIELDS, Row, comparison_rows, figure, stage_rows

MISSING = "not measured"
LONG_LIST = 16  # rows; a longer list starts folded
DIFFERENCES = ("box_mean", "box_max", "score_mean", "score_max")
PARITY = {
    "torch": "Fake-quantized PyTorch and the INT8 file simulated in float",
    "simulation": "The INT8 file as it runs and simulated in float",
    "float": "The INT8 file as it runs and FP32: what quantization does",
}
Report = Mapping[str, Any]


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
    """Return a report (see `write_report`) as one page, pictures with relative paths taken from `run_dir`."""
    parts = {name: part(report, run_dir) for name, part in SECTIONS.items()}
    rows = comparison_rows(_side(report, "before"), _side(report, "after"))
    cards, int8_note = _cards(report, rows)
    return page(
        "report.html.j2",
        title=str(report.get("title") or "Compression report"),
        verdicts=_verdicts(report.get("checks") or [], rows),
        cards=cards,
        int8_note=int8_note,
        sections={name: part for name, part in parts.items() if part},
    )


def _verdicts(checks: Sequence[Report], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Say in a (tone, text) per finding whether the checks passed and where the result is worse than the base."""
    failed = [str(c.get("name")) for c in checks if not c.get("passed")]
    worse = [f"{r.label} {r.delta}" for r in rows if r.verdict == "worse"]
    strips = []
    if failed:
        strips.append(("bad", f"✗ {len(failed)} of {len(checks)} checks did not pass: {', '.join(failed)}"))
    elif checks:
        strips.append(("", f"✓ {len(checks)} of {len(checks)} checks passed"))
    if worse:
        strips.append(("warn", f"▼ Worse than the base model: {' · '.join(worse)}"))
    return strips


def _cards(report: Report, rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Return the five key figures, the latency of INT8 where it was measured, and the note on INT8 mAP it calls for."""
    known, after = {row.key: row for row in rows}, _side(report, "after")
    speed = next((k for k in ("ort_int8", "ort", "torch") if figure(after, f"latency_ms.{k}")), "torch")
    int8 = known.get("map_onnx.int8")
    note = f"; INT8 {int8.delta}" if int8 and int8.delta != ABSENT else ""
    if speed == "ort_int8" and not note:
        note = f"; INT8 {MISSING}"
    keys = ("params", "gflops", "size_mb", "map", f"latency_ms.{speed}")
    labels = {f.key: f.label for f in FIELDS}
    return [known.get(key) or Row(key, labels[key], ABSENT, ABSENT, ABSENT, "") for key in keys], note


def _figures(report: Report, _: Path) -> list[Row]:
    """Return the rows Before | After | Delta."""
    return comparison_rows(_side(report, "before"), _side(report, "after"))


def _stages(report: Report, _: Path) -> dict[str, Any]:
    """Return the table of stages, the base in front, and the charts of GFLOPs, mAP and one latency."""
    stages = dict((report.get("summary") or {}).get("stages") or {})
    if not stages:
        return {}
    if _side(report, "before") and not {"base", "before"} & stages.keys():
        stages = {"base": _side(report, "before"), **stages}
    latencies = [f for f in reversed(FIELDS) if f.kind == "latency"]  # of two that are equal the one nearer to use
    latency = max(latencies, key=lambda f: sum(figure(m, f.key) is not None for m in stages.values()))
    fields = [f for f in FIELDS if f.key in ("gflops", "map", latency.key)]
    charts = [_chart(f.label, {n: figure(m, f.key) for n, m in stages.items()}, f.spec) for f in fields]
    header, rows = stage_rows(stages)
    return {"header": header, "rows": rows, "charts": [c for c in charts if c]}


def _chart(title: str, points: Mapping[str, float | None], spec: str) -> dict[str, Any]:
    """Place one figure over the stages in a chart of 360 x 200; nothing where fewer than two were measured."""
    measured = {name: v for name, v in points.items() if v is not None}
    if len(measured) < 2:
        return {}
    low, high = min(measured.values()), max(measured.values())
    spots = []
    for i, (name, v) in enumerate(measured.items()):
        x = 40 + 280 * i / (len(measured) - 1)
        y = 130 - 80 * ((v - low) / (high - low) if high > low else 0.5)
        places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "above": f"{y - 9:.1f}", "right": f"{x + 4:.1f}"}
        spots.append({**places, "name": name, "value": format(v, spec)})
    return {"title": title, "spots": spots}


def _latency(report: Report, _: Path) -> dict[str, Any]:
    """Return names with median, p10 and p90 in ms, and the longest of them, which the bars are drawn against."""
    latency = report.get("latency") or {}
    rows = [(r.get("name"), *(figure(r, k) for k in ("median", "p10", "p90"))) for r in latency.get("rows") or []]
    longest = max((v for _, median, _, high in rows for v in (median, high) if v is not None), default=1.0)
    return {"rows": rows, "longest": longest, "note": latency.get("note")} if rows or latency.get("note") else {}


def _channels(report: Report, _: Path) -> dict[str, Any]:
    """Return the layers, how many channels each keeps and what it is coupled with or why it was kept."""
    layers = report.get("layers") or []
    if not layers:
        return {}
    rows = []
    for layer in layers:
        before, after, coupled = layer["before"], layer["after"], layer.get("coupled") or []
        beside = f"coupled with {', '.join(coupled[:3])}{' ...' if len(coupled) > 3 else ''}" if coupled else ""
        kept = f"{100 * after / before:.0f}%" if before else ABSENT
        rows.append({**layer, "kept": kept, "beside": layer.get("reason") or beside})
    pruned = sum(layer["after"] < layer["before"] for layer in layers)
    total = [sum(layer[side] for layer in layers) for side in ("before", "after")]
    text = f"{pruned} of {len(layers)} layers pruned, {total[0]:,} → {total[1]:,} output channels."
    return {"layers": rows, "widest": max(layer["before"] for layer in layers), "text": text}


def _comparison(report: Report, _: Path) -> list[list[Any]]:
    """Return the pruned model beside what else costs as much: is pruning worth it?"""
    specs = {"params": ",.0f", "gflops": ",.2f", "map": ".4f", "ort": ",.2f"}
    rows = []
    for row in report.get("comparison") or []:
        values = [(figure(row, key), spec) for key, spec in specs.items()]
        rows.append([row.get("name"), *(ABSENT if v is None else format(v, spec) for v, spec in values)])
    return rows


def _quantization(report: Report, _: Path) -> dict[str, Any]:
    """Return what runs in INT8, what the file was made with, and how far what should be equal lies apart."""
    found = report.get("quantization")
    if not found:
        return {}
    parity = found.get("parity") or {}
    return {
        **{key: found.get(key) for key in ("convs", "int8_convs")},
        "float": found.get("float") or {},
        "made": _made_with(found),
        "parity": [(what, *(figure(parity[k], d) for d in DIFFERENCES)) for k, what in PARITY.items() if parity.get(k)],
    }


def _made_with(found: Report) -> list[tuple[str, str]]:
    """Return profile and calibration of an INT8 file, and the threshold that suits it."""
    made, f1, rows = found.get("calibration") or {}, found.get("f1") or {}, []
    if found.get("profile"):
        rows.append(("Profile", _text(found["profile"])))
    if made:
        images, imgsz, seed, digest = (_text(made.get(k)) for k in ("images", "imgsz", "seed", "hash"))
        rows.append(("Calibration", f"{images} images of {imgsz} px, seed {seed}, hash {digest}"))
        rows.append(("Observers", f"{_text(made.get('observer'))}; of weights {_text(made.get('weights'))}"))
    best = [(k, *(_fixed(figure(f1[k], d), 3) for d in ("f1", "f1_conf"))) for k in ("fp32", "int8") if k in f1]
    if best:
        text = ", ".join(f"{score} at {threshold} ({k.upper()})" for k, score, threshold in best)
        rows.append(("Best F1 at confidence", text))
    return rows


def _plan(report: Report, _: Path) -> str:
    """Return the options, one in a line."""
    return "\n".join(f"{name}: {json.dumps(step)}" for name, step in (report.get("plan") or {}).items())


def _reproduce(report: Report, _: Path) -> dict[str, Any]:
    """Return the command and the environment."""
    summary = report.get("summary") or {}
    command, env = report.get("command") or summary.get("command"), summary.get("env") or {}
    return {"command": command, "env": env} if command or env else {}


def _embed(pictures: Sequence[Report] | None, run_dir: Path) -> list[dict[str, str]]:
    """Read pictures as data URLs, an empty one for a picture that is gone."""
    read = []
    for picture in pictures or []:
        path = run_dir / str(picture["path"])
        kind = mimetypes.guess_type(path.name)[0] or ""
        there = path.is_file() and kind.startswith("image/")
        data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if there else ""
        read.append({"name": path.name, "caption": _text(picture.get("caption") or path.name), "data": data})
    return read


# What `report.html.j2` shows in each section, in this order; an empty one is left out.
SECTIONS: dict[str, Callable[[Report, Path], Any]] = {
    "Before and after": _figures,
    "Notes": lambda report, _: report.get("notes"),
    "Stages": _stages,
    "Checks": lambda report, _: report.get("checks"),
    "Detections": lambda report, run_dir: _embed(report.get("pictures"), run_dir),
    "Latency": _latency,
    "For comparison": _comparison,
    "Channels per layer": _channels,
    "Quantization": _quantization,
    "Plots": lambda report, run_dir: _embed(report.get("plots"), run_dir),
    "Options": _plan,
    "Reproduce": _reproduce,
}


def _side(report: Report, side: str) -> dict[str, Any]:
    """Return the measurement `before` or `after`."""
    return (report.get("summary") or {}).get(side) or {}


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


def page(template: str, **values: Any) -> str:
    """Render a template of this package; everything from outside is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    """Return the templates with their filters."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.globals.update(absent=ABSENT, missing=MISSING, long_list=LONG_LIST)
    made.filters.update(
        text=_text, number=_number, fixed=_fixed,
        anchor=lambda name: name.lower().replace(" ", "-"),
        percent=lambda value, longest: f"{100 * value / longest if longest else 0:.2f}%",
        thousands=lambda value: f"{value:,}",
    )  # fmt: skip
    return made


def _text(value: object) -> str:
    """Return a value of a report as text, dicts and lists as JSON."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def _number(value: object) -> str:
    """Format a figure of any kind, None as not measured."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _fixed(value: float | None, digits: int) -> str:
    """Format a figure with these digits, None as not measured."""
    return MISSING if value is None else f"{value:,.{digits}f}"
