# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning criteria: what a channel is worth. Each is one function of a group of coupled channels and one row.

Weights are read as deployed, with BatchNorm folded in. A row that needs "data" ranks by what `evidence.collect`
measured; one that needs "sparsity" expects a model that was trained with the penalty of the same name.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table
from yolo_ext.pruning.evidence import Evidence
from yolo_ext.pruning.graph import Group
from yolo_ext.pruning.labels import norm_behind, weight_dim

criteria = Table("pruning criterion")
AUTO, WITH_DATA, WITHOUT_DATA = "auto", "taylor", "lamp"  # the best ones of benchmarks/RESULTS.md


@dataclass(frozen=True)
class GroupWeights:
    """What a criterion may look at: one group of n coupled channels, its weights with BatchNorm folded in."""

    out: list[torch.Tensor]  # (n, fan_in) weights for each layer that produces the channels
    generator: torch.Generator  # seeded
    inp: list[torch.Tensor] = field(default_factory=list)  # (n, fan_out) weights for each layer that reads them
    gamma: list[torch.Tensor] = field(default_factory=list)  # (n,) absolute scales for each BatchNorm over them
    evidence: list[torch.Tensor] = field(default_factory=list)  # (n, k) salience for each coupled tensor, with data


def _magnitude(layers: list[torch.Tensor], p: int) -> torch.Tensor:
    """Return (n,) mean over the layers of sum |w|^p for each channel."""
    return torch.stack([w.abs().pow(p).sum(1) for w in layers]).mean(0)


