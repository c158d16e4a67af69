# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pages that open offline: the report of a run, and the review sheet of auto-labelling."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
from jinja2 import StrictUndefined
from markupsafe import Markup
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import colors

from yolo_ext.checkpoint import atomic_write
from yolo_ext.reporting import tables
from yolo_ext.reporting.figures import pareto
from yolo_ext.reporting.tables import ABSENT, FIELDS, TEXT, Row, cell, comparison_rows, figure, stage_rows
from yolo_ext.stock.model import METRIC

MISSING = "not measured"
LONG_LIST = 16  # rows; a longer list starts folded
LOW = 0.5  # boxes below this confidence are marked
THUMB, WIDE = 360, 1400  # px; of the pictures of a review sheet and of a report
HEAVY = 800_000  # bytes that all pictures of a report may have
QUALITIES = (80, 60, 40, 20)  # of WebP, as far as it takes to stay below
TEMPLATES = Path(__file__).with_name("templates")
METRICS = {f.key: f.label for f in FIELDS if f.key in METRIC}
Report = Mapping[str, Any]
Record = Mapping[str, Any]  # an image: `image` (name), `size` (width, height), `objects` (`class`, `confidence`, `box`)


def write_report(run_dir: str | Path, report: Report) -> Path:
    """Write `report.json`, `report.md` and `report.html` into the folder of a run, and return the path of the latter.

    All of `report` is optional: `title`, `about` (facts for the header), `command`, `summary` (the contents of
    `summary.json`), `files` (whose size is given, by stage, `before` and `after`), `layers`, `checks`, `comparison`,
    `pictures`, `curves` (of each training, its columns), `latency`, `quantization`, `options` (value and default by
    name) and `notes`. Paths are relative to the folder.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Reduced to what JSON holds: NaN and infinity become null, arrays lists, unknown objects text.
    text = json.dumps(report, ensure_ascii=False, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    whole = text.encode("utf-8", "replace").decode()  # half of a character, as file names may hold, cannot be written
    report = json.loads(whole, parse_constant=lambda _: None)
    atomic_write(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    shown = _content(report, folder)
    atomic_write(folder / "report.md", MARKDOWN.get_template("report.md.j2").render(**shown))
    atomic_write(folder / "report.html", ENVIRONMENT.get_template("report.html.j2").render(**shown))
    return folder / "report.html"


def _content(report: Report, run_dir: Path) -> dict[str, Any]:
    """Return what the templates of a report show."""
    summary = report.get("summary") or {}
    before, after, proved = (summary.get(k) or {} for k in tables.COMPARED)
    stages, env, rows = summary.get("stages") or {}, summary.get("env") or {}, comparison_rows(before, after, proved)
    command, checks, layers = (report.get(k) or [] for k in ("command", "checks", "layers"))
    command, files = command or summary.get("command"), report.get("files") or {}
    failed = [str(c.get("name")) for c in checks if not c.get("passed")]
    passes = f"✗ {len(failed)} of {len(checks)} checks did not pass: {', '.join(failed)}" if failed else ""
    passes = passes or f"✓ {len(checks)} of {len(checks)} checks passed"
    sections = {  # an empty one is left out
        "Contract": proved and _contract(proved),
        "Before and after": rows,
        "Notes": report.get("notes"),
        "Stages": stages and _stages(before, stages, summary.get("seconds") or {}, files),
        "Accuracy against latency": _tradeoff(before, after, report.get("latency") or {}),
        "Checks": checks and {"rows": checks, "passes": passes, "failed": failed},
        "Images that changed most": _embed(report.get("pictures"), run_dir),
        "Latency": report.get("latency"),
        "For comparison": report.get("comparison"),
        "Channels per layer": layers and {"layers": layers, "pruned": sum(x["after"] < x["before"] for x in layers)},
        "Quantization": report.get("quantization"),
        "Training curves": report.get("curves"),
        "Options": report.get("options"),
        "In a table of runs": summary.get("comparison"),
        "Reproduce": {"command": command, "env": env} if command or env else None,
    }
    sections = {name: part for name, part in sections.items() if part}
    headline, good = summary.get("headline") or (passes if checks else ""), summary.get("passed", not failed)
    doubt = any(r.verdict == "worse" for r in rows) or (summary.get("settings") or {}).get("epochs") == 0
    tone = "" if good and not doubt else "warn" if good else "bad"
    shown = {"title": report.get("title") or "Compression report", "headline": headline, "tone": tone}
    shown |= {"cards": _cards(rows), "about": report.get("about") or {}, "sections": sections, "files": files}
    return {**shown, "remarks": tables.note(after, proved)}


def _contract(found: Report) -> dict[str, Any]:
    """Return the figures of a contract in tables: overall and by size, then by class; each with the limit it broke."""
    limits = {c["name"].removeprefix("contract "): c["limit"] for c in found.get("checks") or [] if not c["passed"]}
    groups: dict[str, list[dict[str, Any]]] = {"Overall and by size": []}
    for c in sorted(found.get("changes") or [], key=lambda c: c["name"].startswith("size.")):
        kind, _, which = c["name"].partition(".")
        figure = METRICS.get(kind, kind.capitalize())
        title = f"{figure} by class" if which and kind != "size" else "Overall and by size"
        label = f"{which.capitalize()} objects" if kind == "size" else which or figure
        groups.setdefault(title, []).append({**c, "label": label, "broken": limits.get(c["name"])})
    return {**found, "groups": {k: rows for k, rows in groups.items() if rows and k != "Precision by class"}}


def _cards(rows: Sequence[Row]) -> list[Row]:
    """Return the five key figures: of INT8 where it was measured, and the metric that fell where one of several did."""
    known = {row.key: row for row in rows if row.after != ABSENT}
    latency = next((k for k in ("ort_int8", "ort", "torch") if f"latency_ms.{k}" in known), "torch")
    metrics = [known.get(f"{key}_onnx.int8", known[key]) for key in METRICS if key in known]
    fell = [row for row in metrics if row.verdict == "worse"]
    accuracy = next((row.key for row in fell + metrics), "map")
    blank = {f.key: Row(f.key, f.label, ABSENT, ABSENT, ABSENT, "") for f in FIELDS}
    return [{**blank, **known}[key] for key in ("params", "gflops", "size_mb", accuracy, f"latency_ms.{latency}")]


def _stages(before: Report, stages: Report, seconds: Report, files: Report) -> dict[str, Any]:
    """Return the table of stages, the base in front, and what the charts of GFLOPs, accuracy and one latency show."""
    if before and not {"base", "before"} & stages.keys():
        stages = {"base": before, **stages}
    latencies = [f for f in reversed(FIELDS) if f.kind == "latency"]  # of two that are equal the one nearer to use
    latency = max(latencies, key=lambda f: sum(figure(m, f.key) is not None for m in stages.values()))
    charts = []
    for f in (f for f in FIELDS if f.key in ("gflops", *METRICS, latency.key)):
        points = [(name, v) for name, m in stages.items() if (v := figure(m, f.key)) is not None]
        charts += [{"title": f.label, "points": points, "spec": f.spec}] if len(points) > 1 else []
    header, rows = stage_rows(stages)
    if seconds:
        header, rows = [*header, "Seconds"], [[*row, cell(seconds.get(row[0]), ",.1f")] for row in rows]
    if files:
        header, rows = [*header, "Size is of"], [[*row, files.get(row[0], ABSENT)] for row in rows]
    return {"header": header, "rows": rows, "charts": charts}


def _tradeoff(before: Report, after: Report, latency: Report) -> list[dict[str, Any]]:
    """Return files with known latency and accuracy in ONNX Runtime, and whether each is on the Pareto front."""
    fp32, int8 = ("map_onnx.fp32", "top1_onnx.fp32", "map", "top1"), ("map_onnx.int8", "top1_onnx.int8")
    measured = {"base FP32": (before, fp32), "compressed FP32": (after, fp32), "compressed INT8": (after, int8)}
    points = []
    for row in latency.get("rows") or []:
        m, keys = measured.get(str(row.get("name")), ({}, ()))
        score = next((v for k in keys if (v := figure(dict(m), k)) is not None), None)
        times = {k: figure(dict(row), k) for k in ("median", "p10", "p90")}
        points += [{"name": row["name"], **times, "map": score}] if None not in (score, *times.values()) else []
    return [p | {"front": best} for p, best in zip(points, pareto(points))] if len(points) > 1 else []


def _embed(pictures: Sequence[Report] | None, run_dir: Path) -> list[dict[str, str]]:
    """Read pictures as data URLs, an empty one for a picture that is gone."""
    read = []
    for picture in pictures or []:
        path = run_dir / str(picture["path"])
        place = quote((path.relative_to(run_dir) if path.is_relative_to(run_dir) else path).as_posix())
        named = {"name": path.name, "caption": _text(picture.get("caption") or path.name), "path": place}
        read.append({**named, "data": _data_url(path, WIDE, HEAVY // len(pictures or []))})
    return read


def _data_url(file: Path, side: int, limit: float = math.inf) -> str:
    """Return a copy of an image of at most `side` pixels and about `limit` bytes as a data URL; "" where it is gone."""
    image = imread(str(file)) if file.is_file() else None
    if image is None:
        return ""
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = [max(1, round(n * scale)) for n in (image.shape[1], image.shape[0])]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for quality in QUALITIES:
        data = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
        if len(data) < limit:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def lowest(record: Record) -> float | None:
    """Return the lowest confidence among the objects of an image, None where there are none."""
    return min((o["confidence"] for o in record["objects"]), default=None)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sort images by the work that they are likely to need: boxes below `LOW` by how many are wrong, then no boxes."""

    def need(record: Record) -> float:
        return sum(1 - o["confidence"] for o in record["objects"] if o["confidence"] < LOW)

    return sorted(records, key=lambda r: (-need(r), LOW if (low := lowest(r)) is None else low, r["image"]))


