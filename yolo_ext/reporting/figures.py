# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figures: accuracy against latency, boxes of a dataset, detections of two side by side, and what layers bear."""

import math
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
BLUE, ORANGE = "#2563eb", "#ea580c"
MISSED, ADDED = (40, 40, 230), (0, 140, 255)  # BGR
MIN_WIDTH = 640  # px; narrower pictures are enlarged so that captions and labels fit
LEAST_RANGE = 0.02  # of mAP; a finer axis would blow up noise of the validation set
MAX_LABELS = 15  # more boxes than this are drawn without class labels, which would hide the objects
CURVES, BARS, RIDGES = 10, 40, 15  # more cannot be told apart or read
LABELLED = 120  # rows of a heat map; of more, not each has a name
LEFT = 1e-2  # left end of the axis of ridges, unless there are smaller scores that are not zero
VISIBLE = 0.01  # of the highest ridge; a few channels below that do not stretch the axis
OVERLAP = 1.9  # height of the highest ridge in rows


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
    ax.step(*zip(*line), where="post", color=BLUE, linewidth=1, alpha=0.5, label="Pareto front")
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
    right.bar(list(sizes), list(sizes.values()), color=BLUE)
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


# Layers --------------------------------------------------------------------------------------------------------------
def drops(found: Mapping[str, Any]) -> np.ndarray:
    """Return how far mAP falls below the base (groups, ratios), NaN where a group is too narrow for such a point."""
    ratios = np.array(found["ratios"])
    table = np.full((len(found["groups"]), len(ratios)), math.nan)
    for row, group in zip(table, found["groups"]):
        for point in group["curve"]:
            row[np.abs(ratios - point["wanted"]).argmin()] = found["base"]["map"] - point["map"]
    return table


