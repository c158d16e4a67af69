# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pages that open offline, without scripts: the report of a run, and the review sheet of auto-labelling."""

import base64
import json
import math
import mimetypes
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import colors

from yolo_ext.checkpoint import atomic_write
from yolo_ext.reporting.tables import ABSENT, FIELDS, Row, cell, comparison_rows, figure, stage_rows

MISSING = "not measured"
LONG_LIST = 16  # rows; a longer list starts folded
LOW = 0.5  # boxes below this confidence are marked
THUMB = 360  # px
Report = Mapping[str, Any]
Record = Mapping[str, Any]  # an image: `image` (name), `size` (width, height), `objects` (`class`, `confidence`, `box`)


def write_report(run_dir: str | Path, report: Report) -> Path:
    """Write `report.json`, `report.md` and `report.html` into the folder of a run, and return the path of the latter.

    All of `report` is optional: `title`, `command`, `summary` (the contents of `summary.json`), `layers`, `checks`,
    `comparison`, `pictures`, `plots`, `latency`, `quantization`, `plan` and `notes`. Paths are relative to the folder.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = _plain(report)
    atomic_write(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    shown = _content(report, folder)
    atomic_write(folder / "report.md", MARKDOWN.get_template("report.md.j2").render(**shown))
    atomic_write(folder / "report.html", _page("report.html.j2", **shown))
    return folder / "report.html"


def render(report: Report, run_dir: Path) -> str:
    """Return a report (see `write_report`) as one page, pictures with relative paths taken from `run_dir`."""
    return _page("report.html.j2", **_content(report, run_dir))


def _content(report: Report, run_dir: Path) -> dict[str, Any]:
    """Return what the templates of a report show."""
    summary = report.get("summary") or {}
    before, after, stages, env = (summary.get(k) or {} for k in ("before", "after", "stages", "env"))
    command, checks, layers = (report.get(k) or [] for k in ("command", "checks", "layers"))
    command, rows = command or summary.get("command"), comparison_rows(before, after)
    sections = {  # an empty one is left out
        "Before and after": rows,
        "Notes": report.get("notes"),
        "Stages": stages and _stages(before, stages, summary.get("seconds") or {}),
        "Checks": checks,
        "Detections": _embed(report.get("pictures"), run_dir),
        "Latency": _latency(report.get("latency") or {}),
        "For comparison": report.get("comparison"),
        "Channels per layer": layers and {"layers": layers, "pruned": sum(x["after"] < x["before"] for x in layers)},
        "Quantization": report.get("quantization"),
        "Plots": _embed(report.get("plots"), run_dir),
        "Options": report.get("plan"),
        "In a table of runs": summary.get("comparison"),
        "Reproduce": {"command": command, "env": env} if command or env else None,
    }
    sections = {name: part for name, part in sections.items() if part}
    cards, int8_note = _cards(after, rows)
    failed = [str(c.get("name")) for c in checks if not c.get("passed")]
    worse = [f"{r.label} {r.delta}" for r in rows if r.verdict == "worse"]
    verdicts = [("", f"✓ {len(checks)} of {len(checks)} checks passed")] if checks else []
    if failed:
        verdicts = [("bad", f"✗ {len(failed)} of {len(checks)} checks did not pass: {', '.join(failed)}")]
    verdicts += [("warn", f"▼ Worse than the base model: {' · '.join(worse)}")] if worse else []
    shown = {"verdicts": verdicts, "cards": cards, "int8_note": int8_note, "sections": sections}
    return {"title": str(report.get("title") or "Compression report"), **shown}


def _cards(after: dict[str, Any], rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Return the five key figures, the latency of INT8 where it was measured, and the note on INT8 mAP it calls for."""
    known = {row.key: row for row in rows}
    speed = next((k for k in ("ort_int8", "ort", "torch") if figure(after, f"latency_ms.{k}")), "torch")
    int8 = known.get("map_onnx.int8")
    note = f"; INT8 {int8.delta}" if int8 and int8.delta != ABSENT else ""
    if speed == "ort_int8" and not note:
        note = f"; INT8 {MISSING}"
    empty = {f.key: Row(f.key, f.label, ABSENT, ABSENT, ABSENT, "") for f in FIELDS}
    accuracy = "top1" if "top1" in known else "map"
    keys = ("params", "gflops", "size_mb", accuracy, f"latency_ms.{speed}")
    return [{**empty, **known}[key] for key in keys], note


def _stages(before: Report, stages: Report, seconds: Report) -> dict[str, Any]:
    """Return the table of stages, the base in front, and the charts of GFLOPs, accuracy and one latency."""
    if before and not {"base", "before"} & stages.keys():
        stages = {"base": before, **stages}
    latencies = [f for f in reversed(FIELDS) if f.kind == "latency"]  # of two that are equal the one nearer to use
    latency = max(latencies, key=lambda f: sum(figure(m, f.key) is not None for m in stages.values()))
    fields = [f for f in FIELDS if f.key in ("gflops", "map", "top1", latency.key)]
    charts = [_chart(f.label, {n: figure(m, f.key) for n, m in stages.items()}, f.spec) for f in fields]
    header, rows = stage_rows(stages)
    if seconds:
        header, rows = [*header, "Seconds"], [[*row, cell(seconds.get(row[0]), ",.1f")] for row in rows]
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


