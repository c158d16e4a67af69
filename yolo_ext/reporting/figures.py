# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figures of models and data: accuracy against latency, boxes of a dataset, detections of two side by side."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from ultralytics.utils import plt_settings
from ultralytics.utils.checks import is_ascii
from ultralytics.utils.metrics import bbox_ioa
from ultralytics.utils.patches import imwrite
from ultralytics.utils.plotting import Annotator

Box = Sequence[float]  # x1, y1, x2, y2 in pixels, confidence, class
AFTER = "#2563eb"
MISSED, ADDED = (40, 40, 230), (0, 140, 255)  # BGR
MIN_WIDTH = 640  # px; narrower pictures are enlarged so that captions and labels fit
LEAST_RANGE = 0.02  # of mAP; a finer axis would blow up noise of the validation set
MAX_LABELS = 15  # more boxes than this are drawn without class labels, which would hide the objects


def pictured(size: int) -> Callable[[Any], Any]:
    """Draw by the decorated function in a font of `size` points, names as they are: two $ would begin a formula."""
    frame = {f"axes.spines.{side}": False for side in ("top", "right")}
    return plt_settings({"font.size": size, "text.parse_math": False, "grid.alpha": 0.3, **frame})


def pareto(points: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Tell for each point (`median` in ms, `map`) whether no other is as fast and as accurate and better in one."""
    pairs = [(p["median"], -p["map"]) for p in points]
    return [not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in pairs) for p in pairs]


@pictured(10)
def plot_tradeoff(points: Sequence[Mapping[str, Any]], path: str | Path, note: str, metric: str) -> Path:
    """Plot a metric of points (`name`, `median`, `p10`, `p90` in ms, `map`) against latency, and the Pareto front."""
    front = pareto(points)
    drawn, ax = subplots(figsize=(9, 4.8))
    line = sorted({(p["median"], p["map"]) for p, best in zip(points, front) if best})
    ax.step(*zip(*line), where="post", color=AFTER, linewidth=1, alpha=0.5, label="Pareto front")
    for i, (p, best) in enumerate(zip(points, front)):
        spread = [[p["median"] - p["p10"]], [p["p90"] - p["median"]]]
        ax.errorbar(p["median"], p["map"], xerr=spread, fmt="osD^v"[i // 10 % 5], capsize=3, label=str(p["name"]),
                    markerfacecolor=None if best else "white")  # fmt: skip
    ax.set(xlabel="latency (ms, median, 10 to 90 % range)\n" + note, ylabel=metric)
    ax.set_xlim(left=0)
    ax.margins(x=0.15, y=0.15)
    low, high = ax.get_ylim()
    room = max(0.0, LEAST_RANGE - (high - low)) / 2
    ax.set_ylim(low - room, high + room)
    ax.grid()
    drawn.legend(frameon=False, loc="outside right upper", title="hollow: another is better")
    return save(drawn, path)


@pictured(10)
def plot_boxes(found: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the boxes by class and by size, as `data.summarise` counts them."""
    classes, sizes = found["classes"], found["sizes"]
    drawn, (left, right) = subplots(1, 2, figsize=(10, max(3.8, 1 + 0.22 * len(classes))))
    start = np.zeros(len(classes))
    for split in found["splits"]:
        counts = [row[split] for row in classes.values()]
        left.barh(list(classes), counts, left=start, label=split)
        start += counts
    left.set(title="Boxes by class", xlabel="boxes", ylim=(len(classes) - 0.4, -0.6))
    left.legend()
    right.bar(list(sizes), list(sizes.values()), color=AFTER)
    right.set_box_aspect(0.7)
    right.set_anchor("N")
    right.tick_params(axis="x", rotation=45)
    right.set(title="Boxes by size", xlabel="square root of area in pixels", ylabel="boxes")
    return save(drawn, path)


def side_by_side(base: Any, new: Any, path: str | Path) -> dict[str, int]:
    """Draw two of Ultralytics' results of one picture; count the objects of each (`base`, `new`), `missed`, `added`."""
    boxes, more = _boxes(base, new.names), _boxes(new, new.names)
    missed, added = match_boxes(boxes, more)
    labels = max(len(boxes), len(more)) <= MAX_LABELS
    base, new = _enlarged(base), _enlarged(new)
    before, after = (r.orig_img if r.probs else r.plot(line_width=2, labels=labels, conf=labels) for r in (base, new))
    annotator = Annotator(after, line_width=2)
    annotator.lw = 5  # not that of the words
    for result, indices, word, color in ((base, missed, "missed", MISSED), (new, added, "added", ADDED)):
        for i in indices if not result.probs else ():
            outline = result.boxes.xyxy[i] if result.obb is None else result.obb.xyxyxyxy[i]
            cls = (result.boxes if result.obb is None else result.obb).cls[i]
            annotator.box_label(outline, f"{word} {result.names[int(cls)]}", color)
    note = f"{len(missed)} missed, {len(added)} added"
    told = [f"{len(found)} objects" for found in (boxes, more)]
    if new.probs:
        note = "another class" if missed else ""
        told = [f"{r.names[r.probs.top1]} {r.probs.top1conf:.2f}" for r in (base, new)]
    halves = _caption(before, f"base: {told[0]}", ""), _caption(annotator.result(), f"compressed: {told[1]}", note)
    gap = np.full((halves[0].shape[0], 8, 3), 255, np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imwrite(str(path), np.hstack([halves[0], gap, halves[1]]))
    return {"base": len(boxes), "new": len(more), "missed": len(missed), "added": len(added)}


def _boxes(result: Any, names: Mapping[int, str]) -> list[Box]:
    """Return boxes, confidences and classes, numbered as in `names`; of a classifier one box, that of the picture."""
    if result.probs:
        rows = [(0, 0, 1, 1, float(result.probs.top1conf), result.probs.top1)]
    else:
        found = result.boxes if result.obb is None else result.obb
        rows = [(*b, p, c) for b, p, c in zip(*(v.tolist() for v in (found.xyxy, found.conf, found.cls)))]
    index = {name: i for i, name in names.items()}
    return [(*row[:5], index[result.names[int(row[5])]]) for row in rows]


def _enlarged(result: Any) -> Any:
    """Return a result at `MIN_WIDTH` or more, in three channels, with class names that OpenCV can write."""
    image = result.orig_img[..., [0, 1, 2] if result.orig_img.shape[2] > 2 else [0, 0, 0]]
    scale, made = max(MIN_WIDTH / image.shape[1], 1.0), copy(result)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else image
    made.orig_img, made.orig_shape = np.ascontiguousarray(image), image.shape[:2]
    made.names = {i: n if is_ascii(n) else f"class {i}" for i, n in result.names.items()}  # or a font would be fetched
    for part, places in {"boxes": 4, "obb": 4, "keypoints": 2}.items():
        if (found := getattr(result, part)) is not None:
            data = found.data.clone()
            data[..., :places] *= scale
            setattr(made, part, type(found)(data, made.orig_shape))
    return made


def match_boxes(base: Sequence[Box], new: Sequence[Box], iou: float = 0.5) -> tuple[list[int], list[int]]:
    """Pair boxes one to one, the best overlap of a class first; return indices of missed and of added boxes."""
    missed, added = list(range(len(base))), list(range(len(new)))
    if base and new:
        a, b = np.asarray(base, dtype=np.float64), np.asarray(new, dtype=np.float64)
        overlap = np.where(a[:, None, 5] == b[None, :, 5], bbox_ioa(a[:, :4], b[:, :4], iou=True), 0.0)
        while overlap.max() >= iou:
            i, j = divmod(int(overlap.argmax()), len(new))
            missed.remove(i)
            added.remove(j)
            overlap[i], overlap[:, j] = 0, 0
    return missed, added


def _caption(image: np.ndarray, left: str, right: str) -> np.ndarray:
    """Put a white strip with a caption, and a warning at its right end, above a picture."""
    strip = np.full((34, image.shape[1], 3), 255, np.uint8)
    font, scale, grey = cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40)
    cv2.putText(strip, left, (6, 23), font, scale, grey, 1, cv2.LINE_AA)
    place = image.shape[1] - cv2.getTextSize(right, font, scale, 1)[0][0] - 6, 23
    color = grey if right.startswith("0 missed, 0") else MISSED
    cv2.putText(strip, right, place, font, scale, color, 1, cv2.LINE_AA)
    return np.vstack([strip, image])


def subplots(*grid: int, **options: Any) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes."""
    import matplotlib.pyplot as plt

    return plt.subplots(*grid, layout="constrained", **options)


def save(drawn: Any, path: str | Path) -> Path:
    """Write a matplotlib figure and close it; return the path."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    return path
