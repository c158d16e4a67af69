# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figure of a sensitivity analysis: a heat map over all layers and the curves of the most sensitive ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import plt_settings

from yolo_ext.core.errors import UsageError

SHOWN = 10  # curves; more cannot be told apart
LABELLED = 120  # rows of the heat map; of more, not each has a name


def drops(found: Mapping[str, Any]) -> np.ndarray:
    """Return how far mAP falls below the base.

    Args:
        found: What `pruning.sensitivity.sensitivity` returned.

    Returns:
        (groups, ratios) drops; NaN where a group is too narrow for a point of its own.
    """
    ratios = np.array(found["ratios"])
    table = np.full((len(found["groups"]), len(ratios)), math.nan)
    for row, group in zip(table, found["groups"]):
        for point in group["curve"]:
            row[np.abs(ratios - point["wanted"]).argmin()] = found["base"]["map"] - point["map"]
    return table


@plt_settings({"font.size": 9})
def plot_sensitivity(found: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the mAP drop of every layer by the share of its channels that is removed.

    Args:
        found: What `pruning.sensitivity.sensitivity` returned.
        path: Picture to write.

    Returns:
        The path written.

    Raises:
        UsageError: There are no groups.
    """
    import matplotlib.pyplot as plt

    groups = found["groups"]
    if not groups:
        raise UsageError("No layers to plot: the sensitivity analysis holds no groups. Analyse at least one.")
    table = drops(found)
    height = min(max(4.0, 1.6 + 0.17 * len(groups)), 26.0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    _heat_map(figure, left, table, [g["name"] for g in groups], found["ratios"])
    _curves(right, table, groups, found["base"]["map"])
    left.set_title(f"{found['metric']} drop")
    right.set_ylabel(found["metric"])
    figure.suptitle(
        f"Sensitivity to pruning: {found['metric']} {found['base']['map']:.3f} unpruned after BatchNorm recalibration, "
        f"{found['trained']:.3f} as trained"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _heat_map(figure: Any, ax: Any, table: np.ndarray, names: Sequence[str], ratios: Sequence[float]) -> None:
    top = max(float(np.nanmax(table, initial=0.0)), 1e-3)
    image = ax.imshow(table, aspect="auto", cmap="YlOrRd", vmin=0, vmax=top, interpolation="nearest")
    figure.colorbar(image, ax=ax, pad=0.02)
    ax.set_facecolor("#e2e8f0")  # not measured
    every = math.ceil(len(names) / LABELLED)
    ax.set_yticks(range(0, len(names), every), list(names)[::every], fontsize=6.5, parse_math=False)
    ax.set_xticks(range(len(ratios)), [f"{r:.0%}" for r in ratios])
    ax.set_xlabel("channels removed")
    if len(names) <= LABELLED:
        for (row, column), value in np.ndenumerate(table):
            if not math.isnan(value):
                color = "white" if value > 0.6 * top else "#334155"
                ax.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=6, color=color)


def _curves(ax: Any, table: np.ndarray, groups: Sequence[Mapping[str, Any]], base: float) -> None:
    worst = np.argsort(-np.nan_to_num(table, nan=-1.0).max(1), kind="stable")[:SHOWN]
    for color, i in zip(("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink",
                         "tab:gray", "tab:olive", "tab:cyan"), worst):  # fmt: skip
        curve = groups[i]["curve"]
        ax.plot([0.0, *(p["ratio"] for p in curve)], [base, *(p["map"] for p in curve)],
                marker="o", ms=3, lw=1.5, color=color, label=groups[i]["name"])  # fmt: skip
    ax.axhline(base, color="#94a3b8", lw=0.8, ls="--")
    ax.set(xlabel="channels removed", title=f"The {len(worst)} most sensitive layers")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=7.5)
