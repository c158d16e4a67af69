# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Tied groups: groups that shrink at one rate, ranked from worst to best, with the widths that options allow them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.criteria import criteria, resolved, score
from yolo_ext.pruning.evidence import Evidence
from yolo_ext.pruning.graph import Graph, Group
from yolo_ext.stock.model import matches, natural_key

FLOORED = "which the floors do not let shrink"


@dataclass
class TiedGroups:
    """Groups that shrink at the same rate, in `units`: unit u removes the next worst channels of each group."""

    groups: list[Group]  # most often one
    order: list[torch.Tensor]  # for each group, its channels from worst to best
    scores: torch.Tensor  # (units,) ascending
    allowed: list[int]  # numbers of kept units that rounding and floors allow, descending; the first one is all of them
    share: float | None = None  # of units that `prune.ratios` removes, whatever the target; None where free
    values: list[torch.Tensor] = field(default_factory=list)  # for each group, the scores of its channels

    @property
    def name(self) -> str:
        """Path of the first layer that produces the channels."""
        return self.groups[0].name

    @property
    def units(self) -> int:
        """Number of units before pruning."""
        return len(self.scores)

    @property
    def channels(self) -> int:
        """Number of channels before pruning."""
        return sum(g.size for g in self.groups)

    def round(self, units: float) -> int:
        """Return the allowed number of kept units nearest to `units`; of two equally near ones the larger."""
        return min(self.allowed, key=lambda a: (abs(a - units), -a))


