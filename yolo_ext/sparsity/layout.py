# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""All prunable channels of a model numbered through, so that a step over all of them is a handful of tensor calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from yolo_ext.sparsity.groups import SparseGroup

Side = tuple[str, int, torch.Tensor]  # parameter, dimension, (size,) channel of each position in it, C where none


@dataclass
class Layout:
    """Where each of the C channels sits.

    Attributes:
        starts: First channel of each group, and C.
        group: (C,) number of the group of each channel.
        scales: BatchNorm scales over the channels, parameter names.
        slots: (m,) positions in all scales joined.
        owner: (m,) channel of each slot.
        weights: The sides of coupled layers; empty when only scales matter.
        scale_table: (C, k) slots of each channel, filled up with m.
        weight_table: (C, l) positions of each channel in all sides joined, filled up with their length.
    """

    starts: list[int]
    group: torch.Tensor
    scales: list[str]
    slots: torch.Tensor
    owner: torch.Tensor
    weights: list[Side]
    scale_table: torch.Tensor
    weight_table: torch.Tensor


def lay_out(model: nn.Module, groups: list[SparseGroup], weights: bool) -> Layout:
    """Number the channels of all groups through.

    Args:
        model: The model that the groups were found in.
        groups: Its prunable groups.
        weights: Whether weights matter too, or scales only.

    Returns:
        The layout, on the device of the model.
    """
    device = next(model.parameters()).device
    starts = [0]
    for g in groups:
        starts.append(starts[-1] + g.size)
    total = starts[-1]
    sides: dict[tuple[str, int], torch.Tensor] = {}
    for g, start in zip(groups, starts):
        members = [(name, 0, index) for name, index in g.gammas] + (g.weights if weights else [])
        for name, dim, index in members:
            size = model.get_parameter(name).shape[dim]
            of = sides.setdefault((name, dim), torch.full((size,), total, device=device))
            of[index.to(device)] = torch.arange(start, start + g.size, device=device)[:, None]
    scales = list(dict.fromkeys(name for g in groups for name, _ in g.gammas))
    joined = torch.cat([torch.zeros(0, dtype=torch.long, device=device), *(sides.pop((n, 0)) for n in scales)])
    slots = (joined < total).nonzero().flatten()
    found = [(name, dim, of) for (name, dim), of in sides.items()]
    return Layout(
        starts,
        torch.repeat_interleave(torch.tensor([g.size for g in groups], device=device)),
        scales,
        slots,
        joined[slots],
        found,
        _table(joined[slots], total),
        _table(torch.cat([of for _, _, of in found]), total) if found else torch.zeros(total, 0, dtype=torch.long),
    )


def _table(owner: torch.Tensor, total: int) -> torch.Tensor:
    """Return (C, k) positions of each channel in (m,) `owner`, filled up with m.

    Sums over such a table give the same bits on every device and run, which `index_add_` does not on a GPU.
    """
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
    squares: dict[str, torch.Tensor] = {}
    parts = []
    for name, dim, _ in layout.weights:
        if name not in squares:
            squares[name] = _folded_squares(model, name.removesuffix(".weight"))
        w = squares[name]
        parts.append(w.flatten() if w.ndim == 1 or w.shape[1 - dim] == 1 else w.sum(1 - dim))
    joined = torch.cat([*parts, parts[0].new_zeros(1)])
    return joined[layout.weight_table].sum(1).sqrt()


def _folded_squares(model: nn.Module, path: str) -> torch.Tensor:
    """Return squared weights of a layer, summed over the kernel and with the BatchNorm of its Conv block folded in."""
    layer, block = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    w = layer.weight.detach().float().square()
    w = w.flatten(2).sum(2) if w.ndim > 2 else w
    out = int(isinstance(layer, nn.ConvTranspose2d))
    bn = getattr(block, "bn", None)
    if isinstance(bn, nn.BatchNorm2d) and bn.weight is not None and bn.num_features == w.shape[out]:
        scale = bn.weight.detach().float().square() / (bn.running_var.float() + bn.eps)
        w = w * (scale[None] if out else scale[:, None])
    return w


def join_slots(model: nn.Module, layout: Layout, values: torch.Tensor) -> list[torch.Tensor]:
    """Spread (m,) values of the slots over tensors of the shapes of all scales, with 1 where there is no slot."""
    sizes = [len(model.get_parameter(n)) for n in layout.scales]
    joined = values.new_ones(sum(sizes)).index_copy_(0, layout.slots, values)
    return list(joined.split(sizes))


@torch.no_grad()
def multiply(model: nn.Module, layout: Layout, scales: torch.Tensor, channels: torch.Tensor | None = None) -> None:
    """Shrink parameters in place; what belongs to no channel keeps its bits.

    Args:
        model: The model, or its EMA.
        layout: Where the channels sit.
        scales: (m,) factors of the BatchNorm scales.
        channels: (C,) factors of the coupled weights, None to leave them alone.
    """
    if layout.scales:
        torch._foreach_mul_([model.get_parameter(n) for n in layout.scales], join_slots(model, layout, scales))
    if channels is not None:
        padded = torch.cat([channels, channels.new_ones(1)])
        for name, dim, of in layout.weights:
            w = model.get_parameter(name)
            w.mul_(padded[of].view([-1 if d == dim else 1 for d in range(w.ndim)]))
