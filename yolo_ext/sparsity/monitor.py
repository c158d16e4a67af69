# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What sparsity training did so far: how many channels are near zero, where, and what pruning them would save.

Channels are scored by the pruning criterion of the same name, so that the monitor and `prune` never disagree: `slim`
and `group_slim` score by |gamma| (mean and root mean square over the coupled BatchNorms), `group_sl` and `group_reg` by
the norm of all coupled weights relative to the largest of the group. A channel is near zero when its score is at most
`sparsity.threshold` of the largest score in its group. Only channels that the pruning options leave prunable count.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from yolo_ext.checkpoint import atomic_write
from yolo_ext.config import PruneConfig, SparsityConfig
from yolo_ext.pruning.bundles import Bundle, bundles, widths_of
from yolo_ext.pruning.criteria import criteria
from yolo_ext.pruning.graph import Graph, build_graph
from yolo_ext.pruning.readiness import near_zero, near_zero_share, spare_units
from yolo_ext.pruning.targets import measure

FILE = "sparsity.json"
# The first bin holds what is zero for all that it matters, the last one also what is larger.
EDGES = [0.0, *(10 ** (k / 20) for k in range(-80, 21))]  # 1e-4 .. 10, twenty to the decade
SURVIVORS = 8  # a group with so few channels in use has nothing left to give


def observe(
    model: nn.Module,
    cfg: SparsityConfig,
    prune_cfg: PruneConfig,
    epoch: int,
    coefficient: float,
    penalty: float,
    imgsz: int = 640,
    *,
    pull: float = 0.0,
    graph: Graph | None = None,
) -> dict[str, Any]:
    """Describe the sparsity of a model after an epoch.

    Args:
        model: The model, best the EMA, which is what is saved and pruned; it is not changed.
        cfg: Sparsity options.
        prune_cfg: Pruning options: which layers can be pruned, rounding and floors. Its criterion and target do not
            matter.
        epoch: The epoch, counted from 0.
        coefficient: Pull over the whole run.
        penalty: Value of the penalty.
        imgsz: Side of the image in pixels that FLOPs are counted for.
        pull: Pull of this epoch.
        graph: Couplings of the model as it is now, traced when None.

    Returns:
        Plain record: `epoch`, `coefficient`, `pull`, `penalty`; `share` of all prunable channels that is near zero and
        `layers`, the share by group name; `speedup` and `params`, before / after if those channels were pruned now
        (rounded and floored as `prune` would, keeping what is in use); `collapsed`, names of groups with no more than a
        few channels in use or whose largest score is negligible; `histogram`, counts of channels between `EDGES`.
    """
    graph = graph or build_graph(model)
    made = bundles(model, graph, replace(prune_cfg, method=criterion_of(cfg), ratios={}))
    figures = measure(model, graph, imgsz)
    before, after = figures({}), figures(widths_of(graph, made, spare_units(made, cfg.threshold)))
    return {
        "epoch": epoch,
        "coefficient": float(coefficient),
        "pull": float(pull),
        "penalty": float(penalty) if isfinite(penalty) else None,  # NaN is no JSON
        "share": near_zero_share(made, cfg.threshold),
        "speedup": before[0] / after[0],
        "params": before[1] / after[1],
        "layers": _layers(made, cfg.threshold),
        "collapsed": _collapsed(made, cfg),
        "histogram": _histogram(made),
    }


def criterion_of(cfg: SparsityConfig) -> str:
    """Return the pruning criterion that shows what a penalty does: of the same name, `slim` for the user's own."""
    return cfg.method if cfg.method in criteria.names() else "slim"


def _layers(made: list[Bundle], threshold: float) -> dict[str, float]:
    """Return the share of near-zero channels by group name; the groups of a layer that is cut in parts count as one."""
    masks: dict[str, list[torch.Tensor]] = {}
    for b in made:
        for g, v in zip(b.groups, b.values):
            masks.setdefault(g.name, []).append(near_zero(v, threshold))
    return {name: float(torch.cat(parts).float().mean()) for name, parts in masks.items()}


def _collapsed(made: list[Bundle], cfg: SparsityConfig) -> list[str]:
    """Return the names of groups that have nothing left to give, in the order of the model."""
    rows = [(g.name, v) for b in made for g, v in zip(b.groups, b.values)]
    negligible = cfg.threshold * median(float(v.max()) for _, v in rows) if rows else 0.0
    found = {}
    for name, v in rows:
        used = int((~near_zero(v, cfg.threshold)).sum())
        if used < len(v) and used <= max(SURVIVORS, cfg.protect * len(v)) or float(v.max()) <= negligible:
            found[name] = True
    return list(found)


def _histogram(made: list[Bundle]) -> list[int]:
    """Return the number of channels whose score lies between each two of `EDGES`."""
    scores = torch.cat([torch.zeros(0), *(v for b in made for v in b.values)]).clamp(max=EDGES[-1])
    return torch.histogram(scores, torch.tensor(EDGES)).hist.int().tolist()


def columns(record: dict[str, Any]) -> dict[str, float]:
    """Return what of a record goes into results.csv and to loggers; the keys are the same at each epoch."""
    return {f"sparsity/{k}": record[k] for k in ("share", "speedup", "coefficient", "pull")}


# History -------------------------------------------------------------------------------------------------------------
def append(folder: str | Path, cfg: SparsityConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Add the record of an epoch to `sparsity.json`; records of this and later epochs, left by a killed run, go.

    Args:
        folder: Run folder.
        cfg: Sparsity options.
        record: What `observe` returned.

    Returns:
        The history: `method`, `threshold`, `scores` (``|gamma|`` or ``relative norm``), `edges` and `epochs`, the records in order.
    """
    earlier = [r for r in (read(folder) or {"epochs": []})["epochs"] if r["epoch"] < record["epoch"]]
    relative = criterion_of(cfg) in ("group_sl", "group_reg")
    history = {
        "method": cfg.method,
        "threshold": cfg.threshold,
        "scores": "relative norm" if relative else "|gamma|",
        "edges": EDGES,
        "epochs": [*earlier, record],
    }
    atomic_write(Path(folder) / FILE, json.dumps(history))
    return history


def read(folder: str | Path) -> dict[str, Any] | None:
    """Return the history of a run folder, None when there is none."""
    path = Path(folder) / FILE
    return json.loads(path.read_text()) if path.is_file() else None
