# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Bundles: groups that shrink at one rate, ranked from worst to best, with the widths that they may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.criteria import resolved, score
from yolo_ext.pruning.evidence import Evidence
from yolo_ext.pruning.graph import Graph, Group, Kept
from yolo_ext.pruning.select import producers, refuse_frozen, restrict, shares

Widths = dict[tuple[str, str], int]  # (module path, "out" or "in") -> kept channels


@dataclass
class Bundle:
    """Groups that shrink at the same rate, in `units`: unit u removes the next worst channels of each group.

    Attributes:
        groups: The groups.
        order: For each group, its channels from worst to best.
        scores: (units,) ascending.
        allowed: Numbers of kept units that rounding and floors allow, descending; the first one is all of them.
        share: Share of units that `prune.ratios` removes, whatever the target; None for a bundle that is free.
        values: For each group, the scores of its channels.
    """

    groups: list[Group]
    order: list[torch.Tensor]
    scores: torch.Tensor
    allowed: list[int]
    share: float | None = None
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Path of the first layer that produces the channels."""
        return self.groups[0].name

    @property
    def units(self) -> int:
        """Number of units before pruning."""
        return len(self.scores)

    def round(self, units: float) -> int:
        """Return the allowed number of kept units nearest to `units`; of two equally near ones the larger."""
        return min(self.allowed, key=lambda a: (abs(a - units), -a))


def bundles(model: nn.Module, graph: Graph, cfg: PruneConfig, evidence: Evidence | None = None) -> list[Bundle]:
    """Score every bundle that the options leave prunable.

    Args:
        model: The model that the graph was built from.
        graph: Its couplings; groups that `cfg` keeps whole become frozen, with the reason.
        cfg: Pruning options.
        evidence: What `evidence.collect` measured, for criteria that need data.

    Returns:
        The prunable bundles.

    Raises:
        UsageError: If the criterion is unknown or fails, a selector is broken or matches nothing, a share of
            `cfg.ratios` breaks a floor, or layers are frozen that would lose channels.
    """
    cfg = resolved(cfg, evidence is not None)
    restrict(model, graph, cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    made: dict[int, Bundle] = {}
    for i, indices in enumerate(graph.bundles):
        groups = [graph.groups[g] for g in indices]
        if any(g.frozen for g in groups):
            continue
        found = _bundle(model, graph, groups, cfg, generator, evidence)
        if isinstance(found, Bundle):
            made[i] = found
        else:
            for g in groups:
                g.frozen = found
    for i, share in shares(model, graph, cfg).items():
        _check_share(made[i], share, _floor(model, graph, made[i].groups, cfg), cfg)
        made[i].share = share
    refuse_frozen(model, [p for b in made.values() for g in b.groups for p in producers(g)])
    return list(made.values())


def _bundle(
    model: nn.Module, graph: Graph, groups: list[Group], cfg: PruneConfig, generator: torch.Generator,
    evidence: Evidence | None,
) -> Bundle | str:  # fmt: skip
    """Return the ranked bundle of these groups, or the reason why they keep all their channels."""
    units, widest = min(g.size for g in groups), max(g.size for g in groups)
    if any(g.size % units for g in groups):
        return "is coupled with a part whose width does not divide its own"
    floor = _floor(model, graph, groups, cfg)
    step = widest // units
    legal = [u for u in range(1, units) if u * step % cfg.round_to == 0 and u * step >= floor]
    if not legal:
        return f"has {groups[0].size} channels, which the floors do not let shrink"
    values: list[torch.Tensor] = []
    for g in groups:
        scored = score(model, g, cfg.method, generator, evidence)
        if scored is None:
            return f"has no BatchNorm, which '{cfg.method}' ranks by"
        values.append(scored)
    order = [v.argsort(stable=True) for v in values]
    rows = [v[o].view(units, -1).mean(1) for v, o in zip(values, order)]
    return Bundle(groups, order, torch.stack(rows).mean(0), [units, *reversed(legal)], values=values)


def _floor(model: nn.Module, graph: Graph, groups: list[Group], cfg: PruneConfig) -> float:
    """Return the fewest channels that the widest group may keep, counted from its width before any pruning."""
    shapes = manifest(model).prune.get("shapes", {})
    widest, narrowest = max(groups, key=lambda g: g.size), min(g.size for g in groups)
    # Of several layers, the one that holds least else tells best how wide the group was.
    before = [widest.size * shapes[p][0] / graph.shapes[p][0] for p in producers(widest) if p in shapes]
    share = max([widest.size, *before]) * (1 - cfg.max_ratio)
    return max(cfg.min_channels * widest.size // narrowest, share - 1e-6)


def _check_share(bundle: Bundle, share: float, floor: float, cfg: PruneConfig) -> None:
    """Refuse a share of `prune.ratios` that a floor does not allow; warn when rounding leaves nothing of it."""
    size = max(g.size for g in bundle.groups)
    if size * (1 - share) < floor and share:
        raise UsageError(
            f"'prune.ratios' takes {share:g} of the {size} channels of {bundle.name}, but the floors keep "
            f"{floor:.4g}. Give at most {max(0.0, 1 - floor / size):.2g}, "
            f"lower prune.min_channels={cfg.min_channels} or raise prune.max_ratio={cfg.max_ratio:g}."
        )
    if share and bundle.round(bundle.units * (1 - share)) == bundle.units:
        LOGGER.warning(
            f"{colorstr('prune: ')}{bundle.name} stays whole: {share:g} of its {size} channels is less than half of "
            f"prune.round_to={cfg.round_to}"
        )


def _gone(bundle: Bundle, units: int) -> list[torch.Tensor]:
    """Return, for each group, the channels that go when `units` stay."""
    pairs = zip(bundle.groups, bundle.order)
    return [order[: g.size - units * (g.size // bundle.units)] for g, order in pairs]


def width(graph: Graph, path: str, dim: str) -> int:
    """Return the channels of a layer or norm before pruning."""
    if path in graph.shapes:
        return graph.shapes[path][dim == "in"]
    return 1 + max(int(m.index.max()) for g in graph.groups for m in g.members if (m.module, m.dim) == (path, dim))


def widths_of(graph: Graph, made: list[Bundle], units: list[int]) -> Widths:
    """Return the kept channels of each layer that the bundles touch, cheaper than `kept_of`.

    Args:
        graph: The couplings.
        made: Bundles.
        units: How many units of each stay.
    """
    found: Widths = {}
    for bundle, u in zip(made, units):
        for g in bundle.groups:
            gone = g.size - u * (g.size // bundle.units)
            for m in g.members:
                if m.module in graph.shapes:
                    key = m.module, m.dim
                    found[key] = found.get(key, width(graph, *key)) - gone * m.index.shape[1]
    return found


def kept_of(graph: Graph, made: list[Bundle], units: list[int]) -> Kept:
    """Return the kept positions of every layer that loses channels: plain data that can be stored and replayed.

    Args:
        graph: The couplings.
        made: Bundles.
        units: How many units of each stay.
    """
    masks: dict[tuple[str, str], torch.Tensor] = {}
    for bundle, u in zip(made, units):
        for group, gone in zip(bundle.groups, _gone(bundle, u)):
            for m in group.members:
                key = m.module, m.dim
                if key not in masks:
                    masks[key] = torch.ones(width(graph, *key), dtype=torch.bool)
                masks[key][m.index[gone].flatten()] = False
    kept: Kept = {}
    for (path, dim), mask in masks.items():
        if not mask.all():
            kept.setdefault(path, {})[dim] = mask.nonzero().flatten().tolist()
    return kept


def near_zero(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Tell which channels of a group are near zero.

    Args:
        scores: (n,) scores of one group.
        threshold: Share of the largest score.

    Returns:
        (n,) booleans; all True in a group whose scores are all zero.
    """
    return scores <= threshold * scores.max()


def spare_units(made: Sequence[Bundle], threshold: float) -> list[int]:
    """Return the kept units of each bundle when channels near zero go and, after rounding and floors, no others.

    Args:
        made: Bundles, scored by a criterion that needs "sparsity".
        threshold: Share of the largest score of a group.
    """
    units = []
    for b in made:
        pairs = zip(b.groups, b.values)
        gone = min(int(near_zero(v, threshold).sum()) // (g.size // b.units) for g, v in pairs)
        units.append(min(a for a in b.allowed if a >= b.units - gone))
    return units


def near_zero_share(made: Sequence[Bundle], threshold: float) -> float:
    """Return the share, 0..1, of all channels of these bundles that are near zero."""
    masks = [near_zero(v, threshold) for b in made for v in b.values]
    return float(torch.cat(masks).float().mean()) if masks else 0.0
