# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The review sheet of auto-labelling: one self-contained page, the least certain images first, without scripts."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
from ultralytics.utils.patches import imread
from ultralytics.utils.plotting import colors

from yolo_ext.reporting.pages import page

LOW = 0.5  # boxes below this confidence are marked
THUMB = 360  # px
Record = Mapping[str, Any]  # an image: `image` (name), `size` (width, height), `objects` (`class`, `confidence`, `box`)


def lowest(record: Record) -> float | None:
    """Return the lowest confidence among the objects of an image, None where there are none."""
    return min((o["confidence"] for o in record["objects"]), default=None)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sort images by their least certain object; those in which nothing was found come last."""
    return sorted(records, key=lambda r: (2.0 if (low := lowest(r)) is None else low, r["image"]))


def class_counts(records: Iterable[Record], names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """Return `boxes`, `images`, `mean_confidence` and `low`, the boxes below `LOW`, of each class that was found."""
    found: dict[int, list[float]] = {}
    images = Counter[int]()
    for record in records:
        images.update({o["class"] for o in record["objects"]})
        for o in record["objects"]:
            found.setdefault(o["class"], []).append(o["confidence"])
    return {
        names[c]: {
            "boxes": len(values),
            "images": images[c],
            "mean_confidence": round(sum(values) / len(values), 4),
            "low": sum(v < LOW for v in values),
        }
        for c, values in sorted(found.items())
    }


def render_review(
    title: str,
    records: Sequence[Record],
    files: Mapping[str, Path],
    names: Mapping[int, str],
    *,
    notes: Sequence[str] = (),
    skipped: Mapping[str, str] | None = None,
    previews: str = "",
    limit: int = 500,
) -> str:
    """Render the review sheet of auto-labelling, the least certain images first; the same input gives the same bytes.

    Args:
        title: Title of the page.
        records: Images: `image` (name), `size` (width, height in pixels), `objects` with `class`, `confidence`, `box`
            (x1, y1, x2, y2 in pixels) and, of segment models, `polygon` (x, y, x, y, ... in pixels).
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
    seen = Counter(c for r in shown for c in {o["class"] for o in r["objects"]})
    filters = [{"name": "All", "key": "", "color": "", "count": len(shown)}]
    filters += [{"name": names[c], "key": f"c{c}", "color": _color(c), "count": n} for c, n in sorted(seen.items())]
    if empty := sum(not r["objects"] for r in shown):
        filters.append({"name": "Nothing found", "key": "none", "color": "", "count": empty})
    shots = [_shot(r, files[r["image"]], names, previews) for r in shown]
    return page(
        "review.html.j2", title=title, notes=notes, counts=class_counts(records, names), skipped=skipped or {},
        low=LOW, filters=filters, shots=shots, total=len(records),
    )  # fmt: skip


def _shot(record: Record, file: Path, names: Mapping[int, str], previews: str) -> dict[str, Any]:
    """Return what is shown of one image: boxes as SVG stay sharp and can be filtered."""
    objects, low = record["objects"], lowest(record)
    counts = Counter(o["class"] for o in objects)
    least = {c: min(o["confidence"] for o in objects if o["class"] == c) for c in counts}
    tone, word = ("none", "nothing found") if low is None else ("warn" if low < LOW else "", f"lowest {low:.2f}")
    return {
        "image": record["image"],
        "size": record["size"],
        "thumbnail": _thumbnail(file),
        "boxes": [_box(o, names) for o in objects],
        "link": quote(f"{previews}/{record['image']}.jpg", errors="replace") if previews else "",
        "classes": " ".join(f"c{c}" for c in sorted(counts)) or "none",
        "order": ";".join(f"--c{c}:{round(1e4 * p)}" for c, p in least.items()),
        "text": " · ".join(f"{n} {names[c]}" for c, n in sorted(counts.items())),
        "tone": tone,
        "word": word,
    }


def _box(o: Record, names: Mapping[int, str]) -> dict[str, str]:
    """Return class, colour, title and shape of one object."""
    low = " low" if o["confidence"] < LOW else ""
    title = f"{names[o['class']]} {o['confidence']:.2f}"
    drawn = {"tone": f"c{o['class']}{low}", "color": _color(o["class"]), "title": title, "points": ""}
    if flat := o.get("polygon"):
        return {**drawn, "points": " ".join(f"{x:g},{y:g}" for x, y in zip(flat[::2], flat[1::2]))}
    x0, y0, x1, y1 = o["box"]
    return {**drawn, **{k: f"{v:g}" for k, v in (("x", x0), ("y", y0), ("w", x1 - x0), ("h", y1 - y0))}}


def _color(index: int) -> str:
    """Return the CSS colour that Ultralytics draws a class in."""
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
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
