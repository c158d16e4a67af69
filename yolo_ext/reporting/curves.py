# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figures of layers: sensitivity to pruning and to quantization, and scale factors over sparsity training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_ext.reporting.figures import pictured, save, subplots

CURVES, BARS, RIDGES = 10, 40, 15  # more cannot be told apart or read
LABELLED = 120  # rows of a heat map; of more, not each has a name
LEFT = 1e-2  # left end of the axis of ridges, unless there are smaller scores that are not zero
VISIBLE = 0.01  # of the highest ridge; a few channels below that do not stretch the axis
OVERLAP = 1.9  # height of the highest ridge in rows
SHARE, SPEEDUP = "#2563eb", "#ea580c"


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
    import matplotlib.pyplot as plt

    records = history["epochs"]
    figure, (zero, ridges, curves) = subplots(1, 3, figsize=(12, 5.2), width_ratios=(0.75, 3, 2.6))
    figure.set_layout_engine("constrained", w_pad=0.12)
    shown = [records[i] for i in sorted({round(k) for k in np.linspace(0, len(records) - 1, RIDGES)})]
    colors = plt.get_cmap("viridis_r")(np.linspace(0.15, 1.0, len(shown)))
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
    ax.plot(epochs, [r["share"] for r in records], color=SHARE, marker=marker, ms=3.5)
    ax.set(ylim=(0, 1), xlabel="epoch")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_ylabel("channels below the threshold", color=SHARE)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid()
    other = ax.twinx()
    other.plot(epochs, [r["speedup"] for r in records], color=SPEEDUP, marker=marker, ms=3.5)
    other.set_ylim(1, max(2.0, 1.1 * max(r["speedup"] for r in records)))
    other.yaxis.set_major_formatter(lambda v, _: f"{v:g}x")
    other.set_ylabel("FLOPs before / after if pruned now", color=SPEEDUP)


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
