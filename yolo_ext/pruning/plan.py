# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Plans: how a share of all channels is spread over tied groups, which positions stay then, and what is remembered."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest, note, set_tripwire
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Table, suggest
from yolo_ext.pruning.evidence import NO_PROBES, Probes
from yolo_ext.pruning.graph import TIED, Graph, Group, Kept
from yolo_ext.pruning.groups import TiedGroups
from yolo_ext.pruning.labels import layer_channels
from yolo_ext.pruning.surgery import apply_plan

Widths = dict[tuple[str, str], int]  # (module path, "out" or "in") -> kept channels
Steps = Callable[[float], list[int]]  # share of units to remove, 0..1 -> kept units of each
scopes = Table("pruning scope")  # row: (tied groups, model) -> the class of each; units are ranked in their class


@dataclass(frozen=True)
class Job:
    """What is pruned, which stays as it is, and what may be asked about it."""

    model: nn.Module
    graph: Graph
    ties: Sequence[TiedGroups]  # what can be pruned, that with a share of its own included
    cfg: PruneConfig
    probes: Probes = NO_PROBES
    imgsz: int = 640  # side of the image in pixels, for the FLOPs

    def widths(self, units: Sequence[int]) -> Widths:
        """Return the widths of the layers when these units stay."""
        return widths_of(self.graph, self.ties, units)

    def pruned(self, units: Sequence[int]) -> nn.Module:
        """Return a pruned copy in which these units stay."""
        return apply_plan(deepcopy(self.model), kept_of(self.graph, self.ties, units))


# Scopes --------------------------------------------------------------------------------------------------------------
@scopes.row("global", "Rank the channels of the whole model together")
def everything(ties: Sequence[TiedGroups], model: nn.Module) -> list[Hashable]:
    """Put all into one class."""
    return [0] * len(ties)


@scopes.row("local", "Remove the same share of each group")
def each(ties: Sequence[TiedGroups], model: nn.Module) -> list[Hashable]:
    """Put each into a class of its own."""
    return list(range(len(ties)))


@scopes.row("isomorphic", "Rank within groups of the same structure", paper="Fang et al., 2024, arXiv:2407.04616")
def isomorphic(ties: Sequence[TiedGroups], model: nn.Module) -> list[Hashable]:
    """Put those into one class whose groups have the same size and the same kinds of layers."""
    modules = dict(model.named_modules())

    def kinds(group: Group) -> list[tuple[Any, ...]]:
        found = ((modules[m.module], m.dim) for m in group.members)
        kind = ((type(m).__name__, getattr(m, "kernel_size", ()), getattr(m, "groups", 1) > 1, d) for m, d in found)
        return sorted(kind)

    return [tuple(sorted((g.size, tuple(kinds(g))) for g in t.groups)) for t in ties]


