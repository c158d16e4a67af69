# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What sparsity training did so far: how many channels are near zero, where, and what pruning them would save.

Channels are scored by the pruning criterion of the same name, so that the monitor and `prune` never disagree. One is
near zero when its score is at most `sparsity.threshold` of the largest score in its group. Only channels that the
pruning options leave prunable count.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.config import PruneConfig, SparsityConfig
from yolo_ext.pruning.criteria import criteria
from yolo_ext.pruning.graph import Graph, build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.plan import near_zero, near_zero_share, spare_units, widths_of
from yolo_ext.pruning.solve import measure
from yolo_ext.reporting.figures import plot_layers, plot_ridge

FILE = "sparsity.json"
LITTLE = 1.05  # FLOPs before / after below which sparsity training has changed nothing
# The first bin holds what is zero for all that it matters, the last one also what is larger.
EDGES = [0.0, *(10 ** (k / 20) for k in range(-80, 21))]  # 1e-4 .. 10, twenty to the decade


def observe(
    model: nn.Module, cfg: SparsityConfig, prune_cfg: PruneConfig, epoch: int, coefficient: float, penalty: float,
    imgsz: int = 640, *, pull: float = 0.0, graph: Graph | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Describe the sparsity of a model, best the EMA, after an epoch (from 0), and what pruning it now would save."""
    graph, threshold = graph or build_graph(model), cfg.threshold
    criterion = cfg.method if cfg.method in criteria.names() else "slim"  # for a penalty of the user's own
    ties = tied_groups(model, graph, replace(prune_cfg, method=criterion, ratios={}))
    figures = measure(model, graph, imgsz)
    before, after = figures({}), figures(widths_of(graph, ties, spare_units(ties, threshold)))
    rows = [(g.name, v) for t in ties for g, v in zip(t.groups, t.values)]
    masks: dict[str, list[torch.Tensor]] = {}  # the groups of a layer that is cut in parts count as one
    for name, v in rows:
        masks.setdefault(name, []).append(near_zero(v, threshold))
    scores = torch.cat([torch.zeros(0), *(v for _, v in rows)]).clamp(max=EDGES[-1])
    return {
        "epoch": epoch,
        "method": cfg.method,
        "scores": "relative norm" if criterion == "group_sl" else "|gamma|",
        "threshold": threshold,
        "coefficient": float(coefficient),
        "pull": float(pull),
        "penalty": float(penalty) if isfinite(penalty) else None,  # NaN is no JSON
        "share": near_zero_share(ties, threshold),
        "speedup": before[0] / after[0],
        "params": before[1] / after[1],
        "layers": {name: float(torch.cat(parts).float().mean()) for name, parts in masks.items()},
        "histogram": torch.histogram(scores, torch.tensor(EDGES)).hist.int().tolist(),
    }


def conclusion(epochs: Sequence[dict[str, Any]], held: Sequence[str], max_drop: float) -> str:
    """Say what records have come to and, where that is too much or too little, what to do; `held` is protected."""
    first, last = epochs[0], epochs[-1]
    said = f"{last['share']:.1%} of the channels are near zero, which is worth FLOPs / {last['speedup']:.2f}"
    lost = (first.get("fitness") or 0.0) - (last.get("fitness") or 0.0)
    if held and lost > max_drop:
        names = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if held[3:] else "")
        why = f"The fitness fell by {lost:.4f} and only sparsity.protect holds {names}"
        return f"{said}. {why}: lower sparsity.coefficient"
    if not held and last["speedup"] < LITTLE:
        return f"{said}. For more, give more epochs or a larger sparsity.coefficient"
    return said


def noted(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Add the record of an epoch to `sparsity.json`, in place of what a killed run left behind, and return the file."""
    path = folder / FILE
    history: Any = json.loads(path.read_text()) if path.is_file() else {"edges": EDGES, "epochs": []}
    history["epochs"] = [r for r in history["epochs"] if r["epoch"] < record["epoch"]] + [record]
    atomic_write(path, json.dumps(history))
    return history


def plot(history: dict[str, Any], folder: Path) -> list[Path]:
    """Draw `sparsity.png` and `sparsity_layers.png` of the content of `sparsity.json`, and return their paths."""
    return [plot_ridge(history, folder / "sparsity.png"), plot_layers(history, folder / "sparsity_layers.png")]
