# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""torch-pruning's dependency graph of any YOLO, filled from labelled channels instead of a trace of autograd.

A channel has one number wherever it lies, so that torch-pruning's index mappings are not needed. Channels that can only
go together are one atom: the same place of all parts of a cut tensor, and of all value heads of attention.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning.pruner.function import PrunerBox
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning import graph
from yolo_ext.pruning.graph import Kept
from yolo_ext.pruning.labels import FIXED, layer_channels

Place = tuple[str, str]  # path of a layer or norm, "out" or "in"
KNOWN: ContextVar[graph.Graph | None] = ContextVar("couplings of the model that is pruned, if known", default=None)


def width(module: nn.Module, dim: str) -> int:
    """Return the channels of one side of a layer or norm as it is now."""
    return (layer_channels(module) or (module.num_features,) * 2)[dim == "in"]


def depthwise(module: nn.Module) -> bool:
    """Tell whether what goes into a layer goes with what comes out of it."""
    return getattr(module, "groups", 1) == getattr(module, "out_channels", 1) > 1


# Criteria and surgery use the next two as well.
def pruning_function(layer: nn.Module, dim: str) -> Callable[..., Any]:
    """Return the function of torch-pruning that cuts one side of a layer and names it to its importances."""
    kind = tp.ops.OPTYPE.CONV if depthwise(layer) else tp.ops.module2type(layer)  # filters score like any others
    return getattr(PrunerBox[kind], f"prune_{dim}_channels")  # type: ignore[no-any-return]


def cut_channels(layer: nn.Module, function: Callable[..., Any], positions: list[int]) -> None:
    """Cut positions of one side of a layer, in place; what is frozen stays frozen, which torch-pruning forgets."""
    learns = [p.requires_grad for p in layer.parameters(recurse=False)]
    (tp.prune_depthwise_conv_out_channels if depthwise(layer) else function)(layer, positions)
    for p, learned in zip(layer.parameters(recurse=False), learns):
        p.requires_grad_(learned)


class Dependency(tp.dependency.Dependency):  # type: ignore[misc]
    """One side of one layer in a group; a depthwise filter is scored as any other, and cut as what it is."""

    def __call__(self, idxs: list[int]) -> None:
        """Cut these positions."""
        cut_channels(self.target.module, self.handler, idxs)


