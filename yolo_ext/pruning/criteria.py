# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning criteria: what a channel is worth. Each is one function of a group's weights and one row.

Weights are read as deployed, with BatchNorm folded in: the scale of a conv filter that a BatchNorm follows means
nothing by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from yolo_ext.pruning.graph import Group
from yolo_ext.registry import Table

criteria = Table("pruning criterion")


@dataclass(frozen=True)
class GroupWeights:
    """What a criterion may look at: one group of n coupled channels.

    Attributes:
        out: For each layer that produces the channels, (n, fan_in) weights with BatchNorm folded in.
        generator: Seeded random generator.
    """

    out: list[torch.Tensor]
    generator: torch.Generator


def _magnitude(group: GroupWeights, p: int) -> torch.Tensor:
    """Return (n,) mean over the producing layers of sum |w|^p for each channel."""
    return torch.stack([w.abs().pow(p).sum(1) for w in group.out]).mean(0)


@criteria.row(
    "l1", "Sum of absolute weights, relative to the mean of the group", paper="Li et al., 2017, arXiv:1608.08710"
)
def l1(group: GroupWeights) -> torch.Tensor:
    """Return (n,) L1 magnitudes divided by their mean, so that groups can be ranked together."""
    score = _magnitude(group, 1)
    return score / score.mean().clamp(min=1e-12)


@criteria.row(
    "l2", "Sum of squared weights, relative to the mean of the group", paper="Li et al., 2017, arXiv:1608.08710"
)
def l2(group: GroupWeights) -> torch.Tensor:
    """Return (n,) squared L2 magnitudes divided by their mean."""
    score = _magnitude(group, 2)
    return score / score.mean().clamp(min=1e-12)


@criteria.row(
    "lamp", "Magnitude over the sum of all larger ones in the group", paper="Lee et al., 2021, arXiv:2010.07611"
)
def lamp(group: GroupWeights) -> torch.Tensor:
    """Return (n,) LAMP scores: m_k / sum of m_j over all j with m_j >= m_k; the largest channel scores 1."""
    score = _magnitude(group, 2)
    order = score.argsort()
    ascending = score[order]
    remaining = ascending.flip(0).cumsum(0).flip(0).clamp(min=1e-30)
    return torch.empty_like(score).scatter_(0, order, ascending / remaining)


@criteria.row("random", "Uniform noise: the baseline that every criterion must beat")
def random(group: GroupWeights) -> torch.Tensor:
    """Return (n,) uniform noise."""
    return torch.rand(group.out[0].shape[0], generator=group.generator)


def _folded(modules: dict[str, nn.Module], path: str) -> torch.Tensor:
    """Return (out, fan_in) weights of a layer with the BatchNorm of its Conv block folded in."""
    layer = modules[path]
    weight = layer.weight.detach().float().cpu()
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    weight = weight.flatten(1)
    bn = modules.get(path.rpartition(".")[0] + ".bn")
    if isinstance(bn, nn.BatchNorm2d) and bn.weight is not None and bn.num_features == weight.shape[0]:
        scale = bn.weight.detach().float() / (bn.running_var.float() + bn.eps).sqrt()
        weight = weight * scale.cpu()[:, None]
    return weight


def group_weights(model: nn.Module, group: Group, generator: torch.Generator) -> GroupWeights:
    """Collect the weights of a group from the live model.

    Args:
        model: The model that the graph was built from.
        group: One group of n channels.
        generator: Seeded random generator.

    Returns:
        The weights, each (n, fan_in).
    """
    modules = dict(model.named_modules())
    layers = [m for m in group.members if m.dim == "out" and hasattr(modules[m.module], "weight")]
    layers = [m for m in layers if not isinstance(modules[m.module], nn.BatchNorm2d)]
    return GroupWeights([_folded(modules, m.module)[m.index[:, 0]] for m in layers], generator)
