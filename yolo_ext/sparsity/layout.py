# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What sparsity training may pull on: the scales and weights of the channels that pruning could remove.

All channels are numbered through, so that a step over all of them is a handful of tensor calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.graph import Group, build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.labels import layer_channels, norm_behind, weight_dim

Side = tuple[str, int, torch.Tensor]  # parameter, dimension, (size,) channel of each position in it, C where none


@dataclass
class SparseGroup:
    """Channels that can be removed together, and the parameters that go with them."""

    name: str  # path of the first layer that produces the channels
    size: int  # number n of channels
    # parameter, (n, repeats) positions in it, of each BatchNorm over the channels
    gammas: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    # parameter, dimension, (n, repeats) positions in that, of each layer that produces or reads them
    weights: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)


def sparse_groups(model: nn.Module, cfg: PruneConfig, scales: bool = False) -> list[SparseGroup]:
    """Find the groups that pruning could shrink, with `scales` those with BatchNorm; slots hold what has a gradient."""
    modules = dict(model.named_modules())
    fused = bool(getattr(model, "is_fused", bool)())
    if fused or (scales and not any(isinstance(m, nn.BatchNorm2d) for m in modules.values())):
        raise UsageError(
            "Sparsity training needs BatchNorm, but this model has none: it was fused, or built without. "
            "Give the .pt as it was trained, before fuse()."
        )
    graph, inference = build_graph(model), not any(p.requires_grad for p in model.parameters())
    for g in graph.groups:  # what is not trained could not recover from pruning
        learn = all(p.requires_grad for path in g.producers for p in modules[path].parameters(recurse=False))
        g.frozen = g.frozen or ("" if learn or inference else "is not trained")
    # the simplest criterion that can rank what the penalty can pull on
    ties = tied_groups(model, graph, replace(cfg, method="slim" if scales else "l1", ratios={}))
    if not ties:
        why = "has a BatchNorm and " if scales else ""
        raise UsageError(
            f"Sparsity training finds no group of channels that {why}can be pruned. Look at prune.include, "
            "prune.exclude, prune.min_channels, prune.round_to and freeze; `yolo-ext analyze` says why layers stay."
        )
    return [_slots(modules, g, inference) for t in ties for g in t.groups]


def _slots(modules: Mapping[str, nn.Module], group: Group, inference: bool) -> SparseGroup:
    """Return the parameters of a group that learn, or all for inference, with the positions of its channels in them."""
    found = SparseGroup(group.name, group.size)
    for m in group.members:
        layer = modules[m.module]
        name, weight = f"{m.module}.weight", getattr(layer, "weight", None)
        if weight is None or not (weight.requires_grad or inference):
            continue
        if isinstance(layer, nn.BatchNorm2d):
            found.gammas.append((name, m.index))
        elif layer_channels(layer) and (m.dim == "out" or getattr(layer, "groups", 1) == 1):
            found.weights.append((name, weight_dim(layer, m.dim), m.index))
    return found


@dataclass
class Layout:
    """Where each of the C channels sits."""

    starts: list[int]  # first channel of each group, and C
    group: torch.Tensor  # (C,) number of the group of each channel
    scales: list[str]  # parameter names of the BatchNorm scales over the channels
    slots: torch.Tensor  # (m,) positions in all scales joined
    owner: torch.Tensor  # (m,) channel of each slot
    weights: list[Side]  # the sides of coupled layers; empty when only scales matter
    scale_table: torch.Tensor  # (C, k) slots of each channel, filled up with m
    weight_table: torch.Tensor  # (C, l) positions of each channel in all sides joined, filled up with their length


