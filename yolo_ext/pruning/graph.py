# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Which channels of a model must be removed together, found by one forward pass with labelled channels.

Every output channel of a Conv or Linear gets a label. Labels flow through the forward pass: `cat` joins label lists,
`chunk` cuts them, `+` makes two channels one (union-find), a depthwise conv or BatchNorm passes them on. What is not
understood freezes its labels with the reason. So stock C2f, C3k2, ELAN and ADown need no rewriting, an unknown module
costs some channels but never a crash, and the cost is two forward passes whatever the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from yolo_ext import compat

FIXED = -1  # label of a channel that cannot be removed (image, constants)
POINTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "__add__",
        "__radd__",
        "__iadd__",
        "__sub__",
        "__rsub__",
        "__mul__",
        "__rmul__",
        "__imul__",
        "__truediv__",
        "add_",
        "mul_",
        "relu",
        "relu_",
        "silu",
        "silu_",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "gelu",
        "hardswish",
        "leaky_relu",
        "leaky_relu_",
        "clamp",
        "clip",
        "detach",
        "clone",
        "contiguous",
        "to",
        "float",
        "half",
        "type",
        "dropout",
        "__getitem__batch",
    ]
)
SPATIAL = frozenset(["max_pool2d", "avg_pool2d", "interpolate", "adaptive_avg_pool2d", "adaptive_max_pool2d"])
PASS_MODULES = (nn.BatchNorm2d, nn.Upsample, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass
class Member:
    """Where the channels of a group sit in one tensor dimension.

    Attributes:
        module: Module path, such as ``model.2.cv1.conv``.
        dim: ``out`` or ``in``.
        index: (channels, repeats) positions in that dimension; row k belongs to channel k of the group.
    """

    module: str
    dim: str
    index: torch.Tensor


@dataclass
class Group:
    """Channels that are removed together in all members, one channel at a time.

    Attributes:
        name: Module path of the first producer.
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


@dataclass
class Graph:
    """Couplings of a whole model.

    Attributes:
        groups: All groups, prunable and frozen.
        bundles: Lists of indices into `groups`; the groups of one bundle keep the same share of channels.
        convs: FLOPs-relevant layers, path to (output positions, kernel area, grouped like depthwise).
        shapes: Path to (out, in) channel counts before pruning.
    """

    groups: list[Group]
    bundles: list[list[int]]
    convs: dict[str, tuple[int, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)


class _Labels:
    """Union-find over channel labels, with freeze reasons and equal-count constraints."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.frozen: dict[int, str] = {}
        self.ties: list[list[list[int]]] = []
        self.out: dict[str, list[int]] = {}
        self.inp: dict[str, list[int]] = {}

    def new(self, n: int) -> list[int]:
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        return list(range(start, start + n))

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def freeze(self, labels: list[int], reason: str) -> None:
        for label in labels:
            if label != FIXED:
                self.frozen.setdefault(self.find(label), reason)

    def union(self, a: list[int], b: list[int], reason: str) -> list[int]:
        """Make two label lists one, channel by channel, and return it."""
        for x, y in zip(a, b):
            if FIXED in (x, y):
                self.freeze([x, y], reason)
                continue
            x, y = sorted((self.find(x), self.find(y)))
            if x != y:
                self.parent[y] = x
                if y in self.frozen:
                    self.frozen.setdefault(x, self.frozen[y])
        return [FIXED if FIXED in (x, y) else x for x, y in zip(a, b)]

    def consume(self, path: str, labels: list[int]) -> None:
        """Record the input labels of a layer; a layer that is called twice couples both inputs."""
        self.inp[path] = self.union(self.inp[path], labels, f"shared layer {path}") if path in self.inp else labels

    def produce(self, path: str, n: int) -> list[int]:
        """Return the output labels of a layer, the same ones each time it is called."""
        return self.out.setdefault(path, self.out.get(path) or self.new(n))


class _Tracer(TorchFunctionMode):
    """Follows labels through every torch function that is called outside the modules that have a rule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = _Labels()
        self.of: dict[int, list[int]] = {}  # id of a tensor -> labels of its channels
        self.keep: list[Any] = []  # keeps tensors alive, so that ids stay unique
        self.depth = 0
        self.paths = {m: name for name, m in model.named_modules()}
        self.positions: dict[str, int] = {}

    # Labels of tensors -------------------------------------------------------------------------------------------
    def get(self, x: torch.Tensor) -> list[int] | None:
        return self.of.get(id(x))

    def put(self, x: torch.Tensor, labels: list[int]) -> None:
        self.keep.append(x)
        self.of[id(x)] = labels

    # Functions ---------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth == 0:
            name = getattr(func, "__name__", "")
            tensors = [t for t in _tensors((args, kwargs)) if self.get(t) is not None]
            if tensors and any(True for _ in _tensors(out)):
                self._propagate(name, tensors, args, kwargs or {}, out)
        return out

    def _propagate(self, name: str, tensors: list[torch.Tensor], args: tuple, kwargs: dict, out: Any) -> None:
        if name in SPATIAL or (name in POINTWISE and isinstance(out, torch.Tensor)):
            return self._pointwise(name, tensors, args, kwargs, out)
        if name in ("cat", "concat") and _dim(args, kwargs) == 1:
            return self._cat(args, kwargs, out)
        if name in ("chunk", "split", "split_with_sizes") and _dim(args, kwargs, place=2) == 1:
            return self._cut(tensors[0], out)
        if name in ("flatten", "view", "reshape") and _keeps_channels(tensors[0], out):
            return self.put(out, self.get(tensors[0]))
        for t in tensors:
            self.labels.freeze(self.get(t), f"goes through '{name}'")

    def _pointwise(self, name: str, tensors: list[torch.Tensor], args: tuple, kwargs: dict, out: Any) -> None:
        channels = len(self.get(tensors[0]))
        labels = self.get(tensors[0])
        for t in tensors[1:]:
            if len(self.get(t)) != channels:
                for u in tensors:
                    self.labels.freeze(self.get(u), f"goes through '{name}' with broadcasting over channels")
                return
            labels = self.labels.union(labels, self.get(t), f"'{name}' with a constant")
        others = [t for t in _tensors((args, kwargs)) if self.get(t) is None]
        if any(t.ndim >= 2 and t.numel() > 1 and channels in t.shape for t in others):
            self.labels.freeze(labels, f"'{name}' with a parameter or an untracked tensor")
        for o in _tensors(out):
            if o.ndim >= 2 and o.shape[1] == channels:
                self.put(o, labels)

    def _cat(self, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
        parts = args[0] if args else kwargs["tensors"]
        self.put(out, [c for t in parts for c in (self.get(t) or [FIXED] * t.shape[1])])

    def _cut(self, x: torch.Tensor, out: Any) -> None:
        labels, start, parts = self.get(x), 0, []
        for o in out:
            parts.append(labels[start : start + o.shape[1]])
            self.put(o, parts[-1])
            start += o.shape[1]
        self.labels.ties.append(parts)

    # Modules -----------------------------------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: tuple) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.depth -= 1
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if self.depth or x is None or not isinstance(out, torch.Tensor):
            return
        labels = self.get(x)
        channels = _channels(module)
        labels = labels if labels is not None else [FIXED] * (channels[1] if channels else x.shape[1])
        rule = next((r for types, r in RULES if isinstance(module, types)), None)
        if rule is not None:
            self.put(out, rule(self, module, self.paths[module], labels, out))


def _tensors(tree: Any):
    """Yield the tensors of nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for v in tree.values():
            yield from _tensors(v)
    elif isinstance(tree, (list, tuple)):
        for v in tree:
            yield from _tensors(v)


def _dim(args: tuple, kwargs: dict, place: int = 1) -> int:
    return kwargs.get("dim", args[place] if len(args) > place else 0)


def _keeps_channels(x: torch.Tensor, out: Any) -> bool:
    """Tell whether a reshape only drops spatial dimensions of size one, as before a classifier."""
    return isinstance(out, torch.Tensor) and x.shape[:2] == out.shape[:2] and out.numel() == x.shape[0] * x.shape[1]


def _channels(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) channels of a layer with weights, else None."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return None


# Rules: (tracer, module, path, input labels, output) -> output labels -------------------------------------------------
def _weights_rule(t: _Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    n_out, n_in = _channels(module)  # type: ignore[misc]
    groups = getattr(module, "groups", 1)
    t.positions[path] = out.shape[2] * out.shape[3] if out.ndim == 4 else 1
    if len(labels) != n_in:
        t.labels.freeze(labels, f"reshaped before {path}")
        labels = [FIXED] * n_in
    t.labels.consume(path, labels)
    if groups == n_out == n_in and groups > 1:  # depthwise: what goes in comes out
        t.labels.out[path] = t.labels.inp[path]
        return t.labels.out[path]
    produced = t.labels.produce(path, n_out)
    if groups > 1:
        t.labels.freeze(labels + produced, f"grouped convolution {path}")
    return produced


def _norm_rule(t: _Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    t.labels.out[path] = t.labels.union(t.labels.out[path], labels, path) if path in t.labels.out else labels
    return labels


def _pass_rule(t: _Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    return labels


def _attention_rule(t: _Tracer, m: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    """Attention reshapes by head: q and k rows stay, v rows go at the same rate as the channels of the stream."""
    heads, key, head = m.num_heads, m.key_dim, m.head_dim
    values = [t.labels.new(head) for _ in range(heads)]
    qkv: list[int] = []
    for v in values:
        qkv += t.labels.produce(f"{path}.qk", 0) + [FIXED] * (2 * key) + v
    flat = [c for v in values for c in v]
    projected = t.labels.new(m.proj.conv.out_channels)
    positions = out.shape[2] * out.shape[3]
    for name, inp, produced in (("qkv", labels, qkv), ("pe", flat, flat), ("proj", flat, projected)):
        t.labels.consume(f"{path}.{name}.conv", inp)
        t.labels.out[f"{path}.{name}.conv"] = t.labels.out[f"{path}.{name}.bn"] = produced
        t.positions[f"{path}.{name}.conv"] = positions
    t.labels.ties.append([labels, *values])
    return projected


def _opaque_rule(t: _Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    t.labels.freeze(labels, f"enters {type(module).__name__} {path}")
    return [FIXED] * out.shape[1]


RULES: list[tuple[tuple[type, ...], Callable[..., list[int]]]] = [
    ((nn.Conv2d, nn.ConvTranspose2d, nn.Linear), _weights_rule),
    ((nn.BatchNorm2d,), _norm_rule),
    (compat.ATTENTION, _attention_rule),
    (compat.OPAQUE, _opaque_rule),
    (PASS_MODULES + compat.ACTIVATIONS, _pass_rule),
]


def _trace(model: nn.Module, imgsz: int) -> _Tracer:
    """Run a copy of the model in train and eval mode with labelled channels; train mode shows train-only branches."""
    model = deepcopy(model).float().cpu().requires_grad_(False)
    tracer = _Tracer(model)
    ruled = tuple(t for types, _ in RULES for t in types)
    for m in model.modules():
        if isinstance(m, ruled):
            m.register_forward_pre_hook(tracer.enter)
            m.register_forward_hook(tracer.leave)
    channels = compat.input_channels(model)
    for training in (True, False):
        model.train(training)
        with torch.no_grad(), tracer:
            out = model(torch.rand(2, channels, imgsz, imgsz))
        for x in compat.returned_tensors(out):
            if (labels := tracer.get(x)) is not None:
                tracer.labels.freeze(labels, "is an output of the model")
    return tracer


def build_graph(model: nn.Module, imgsz: int = 64) -> Graph:
    """Find which channels are coupled.

    Args:
        model: A YOLO model of any family; it is not changed.
        imgsz: Side in pixels of the square image for tracing; a multiple of the largest stride.

    Returns:
        The couplings, with a reason for every group that cannot be pruned.
    """
    tracer = _trace(model, max(imgsz, 2 * compat.max_stride(model)))
    lab = tracer.labels
    for parts in lab.ties:
        if any(FIXED in part for part in parts) or any(lab.find(c) in lab.frozen for part in parts for c in part):
            for part in parts:
                lab.freeze(part, _tie_reason(lab, parts))
    modules = dict(model.named_modules())
    shapes = {p: s for p, m in modules.items() if (s := _channels(m)) and p in lab.inp}
    places = _places(lab)
    groups = _groups(lab, places)
    graph = Graph(groups, _bundles(lab, groups), shapes=shapes)
    for path, positions in tracer.positions.items():
        kernel = getattr(modules[path], "kernel_size", (1, 1))
        graph.convs[path] = (positions, kernel[0] * kernel[1])
    return graph


def _tie_reason(lab: _Labels, parts: list[list[int]]) -> str:
    for part in parts:
        for c in part:
            if c != FIXED and (reason := lab.frozen.get(lab.find(c))):
                return (
                    reason if reason.startswith("must stay as wide") else f"must stay as wide as a part that {reason}"
                )
    return "must stay as wide as a fixed part"


def _places(lab: _Labels) -> dict[int, list[tuple[str, str, int]]]:
    """Return, for each coupled set of channels, the (module, dim, position) places where it sits."""
    places: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
    for dim, table in (("out", lab.out), ("in", lab.inp)):
        for path, labels in table.items():
            for i, c in enumerate(labels):
                if c != FIXED:
                    places[lab.find(c)].append((path, dim, i))
    return places


def _groups(lab: _Labels, places: dict[int, list[tuple[str, str, int]]]) -> list[Group]:
    """Collect coupled sets with the same members into groups; the parts of a cut tensor stay apart."""
    part_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for t, parts in enumerate(lab.ties):
        for p, part in enumerate(parts):
            for c in part:
                if c != FIXED and (t, p) not in part_of[lab.find(c)]:
                    part_of[lab.find(c)].append((t, p))
    by_signature: dict[Any, list[int]] = defaultdict(list)
    for root in sorted(places):
        repeats: dict[tuple[str, str], int] = defaultdict(int)
        for path, dim, _ in places[root]:
            repeats[path, dim] += 1
        reason = lab.frozen.get(root, "")
        by_signature[tuple(sorted(repeats.items())), tuple(sorted(part_of[root])), reason].append(root)
    groups = []
    for (signature, _, reason), roots in by_signature.items():
        members = []
        for (path, dim), _repeat in signature:
            rows = [[i for p, d, i in places[r] if (p, d) == (path, dim)] for r in roots]
            members.append(Member(path, dim, torch.tensor(rows)))
        members.sort(key=lambda m: (m.dim != "out", compat.natural_key(m.module)))
        groups.append(Group(members[0].module, members, reason))
    return sorted(groups, key=lambda g: compat.natural_key(g.name))


def _bundles(lab: _Labels, groups: list[Group]) -> list[list[int]]:
    """Join groups that must keep the same share of channels, and freeze bundles that cannot."""
    home: dict[tuple[str, str, int], int] = {}
    for g, group in enumerate(groups):
        for m in group.members:
            home.update({(m.module, m.dim, int(i)): g for i in m.index.flatten()})
    where = {lab.find(c): home[path, dim, i] for dim, table in (("out", lab.out), ("in", lab.inp))
             for path, labels in table.items() for i, c in enumerate(labels) if c != FIXED}  # fmt: skip
    parent = list(range(len(groups)))

    def find(g: int) -> int:
        while parent[g] != g:
            g = parent[g]
        return g

    for parts in lab.ties:
        members = [{where[lab.find(c)] for c in part if c != FIXED} for part in parts]
        whole = all(len(m) == 1 and groups[next(iter(m))].size == len(set(part)) for m, part in zip(members, parts))
        flat = set().union(*members)
        if not whole or len(flat) < len(parts):
            for g in flat:
                groups[g].frozen = groups[g].frozen or "is cut into parts that several layers share"
        for g in flat:
            parent[find(g)] = find(min(flat))
    bundles: dict[int, list[int]] = defaultdict(list)
    for g in range(len(groups)):
        bundles[find(g)].append(g)
    for bundle in bundles.values():
        reason = next((groups[g].frozen for g in bundle if groups[g].frozen), "")
        for g in bundle:
            groups[g].frozen = groups[g].frozen or (f"must stay as wide as a part that {reason}" if reason else "")
    return list(bundles.values())
