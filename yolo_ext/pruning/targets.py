# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""From scores to a plan: which channels go so that a target is met, found without touching the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from yolo_ext import compat
from yolo_ext.config import PruneConfig
from yolo_ext.errors import UsageError
from yolo_ext.pruning.criteria import GroupWeights, criteria, group_weights
from yolo_ext.pruning.graph import Graph, Group

Steps = Callable[[float], list[int]]  # share of units to remove, 0..1 -> kept units of each bundle
Kept = dict[str, dict[str, list[int]]]  # module path -> {"out": kept positions, "in": kept positions}


@dataclass
class Bundle:
    """Groups that shrink at the same rate, in `units`: unit u removes the next worst channels of each group.

    Attributes:
        groups: The groups.
        order: For each group, its channels from worst to best.
        scores: (units,) ascending.
        allowed: Numbers of kept units that rounding and floors allow, descending; the first one is all of them.
    """

    groups: list[Group]
    order: list[torch.Tensor]
    scores: torch.Tensor
    allowed: list[int]

    @property
    def units(self) -> int:
        """Number of units before pruning."""
        return len(self.scores)

    def round(self, units: float) -> int:
        """Return the allowed number of kept units nearest to `units`; of two equally near ones the larger."""
        return min(self.allowed, key=lambda a: (abs(a - units), -a))


def _allowed(size: int, units: int, cfg: PruneConfig) -> list[int]:
    """Return the legal numbers of kept units for a bundle whose widest group has `size` channels."""
    per_unit = size // units
    floor = max(cfg.min_channels, size * (1 - cfg.max_ratio))
    legal = [u for u in range(1, units) if (u * per_unit) % cfg.round_to == 0 and u * per_unit >= floor]
    return [units, *reversed(legal)]


