# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figures of sparsity training: scale factors over the epochs, and which layers gave up channels when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import plt_settings

from yolo_ext.core.errors import UsageError

RIDGES = 15  # more cannot be told apart
LABELLED = 120  # rows of the heat map; of more, not each has a name
LEFT = 1e-2  # left end of the axis, unless there are smaller scores that are not zero
VISIBLE = 0.01  # of the highest ridge; a few channels below that do not stretch the axis
OVERLAP = 1.9  # height of the highest ridge in rows
SHARE, SPEEDUP = "#2563eb", "#ea580c"


@plt_settings({"font.size": 9})
def plot_ridge(history: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the distribution of the scores of all prunable channels over the epochs, and what pruning them would save.

    Args:
        history: Contents of ``sparsity.json``.
        path: Picture to write.

    Returns:
        The path written.

    Raises:
        UsageError: There are no epochs.
    """
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records, last = _records(history), history["epochs"][-1]
    figure = plt.figure(figsize=(12, 5.2), layout=ConstrainedLayoutEngine(w_pad=0.12))
    zero, ridges, curves = figure.subplots(1, 3, width_ratios=(0.75, 3, 2.6))
    shown = [records[i] for i in sorted({round(k) for k in np.linspace(0, len(records) - 1, RIDGES)})]
    colors = plt.get_cmap("viridis_r")(np.linspace(0.15, 1.0, len(shown)))
    _zero(zero, shown, colors, history["edges"][1])
    _ridges(ridges, shown, colors, np.array(history["edges"][1:]))
    _curves(curves, records)
    for ax in (zero, ridges):
        ax.set_ylim(len(shown) - 0.5, -OVERLAP)
        ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(f"Sparsity training with '{last['method']}': {sum(last['histogram']):,} prunable channels")
    return _save(figure, path)


def _zero(ax: Any, shown: list[dict[str, Any]], colors: np.ndarray, edge: float) -> None:
    """Draw the share of channels in the first bin as bars: as part of a ridge it would dwarf all others."""
    shares = [r["histogram"][0] / max(sum(r["histogram"]), 1) for r in shown]
    rows = np.arange(len(shown)) - 0.22
    ax.barh(rows, shares, 0.44, color=colors)
    for row, share in zip(rows, shares):
        ax.text(share, row, f" {share:.0%}", va="center", fontsize=7, color="#475569")
    ax.set_yticks(range(len(shown)), [str(r["epoch"] + 1) for r in shown])
    ax.set(xlim=(0, 1.35 * max(*shares, 0.05)), xticks=[], ylabel="epoch", xlabel=f"zero\n(below {edge:g})")
    ax.tick_params(axis="y", length=0)


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
    ax.set(
        xscale="log", xlim=(max(left, edges[0]), right * 1.3), yticks=[], xlabel=f"{shown[-1]['scores']} of a channel"
    )
    if shown[-1]["scores"] != "|gamma|":  # where that of gamma lies depends on the group
        ax.axvline(shown[-1]["threshold"], color="#475569", lw=0.9, ls="--", zorder=len(shown))
        ax.text(shown[-1]["threshold"], -OVERLAP, " threshold", va="top", fontsize=7, color="#475569")


def _curves(ax: Any, records: list[dict[str, Any]]) -> None:
    epochs = [r["epoch"] + 1 for r in records]
    marker = "o" if len(records) <= 30 else None
    ax.plot(epochs, [r["share"] for r in records], color=SHARE, marker=marker, ms=3.5)
    ax.set(ylim=(0, 1), xlabel="epoch")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_ylabel("channels below the threshold", color=SHARE)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    other = ax.twinx()
    other.plot(epochs, [r["speedup"] for r in records], color=SPEEDUP, marker=marker, ms=3.5)
    other.set_ylim(1, max(2.0, 1.1 * max(r["speedup"] for r in records)))
    other.yaxis.set_major_formatter(lambda v, _: f"{v:g}x")
    other.set_ylabel("FLOPs before / after if pruned now", color=SPEEDUP)
    for axis in (ax, other):
        axis.spines["top"].set_visible(False)


@plt_settings({"font.size": 9})
def plot_layers(history: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the share of channels below the threshold of each layer over the epochs.

    Args:
        history: Contents of ``sparsity.json``.
        path: Picture to write; layers that pruning kept whole in an epoch are grey there.

    Returns:
        The path written.

    Raises:
        UsageError: There are no epochs or no layers.
    """
    import matplotlib.pyplot as plt

    records = _records(history)
    names = list(dict.fromkeys(name for r in records for name in r["layers"]))
    if not names:
        raise UsageError("No layers to plot: the sparsity history holds no layer that can be pruned.")
    table = np.array([[r["layers"].get(name, math.nan) for r in records] for name in names]).reshape(-1, len(records))
    figure, ax = plt.subplots(figsize=(8.5, min(max(4.0, 1.6 + 0.17 * len(names)), 26.0)), layout="constrained")
    image = ax.imshow(table, aspect="auto", cmap="YlOrRd", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=ax, pad=0.02, aspect=40)
    bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_facecolor("#e2e8f0")
    every = max(1, math.ceil(len(names) / LABELLED))
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize=6.5, parse_math=False)
    step = math.ceil(len(records) / 20)
    ax.set_xticks(range(0, len(records), step), [str(r["epoch"] + 1) for r in records[::step]])
    for row, name in enumerate(names):
        if name in records[-1]["collapsed"]:
            ax.text(len(records) - 0.45, row, "◂", va="center", fontsize=7, color="#475569", clip_on=False)
    note = " (◂ collapsed: only a few channels left)" if records[-1]["collapsed"] else ""
    ax.set(xlabel="epoch", title=f"Channels below the threshold{note}")
    return _save(figure, path)


def _records(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not history["epochs"]:
        raise UsageError("Nothing to plot: the sparsity history holds no epochs. Train at least one.")
    return list(history["epochs"])


def _save(figure: Any, path: str | Path) -> Path:
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
