# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Which channels of a model must be removed together, found by two forward passes with labelled channels.

One rule for each kind of module says what it does to labels (see `labels`); these become groups (channels that go
together) and ties (groups that keep the same share). An unknown module costs some channels but never a crash.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.errors import refused
from yolo_ext.pruning.labels import FIXED, LAYERS, Labels, Tracer, layer_channels, tensors_in

Kept = dict[str, dict[str, list[int]]]  # module path -> {"out": kept positions, "in": kept positions}
PASS_MODULES = (nn.Upsample, nn.ZeroPad2d, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
STOCK = ("torch.", "torchvision.", "ultralytics.")
UNFOLLOWED = "is used in a way that cannot be followed"
TIED = "must stay as wide as a part that "  # start of the reason of a channel that stays because of another one


@dataclass
class Member:
    """Where the channels of a group sit in one tensor dimension."""

    module: str  # path, such as model.2.cv1.conv
    dim: str  # "out" or "in"
    index: torch.Tensor  # (channels, repeats) positions in that dimension; row k belongs to channel k of the group


@dataclass
class Group:
    """Channels that are removed together in all members, one channel at a time."""

    name: str  # path of the first layer that produces the channels
    members: list[Member]  # all coupled tensor dimensions
    frozen: str = ""  # why the group keeps all its channels, empty when it can be pruned

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
    """Couplings of a whole model."""

    groups: list[Group]  # prunable and frozen
    ties: list[list[int]]  # indices into `groups`; the groups of one list keep the same share of channels
    convs: dict[str, tuple[int, int]] = field(default_factory=dict)  # by path: output positions, kernel area
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)  # path -> (out, in) channels before pruning
    norms: dict[str, int] = field(default_factory=dict)  # path of a BatchNorm -> channels before pruning

    def layers(self, group: Group) -> list[str]:
        """Return the paths of the layers with weights that produce the channels of a group."""
        return [p for p in group.producers if p in self.shapes]

    def width(self, path: str, dim: str) -> int:
        """Return the channels of a layer or norm before pruning."""
        return self.shapes[path][dim == "in"] if path in self.shapes else self.norms[path]

    def reasons(self) -> dict[str, str]:
        """Return why layers and norms keep their channels, by path."""
        return {p: g.frozen for g in self.groups if g.frozen for p in g.producers}


# Rules: (tracer, module, path, input, output) ------------------------------------------------------------------------
def _weights_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Consume the labels of the input of a conv or linear layer and produce new ones; depthwise passes them on."""
    n_out, n_in = layer_channels(m)  # type: ignore[misc]
    labels, groups = t.get(x) or [FIXED] * n_in, getattr(m, "groups", 1)
    tokens = isinstance(m, nn.Linear) and x.ndim != 2  # its channels are in the last dimension
    t.positions[path] = out.numel() // (out.shape[0] * n_out)
    if len(labels) != n_in or tokens:
        t.labels.freeze(labels, f"is reshaped before {path}")
        labels = [FIXED] * n_in
    t.labels.consume(path, labels)
    if groups == n_out == n_in and groups > 1 and isinstance(m, nn.Conv2d):  # depthwise: what goes in comes out
        t.labels.out[path] = t.labels.inp[path]
        return t.put(out, t.labels.out[path])
    if lifted := t.lifted(x):
        t.labels.freeze(labels, lifted)
    produced = t.labels.produce(path, n_out)
    if groups > 1:
        t.labels.freeze(labels + produced, f"meets the grouped convolution {path}")
    if tokens:
        return t.labels.freeze(produced, f"belongs to tokens, not to a feature map{t.where()}")
    t.put(out, produced)


def _norm_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Couple a BatchNorm with the channels that it norms."""
    labels = t.get(x) or [FIXED] * x.shape[1]
    if m.weight is None or m.running_mean is None:
        t.labels.freeze(labels, f"meets {path}, a BatchNorm without weights or statistics")
    else:
        reason = f"meets {path}, which also norms fixed channels"
        t.labels.out[path] = t.labels.union(t.labels.out[path], labels, reason) if path in t.labels.out else labels
        t.positions[path] = x.numel() // (x.shape[0] * x.shape[1])
    t.put(out, labels)


def _pass_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Pass labels on through a module that works on each channel by itself."""
    if t.get(x) is not None:
        t.pointwise(type(m).__name__, [x], ((x,), {}), out, m.forward)  # not its call, which would come back here


def _attention_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Attention reshapes by head: q and k rows stay, v rows go at the same rate as the channels of the stream."""
    key, head, labels = m.key_dim, m.head_dim, t.get(x) or [FIXED] * x.shape[1]
    if lifted := t.lifted(x):
        t.labels.freeze(labels, lifted)
    flat = t.labels.produce(f"{path}.pe.conv", m.num_heads * head)
    values = [flat[i : i + head] for i in range(0, len(flat), head)]
    qkv = [c for v in values for c in [FIXED] * (2 * key) + v]
    projected = t.labels.produce(f"{path}.proj.conv", m.proj.conv.out_channels)
    for name, inp, produced in (("qkv", labels, qkv), ("pe", flat, flat), ("proj", flat, projected)):
        t.labels.consume(f"{path}.{name}.conv", inp)
        t.labels.out[f"{path}.{name}.conv"] = t.labels.out[f"{path}.{name}.bn"] = produced
        t.positions[f"{path}.{name}.conv"] = out.shape[2] * out.shape[3]
    t.labels.ties.append([labels, *values])
    t.put(out, projected)