class Group(tp.dependency.Group):  # type: ignore[misc]
    """A torch-pruning group that knows its channels by number, so that it can still be pruned after others were."""

    def __init__(self, owner: "DependencyGraph", place: Place, channels: Sequence[int]) -> None:
        super().__init__()
        self._DG, self.place, self.channels = owner, place, channels

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Cut all layers of the group, or what goes with positions `idxs` of its first layer."""
        first = self[0].dep
        if idxs is not None:
            return self._DG.get_pruning_group(first.layer, first.handler, idxs).prune(record_history=record_history)
        now = self._DG.group_of(self.place, self.channels)
        if not self._DG.check_pruning_group(now):
            raise UsageError(f"{self.place[0]} would lose all its channels. Ask DG.check_pruning_group(group) before.")
        super(Group, now).prune(record_history=record_history)
        self._DG.forget(now)


@dataclass(frozen=True)
class Coupled:
    """What torch-pruning prunes as one group: the channels of groups of ours that keep one share of them."""

    root: Place  # which holds each atom, and nothing else
    parts: int  # of the root that stay equally wide: position p goes with p + width / parts, and so on
    places: list[Place]


class DependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A `torch_pruning.DependencyGraph` of a YOLO: its groups, functions and history on other foundations."""

    parts: dict[nn.Module, int] = {}  # root layers that are cut into parts -> how many

    def build_dependency(
        self, model: nn.Module, example_inputs: Any = None, *args: Any, ignored_layers: Any = None, **kwargs: Any
    ) -> "DependencyGraph":
        """Find the groups of a YOLO, which is not changed; what torch-pruning's tracer needs besides has no effect."""
        if not isinstance(getattr(model, "model", None), nn.Sequential):
            raise UsageError(f"A {type(model).__name__} is no YOLO network. Give the one inside: YOLO(path).model.")
        if getattr(model, "is_fused", lambda: False)():
            raise UsageError("The model is fused, as predict and val leave it. Load the .pt anew, then prune.")
        self.model, self.couplings = model, KNOWN.get() or graph.build_graph(model)
        self.dense = deepcopy(model)  # for the proof
        self.IGNORED_LAYERS_IN_TRACING.extend(ignored_layers or [])
        self.paths = dict(model.named_modules())
        self._module2name = {m: path for path, m in self.paths.items()}
        held = dict.fromkeys((m.module, m.dim) for g in self.couplings.groups for m in g.members)
        self.module2node = {self.paths[p]: tp.dependency.Node(self.paths[p], None, p) for p, _ in held}
        self.at: dict[Place, list[int]] = {(p, d): [FIXED] * width(self.paths[p], d) for p, d in held}  # channels
        self.kept: dict[Place, list[int]] = {p: list(range(len(at))) for p, at in self.at.items()}
        self._number()
        return self

    # Channels by number -----------------------------------------------------------------------------------------
    def _number(self) -> None:
        """Number the channels that can go, tie by tie, and note what torch-pruning cannot prune in `skipped`."""
        self.atom: list[int] = []  # of each channel
        self.home: list[int] = []  # of each channel, its set
        self.sets: list[Coupled] = []
        self.skipped: dict[str, str] = {}  # first layer of groups -> why they stay whole
        for tie in self.couplings.ties:
            groups = [self.couplings.groups[i] for i in tie]
            if not any(g.frozen for g in groups) and (why := self._add(groups)):
                self.skipped[groups[0].name] = why
                LOGGER.warning(f"{colorstr('torch-pruning: ')}{groups[0].name} stays whole, because it {why}.")
        self.parts = {self.paths[s.root[0]]: s.parts for s in self.sets if s.parts > 1}

    def _add(self, groups: Sequence[graph.Group]) -> str:
        """Number the channels of groups that keep one share of them, or return why torch-pruning cannot prune them."""
        units = min(g.size for g in groups)
        if any(g.size % units for g in groups):
            return "is coupled with a part whose width does not divide its own"
        unit: dict[Place, dict[int, int]] = defaultdict(dict)  # place -> position -> place in its part
        for m in (m for g in groups for m in g.members):
            unit[m.module, m.dim].update({p: k % units for k, row in enumerate(m.index.tolist()) for p in row})
        if (root := self._root(unit, units)) is None:
            return "shares its layers with other channels, and torch-pruning prunes whole layers"
        first, n, spare = len(self.atom), len(self.at[root]), defaultdict(list)
        for p in range(n):
            spare[unit[root][p]].append(first + p)
        parts = n // units if all(unit[root][p] == p % units for p in range(n)) and n % units == 0 else 1
        self.home += [len(self.sets)] * n
        self.sets.append(Coupled(root, parts, list(unit)))
        self.atom += [first + unit[root][p] for p in range(n)]
        turns = {u: cycle(channels) for u, channels in spare.items()}
        for g in groups:  # those that the root does not hold have the numbers of channels that they are tied to
            rows = next((m.index[:, 0].tolist() for m in g.members if (m.module, m.dim) == root), None)
            numbers = [first + p for p in rows] if rows else [next(turns[k % units]) for k in range(g.size)]
            for m in g.members:
                for c, row in zip(numbers, m.index.tolist()):
                    for p in row:
                        self.at[m.module, m.dim][p] = c
        self.at[root] = list(range(first, first + n))  # also where a channel lies there twice
        return ""

    def _root(self, unit: dict[Place, dict[int, int]], units: int) -> Place | None:
        """Return the place that holds all atoms and nothing else, if there is one: best the outputs of a layer."""

        def worse(place: Place) -> tuple[bool, bool, bool, int]:
            layer = self.paths[place[0]]
            return place[1] != "out", isinstance(layer, nn.BatchNorm2d), depthwise(layer), -len(unit[place])

        whole = [p for p, u in unit.items() if len(u) == len(self.at[p]) and len(set(u.values())) == units]
        return min(whole, key=worse, default=None)

    # What torch-pruning asks ------------------------------------------------------------------------------------
    def get_pruner_of_module(self, module: nn.Module) -> Any:
        """Return torch-pruning's pruner of a module, which knows into how many equal parts its output is cut."""
        pruner = super().get_pruner_of_module(module)
        if module not in self.parts:
            return pruner
        found = copy(pruner)  # with the bound functions of the first, by which torch-pruning knows what a group cuts
        found.prune_out_channels, found.prune_in_channels = pruner.prune_out_channels, pruner.prune_in_channels
        found.get_out_channel_groups = self.parts.__getitem__
        return found

    def get_pruning_group(self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Any) -> Group:
        """Return all that goes with positions `idxs` of one side of a layer or norm, as `pruning_fn` says."""
        dim = "out" if self.is_out_channel_pruning_fn(pruning_fn) or depthwise(module) else "in"
        path = self._module2name.get(module, type(module).__name__)
        at = self.at.get((path, dim), [])
        asked = sorted({int(i) for i in (idxs if hasattr(idxs, "__iter__") else [idxs])})
        if (stuck := [i for i in asked if not 0 <= i < len(at) or at[i] == FIXED]) or not at:
            held = (g.frozen for g in self.couplings.groups for m in g.members if (m.module, m.dim) == (path, dim))
            why = next(filter(None, held), f"has {len(at)} in the graph")
            raise UsageError(f"{path} {why}, so its channels {stuck[:5]} ({dim}) cannot go. Choose others.")
        return self.group_of((path, dim), [at[i] for i in asked])

    def group_of(self, place: Place, channels: Sequence[int]) -> Group:
        """Return a group with all that is left of these channels, ranked in this order, and of what goes with them."""
        atoms = {self.atom[c] for c in channels}
        sets = [self.sets[s] for s in sorted({self.home[c] for c in channels})]
        places = dict.fromkeys([place, *(p for s in sets for p in s.places)])
        self.check_current(places)
        where = {p: [i for i, c in enumerate(self.at[p]) if c != FIXED and self.atom[c] in atoms] for p in places}
        left = dict.fromkeys(self.at[place][i] for i in where[place])
        rank = {c: k for k, c in enumerate(dict.fromkeys([*(c for c in channels if c in left), *left]))}
        ranks = {p: [rank.get(self.at[p][i]) for i in where[p]] for p in places}
        each = {p for p, r in ranks.items() if len(r) == len(rank) == len({*r} - {None})}
        found, start = Group(self, place, channels), self.module2node[self.paths[place[0]]]
        trigger = pruning_function(start.module, place[1])
        # torch-pruning sizes its scores by the first layer that it looks at, so those with each rank once come first
        for p in sorted(places, key=lambda p: (p != place, p not in each)):
            node = self.module2node[self.paths[p[0]]]
            if (where[p] or p == place) and not (p[1] == "in" and depthwise(node.module)):
                found.add_dep(Dependency(trigger, pruning_function(node.module, p[1]), start, node), where[p])
                found[len(found) - 1].root_idxs = ranks[p]  # positions rise, and ranks lie beside them
        return found

    def get_all_groups(
        self, ignored_layers: Sequence[nn.Module] = (), root_module_types: Sequence[Any] = (nn.Module,)
    ) -> Iterator[Group]:
        """Yield each group with all its channels, but for those that a layer among `ignored_layers` produces."""
        ignored = {*ignored_layers, *self.IGNORED_LAYERS_IN_TRACING}
        for root in (s.root for s in self.sets):
            group = self.group_of(root, self.at[root])
            produced = {d.layer for d, _ in group if self.is_out_channel_pruning_fn(d.handler)}
            if isinstance(self.paths[root[0]], tuple(root_module_types)) and not produced & ignored:
                yield group

    # What was cut -----------------------------------------------------------------------------------------------
    def forget(self, group: Group) -> None:
        """Take the channels of a group that was pruned out of the graph, and bring widths of blocks up to date."""
        gone, kept = {self.atom[c] for c in group.channels}, Kept()
        for place in {p for c in group.channels for p in self.sets[self.home[c]].places}:
            keep = [i for i, c in enumerate(self.at[place]) if c == FIXED or self.atom[c] not in gone]
            self.at[place], self.kept[place] = ([t[place][i] for i in keep] for t in (self.at, self.kept))
            kept.setdefault(place[0], {})[place[1]] = keep
        stock.refresh_widths(self.model, kept)

    def check_current(self, places: Iterable[Place]) -> None:
        """Refuse layers that anything but the groups of this graph has cut."""
        for path, dim in places:
            layer, n = self.model.get_submodule(path), len(self.at[path, dim])
            if layer is not self.paths[path] or width(layer, dim) != n:
                cut = f"has {width(layer, dim)} channels ({dim}) where the graph has {n}, so it was cut by hand"
                raise UsageError(f"{path} {cut}. Make a new pruner, and cut with group.prune() or pruner.step() only.")

    def plan(self) -> Kept:
        """Return the positions that every layer has kept since the graph was made, of those that lost any."""
        self.check_current(self.at)
        found: Kept = {}
        for (path, dim), keep in self.kept.items():
            if len(keep) < width(self.dense.get_submodule(path), dim):
                found.setdefault(path, {})[dim] = keep
        return found
