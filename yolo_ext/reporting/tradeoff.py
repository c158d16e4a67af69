# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Accuracy against latency of several models, and which of them no other one beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import plt_settings

from yolo_ext.core.errors import UsageError

LEAST_RANGE = 0.02  # of mAP; a finer axis would blow up noise of the validation set
FRONT, BEATEN = "#2563eb", "#94a3b8"


def pareto(points: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Tell for each model whether none of the others is at least as fast and as accurate, and better in one of both.

    Args:
        points: Dicts with `median` (ms) and `map` (0 to 1).

    Returns:
        One bool for each model.
    """
    return [
        not any(
            q["median"] <= p["median"] and q["map"] >= p["map"] and (q["median"] < p["median"] or q["map"] > p["map"])
            for q in points
        )
        for p in points
    ]


@plt_settings({"font.size": 10})
def plot_tradeoff(points: Sequence[Mapping[str, Any]], path: str | Path, note: str = "") -> Path:
    """Plot mAP50-95 against latency with its 10 to 90 % range, and the Pareto front.

    Args:
        points: Dicts with `name`, `median`, `p10`, `p90` (ms) and `map` (0 to 1).
        path: Picture to write.
        note: Conditions of the measurement, written below the plot.

    Returns:
        The path written.

    Raises:
        UsageError: There are no points.
    """
    import matplotlib.pyplot as plt

    if not points:
        raise UsageError("No models to plot: nothing has both a latency and a mAP. Pass at least one model.")
    front = pareto(points)
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    line = sorted((p["median"], p["map"]) for p, best in zip(points, front) if best)
    ax.plot(*zip(*line), color=FRONT, linewidth=1, alpha=0.5, label="Pareto front")
    for p, best in zip(points, front):
        spread = [[p["median"] - p["p10"]], [p["p90"] - p["median"]]]
        ax.errorbar(p["median"], p["map"], xerr=spread, fmt="o", color=FRONT if best else BEATEN, capsize=3)
        place: Any = {"xytext": (6, 6), "textcoords": "offset points"}
        ax.annotate(str(p["name"]), (p["median"], p["map"]), parse_math=False, **place)
    ax.set(xlabel="latency (ms, median, 10 to 90 % range)" + (f"\n{note}" if note else ""), ylabel="mAP50-95")
    ax.set_xlim(left=0)
    ax.margins(x=0.15, y=0.15)
    low, high = ax.get_ylim()
    room = max(0.0, LEAST_RANGE - (high - low)) / 2
    ax.set_ylim(low - room, high + room)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return Path(path)