def bundles(model: nn.Module, graph: Graph, cfg: PruneConfig) -> list[Bundle]:
    """Score every prunable bundle and mark excluded groups in the graph.

    Args:
        model: The model that the graph was built from.
        graph: Its couplings; groups that `cfg` keeps whole become frozen, with the reason.
        cfg: Pruning options.

    Returns:
        The prunable bundles.

    Raises:
        UsageError: If the criterion is unknown or fails, or an exclude pattern is broken or matches nothing.
    """
    _exclude(graph, cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    made = []
    for indices in graph.bundles:
        groups = [graph.groups[i] for i in indices]
        if any(g.frozen for g in groups):
            continue
        units = min(g.size for g in groups)
        if any(g.size % units for g in groups):
            for g in groups:
                g.frozen = "is coupled with a part whose width does not divide its own"
            continue
        order, rows = [], []
        for g in groups:
            values = _scores(cfg.method, group_weights(model, g, generator), g)
            by_worth = values.argsort(stable=True)
            order.append(by_worth)
            rows.append(values[by_worth].view(units, -1).mean(1))
        allowed = _allowed(max(g.size for g in groups), units, cfg)
        if len(allowed) > 1:
            made.append(Bundle(groups, order, torch.stack(rows).mean(0), allowed))
        else:
            for g in groups:
                g.frozen = f"has {g.size} channels, which the floors do not let shrink"
    return made


def _scores(method: str, weights: GroupWeights, group: Group) -> torch.Tensor:
    """Return (n,) finite scores of a group by a criterion, which may be the user's own."""
    values = criteria[method].fn(weights)
    if not isinstance(values, torch.Tensor) or values.shape != (group.size,) or not values.isfinite().all():
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise UsageError(
            f"The pruning criterion '{method}' returned {got} with values that cannot be ranked for '{group.name}'. "
            f"Legal: a tensor of {group.size} finite scores, one for each channel; are the weights of the model finite?"
        )
    return values.detach().float().cpu()


def _exclude(graph: Graph, cfg: PruneConfig) -> None:
    """Freeze the bundles in which a layer that `cfg.exclude` names produces channels."""
    for pattern in cfg.exclude:
        try:
            matches = re.compile(pattern).search
        except re.error as e:
            raise UsageError(f"'prune.exclude={pattern}' is not a regular expression: {e}.") from e
        bundles = [[graph.groups[g] for g in bundle] for bundle in graph.bundles]
        hits = [b for b in bundles if any(matches(m.module) for g in b for m in g.members if m.dim == "out")]
        if not hits:
            raise UsageError(
                f"'prune.exclude={pattern}' matches no layer. Layers have names such as 'model.2.cv1.conv'."
            )
        for g in (g for b in hits for g in b):
            g.frozen = g.frozen or f"is excluded by '{pattern}'"


def _masks(graph: Graph, made: list[Bundle], units: list[int]) -> dict[tuple[str, str], torch.Tensor]:
    """Return for each touched (module, dim) a boolean mask of the channels that stay."""
    masks: dict[tuple[str, str], torch.Tensor] = {}
    for bundle, u in zip(made, units):
        for group, order in zip(bundle.groups, bundle.order):
            gone = order[: group.size - u * (group.size // bundle.units)]
            for m in group.members:
                if (m.module, m.dim) not in masks:
                    masks[m.module, m.dim] = torch.ones(_width(graph, m.module, m.dim), dtype=torch.bool)
                masks[m.module, m.dim][m.index[gone].flatten()] = False
    return masks


def _width(graph: Graph, path: str, dim: str) -> int:
    if path in graph.shapes:
        return graph.shapes[path][dim == "in"]
    return 1 + max(int(m.index.max()) for g in graph.groups for m in g.members if (m.module, m.dim) == (path, dim))


class _Flops:
    """FLOPs of the deployed model as a function of the kept channels, without building anything."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        deployed = compat.deployed_layers(model)
        self.convs = {p: c for p, c in graph.convs.items() if p in deployed and p in graph.shapes}
        self.shapes = graph.shapes
        modules = dict(model.named_modules())
        self.groups = {p: getattr(modules[p], "groups", 1) for p in self.convs}

    def __call__(self, masks: dict[tuple[str, str], torch.Tensor]) -> float:
        total = 0.0
        for path, (positions, kernel) in self.convs.items():
            n_out, n_in = self.shapes[path]
            out = int(masks[path, "out"].sum()) if (path, "out") in masks else n_out
            inp = int(masks[path, "in"].sum()) if (path, "in") in masks else n_in
            fan_in = 1 if self.groups[path] == n_out else inp / self.groups[path]
            total += 2.0 * positions * kernel * out * fan_in
        return total


def plan(model: nn.Module, graph: Graph, cfg: PruneConfig) -> Kept:
    """Choose the channels that stay so that the target is met.

    Args:
        model: The model; it is not changed.
        graph: Its couplings from `build_graph`, used once: groups that `cfg` keeps whole become frozen in it.
        cfg: Pruning options with `speedup` or `ratio`.

    Returns:
        Kept positions for every layer that loses channels: plain data that can be stored and replayed.

    Raises:
        UsageError: If nothing can be pruned or the floors do not allow the target.
    """
    made = bundles(model, graph, cfg)
    if not made:
        raise UsageError(
            "Nothing can be pruned: every group is frozen, excluded or at its floor. See `yolo-ext help prune`."
        )
    steps = _steps(made, cfg)
    units = steps(cfg.ratio or 0.0) if cfg.speedup is None else _solve(_Flops(model, graph), graph, made, steps, cfg)
    kept: Kept = {}
    for (path, dim), mask in _masks(graph, made, units).items():
        if not mask.all():
            kept.setdefault(path, {})[dim] = mask.nonzero().flatten().tolist()
    return kept


def _solve(flops: _Flops, graph: Graph, made: list[Bundle], steps: Steps, cfg: PruneConfig) -> list[int]:
    """Return the kept units of each bundle whose FLOPs ratio is nearest to `cfg.speedup`."""
    before, target = flops({}), float(cfg.speedup or 1.0)

    def speedup(units: list[int]) -> float:
        return before / flops(_masks(graph, made, units))

    if (most := speedup(steps(1.0))) < target * 0.97:
        raise UsageError(
            f"'prune.speedup={target:g}' cannot be reached: the floors allow at most {most:.2f}. "
            f"Lower prune.speedup, prune.min_channels={cfg.min_channels} or prune.round_to={cfg.round_to}, "
            f"or raise prune.max_ratio={cfg.max_ratio:g}."
        )
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if speedup(steps(middle)) < target else (low, middle)
    # Several bundles may jump at the same share: walk from one side to the other, one bundle at a time.
    units, end = steps(low), steps(high)
    best = min((units, end), key=lambda u: abs(speedup(u) - target))
    for i, (u, v) in enumerate(zip(units, end)):
        if u != v:
            units = [*units[:i], v, *units[i + 1 :]]
            best = min((best, units), key=lambda u: abs(speedup(u) - target))
    return best


def _steps(made: list[Bundle], cfg: PruneConfig) -> Steps:
    """Return a function from the share of units to remove, 0..1, to the kept units of each bundle."""
    if cfg.scope == "local":
        return lambda share: [b.round(b.units * (1 - share)) for b in made]
    scores = torch.cat([b.scores for b in made])
    owner = torch.cat([torch.full((b.units,), i) for i, b in enumerate(made)])[scores.argsort(stable=True)]

    def steps(share: float) -> list[int]:
        gone = torch.bincount(owner[: round(share * len(owner))], minlength=len(made)).tolist()
        return [b.round(b.units - g) for b, g in zip(made, gone)]

    return steps
