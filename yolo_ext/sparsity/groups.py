# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What sparsity training may pull on: the scale factors and weights of the channels that pruning could remove."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.graph import Graph, Group, build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.labels import layer_channels


@dataclass
class SparseGroup:
    """Channels that can be removed together, and the parameters that go with them.

    Attributes:
        name: Path of the first layer that produces the channels.
        size: Number n of channels.
        gammas: (parameter, (n, repeats) positions) of each BatchNorm over the channels.
        weights: (parameter, dimension, (n, repeats) positions in it) of each layer that produces or reads them.
    """

    name: str
    size: int
    gammas: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    weights: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)


def sparse_groups(model: nn.Module, cfg: PruneConfig, scales: bool = False) -> list[SparseGroup]:
    """Find the groups that pruning with these options could shrink.

    Args:
        model: A YOLO model as it is trained; it is not changed.
        cfg: Pruning options: what is excluded, floors and rounding.
        scales: Leave out groups without BatchNorm, which cannot be ranked by scale factors.

    Returns:
        The groups. Parameters without gradient are never among their slots.

    Raises:
        UsageError: If the model is fused or has no BatchNorm, or nothing in it can be pruned.
    """
    _check(model, scales)
    graph = build_graph(model)
    _keep_untrained(model, graph)
    # the simplest criterion that can rank what the penalty can pull on
    ties = tied_groups(model, graph, replace(cfg, method="slim" if scales else "l1", ratios={}))
    kept = [_slots(model, g) for t in ties for g in t.groups]
    if not kept:
        why = "has a BatchNorm and " if scales else ""
        raise UsageError(
            f"Sparsity training finds no group of channels that {why}can be pruned. Look at prune.include, "
            "prune.exclude, prune.min_channels, prune.round_to and freeze; `yolo-ext analyze` says why layers stay."
        )
    return kept


def _check(model: nn.Module, scales: bool) -> None:
    fused = bool(getattr(model, "is_fused", bool)())
    if fused or (scales and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())):
        raise UsageError(
            "Sparsity training needs BatchNorm, but this model has none: it was fused, or built without. "
            "Give the .pt as it was trained, before fuse()."
        )


def _keep_untrained(model: nn.Module, graph: Graph) -> None:
    """Freeze groups that a layer without gradients produces: it could not recover from pruning."""
    modules = dict(model.named_modules())
    if not any(p.requires_grad for p in model.parameters()):
        return  # loaded for inference
    for g in graph.groups:
        if any(not p.requires_grad for path in g.producers for p in modules[path].parameters(recurse=False)):
            g.frozen = g.frozen or "is not trained"


def _slots(model: nn.Module, group: Group) -> SparseGroup:
    found = SparseGroup(group.name, group.size)
    inference = not any(p.requires_grad for p in model.parameters())
    for m in group.members:
        layer = model.get_submodule(m.module)
        name, weight = f"{m.module}.weight", getattr(layer, "weight", None)
        if weight is None or not (weight.requires_grad or inference):
            continue
        if isinstance(layer, nn.BatchNorm2d):
            found.gammas.append((name, m.index))
        elif layer_channels(layer) and (m.dim == "out" or getattr(layer, "groups", 1) == 1):
            swap = (m.dim == "in") != isinstance(layer, nn.ConvTranspose2d)
            found.weights.append((name, int(swap), m.index))
    return found