def by_rank(ties: Sequence[TiedGroups], classes: Sequence[Hashable]) -> Steps:
    """Return steps that remove the same share of the worst units of each class."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, c in enumerate(classes):
        members[c].append(i)
    owners = []
    for places in members.values():
        scores = torch.cat([ties[i].scores for i in places])
        owner = torch.cat([torch.full((ties[i].units,), i) for i in places])
        owners.append(owner[scores.argsort(stable=True)])

    def steps(share: float) -> list[int]:
        worst = torch.cat([torch.zeros(0, dtype=torch.long), *(owner[: round(share * len(owner))] for owner in owners)])
        gone = torch.bincount(worst, minlength=len(ties)).tolist()
        return [t.round(t.units - g) for t, g in zip(ties, gone)]

    return steps


# Sensitivity ---------------------------------------------------------------------------------------------------------
def by_sensitivity(ties: Sequence[TiedGroups], curves: dict[str, Any]) -> Steps:
    """Return steps that prune each as far as its mAP drop stays below one tolerance; shares count through all drops."""
    groups = {g["name"]: g for g in curves["groups"]}
    lines = [_line(t, groups, curves["base"]["map"]) for t in ties]
    drops = sorted(d for line in lines for _, d in line) or [0.0]

    def steps(share: float) -> list[int]:
        tolerance = np.interp(share * (len(drops) - 1), range(len(drops)), drops)
        ratios = [np.interp(tolerance, [d for _, d in line], [r for r, _ in line]) for line in lines]
        return [t.round(t.units * (1 - float(r))) for t, r in zip(ties, ratios)]

    return steps


def _line(tied: TiedGroups, groups: dict[str, dict[str, Any]], base: float) -> list[tuple[float, float]]:
    """Return (ratio, drop) points of one curve, from (0, 0) on, with drops that never fall."""
    group = groups.get(tied.name)
    if group is None or group.get("channels", tied.channels) != tied.channels:
        problem = f"with {group['channels']} channels instead of {tied.channels}" if group else "at all"
        near = suggest(tied.name, list(groups)) if group is None else ""
        same = "the same prune.include, prune.exclude, prune.min_channels and prune.round_to"
        other = f"does not know {tied.name} {problem}, so it belongs to another model.{near}"
        raise UsageError(f"The sensitivity file {other} Run `yolo-ext sensitivity` on this model, with {same}.")
    points = sorted((p["ratio"], base - p["map"]) for p in group["curve"])
    # A drop below zero is noise; the tiny slope makes harmless groups shrink step by step instead of all at once.
    worst = accumulate((max(0.0, drop) for _, drop in points), max)
    return [(0.0, 0.0), *((ratio, drop + 1e-6 * ratio) for (ratio, _), drop in zip(points, worst))]


def read_sensitivity(file: str) -> dict[str, Any]:
    """Read a file of `yolo-ext sensitivity`, or refuse it when it is missing or something else."""
    try:
        found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        float(found["base"]["map"])
        for g in found["groups"]:
            _ = g["name"], [(p["ratio"], p["map"]) for p in g["curve"]]
        return found
    except OSError as e:
        problem = f"cannot be read ({e.strerror}). Run `yolo-ext sensitivity`."
    except (ValueError, LookupError, TypeError) as e:
        problem = f"is not a file of `yolo-ext sensitivity` ({type(e).__name__}: {e}). Give its sensitivity.json."
    raise UsageError(f"'prune.sensitivity={file}' {problem}")


# What stays ----------------------------------------------------------------------------------------------------------
def widths_of(graph: Graph, ties: Sequence[TiedGroups], units: Sequence[int]) -> Widths:
    """Return the kept channels of each layer and norm when these units stay, cheaper than `kept_of`."""
    found: Widths = {}
    for tied, u in zip(ties, units):
        for g in tied.groups:
            gone = g.size - u * (g.size // tied.units)
            for m in g.members:
                key = m.module, m.dim
                found[key] = found.get(key, graph.width(*key)) - gone * m.index.shape[1]
    return found


def kept_of(graph: Graph, ties: Sequence[TiedGroups], units: Sequence[int]) -> Kept:
    """Return the kept positions of every layer that loses channels when these units stay."""
    masks: dict[tuple[str, str], torch.Tensor] = {}
    for tied, u in zip(ties, units):
        for group, order in zip(tied.groups, tied.order):
            gone = order[: group.size - u * (group.size // tied.units)]
            for m in group.members:
                key = m.module, m.dim
                if key not in masks:
                    masks[key] = torch.ones(graph.width(*key), dtype=torch.bool)
                masks[key][m.index[gone].flatten()] = False
    kept: Kept = {}
    for (path, dim), mask in masks.items():
        if not mask.all():
            kept.setdefault(path, {})[dim] = mask.nonzero().flatten().tolist()
    return kept


# What is near zero: at most a threshold times the largest score of its group -----------------------------------------
def near_zero(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return (n,) which channels of a group with these scores are near zero: all where all scores are zero."""
    return scores <= threshold * scores.max()