@pictured(9)
def plot_sensitivity(found: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the mAP drop of every layer by the share of its channels that is removed."""
    groups, ratios, metric, base = found["groups"], found["ratios"], found["metric"], found["base"]["map"]
    table, names = drops(found), [g["name"] for g in groups]
    figure, (left, right) = subplots(1, 2, figsize=(12, _height(len(groups))))
    top = max(float(np.nanmax(table, initial=0.0)), 1e-3)
    _heat_map(left, table, names, top)
    left.set_xticks(range(len(ratios)), [f"{r:.0%}" for r in ratios])
    grey = " (grey: the layer is too narrow)" * bool(np.isnan(table).any())
    left.set(xlabel=f"channels removed{grey}", title=f"{metric} drop")
    for (row, column), value in np.ndenumerate(table):
        if not math.isnan(value) and len(names) <= LABELLED:  # else there is no room for it
            color = "white" if value > 0.6 * top else "#334155"
            left.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=7, color=color)
    worst = np.argsort(-np.nan_to_num(table, nan=-1.0).max(1), kind="stable")[:CURVES]
    for i in worst:
        curve = groups[i]["curve"]
        right.plot([0.0, *(p["ratio"] for p in curve)], [base, *(p["map"] for p in curve)],
                   marker="o", ms=3, lw=1.5, label=names[i])  # fmt: skip
    right.axhline(base, color="#94a3b8", lw=0.8, ls="--")
    right.set(xlabel="channels removed", ylabel=metric, title=f"The {len(worst)} most sensitive layers")
    right.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    right.grid()
    right.set_box_aspect(1)
    right.set_anchor("N")
    right.legend(frameon=False, fontsize=8)
    text = f"{metric} {base:.3f} unpruned after BatchNorm recalibration, {found['trained']:.3f} as trained"
    figure.suptitle(f"Sensitivity to pruning: {text}")
    return save(figure, path)


def _height(rows: int) -> float:
    return min(max(4.0, 1.6 + 0.19 * rows), 26.0)  # inches


def _heat_map(ax: Any, table: np.ndarray, names: Sequence[str], top: float, **bar: Any) -> Any:
    """Draw a table (rows, columns) from 0 to `top`, NaN in grey; return its colour bar."""
    image = ax.imshow(table, aspect="auto", cmap="YlOrRd", vmin=0, vmax=top, interpolation="nearest")
    ax.set_facecolor("#e2e8f0")  # not measured
    every = max(1, math.ceil(len(names) / LABELLED))
    ax.set_yticks(range(0, len(names), every), list(names)[::every], fontsize=7.5)
    return ax.figure.colorbar(image, ax=ax, pad=0.02, **bar)


@pictured(9)
def plot_quant_sensitivity(found: Mapping[str, Any], path: str | Path) -> Path:
    """Plot box error, score error and, where it was measured, ms saved of each layer, the worst on top."""
    groups, total = found["groups"][:BARS][::-1], len(found["groups"])
    bars = [("box_mean", "box error (px)", "tab:blue"), ("score_mean", "score error", "tab:orange")]
    bars += [("ms", "ms saved by INT8", "tab:green")] if any("ms" in g for g in groups) else []
    height = min(max(3.0, 1.4 + 0.18 * len(groups)), 12.0)
    figure, axes = subplots(1, len(bars), figsize=(4 * len(bars), height), sharey=True)
    for ax, (key, label, color) in zip(axes, bars):
        ax.barh(range(len(groups)), [g.get(key, 0.0) for g in groups], color=color)
        ax.set_xlabel(label)
        ax.grid(axis="x")
        ax.margins(y=0.01)
    axes[0].set_yticks(range(len(groups)), [g["name"] for g in groups], fontsize=7.5)
    which = f" (the {BARS} worst of {total})" if total > BARS else ""
    figure.suptitle(f"Error with one {found['by']} quantized, {found['images']} images{which}")
    return save(figure, path)


@pictured(9)
def plot_ridge(history: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the scores of prunable channels over the epochs of a `sparsity.json`, and what pruning them would save."""
    from matplotlib import colormaps

    records = history["epochs"]
    figure, (zero, ridges, curves) = subplots(1, 3, figsize=(12, 5.2), width_ratios=(0.75, 3, 2.6))
    figure.set_layout_engine("constrained", w_pad=0.12)
    shown = [records[i] for i in sorted({round(k) for k in np.linspace(0, len(records) - 1, RIDGES)})]
    colors = colormaps["viridis_r"](np.linspace(0.15, 1.0, len(shown)))
    # The share of channels in the first bin as bars: as part of a ridge it would dwarf all others.
    shares, rows = [r["histogram"][0] / max(sum(r["histogram"]), 1) for r in shown], np.arange(len(shown)) - 0.22
    zero.barh(rows, shares, 0.44, color=colors)
    for row, share in zip(rows, shares):
        zero.text(share, row, f" {share:.0%}", va="center", fontsize=7, color="#475569")
    zero.set_yticks(range(len(shown)), [str(r["epoch"] + 1) for r in shown])
    below = f"zero\n(below {history['edges'][1]:g})"
    zero.set(xlim=(0, 1.35 * max(*shares, 0.05)), xticks=[], ylabel="epoch", xlabel=below)
    zero.tick_params(axis="y", length=0)
    _ridges(ridges, shown, colors, np.array(history["edges"][1:]))
    _progress(curves, records)
    for ax in (zero, ridges):
        ax.set_ylim(len(shown) - 0.5, -OVERLAP)
        ax.spines["left"].set_visible(False)
    figure.suptitle(
        f"Sparsity training with '{records[-1]['method']}': {sum(records[-1]['histogram']):,} prunable channels"
    )
    return save(figure, path)


def _ridges(ax: Any, shown: list[dict[str, Any]], colors: np.ndarray, edges: np.ndarray) -> None:
    """Draw a ridge for each epoch over a logarithmic axis, later epochs in front."""
    centres = np.sqrt(edges[1:] * edges[:-1])
    counts = np.array([r["histogram"][1:] for r in shown], dtype=float)
    counts /= max(counts.max(), 1.0) / OVERLAP
    for row, (heights, color) in enumerate(zip(counts, colors)):
        ax.fill_between(centres, row - heights, row, color=color, alpha=0.8, lw=0, zorder=row)
        ax.plot(centres, row - heights, color="white", lw=1.0, zorder=row)
        ax.axhline(row, color=color, lw=0.6, zorder=row)
    used = edges[1:][counts.max(0) > VISIBLE * OVERLAP]
    left, right = min(LEFT, used.min(initial=LEFT) / 2), used.max(initial=LEFT * 10)
    scores, threshold = shown[-1]["scores"], shown[-1]["threshold"]
    ax.set(xscale="log", xlim=(max(left, edges[0]), right * 1.3), yticks=[], xlabel=f"{scores} of a channel")
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.xaxis.set_minor_formatter(lambda v, _: "")
    if scores != "|gamma|":  # where that of gamma lies depends on the group
        ax.axvline(threshold, color="#475569", lw=0.9, ls="--", zorder=len(shown))
        ax.text(threshold, -OVERLAP, " threshold", va="top", fontsize=7, color="#475569")


def _progress(ax: Any, records: list[dict[str, Any]]) -> None:
    """Draw the share below the threshold and the speed-up over the epochs."""
    epochs = [r["epoch"] + 1 for r in records]
    marker = "o" if len(records) <= 30 else None
    ax.plot(epochs, [r["share"] for r in records], color=BLUE, marker=marker, ms=3.5)
    ax.set(ylim=(0, 1), xlabel="epoch")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_ylabel("channels below the threshold", color=BLUE)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid()
    other = ax.twinx()
    other.plot(epochs, [r["speedup"] for r in records], color=ORANGE, marker=marker, ms=3.5)
    other.set_ylim(1, max(2.0, 1.1 * max(r["speedup"] for r in records)))
    other.yaxis.set_major_formatter(lambda v, _: f"{v:g}x")
    other.set_ylabel("FLOPs before / after if pruned now", color=ORANGE)


@pictured(9)
def plot_layers(history: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the share of channels below the threshold of each layer over the epochs; where kept whole, grey."""
    records = history["epochs"]
    names = list(dict.fromkeys(name for r in records for name in r["layers"]))
    table = np.array([[r["layers"].get(name, math.nan) for r in records] for name in names])
    figure, ax = subplots(figsize=(8.5, _height(len(names))))
    bar = _heat_map(ax, table, names, 1, aspect=40)
    bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    step = math.ceil(len(records) / 20)
    ax.set_xticks(range(0, len(records), step), [str(r["epoch"] + 1) for r in records[::step]])
    for row, name in enumerate(names):
        if name in records[-1]["collapsed"]:
            ax.text(len(records) - 0.45, row, "◂", va="center", fontsize=7, color="#475569", clip_on=False)
    note = " (◂ collapsed: only a few channels left)" if records[-1]["collapsed"] else ""
    grey = " (grey: could not be pruned then)" * bool(np.isnan(table).any())
    ax.set(xlabel=f"epoch{grey}", title=f"Channels below the threshold{note}")
    return save(figure, path)
