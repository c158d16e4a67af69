# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pieces of HTML for the report; everything that comes from outside is escaped here."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from yolo_ext.reporting.tables import ABSENT

MISSING = "not measured"
LONG_LIST = 16  # rows; a longer list starts folded


def text(value: object) -> str:
    """Escape a value from the report; dicts and lists are shown as JSON."""
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return "" if value is None else escape(str(value))


def number(value: object) -> str:
    """Format a figure of any kind, None as not measured."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else text(value)


def value(text: str, missing: str = MISSING) -> str:
    """Escape a formatted figure, greyed out where it is absent."""
    return f'<span class="muted" title="{MISSING}">{missing}</span>' if text == ABSENT else escape(text)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Build a table of cells that are already HTML; a title `|class|Title` gives its column that class."""
    titles = [h.rpartition("|")[::2] for h in header]
    classes = [f' class="{c.strip("|")}"' if c else "" for c, _ in titles]
    head = "".join(f"<th{c}>{escape(t)}</th>" for c, (_, t) in zip(classes, titles))
    body = "".join(f"<tr>{''.join(f'<td{c}>{v}</td>' for c, v in zip(classes, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def fold(table: str, count: int, what: str) -> str:
    """Fold a long list away behind a line that says how long it is."""
    if count <= LONG_LIST:
        return table
    return f"<details><summary>Show all {count} {what}</summary>{table}</details>"


def bar(value: float, longest: float, tone: str) -> str:
    """Draw a bar, to be put in a `track` whose full width stands for `longest`."""
    return f'<i class="{tone}" style="width:{percent(value, longest)}"></i>'


def percent(value: float, longest: float) -> str:
    """Give a length in CSS percent of `longest`."""
    return f"{100 * value / longest if longest else 0:.2f}%"


def line_chart(title: str, points: Sequence[tuple[str, float | None]], spec: str) -> str:
    """Draw one figure over the stages as inline SVG; nothing where fewer than two stages were measured."""
    measured = [(name, v) for name, v in points if v is not None]
    if len(measured) < 2:
        return ""
    low, high = min(v for _, v in measured), max(v for _, v in measured)
    spots = [
        (40 + 280 * i / (len(measured) - 1), 130 - 80 * ((v - low) / (high - low) if high > low else 0.5), name, v)
        for i, (name, v) in enumerate(measured)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in spots)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        f'<text class="value" x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{v:{spec}}</text>'
        f'<text transform="translate({x + 4:.1f} 162) rotate(-28)" text-anchor="end">{escape(name)}</text>'
        for x, y, name, v in spots
    )
    return (
        f'<svg viewBox="0 0 360 200" role="img" aria-label="{escape(title)} per stage">'
        f'<text class="title" x="12" y="18">{escape(title)}</text>'
        f'<line class="axis" x1="12" x2="348" y1="146" y2="146"/>'
        f'<line class="ref" x1="12" x2="348" y1="{spots[0][1]:.1f}" y2="{spots[0][1]:.1f}"/>'
        f'<polyline class="path" points="{path}"/>{dots}</svg>'
    )


def embed(picture: Mapping[str, Any], run_dir: Path) -> str:
    """Embed a picture; one that is gone is named, not dropped in silence."""
    path = run_dir / str(picture["path"])
    caption = text(picture.get("caption") or path.name)
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not path.is_file() or not kind.startswith("image/"):
        return f'<p class="muted">{caption}: picture {escape(path.name)} not found.</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{caption}" src="data:{kind};base64,{data}"><figcaption>{caption}</figcaption></figure>'
