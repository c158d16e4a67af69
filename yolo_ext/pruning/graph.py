# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Which channels of a model must be removed together, found by one forward pass with labelled channels.

The labels (see `labels`) say which outputs reach which inputs; here they become groups (channels that go together) and
ties (groups that keep the same share). So stock C2f, C3k2, ELAN and ADown need no rewriting, an unknown module costs
some channels but never a crash, and the cost is two forward passes whatever the model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.pruning.labels import FIXED, Labels, layer_channels
from yolo_ext.pruning.rules import trace

Kept = dict[str, dict[str, list[int]]]  # module path -> {"out": kept positions, "in": kept positions}


@dataclass
class Member:
    """Where the channels of a group sit in one tensor dimension."""

    module: str  # path, such as model.2.cv1.conv
    dim: str  # "out" or "in"
    index: torch.Tensor  # (channels, repeats) positions in that dimension; row k belongs to channel k of the group


@dataclass
class Group:
    """Channels that are removed together in all members, one channel at a time.

    Attributes:
        name: Path of the first layer that produces the channels.
        members: All coupled tensor dimensions.
        frozen: Why the group keeps all its channels, empty when it can be pruned.
    """

    name: str
    members: list[Member]
    frozen: str = ""

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.members[0].index.shape[0]

    @property
    def producers(self) -> list[str]:
        """Paths of the layers and norms that produce the channels."""
        return [m.module for m in self.members if m.dim == "out"]


@dataclass
class Graph:
    """Couplings of a whole model.

    Attributes:
        groups: All groups, prunable and frozen.
        ties: Lists of indices into `groups`; the groups of one list keep the same share of channels.
        convs: Layers with weights, path to (output positions, kernel area).
        shapes: Path to (out, in) channel counts before pruning.
        notes: What the planner has to say about single groups, as plain rows.
    """

    groups: list[Group]
    ties: list[list[int]]
    convs: dict[str, tuple[int, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def layers(self, group: Group) -> list[str]:
        """Return the paths of the layers with weights that produce the channels of a group."""
        return [p for p in group.producers if p in self.shapes]

    def width(self, path: str, dim: str) -> int:
        """Return the channels of a layer or norm before pruning."""
        if path in self.shapes:
            return self.shapes[path][dim == "in"]
        return 1 + max(int(m.index.max()) for g in self.groups for m in g.members if (m.module, m.dim) == (path, dim))

    def reasons(self) -> dict[str, str]:
        """Return why layers and norms keep their channels, by path."""
        return {p: g.frozen for g in self.groups if g.frozen for p in g.producers}


def build_graph(model: nn.Module, imgsz: int = 64, custom: bool = True) -> Graph:
    """Find which channels are coupled.

    Args:
        model: A YOLO model of any family; it is not changed.
        imgsz: Side in pixels of the square image for tracing; a multiple of the largest stride.
        custom: Follow channels through the code of modules that are not of torch or Ultralytics; False keeps whole
            what enters and leaves them.

    Returns:
        The couplings, with a reason for every group that cannot be pruned.
    """
    tracer = trace(model, max(imgsz, stock.probe_size(model)), custom)
    lab = tracer.labels
    for parts in lab.ties:
        if reason := next((r for part in parts for c in part if (r := lab.reason(c))), ""):
            for part in parts:
                lab.freeze(part, _tied(reason))
    modules = dict(model.named_modules())
    shapes = {p: s for p, m in modules.items() if (s := layer_channels(m)) and p in lab.inp}
    groups = _groups(lab)
    for g in groups:
        if g.frozen.startswith("is reshaped") and g.name.startswith(stock.head_prefix(model)):
            g.frozen += " (head output)"
    kernels = {p: getattr(modules[p], "kernel_size", (1, 1)) for p in tracer.positions}
    convs = {p: (n, kernels[p][0] * kernels[p][1]) for p, n in tracer.positions.items()}
    return Graph(groups, _ties(lab, groups), convs, shapes)


def _tied(reason: str) -> str:
    """Return the reason of a channel that stays because one that it is tied to stays."""
    start = "must stay as wide as a part that "
    return reason if reason.startswith(start) else start + reason


def _groups(lab: Labels) -> list[Group]:
    """Collect coupled sets with the same members into groups; the parts of a cut tensor stay apart."""
    places: dict[int, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for dim, table in (("out", lab.out), ("in", lab.inp)):
        for path, labels in table.items():
            for i, c in enumerate(labels):
                if c != FIXED:
                    places[lab.find(c)][path, dim].append(i)
    part_of: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for t, parts in enumerate(lab.ties):
        for p, part in enumerate(parts):
            for c in part:
                if c != FIXED:
                    part_of[lab.find(c)].add((t, p))
    alike: dict[Any, list[int]] = defaultdict(list)
    for root in sorted(places):
        repeats = sorted((where, len(index)) for where, index in places[root].items())
        alike[tuple(repeats), tuple(sorted(part_of[root])), lab.frozen.get(root, "")].append(root)
    groups = []
    for (repeats, _, reason), roots in alike.items():
        members = [Member(*where, torch.tensor([places[r][where] for r in roots])) for where, _ in repeats]
        members.sort(key=lambda m: (m.dim != "out", m.module not in lab.inp, stock.natural_key(m.module)))
        groups.append(Group(members[0].module, members, reason))
    return sorted(groups, key=lambda g: stock.natural_key(g.name))


def _ties(lab: Labels, groups: list[Group]) -> list[list[int]]:
    """Join groups that must keep the same share of channels, and freeze those that cannot."""
    home: dict[int, int] = {}  # root label -> number of its group
    for g, group in enumerate(groups):
        first = group.members[0]
        labels = (lab.out if first.dim == "out" else lab.inp)[first.module]
        home.update({lab.find(labels[i]): g for i in first.index[:, 0].tolist()})
    joined = Labels()
    joined.new(len(groups))
    for parts in lab.ties:
        members = [{home[lab.find(c)] for c in part if c != FIXED} for part in parts]
        whole = all(len(m) == 1 and groups[next(iter(m))].size == len(set(part)) for m, part in zip(members, parts))
        flat = set().union(*members)
        for g in flat:
            joined.union([g], [min(flat)], "")
            if not whole or len(flat) < len(parts):
                groups[g].frozen = groups[g].frozen or "is cut into parts that several layers share"
    ties: dict[int, list[int]] = defaultdict(list)
    for g in range(len(groups)):
        ties[joined.find(g)].append(g)
    for tie in ties.values():
        reason = next((groups[g].frozen for g in tie if groups[g].frozen), "")
        for g in tie:
            groups[g].frozen = groups[g].frozen or (_tied(reason) if reason else "")
    return list(ties.values())
