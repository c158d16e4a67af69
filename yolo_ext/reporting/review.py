# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The review sheet of auto-labelling: one self-contained page, the least certain images first, without scripts."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import colors

from yolo_ext.reporting import markup as ui

LOW = 0.5  # boxes below this confidence are marked
THUMB = 360  # px
STYLE = """
main { max-width: 1240px; }
.pick { position: absolute; opacity: 0; }
.pills { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 16px; }
.pills label { padding: 4px 12px; border: 1px solid var(--line); border-radius: 99px; cursor: pointer; }
.pills { font-size: 13.5px; }
.pills i { display: inline-block;
  width: 9px; height: 9px; margin-right: 6px; border: 1px solid var(--soft); border-radius: 50%; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 16px; }
.shot { margin: 0; min-width: 0; }
.shot svg { display: block; width: 100%; aspect-ratio: 4 / 3; background: #11151c; border-radius: 8px; }
.shot rect, .shot polygon { fill: transparent; stroke-width: 1.6px; vector-effect: non-scaling-stroke; }
.shot .low { stroke-dasharray: 5 3; stroke-width: 2.4px; }
.shot figcaption { overflow-wrap: anywhere; }
.shot figcaption b { color: var(--ink); font-weight: 600; }
.mark.warn { background: var(--warn-bg); color: var(--warn); }
.mark.none { background: var(--line); color: var(--soft); }
"""


def lowest(record: Mapping[str, Any]) -> float | None:
    """Return the lowest confidence among the objects of an image, None where there are none."""
    return min((o["confidence"] for o in record["objects"]), default=None)


def in_order(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort images by their least certain object; those in which nothing was found come last."""
    return sorted(records, key=lambda r: (2.0 if (low := lowest(r)) is None else low, r["image"]))


def class_counts(records: Iterable[Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Count the objects of each class.

    Args:
        records: Images with `objects`, each with `class` and `confidence`.
        names: Class names by class index.

    Returns:
        For each class that was found: `boxes`, `images`, `mean_confidence` and `low`, the boxes below `LOW`.
    """
    boxes, images, low = Counter[int](), Counter[int](), Counter[int]()
    total: dict[int, float] = {}
    for record in records:
        images.update({o["class"] for o in record["objects"]})
        for o in record["objects"]:
            boxes[o["class"]] += 1
            low[o["class"]] += o["confidence"] < LOW
            total[o["class"]] = total.get(o["class"], 0.0) + o["confidence"]
    return {
        names[c]: {"boxes": n, "images": images[c], "mean_confidence": round(total[c] / n, 4), "low": low[c]}
        for c, n in sorted(boxes.items())
    }


def render_review(
    title: str,
    records: Sequence[Mapping[str, Any]],
    files: Mapping[str, Path],
    names: Mapping[int, str],
    *,
    notes: Sequence[str] = (),
    skipped: Mapping[str, str] | None = None,
    previews: str = "",
    limit: int = 500,
) -> str:
    """Render the review sheet; the same input gives the same bytes.

    Args:
        title: Title of the page.
        records: Images: `image` (name), `size` (width, height in pixels), `objects` with `class`, `confidence`, `box`.
        files: Image files by name.
        names: Class names by class index.
        notes: Lines on how the labels were made.
        skipped: Images that cannot be read, and why.
        previews: Folder, relative to the page, of larger pictures `<image>.jpg`; no links without it.
        limit: Pictures shown.

    Returns:
        The page, with style and pictures embedded.
    """
    shown = in_order(records)[:limit]
    counts = class_counts(records, names)
    filters = [("All", "", "", len(shown))]
    seen = Counter(c for r in shown for c in {o["class"] for o in r["objects"]})
    filters += [(names[c], f"c{c}", f'<i style="background:{_color(c)}"></i>', n) for c, n in sorted(seen.items())]
    if empty := sum(not r["objects"] for r in shown):
        filters.append(("Nothing found", "none", "", empty))
    picks = "".join(
        f'<input class="pick" type="radio" name="f" id="f{i}"{" checked" * (not i)}>' for i in range(len(filters))
    )
    pills = "".join(
        f'<label for="f{i}">{dot}{escape(n)} · {count}</label>' for i, (n, _, dot, count) in enumerate(filters)
    )
    shots = "".join(_shot(r, files[r["image"]], names, previews) for r in shown)
    more = f" The {limit} least certain of {len(records)} are shown." if len(records) > limit else ""
    hint = f"Least certain first; dashed boxes are below {LOW}. Point at a box for its class and confidence.{more}"
    rows = [
        (escape(n), *(f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in c.values())) for n, c in counts.items()
    ]
    table = ui.table(("Class", "Boxes", "Images", "Mean confidence", f"Below {LOW}"), rows)
    bad = [(escape(name), escape(why)) for name, why in (skipped or {}).items()]
    broken = ui.fold(ui.table(("Image", "|text|Reason"), bad), len(bad), "unreadable images")
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8") + STYLE + _filter_css(filters)
    # The policy makes a browser refuse every request and script, so the page stays offline whatever it contains.
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body><main><header><h1>{escape(title)}</h1>"
        f"{''.join(f'<p>{escape(n)}</p>' for n in notes)}</header><section><h2>Labels</h2>{table}</section>"
        f"{f'<section><h2>Unreadable images</h2>{broken}</section>' if bad else ''}"
        f'<section><h2>Images</h2><p class="muted">{escape(hint)}</p>{picks}<div class="pills">{pills}</div>'
        f'<div class="sheet">{shots}</div></section></main></body></html>\n'
    )


