# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a pruned model remembers: the plan in the numbering of the first dense model, reasons and couplings."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from typing import Any

from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest, note, set_tripwire
from yolo_ext.core.config import PruneConfig
from yolo_ext.pruning.graph import Graph, Kept
from yolo_ext.pruning.labels import layer_channels


def record(dense: nn.Module, pruned: nn.Module, graph: Graph, kept: Kept, cfg: PruneConfig, gap: float) -> None:
    """Write what was done into the manifest; indices always count in the numbering of the first dense model."""
    previous = deepcopy(dict(manifest(dense).prune))
    shapes = previous["shapes"] if previous else {p: list(s) for p, s in graph.shapes.items()}
    total: Kept = deepcopy(previous["kept"]) if previous else {}
    for path, dims in kept.items():
        for dim, index in dims.items():
            old = total.setdefault(path, {}).get(dim)
            total[path][dim] = [old[i] for i in index] if old is not None else list(index)
    # The teacher that a student grew from knows it by the weights it started with, not by those of today.
    parent = previous["parent"] if previous else manifest(dense).parent or fingerprint(dense)
    told = {
        **(previous or {}),
        "config": asdict(cfg),
        "kept": total,
        "shapes": shapes,
        "parent": parent,
        "frozen": {m.module: g.frozen for g in graph.groups if g.frozen for m in g.members if m.dim == "out"},
        "coupled": coupled_layers(pruned, graph),
        "notes": graph.notes,
        "gap": gap,
    }
    note(pruned, prune=told)
    set_tripwire(pruned)


def coupled_layers(model: nn.Module, graph: Graph) -> dict[str, list[str]]:
    """Return, for every layer whose channels also come from or are tied to others, the paths of those."""
    modules, found = dict(model.named_modules()), {}
    for bundle in graph.bundles:
        members = (m for i in bundle for m in graph.groups[i].members if m.dim == "out")
        layers = {m.module for m in members if layer_channels(modules[m.module])}
        found.update({p: sorted(layers - {p}, key=stock.natural_key) for p in layers if len(layers) > 1})
    return found


def layer_report(model: nn.Module) -> list[dict[str, Any]]:
    """Return channels before and after for every layer of a pruned model, with the reason where nothing changed.

    Returns:
        Rows ``{"name", "before", "after", "reason", "coupled"}`` in the order of the model.
    """
    found = manifest(model).prune or {"shapes": {}, "frozen": {}}
    modules = dict(model.named_modules())
    rows = []
    for path in sorted(found["shapes"], key=stock.natural_key):
        before = found["shapes"][path][0]
        after = getattr(modules[path], "out_channels", None) or getattr(modules[path], "out_features", before)
        reason = found["frozen"].get(path, "") if after == before else ""
        coupled = found.get("coupled", {}).get(path, [])
        rows.append({"name": path, "before": before, "after": after, "reason": reason, "coupled": coupled})
    return rows