def _latency(latency: Report) -> dict[str, Any]:
    """Return names with median, p10 and p90 in ms, and the longest of them, which the bars are drawn against."""
    rows = [(r.get("name"), *(figure(r, k) for k in ("median", "p10", "p90"))) for r in latency.get("rows") or []]
    longest = max((v for _, median, _, high in rows for v in (median, high) if v is not None), default=1.0)
    return {"rows": rows, "longest": longest, "note": latency.get("note")} if rows or latency.get("note") else {}


def _embed(pictures: Sequence[Report] | None, run_dir: Path) -> list[dict[str, str]]:
    """Read pictures as data URLs, an empty one for a picture that is gone."""
    read = []
    for picture in pictures or []:
        path = run_dir / str(picture["path"])
        kind = mimetypes.guess_type(path.name)[0] or ""
        data = _data_url(kind, path.read_bytes()) if path.is_file() and kind.startswith("image/") else ""
        place = quote((path.relative_to(run_dir) if path.is_relative_to(run_dir) else path).as_posix())
        named = {"name": path.name, "caption": _text(picture.get("caption") or path.name), "path": place}
        read.append({**named, "data": data})
    return read


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _plain(value: Any) -> Any:
    """Reduce a value to what JSON holds: NaN and infinity become null, paths and unknown objects text."""
    if isinstance(value, Mapping):
        return {_plain(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, str):  # half of a character, as file names may hold, cannot be written
        return value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def lowest(record: Record) -> float | None:
    """Return the lowest confidence among the objects of an image, None where there are none."""
    return min((o["confidence"] for o in record["objects"]), default=None)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sort images by their least certain object; those in which nothing was found come last."""
    return sorted(records, key=lambda r: (2.0 if (low := lowest(r)) is None else low, r["image"]))


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
                  notes: Sequence[str] = (), skipped: Mapping[str, str] | None = None, previews: str = "",
                  limit: int = 500) -> str:  # fmt: skip
    """Return the review sheet of `files` by name, the least certain first, with links to `previews`, a folder."""
    shown = in_order(records)[:limit]
    seen = Counter(c for r in shown for c in {o["class"] for o in r["objects"]})
    filters = [{"name": "All", "key": "", "color": "", "count": len(shown)}]
    filters += [{"name": names[c], "key": f"c{c}", "color": _color(c), "count": n} for c, n in sorted(seen.items())]
    if empty := sum(not r["objects"] for r in shown):
        filters.append({"name": "Nothing found", "key": "none", "color": "", "count": empty})
    shots = [_shot(r, files[r["image"]], names, previews) for r in shown]
    counts, known = class_counts(records, names), {"names": names, "low": LOW, "skipped": skipped or {}}
    page = {"title": title, "notes": notes, "counts": counts, "filters": filters, "shots": shots, **known}
    return _page("review.html.j2", **page, total=len(records))


def _shot(record: Record, file: Path, names: Mapping[int, str], previews: str) -> dict[str, Any]:
    """Return what is shown of one image: boxes as SVG stay sharp and can be filtered."""
    objects, low = record["objects"], lowest(record)
    counts = sorted(Counter(o["class"] for o in objects).items())
    least: dict[int, float] = {}
    for o in objects:
        least[o["class"]] = min(o["confidence"], least.get(o["class"], 1.0))
    tone, word = ("none", "nothing found") if low is None else ("warn" if low < LOW else "", f"lowest {low:.2f}")
    link = quote(f"{previews}/{record['image']}.jpg", errors="replace") if previews else ""
    classes = " ".join(f"c{c}" for c, _ in counts) or "none"
    order = ";".join(f"--c{c}:{round(1e4 * p)}" for c, p in least.items())
    text = " · ".join(f"{n} {names[c]}" for c, n in counts)
    marks = {"classes": classes, "order": order, "text": text, "tone": tone, "word": word}
    return {**record, "thumbnail": _thumbnail(file), "link": link, **marks}


def _color(index: int) -> str:
    return "rgb({},{},{})".format(*colors(index))


def _thumbnail(file: Path) -> str:
    """Return a reduced copy of an image as a data URL, empty where it is gone."""
    image = imread(file)
    if image is None:
        return ""
    scale = THUMB / max(image.shape[:2])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return _data_url("image/jpeg", cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes())


def _text(value: object) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def _number(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
ENVIRONMENT.globals.update(absent=ABSENT, missing=MISSING, long_list=LONG_LIST)
ENVIRONMENT.filters.update(
    text=_text, number=_number, figure=figure, cell=cell, color=_color, json=json.dumps,
    fixed=lambda value, digits: MISSING if value is None else f"{value:,.{digits}f}",
    anchor=lambda name: name.lower().replace(" ", "-"),
    percent=lambda value, longest: f"{100 * value / longest if longest else 0:.2f}%",
    thousands=lambda value: f"{value:,}",
)  # fmt: skip


# Markdown escapes nothing by itself: a pipe would end a cell, a < begin a tag.
MARKDOWN = ENVIRONMENT.overlay(
    autoescape=False, finalize=lambda v: " ".join(str(v).split("\n")).replace("|", "\\|").replace("<", "&lt;")
)


def _page(template: str, **values: Any) -> str:
    return ENVIRONMENT.get_template(template).render(**values)