def _filter_css(filters: Sequence[tuple[str, str, str, int]]) -> str:
    """Return the rules by which a radio button leaves one class, its least certain images first."""
    rules = []
    for i, (_, key, *_) in enumerate(filters):
        rules.append(
            f'#f{i}:checked~.pills label[for="f{i}"]{{background:var(--accent);border-color:var(--accent);color:#fff}}'
            f'#f{i}:focus-visible~.pills label[for="f{i}"]{{outline:2px solid var(--ink);outline-offset:2px}}'
        )
        if key:
            on = f"#f{i}:checked~.sheet"
            rules.append(
                f"{on} .shot:not(.{key}),{on} .box:not(.{key}){{display:none}}{on} .shot{{order:var(--{key},0)}}"
            )
    return "\n".join(rules)


def _shot(record: Mapping[str, Any], file: Path, names: Mapping[int, str], previews: str) -> str:
    """Draw one image with its boxes as SVG, which stay sharp and can be filtered."""
    w, h = record["size"]
    objects = record["objects"]
    boxes = "".join(_box(o, names) for o in objects)
    picture = f'<svg viewBox="0 0 {w} {h}"><image width="{w}" height="{h}" href="{_thumbnail(file)}"/>{boxes}</svg>'
    if previews:
        link = quote(f"{previews}/{record['image']}.jpg", errors="replace")
        picture = f'<a href="{link}">{picture}</a>'
    low = lowest(record)
    tone, word = ("none", "nothing found") if low is None else ("warn" if low < LOW else "", f"lowest {low:.2f}")
    counts = Counter(o["class"] for o in objects)
    text = " · ".join(f"{n} {escape(names[c])}" for c, n in sorted(counts.items()))
    classes = " ".join(f"c{c}" for c in sorted(counts)) or "none"
    order = ";".join(f"--c{c}:{round(1e4 * min(o['confidence'] for o in objects if o['class'] == c))}" for c in counts)
    mark = f'<span class="mark {tone}">{word}</span>'
    return (
        f'<figure class="shot {classes}" style="{order}">{picture}'
        f"<figcaption>{mark} <b>{escape(record['image'])}</b><br>{text}</figcaption></figure>"
    )


def _color(index: int) -> str:
    return "rgb({},{},{})".format(*colors(index))


def _box(o: Mapping[str, Any], names: Mapping[int, str]) -> str:
    low = " low" if o["confidence"] < LOW else ""
    style = f'class="box c{o["class"]}{low}" stroke="{_color(o["class"])}"'
    title = f"<title>{escape(names[o['class']])} {o['confidence']:.2f}</title>"
    if flat := o.get("polygon"):
        points = " ".join(f"{x:g},{y:g}" for x, y in zip(flat[::2], flat[1::2]))
        return f'<polygon {style} points="{points}">{title}</polygon>'
    x0, y0, x1, y1 = o["box"]
    return f'<rect {style} x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}">{title}</rect>'


def _thumbnail(file: Path) -> str:
    """Return a reduced copy of an image as a data URL, empty where it is gone."""
    image = imread(file)
    if image is None:
        return ""
    scale = THUMB / max(image.shape[:2])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in (image.shape[1], image.shape[0])]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