def spare_units(ties: Sequence[TiedGroups], threshold: float) -> list[int]:
    """Return the kept units of each when channels near zero go and, after rounding and floors, no others."""
    units = []
    for t in ties:
        pairs = zip(t.groups, t.values)
        gone = min(int(near_zero(v, threshold).sum()) // (g.size // t.units) for g, v in pairs)
        units.append(min(a for a in t.allowed if a >= t.units - gone))
    return units


def near_zero_share(ties: Sequence[TiedGroups], threshold: float) -> float:
    """Return the share, 0..1, of all channels that are near zero."""
    masks = [near_zero(v, threshold) for t in ties for v in t.values]
    return float(torch.cat(masks).float().mean()) if masks else 0.0


# What a pruned model remembers ---------------------------------------------------------------------------------------
def record(dense: nn.Module, pruned: nn.Module, graph: Graph, kept: Kept, cfg: PruneConfig, gap: float) -> None:
    """Write what was done into the manifest; indices always count in the numbering of the first dense model."""
    previous = deepcopy(dict(manifest(dense).prune))
    total: Kept = previous.get("kept", {})
    for path, dims in kept.items():
        earlier = total.setdefault(path, {})
        for dim, index in dims.items():
            earlier[dim] = [earlier[dim][i] for i in index] if dim in earlier else list(index)
    modules, coupled = dict(pruned.named_modules()), {}
    for indices in graph.ties:
        layers = {p for i in indices for p in graph.groups[i].producers if layer_channels(modules[p])}
        coupled.update({p: sorted(layers - {p}, key=stock.natural_key) for p in layers if len(layers) > 1})
    told = {
        "shapes": {p: list(s) for p, s in graph.shapes.items()},
        # The teacher that a student grew from knows it by the weights it started with, not by those of today.
        "parent": manifest(dense).parent or fingerprint(dense),
        **previous,
        "config": asdict(cfg), "kept": total, "frozen": graph.reasons(), "coupled": coupled, "gap": gap,
    }  # fmt: skip
    note(pruned, prune=told)
    set_tripwire(pruned)


KEPT = (  # what a reason of the graph looks like, and what it means to a reader of the report
    (r"head output|output of the", "it is an output of the model: classes and box values set its width"),
    (r"^has \d+ channels, which the floors", "it is at the floor ({floors})"),
    (r"tokens|enters AIFI|in AIFI|[Aa]tt", "its channels are split into attention heads"),
    (r"^is reshaped (.*)", "its channels are reshaped ({0}), after which they cannot be told apart"),
    (r"^(.*)", "it {0}"),
)
SPARED = {  # by scope: why what can be pruned gave little
    "global": "'{method}' ranks its channels above those of other layers",
    "isomorphic": "'{method}' ranks its channels above those of layers built alike",
    "local": "each layer gives the same share, rounded to prune.round_to={round_to}",
}
LITTLE = 0.5  # of the share of channels that the whole model gave


def layer_report(model: nn.Module) -> list[dict[str, Any]]:
    """Return channels `before` and `after` by `name`, the `reason` of those that gave few, and `coupled` layers."""
    found, rows = manifest(model).prune or {"shapes": {}}, []
    for path in sorted(found["shapes"], key=stock.natural_key):
        before = found["shapes"][path][0]
        after = (layer_channels(model.get_submodule(path)) or (before, 0))[0]
        rows.append({"name": path, "before": before, "after": after, "coupled": found.get("coupled", {}).get(path, [])})
    share = sum(r["after"] for r in rows) / sum(r["before"] for r in rows) if rows else 1.0
    width = {r["name"]: (r["before"], r["after"]) for r in rows}
    for r in rows:
        gave = 1 - r["after"] / r["before"]
        low = gave == 0 or gave < LITTLE * (1 - share)
        r["reason"] = _few_because(found, [width[p] for p in (r["name"], *r["coupled"])], r["name"]) if low else ""
    return rows


def in_words(reason: str, floors: str = "") -> str:
    """Return a reason of the graph in the words of KEPT; `floors` are those of the pruning."""
    own = reason.removeprefix(TIED)
    hit, words = next((hit, words) for shape, words in KEPT if (hit := re.search(shape, own)))
    tied = "coupled with a part that cannot change: " if own != reason else ""
    return tied + words.format(*hit.groups(), floors=floors)


def _few_because(found: Mapping[str, Any], widths: Sequence[tuple[int, int]], path: str) -> str:
    """Return why a layer gave none or few channels; `widths` before and after are its own and of coupled ones."""
    cfg, (before, after) = {**asdict(PruneConfig()), **found.get("config", {})}, widths[0]
    cfg["floors"] = ", ".join(f"prune.{k}={cfg[k]:g}" for k in ("min_channels", "round_to", "max_ratio"))
    floored = any(a - cfg["round_to"] < max(cfg["min_channels"], b * (1 - cfg["max_ratio"])) for b, a in widths)
    start = "kept whole: " if after == before else "kept most: "
    if before == 1:
        return f"{start}it has one channel"
    if after == before and (reason := found["frozen"].get(path)):
        return start + in_words(reason, cfg["floors"])
    if path.endswith("qkv.conv"):
        return f"{start}attention keeps the channels of queries and keys"
    if floored:
        return f"{start}it is at the floor ({cfg['floors']})"
    spared = SPARED.get(cfg["scope"], "its plan kept it")  # one of an earlier version may have another scope
    why = f"'{cfg['sensitivity']}' shows that accuracy falls sooner" if cfg["sensitivity"] else spared
    return start + why.format(**cfg)