RULES: list[tuple[tuple[type[nn.Module], ...], Callable[..., None]]] = [
    (LAYERS, _weights_rule), ((nn.BatchNorm2d,), _norm_rule), (stock.ATTENTION, _attention_rule),
    (PASS_MODULES + stock.ACTIVATIONS, _pass_rule),
]  # fmt: skip


def rule_of(module: nn.Module) -> Callable[..., None] | None:
    """Return the rule of a module; a subclass that computes something else, or computes its weights, has none."""
    for types, rule in RULES:
        for base in (b for b in types if isinstance(module, b)):
            same = all(getattr(type(module), f, None) is getattr(base, f, None) for f in ("forward", "_conv_forward"))
            own = not hasattr(module, "weight") or "weight" in module._parameters
            return rule if same and own else None
    return None


# Tracing -------------------------------------------------------------------------------------------------------------
def custom_types(model: nn.Module) -> list[type[nn.Module]]:
    """Return the types of modules that are not of torch or Ultralytics, outer ones first."""
    types = dict.fromkeys(type(m) for path, m in model.named_modules() if path)
    return [t for t in types if not t.__module__.startswith(STOCK)]


def _watch(t: Tracer, m: nn.Module, path: str, whole: Collection[type[nn.Module]]) -> None:
    """Let the tracer know when a module runs, and apply its rule to what it returns."""
    rule, fuses = rule_of(m), isinstance(m, stock.FUSIONS)
    followed = type(m) not in whole or rule is not None or fuses or not path
    silent = rule is not None or fuses or not followed

    def enter(_: nn.Module, args: Any) -> None:
        t.stack.append(m)
        t.depth += silent

    def leave(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        t.stack.pop()
        t.depth -= silent
        if t.depth or not silent:
            return
        inputs = tensors_in((args, kwargs))
        if fuses:  # CBFuse adds one part of each cut map, resized, to the last map
            parts = [x[i] for x, i in zip(args[0], m.idx)] + [args[0][-1]]
            if tracked := [p for p in parts if t.get(p) is not None]:
                t.pointwise("add", tracked, ((parts,), {}), out, lambda p: sum(x.sum() for x in p))
        elif rule is not None and len(inputs) == 1 and isinstance(out, torch.Tensor) and inputs[0].ndim > 1:
            rule(t, m, path, inputs[0], out)
        else:
            t.freeze(inputs, f"enters {type(m).__name__} {path}")

    m.register_forward_pre_hook(enter)
    m.register_forward_hook(leave, with_kwargs=True)
    for p in m._parameters.values() if rule is not None else ():
        if p is not None and t.owner.setdefault(id(p), path) != path:  # two layers share it
            t.touched.update((path, t.owner[id(p)]))


def _finish(lab: Labels, touched: set[str]) -> None:
    """Freeze layers whose weights have another use, and channels that are produced but never seen to be used."""
    for path in touched:
        reason = f"meets {path}, whose weights are also used elsewhere"
        lab.freeze(lab.out.get(path, []) + lab.inp.get(path, []), reason)
    used = {lab.find(c) for p, labels in lab.inp.items() if labels != lab.out.get(p) for c in labels if c != FIXED}
    for labels in lab.out.values():
        lab.freeze([c for c in labels if c != FIXED and lab.find(c) not in used], UNFOLLOWED)


def trace(model: nn.Module, imgsz: int, whole: Collection[type[nn.Module]] = ()) -> Tracer:
    """Run a copy in train and eval mode on an image of side `imgsz`; the code of `whole` modules is not followed."""
    model = deepcopy(model).float().cpu().requires_grad_(False)
    tracer = Tracer(model)
    for m, path in tracer.paths.items():
        _watch(tracer, m, path, whole)
    for training in (True, False):
        model.train(training)
        where = f"in {'training' if training else 'eval'} mode on an image of {imgsz}x{imgsz} pixels"
        with torch.random.fork_rng(devices=[]), torch.no_grad(), tracer:
            torch.manual_seed(0)
            with refused(f"The model does not run {where} ({{why}}), so it cannot be pruned. Mend its code."):
                out = model(torch.rand(2, stock.input_channels(model), imgsz, imgsz))
        for x in stock.returned_tensors(out):
            tracer.freeze([x], "is an output of the model")
    _finish(tracer.labels, tracer.touched)
    return tracer


# Groups --------------------------------------------------------------------------------------------------------------
def build_graph(model: nn.Module, imgsz: int = 64, whole: Collection[type[nn.Module]] = ()) -> Graph:
    """Find which channels are coupled.

    Args:
        model: A YOLO model of any family; it is not changed.
        imgsz: Side in pixels of the square image for tracing; a multiple of the largest stride.
        whole: Types of modules through whose code channels are not followed: what enters and leaves them stays.
    Returns: The couplings, with a reason for every group that cannot be pruned.
    """
    tracer = trace(model, max(imgsz, stock.probe_size(model)), whole)
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
    norms = {p: len(labels) for p, labels in lab.out.items() if p not in shapes}
    return Graph(groups, _ties(lab, groups), convs, shapes, norms)


def _tied(reason: str) -> str:
    """Return the reason of a channel that stays because one that it is tied to stays."""
    return reason if reason.startswith(TIED) else TIED + reason


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
        members = [Member(p, d, torch.tensor([places[r][p, d] for r in roots])) for (p, d), _ in repeats]
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