def _relative(score: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """Divide (n,) scores by their mean, or by the largest, so that groups can be ranked together."""
    return score / (score.max() if largest else score.mean()).clamp(min=1e-12)


# Weights only --------------------------------------------------------------------------------------------------------
@criteria.row("random", "Uniform noise: the baseline that every criterion must beat")
def random(group: GroupWeights) -> torch.Tensor:
    """Return (n,) uniform noise."""
    return torch.rand(group.out[0].shape[0], generator=group.generator)


@criteria.row("l1", "Sum of absolute weights, relative to the mean of the group",
              paper="Li et al., 2017, arXiv:1608.08710")  # fmt: skip
def l1(group: GroupWeights) -> torch.Tensor:
    """Return (n,) L1 magnitudes divided by their mean."""
    return _relative(_magnitude(group.out, 1))


@criteria.row("l2", "Sum of squared weights, relative to the mean of the group",
              paper="Li et al., 2017, arXiv:1608.08710")  # fmt: skip
def l2(group: GroupWeights) -> torch.Tensor:
    """Return (n,) squared L2 magnitudes divided by their mean."""
    return _relative(_magnitude(group.out, 2))


@criteria.row("group_norm", "Sum of squares of all coupled weights, readers too, relative to the mean of the group",
              paper="Fang et al., DepGraph, 2023, arXiv:2301.12900")  # fmt: skip
def group_norm(group: GroupWeights) -> torch.Tensor:
    """Return (n,) squared L2 norms over all layers that produce or read a channel, divided by their mean."""
    return _relative(_magnitude(group.out + group.inp, 2))


@criteria.row("lamp", "Magnitude over the sum of all larger ones in the group",
              paper="Lee et al., 2021, arXiv:2010.07611")  # fmt: skip
def lamp(group: GroupWeights) -> torch.Tensor:
    """Return (n,) LAMP scores: m_k / sum of m_j over all j not ranked below k; the largest channel scores 1."""
    score = _magnitude(group.out, 2)
    order = score.argsort(stable=True)  # by position where equal, so that equal channels never go as a whole
    ascending = score[order]
    remaining = ascending.flip(0).cumsum(0).flip(0).clamp(min=1e-30)
    return torch.empty_like(score).scatter_(0, order, ascending / remaining)


@criteria.row("fpgm", "Distance to all other filters of the group: what is near the median can be replaced",
              paper="He et al., 2019, arXiv:1811.00250")  # fmt: skip
def fpgm(group: GroupWeights) -> torch.Tensor:
    """Return (n,) sums of the L2 distances to all other filters, divided by their mean."""
    # in float64, where the fast distances by matrix product are exact enough for equal filters
    return _relative(torch.stack([torch.cdist(w.double(), w.double()).sum(1) for w in group.out]).mean(0).float())


# With a sparsity penalty ---------------------------------------------------------------------------------------------
@criteria.row("slim", "Scale of BatchNorm, over the whole model", needs=[Need.SPARSITY],
              paper="Liu et al., Network Slimming, 2017, arXiv:1708.06519")  # fmt: skip
def slim(group: GroupWeights) -> torch.Tensor | None:
    """Return (n,) mean |gamma| over the BatchNorms, None without BatchNorm."""
    return torch.stack(group.gamma).mean(0) if group.gamma else None


@criteria.row("group_slim", "Norm of all coupled BatchNorm scales, over the whole model", needs=[Need.SPARSITY],
              paper="Liu et al., 2017, arXiv:1708.06519; Fang et al., 2023, arXiv:2301.12900")  # fmt: skip
def group_slim(group: GroupWeights) -> torch.Tensor | None:
    """Return (n,) root mean squares of gamma over the BatchNorms, None without BatchNorm."""
    return torch.stack(group.gamma).square().mean(0).sqrt() if group.gamma else None


@criteria.row("group_reg", "Norm of all coupled weights after growing regularization, relative to the largest",
              needs=[Need.SPARSITY], paper="Wang et al., 2021, arXiv:2012.09243")  # fmt: skip
@criteria.row("group_sl", "Norm of all coupled weights after group sparse learning, relative to the largest",
              needs=[Need.SPARSITY], paper="Fang et al., DepGraph, 2023, arXiv:2301.12900")  # fmt: skip
def group_sparse(group: GroupWeights) -> torch.Tensor:
    """Return (n,) L2 norms over all coupled layers, divided by the largest: the penalty made the rest small."""
    return _relative(_magnitude(group.out + group.inp, 2).sqrt(), largest=True)


# With data -----------------------------------------------------------------------------------------------------------
@criteria.row("obd", "Loss increase by the Kronecker-factored Fisher of the channel's outputs", needs=[Need.DATA],
              paper="Wang et al., EigenDamage (OBD-C), 2019, arXiv:1905.05934")  # fmt: skip
@criteria.row("hessian", "Loss increase by squared weights and the Fisher diagonal of single images", needs=[Need.DATA],
              paper="LeCun et al., Optimal Brain Damage, 1989")  # fmt: skip
@criteria.row("taylor", "Loss change by weight times gradient", needs=[Need.DATA],
              paper="Molchanov et al., 2019, arXiv:1906.10771")  # fmt: skip
def salience(group: GroupWeights) -> torch.Tensor:
    """Return (n,) salience summed over all coupled tensors, not relative: a loss means the same in every group."""
    return sum((e.sum(1) for e in group.evidence), torch.zeros(group.out[0].shape[0]))


# What they look at ---------------------------------------------------------------------------------------------------
def _side(tensor: torch.Tensor, layer: nn.Module, dim: str) -> torch.Tensor:
    """Return a tensor of the shape of a layer's weight with the channels of one side first."""
    return tensor.transpose(0, weight_dim(layer, dim)) if tensor.ndim > 1 else tensor


def _folded(modules: dict[str, nn.Module], path: str) -> torch.Tensor:
    """Return the weight of a layer, in its own layout, with the BatchNorm of its Conv block folded in."""
    layer = modules[path]
    weight = layer.weight.detach().float().cpu()
    out = _side(weight, layer, "out")
    if bn := norm_behind(modules, path):
        scale = (bn.weight.detach().float() / (bn.running_var.float() + bn.eps).sqrt()).cpu()
        out = out * scale.view(-1, *[1] * (out.ndim - 1))
    return _side(out, layer, "out")  # swaps back


def group_weights(
    model: nn.Module, group: Group, generator: torch.Generator, evidence: Evidence | None = None
) -> GroupWeights:
    """Collect what a criterion may look at from the live model, and of what `evidence.collect` measured on it."""
    modules = dict(model.named_modules())
    found = GroupWeights([], generator)
    for m in group.members:
        layer = modules[m.module]
        depthwise = getattr(layer, "groups", 1) > 1
        if getattr(layer, "weight", None) is None or (m.dim == "in" and depthwise):
            continue  # what goes into a depthwise layer is read by the filter that comes out of it
        if isinstance(layer, nn.BatchNorm2d):
            found.gamma.append(layer.weight.detach().float().cpu().abs()[m.index].mean(1))
        else:
            weight = _side(_folded(modules, m.module), layer, m.dim)
            (found.out if m.dim == "out" else found.inp).append(weight[m.index].flatten(1))
        for name in (f"{m.module}.weight", f"{m.module}.bias", m.module):
            measured = (evidence or {}).get(name)
            if measured is not None and (m.dim == "out" or measured.ndim > 1):
                found.evidence.append(_side(measured, layer, m.dim)[m.index].flatten(1))
    return found


def resolved(cfg: PruneConfig, data: bool) -> PruneConfig:
    """Return options that name a criterion where they said `auto`; `data` tells of labelled train images."""
    return replace(cfg, method=WITH_DATA if data else WITHOUT_DATA) if cfg.method == AUTO else cfg


def score(
    model: nn.Module, group: Group, method: str, generator: torch.Generator, evidence: Evidence | None = None
) -> torch.Tensor | None:
    """Return (n,) finite scores of the channels of a group, small where one can go; None when it cannot be ranked."""
    row = criteria[method]
    if Need.DATA in row.needs and evidence is None:
        free = f"a criterion that needs none: {', '.join(r.name for r in criteria if not r.needs)}"
        raise UsageError(f"'prune.method={method}' needs labelled train images. Give data=..., or {free}.")
    values = row.fn(group_weights(model, group, generator, evidence))
    if values is None:
        return None
    if not isinstance(values, torch.Tensor) or values.shape != (group.size,) or not values.isfinite().all():
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise UsageError(
            f"The pruning criterion '{method}' returned {got} with values that cannot be ranked for '{group.name}'. "
            f"Legal: a tensor of {group.size} finite scores, one for each channel; are the weights of the model finite?"
        )
    return values.detach().float().cpu()