def lay_out(model: nn.Module, groups: list[SparseGroup], weights: bool) -> Layout:
    """Number the channels of all groups through, on the device of the model; `weights`: not only scales matter."""
    device = next(model.parameters()).device
    starts = [0, *accumulate(g.size for g in groups)]
    total = starts[-1]
    sides: dict[tuple[str, int], torch.Tensor] = {}
    for g, start in zip(groups, starts):
        for name, dim, index in [*((name, 0, i) for name, i in g.gammas), *(g.weights if weights else [])]:
            size = model.get_parameter(name).shape[dim]
            of = sides.setdefault((name, dim), torch.full((size,), total, device=device))
            of[index.to(device)] = torch.arange(start, start + g.size, device=device)[:, None]
    scales = list(dict.fromkeys(name for g in groups for name, _ in g.gammas))
    none = torch.zeros(0, dtype=torch.long, device=device)
    joined = torch.cat([none, *(sides.pop((n, 0)) for n in scales)])
    slots = (joined < total).nonzero().flatten()
    found = [(name, dim, of) for (name, dim), of in sides.items()]
    group = torch.repeat_interleave(torch.tensor([g.size for g in groups], device=device))
    tables = [_table(owner, total) for owner in (joined[slots], torch.cat([none, *(of for _, _, of in found)]))]
    return Layout(starts, group, scales, slots, joined[slots], found, *tables)


def _table(owner: torch.Tensor, total: int) -> torch.Tensor:
    """Return (C, k) positions of each channel in (m,) `owner`, filled up with m."""
    # Sums over such a table give the same bits on every device and run, which `index_add_` does not on a GPU.
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=total + 1)
    rank = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    table = torch.full((total + 1, int(counts[:total].max()) if total else 0), len(owner), device=owner.device)
    kept = owner[order] < total
    table[owner[order][kept], rank[kept]] = order[kept]
    return table[:total]


def read_scales(model: nn.Module, layout: Layout) -> torch.Tensor:
    """Return the (m,) BatchNorm scales of all slots."""
    params = [model.get_parameter(n).detach() for n in layout.scales]
    return torch.cat(params)[layout.slots].float() if params else torch.zeros(0, device=layout.group.device)


def scale_norms(gammas: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return (C,) root mean squares of the (m,) scales of each channel."""
    table = layout.scale_table
    squares = torch.cat([gammas.square(), gammas.new_zeros(1)])[table].sum(1)
    return (squares / (table < len(gammas)).sum(1).clamp(min=1)).sqrt()


def weight_norms(model: nn.Module, layout: Layout) -> torch.Tensor:
    """Return (C,) norms of all coupled weights with BatchNorm folded in, as pruning ranks them within a group."""
    modules = dict(model.named_modules())
    names = dict.fromkeys(name for name, _, _ in layout.weights)
    squares = {n: _folded_squares(modules, n.removesuffix(".weight")) for n in names}
    parts = []
    for name, dim, _ in layout.weights:
        w = squares[name]
        parts.append(w.flatten() if w.ndim == 1 or w.shape[1 - dim] == 1 else w.sum(1 - dim))
    joined = torch.cat([*parts, parts[0].new_zeros(1)])
    return joined[layout.weight_table].sum(1).sqrt()


def _folded_squares(modules: Mapping[str, nn.Module], path: str) -> torch.Tensor:
    """Return squared weights of a layer, summed over the kernel and with the BatchNorm of its Conv block folded in."""
    layer = modules[path]
    w = layer.weight.detach().float().square()
    w = w.flatten(2).sum(2) if w.ndim > 2 else w
    if (bn := norm_behind(modules, path)) and bn.running_var is not None:
        scale = bn.weight.detach().float().square() / (bn.running_var.float() + bn.eps)
        w = w * scale[:, None].transpose(0, weight_dim(layer, "out"))
    return w


@torch.no_grad()
def multiply(model: nn.Module, layout: Layout, scales: torch.Tensor, channels: torch.Tensor | None = None) -> None:
    """Shrink a model or EMA in place by factors of its (m,) scales and, if given, of the weights of (C,) channels."""
    if params := [model.get_parameter(name) for name in layout.scales]:
        sizes = [len(p) for p in params]
        joined = scales.new_ones(sum(sizes)).index_copy_(0, layout.slots, scales)
        torch._foreach_mul_(params, list(joined.split(sizes)))
    if channels is not None:
        padded = torch.cat([channels, channels.new_ones(1)])
        for name, dim, of in layout.weights:
            w = model.get_parameter(name)
            w.mul_(padded[of].view([-1 if d == dim else 1 for d in range(w.ndim)]))
