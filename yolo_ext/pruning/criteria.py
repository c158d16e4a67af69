# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning criteria: what a channel is worth. Each is one function of a group of coupled channels and one row.

Weights are read as deployed, with BatchNorm folded in. A row that needs "data" ranks by what `evidence.collect`
measured; one that needs "sparsity" expects a model that was trained with the penalty of the same name.

Norms and LAMP are importances of torch-pruning, on stand-ins that hold the deployed weights. Any other importance is a
criterion by its name, `tp:LAMPImportance`, or as the user's class, and sees the layers as they are.
"""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.registry import Need, Row, Table, imported, suggest
from yolo_ext.pruning.depgraph import depthwise, pruning_function
from yolo_ext.pruning.evidence import Evidence
from yolo_ext.pruning.graph import Group
from yolo_ext.pruning.labels import norm_behind, weight_dim
from yolo_ext.stock.context import undisturbed

AUTO, WITH_DATA, WITHOUT_DATA = "auto", "taylor", "lamp"  # the best ones of benchmarks/RESULTS.md
Importance = tp.importance.Importance
Side = tuple[nn.Module, str, list[int], list[int], str]  # layer, "out" or "in", positions, channel of each, path
MEASURED = {  # importances that want gradients or activations of the layers, and what measures the same with data here
    tp.importance.GroupTaylorImportance: "taylor", tp.importance.GroupHessianImportance: "hessian",
    tp.importance.OBDCImportance: "obd", tp.importance.ActivationImportance: "taylor",
}  # fmt: skip
LEGAL = [f"tp:{name}" for name, c in vars(tp.importance).items() if inspect.isclass(c) and issubclass(c, Importance)
         and c is not Importance and not issubclass(c, (*MEASURED,))]  # fmt: skip


# Importances of torch-pruning ----------------------------------------------------------------------------------------
def _importance(kind: str, name: str) -> Callable[..., Any]:
    """Return the user's function by its path, or an importance, `tp:Name` or the user's own by its path, made ready."""
    path, bracket, _ = name.partition("(")
    found: Any = getattr(tp.importance, path[3:], None) if path.startswith("tp:") else imported(kind, path)
    cls: Any = found if inspect.isclass(found) else type(found)
    if not issubclass(cls, Importance) or (bracket and found is not cls):
        if path.startswith("tp:") or bracket:
            legal = f"{', '.join(LEGAL)}, or your own torch_pruning.importance.Importance as 'package.module:Class'"
            raise UsageError(f"'prune.method={name}' is no importance.{suggest(path, LEGAL)} Legal: {legal}.")
        return found  # type: ignore[no-any-return]
    if ours := next((method for c, method in MEASURED.items() if issubclass(cls, c)), ""):
        why = "needs gradients or activations, which the layers of a model to be pruned do not hold"
        script = "or run a pruner of torch-pruning in a script of your own inside `with yolo_ext.on_yolo():`"
        raise UsageError(f"'prune.method={name}' {why}. Take prune.method={ours}, which measures on data, {script}.")
    try:
        return found(**_keywords(name, cls)) if found is cls else found  # type: ignore[no-any-return]
    except UsageError:
        raise
    except Exception as e:  # whatever the class does with its arguments
        raise UsageError(f"'prune.method={name}' cannot be made ({type(e).__name__}: {e}).") from e


def _keywords(name: str, cls: type) -> dict[str, Any]:
    """Return the keyword arguments in the name of an importance: literals, of which nothing is evaluated."""
    legal = inspect.signature(cls).parameters
    hint = f"Write literals by keyword, as in '{name.partition('(')[0]}({next(iter(legal), 'key')}=1)'"
    with refused(f"Cannot read 'prune.method={name}' ({{e}}). {hint}. Legal: {', '.join(legal)}."):
        call = ast.parse(name.partition(":")[2], mode="eval").body
        if isinstance(call, ast.Name):
            return {}
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not one call")
        given: dict[Any, Any] = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        if call.args or None in given or len(given) < len(call.keywords):
            raise ValueError("not keywords alone, each once")
    unknown = [k for k in given if k not in legal]
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in legal.values()):
        near = suggest(unknown[0], list(legal))
        raise UsageError(f"'prune.method={name}' knows no '{unknown[0]}'.{near} Legal: {', '.join(legal) or 'none'}.")
    return given


def _ask(importance: Callable[..., Any], sides: Iterable[Side]) -> Any:
    """Return what an importance says of a torch-pruning group made of these sides, (n,) scores or None."""
    group = tp.dependency.Group()
    for layer, dim, positions, channels, path in sides:
        function, node = pruning_function(layer, dim), tp.dependency.Node(layer, None, path)
        start = group[0].dep.source if len(group) else node
        group.add_dep(tp.dependency.Dependency(function, function, start, node), positions)
        group[len(group) - 1].root_idxs = channels
    return importance(group)


def _stand_ins(weights: Iterable[tuple[torch.Tensor, str]]) -> Iterator[Side]:
    """Yield layers that hold (n, ...) weights of n channels on one side, and norms that hold (n,) scales."""
    for w, dim in weights:  # on the meta device nothing is drawn for weights that are replaced at once
        layer = nn.Linear(1, 1, bias=False, device="meta") if w.ndim > 1 else nn.BatchNorm1d(1, device="meta")
        layer.weight = nn.Parameter(w if dim == "out" else w.t(), requires_grad=False)
        yield layer, dim, list(range(len(w))), list(range(len(w))), ""


def _as_they_are(modules: dict[str, nn.Module], group: Group) -> Iterator[Side]:
    """Yield the live layers and norms of a group, positions in order; scores are as long as the first one is wide."""
    for m in sorted(group.members, key=lambda m: m.index.shape[1]):
        layer = modules[m.module]
        if m.dim == "out" or not depthwise(layer):
            pairs = sorted((p, k) for k, row in enumerate(m.index.tolist()) for p in row)
            yield layer, m.dim, [p for p, _ in pairs], [k for _, k in pairs], m.module


criteria = Table("pruning criterion", own=_importance)


@dataclass(frozen=True)
class GroupWeights:
    """What a criterion may look at: one group of n coupled channels, its weights with BatchNorm folded in."""

    out: list[torch.Tensor]  # (n, fan_in) weights for each layer that produces the channels
    generator: torch.Generator  # seeded
    inp: list[torch.Tensor] = field(default_factory=list)  # (n, fan_out) weights for each layer that reads them
    gamma: list[torch.Tensor] = field(default_factory=list)  # (n,) absolute scales for each BatchNorm over them
    evidence: list[torch.Tensor] = field(default_factory=list)  # (n, k) salience for each coupled tensor, with data


def _relative(score: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """Divide (n,) scores by their mean, or by the largest, so that groups can be ranked together."""
    return score / (score.max() if largest else score.mean()).clamp(min=1e-12)


def _norm(p: int, *sides: tuple[list[torch.Tensor], str], by: Any = _relative) -> torch.Tensor:
    """Return (n,) means over the layers of sum |w|^p for each channel, made relative by `by`."""
    importance = tp.importance.GroupMagnitudeImportance(p=p, normalizer=by)  # its own divides by zero in a dead group
    return _ask(importance, _stand_ins((w, dim) for weights, dim in sides for w in weights))  # type: ignore[no-any-return]


# Weights only --------------------------------------------------------------------------------------------------------
@criteria.row("random", "Uniform noise: the baseline that every criterion must beat")
def random(group: GroupWeights) -> torch.Tensor:
    """Return (n,) uniform noise."""
    return torch.rand(group.out[0].shape[0], generator=group.generator)


@criteria.row("l1", "Sum of absolute weights, relative to the mean of the group",
              paper="Li et al., 2017, arXiv:1608.08710")  # fmt: skip
def l1(group: GroupWeights) -> torch.Tensor:
    """Return (n,) L1 magnitudes divided by their mean."""
    return _norm(1, (group.out, "out"))


@criteria.row("l2", "Sum of squared weights, relative to the mean of the group",
              paper="Li et al., 2017, arXiv:1608.08710")  # fmt: skip
def l2(group: GroupWeights) -> torch.Tensor:
    """Return (n,) squared L2 magnitudes divided by their mean."""
    return _norm(2, (group.out, "out"))


@criteria.row("group_norm", "Sum of squares of all coupled weights, readers too, relative to the mean of the group",
              paper="Fang et al., DepGraph, 2023, arXiv:2301.12900")  # fmt: skip
def group_norm(group: GroupWeights) -> torch.Tensor:
    """Return (n,) squared L2 norms over all layers that produce or read a channel, divided by their mean."""
    return _norm(2, (group.out, "out"), (group.inp, "in"))


@criteria.row("lamp", "Magnitude over the sum of all larger ones in the group",
              paper="Lee et al., 2021, arXiv:2010.07611")  # fmt: skip
def lamp(group: GroupWeights) -> torch.Tensor:
    """Return (n,) LAMP scores: m_k / sum of m_j over all j not ranked below k; the largest channel scores 1."""
    # equal channels are ranked by position, so that they never go as a whole
    return _ask(tp.importance.LAMPImportance(p=2), _stand_ins((w, "out") for w in group.out))  # type: ignore[no-any-return]


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
    return _norm(1, (group.gamma, "out"), by=None) if group.gamma else None


@criteria.row("group_slim", "Norm of all coupled BatchNorm scales, over the whole model", needs=[Need.SPARSITY],
              paper="Liu et al., 2017, arXiv:1708.06519; Fang et al., 2023, arXiv:2301.12900")  # fmt: skip
def group_slim(group: GroupWeights) -> torch.Tensor | None:
    """Return (n,) root mean squares of gamma over the BatchNorms, None without BatchNorm."""
    return _norm(2, (group.gamma, "out"), by=None).sqrt() if group.gamma else None


@criteria.row("group_sl", "Norm of all coupled weights after group sparse learning, relative to the largest",
              needs=[Need.SPARSITY], paper="Fang et al., DepGraph, 2023, arXiv:2301.12900")  # fmt: skip
def group_sparse(group: GroupWeights) -> torch.Tensor:
    """Return (n,) L2 norms over all coupled layers, divided by the largest: the penalty made the rest small."""
    return _relative(_norm(2, (group.out, "out"), (group.inp, "in"), by=None).sqrt(), largest=True)


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
    if (bn := norm_behind(modules, path)) and bn.running_var is not None:
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
    model: nn.Module, group: Group, row: Row, generator: torch.Generator, evidence: Evidence | None = None
) -> torch.Tensor | None:
    """Return (n,) finite scores of the channels of a group, small where one can go; None when it cannot be ranked."""
    if Need.DATA in row.needs and evidence is None:
        free = f"a criterion that needs none: {', '.join(r.name for r in criteria if not r.needs)}"
        raise UsageError(f"'prune.method={row.name}' needs labelled train images. Give data=..., or {free}.")
    if isinstance(row.fn, Importance):
        values = _foreign(model, group, row, generator)
    else:
        values = row.fn(group_weights(model, group, generator, evidence))
    if isinstance(values, torch.Tensor) and values.isnan().all():  # torch-pruning divides by what dead ones sum up to
        dead = not any(w.any() for w in group_weights(model, group, generator).out)
        values = torch.zeros(group.size) if dead else values
    if values is None:
        return None
    if not isinstance(values, torch.Tensor) or values.shape != (group.size,) or not values.isfinite().all():
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise UsageError(
            f"The pruning criterion '{row.name}' returned {got} with values that cannot be ranked for '{group.name}'. "
            f"Legal: a tensor of {group.size} finite scores, one for each channel; are the weights of the model finite?"
        )
    return values.detach().float().cpu()


def _foreign(model: nn.Module, group: Group, row: Row, generator: torch.Generator) -> Any:
    """Return what an importance says of the layers of a group as they are; what is random in it follows the seed."""
    seed = int(torch.randint(2**31, (), generator=generator))
    fails = f"'prune.method={row.name}' fails on '{group.name}' ({{why}})."
    with undisturbed(next(model.parameters()).device, seed), refused(fails):
        return _ask(row.fn, _as_they_are(dict(model.named_modules()), group))
