# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Figure of a quantization sensitivity analysis: error and time saved of the worst layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.utils import plt_settings

SHOWN = 40  # bars; more cannot be read


@plt_settings({"font.size": 9})
def plot_quant_sensitivity(found: Mapping[str, Any], path: str | Path) -> Path:
    """Plot box error, score error and, where it was measured, ms saved of each layer, the worst on top.

    Args:
        found: What `quantization.sensitivity.sensitivity` returned.
        path: Picture to write.

    Returns:
        The path written.
    """
    import matplotlib.pyplot as plt

    groups = found["groups"][:SHOWN][::-1]
    bars = [("box_mean", "box error (px)", "tab:blue"), ("score_mean", "score error", "tab:orange")]
    bars += [("ms", "ms saved by INT8", "tab:green")] if any("ms" in g for g in groups) else []
    height = min(max(3.0, 1.4 + 0.18 * len(groups)), 12.0)
    figure, axes = plt.subplots(1, len(bars), figsize=(4 * len(bars), height), sharey=True, layout="constrained")
    for ax, (key, label, color) in zip(axes, bars):
        ax.barh(range(len(groups)), [g.get(key, 0.0) for g in groups], color=color)
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(groups)), [g["name"] for g in groups], fontsize=7, parse_math=False)
    figure.suptitle(f"Error with one {found['by']} quantized, {found['images']} images")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