def tied_groups(model: nn.Module, graph: Graph, cfg: PruneConfig, evidence: Evidence | None = None) -> list[TiedGroups]:
    """Score all groups that the options leave prunable; the others become frozen in `graph`, with the reason."""
    cfg = resolved(cfg, evidence is not None)
    restrict(model, graph, cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    scored = partial(score, model, row=criteria[cfg.method], generator=generator, evidence=evidence)
    made: dict[int, TiedGroups] = {}
    for i, indices in enumerate(graph.ties):
        groups = [graph.groups[g] for g in indices]
        if any(g.frozen for g in groups):
            continue
        found = _ranked(model, graph, groups, cfg, scored)
        if isinstance(found, TiedGroups):
            made[i] = found
            continue
        for g in groups:
            g.frozen = found
    for i, share in shares(model, graph, cfg).items():
        made[i].share, size = share, max(g.size for g in made[i].groups)
        floor = _floor(model, graph, made[i].groups, cfg)
        if size * (1 - share) < floor and share:
            problem = f"takes {share:g} of the {size} channels of {made[i].name}, but the floors keep {floor:.4g}"
            remedy = f"lower prune.min_channels={cfg.min_channels} or raise prune.max_ratio={cfg.max_ratio:g}"
            raise UsageError(f"'prune.ratios' {problem}. Give at most {max(0.0, 1 - floor / size):.2g}, {remedy}.")
        if share and made[i].round(made[i].units * (1 - share)) == made[i].units:
            whole = f"{share:g} of its {size} channels is less than half of prune.round_to={cfg.round_to}"
            LOGGER.warning(f"{colorstr('prune: ')}{made[i].name} stays whole: {whole}")
    refuse_frozen(model, [p for t in made.values() for g in t.groups for p in g.producers])
    return list(made.values())


def _ranked(
    model: nn.Module, graph: Graph, groups: list[Group], cfg: PruneConfig, scored: Callable[..., Any]
) -> TiedGroups | str:
    """Return these groups ranked, or the reason why they keep all their channels."""
    units = min(g.size for g in groups)
    if any(g.size % units for g in groups):
        return "is coupled with a part whose width does not divide its own"
    if len(legal := allowed(model, graph, groups, cfg)) == 1:
        return f"has {groups[0].size} channels, {FLOORED}"
    values: list[torch.Tensor] = []
    for g in groups:
        if (scores := scored(g)) is None:
            return f"has no layer that '{cfg.method}' ranks by, such as BatchNorm"
        values.append(scores)
    order = [v.argsort(stable=True) for v in values]
    rows = [v[o].view(units, -1).mean(1) for v, o in zip(values, order)]
    return TiedGroups(groups, order, torch.stack(rows).mean(0), legal, values=values)


def allowed(model: nn.Module, graph: Graph, groups: list[Group], cfg: PruneConfig) -> list[int]:
    """Return the numbers of kept units of tied groups that rounding and floors allow, descending, from all of them."""
    units, widest = min(g.size for g in groups), max(g.size for g in groups)
    floor, step = _floor(model, graph, groups, cfg), widest // units
    return [units, *(u for u in range(units - 1, 0, -1) if u * step % cfg.round_to == 0 and u * step >= floor)]


def _floor(model: nn.Module, graph: Graph, groups: list[Group], cfg: PruneConfig) -> float:
    """Return the fewest channels that the widest group may keep, counted from its width before any pruning."""
    shapes = manifest(model).prune.get("shapes", {})
    widest, narrowest = max(groups, key=lambda g: g.size), min(g.size for g in groups)
    # Of several layers, the one that holds least else tells best how wide the group was.
    before: list[float] = [widest.size * shapes[p][0] / graph.shapes[p][0] for p in widest.producers if p in shapes]
    share = max([widest.size, *before]) * (1 - cfg.max_ratio)
    return max(cfg.min_channels * widest.size // narrowest, share - 1e-6)


def _chosen(model: nn.Module, graph: Graph, selector: str, option: str) -> set[str]:
    """Return those producing layers of the graph that a selector means."""
    found = matches(model, selector, option) & {p for g in graph.groups for p in g.producers}
    if not found:
        raise UsageError(f"'{option}={selector}' matches only modules that produce no channels of their own.")
    return found


def restrict(model: nn.Module, graph: Graph, cfg: PruneConfig) -> None:
    """Freeze the groups that `cfg.exclude` names or that `cfg.include` does not, and what must keep up with them."""
    included: set[str] = set().union(*(_chosen(model, graph, s, "prune.include") for s in cfg.include))
    excluded: set[str] = set().union(*(_chosen(model, graph, s, "prune.exclude") for s in cfg.exclude))
    for indices in graph.ties:
        groups = [graph.groups[i] for i in indices]
        layers = [p for g in groups for p in g.producers]
        stays = next((p for p in layers if p in excluded), "")
        outside = bool(cfg.include) and included.isdisjoint(layers)
        reason = f"is coupled with {stays}, which prune.exclude keeps" if stays else "is not in prune.include"
        for g in groups if stays or outside else []:
            own = stays and excluded.issuperset(g.producers)
            g.frozen = g.frozen or ("is excluded by prune.exclude" if own else reason)


def shares(model: nn.Module, graph: Graph, cfg: PruneConfig) -> dict[int, float]:
    """Return the share to remove of each of `graph.ties` that `cfg.ratios` names."""
    found: dict[int, tuple[float, str]] = {}
    for selector, share in cfg.ratios.items():
        layers = _chosen(model, graph, selector, "prune.ratios")
        hits = [i for i, t in enumerate(graph.ties) if any(layers & set(graph.groups[g].producers) for g in t)]
        free = [i for i in hits if not any(graph.groups[g].frozen for g in graph.ties[i])]
        if not free:
            group = next(g for i in hits for j in graph.ties[i] if (g := graph.groups[j]).frozen)
            raise UsageError(f"'prune.ratios={selector}' cannot be pruned: {group.name} {group.frozen}.")
        for i in free:
            other, by = found.setdefault(i, (share, selector))
            if other != share:
                name = graph.groups[graph.ties[i][0]].name
                two = f"{other:g} by '{by}' and {share:g} by '{selector}' (coupled layers lose the same channels)"
                remedy = "Give one of them, or the same share in both."
                raise UsageError(f"'prune.ratios' gives {name} two shares: {two}. {remedy}")
    return {i: share for i, (share, _) in found.items()}


def refuse_frozen(model: nn.Module, layers: list[str]) -> None:
    """Refuse to prune layers, given by path, whose weights are frozen while others learn."""
    modules = dict(model.named_modules())
    stuck = [p for p in layers if any(not w.requires_grad for w in modules[p].parameters(recurse=False))]
    if not stuck or len(stuck) == len(layers):  # a model loaded for inference has no gradients anywhere
        return
    top = sorted({".".join(p.split(".")[:2]) for p in stuck}, key=natural_key)
    keep = ", ".join(p.rpartition(".")[2] if p.startswith("model.") else p for p in top)
    remedy = f"Unfreeze them, or keep them whole with prune.exclude=[{keep}]."
    raise UsageError(f"The model has frozen layers ({', '.join(top)}): they cannot recover from pruning. {remedy}")