def class_counts(records: Iterable[Record], names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Return `boxes`, `images`, `mean_confidence` and `low`, the boxes below `LOW`, of each class that was found."""
    counts = {}
    boxes = [(o["class"], o["confidence"], i) for i, r in enumerate(records) for o in r["objects"]]
    for c in sorted({c for c, *_ in boxes}):
        confidences = [p for k, p, _ in boxes if k == c]
        mean, low = round(sum(confidences) / len(confidences), 4), sum(p < LOW for p in confidences)
        images = len({i for k, _, i in boxes if k == c})
        counts[names[c]] = {"boxes": len(confidences), "images": images, "mean_confidence": mean, "low": low}
    return counts


def render_review(title: str, records: Sequence[Record], files: Mapping[str, Path], names: Mapping[int, str], *,
                  notes: Sequence[str] = (), skipped: Mapping[str, str] | None = None,
                  previews: Mapping[str, str] | None = None, limit: int = 500) -> str:  # fmt: skip
    """Return the review sheet of `files` by name, what needs most work first, with links to `previews` by name."""
    shown = in_order(records)[:limit]
    links = {name: quote(preview, errors="replace") for name, preview in (previews or {}).items()}
    shots = [{**r, "thumbnail": _data_url(files[r["image"]], THUMB), "link": links.get(r["image"])} for r in shown]
    page = {"title": title, "notes": notes, "counts": class_counts(records, names), "total": len(records)}
    page |= {"shots": shots, "names": names, "low": LOW, "skipped": skipped or {}}
    return ENVIRONMENT.get_template("review.html.j2").render(page)


def _text(value: object) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


SCRIPT = Markup((TEMPLATES / "page.js").read_text(encoding="utf-8"))  # nosec B704  # a file of this package
ENVIRONMENT = TEXT.overlay(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
ENVIRONMENT.globals.update(
    absent=ABSENT, missing=MISSING, long_list=LONG_LIST, script=SCRIPT, metric=METRICS,
    script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
)  # fmt: skip
ENVIRONMENT.filters.update(
    text=_text, figure=figure, json=json.dumps,
    color=lambda index: "rgb({},{},{})".format(*colors(index)),
    fixed=lambda value, digits: MISSING if value is None else f"{value:,.{digits}f}",
    number=lambda value: MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else _text(value),
    anchor=lambda name: name.lower().replace(" ", "-"),
)  # fmt: skip


# Markdown escapes nothing by itself: a pipe would end a cell, a < begin a tag.
MARKDOWN = ENVIRONMENT.overlay(
    autoescape=False, finalize=lambda v: " ".join(str(v).split("\n")).replace("|", "\\|").replace("<", "&lt;")
)
