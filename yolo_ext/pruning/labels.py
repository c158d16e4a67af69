# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Labelled channels: which output channels reach which inputs, followed through a forward pass.

Every output channel of a Conv or Linear gets a label. `cat` joins label lists, `chunk` cuts them, `+` makes two
channels one (union-find), a depthwise conv or BatchNorm passes them on. What is not understood freezes its labels with
the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from yolo_ext import compat

FIXED = -1  # label of a channel that cannot be removed (image, constants)
ARITHMETIC = (
    "add add_ sub mul mul_ div __add__ __radd__ __iadd__ __sub__ __rsub__ __mul__ __rmul__ __imul__ __truediv__"
)
ELEMENTWISE = "relu relu_ silu silu_ sigmoid sigmoid_ tanh gelu hardswish leaky_relu leaky_relu_ clamp clip dropout"
COPIES = "detach clone contiguous to float half type"
POOLS = "max_pool2d avg_pool2d interpolate adaptive_avg_pool2d adaptive_max_pool2d"
POINTWISE = frozenset(f"{ARITHMETIC} {ELEMENTWISE} {COPIES}".split())
SPATIAL = frozenset(POOLS.split())
RESHAPES = frozenset(["flatten", "view", "reshape", "permute", "transpose", "unflatten", "squeeze", "unsqueeze"])
PASS_MODULES = (nn.Upsample, nn.ZeroPad2d, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class Labels:
    """Union-find over channel labels, with freeze reasons and equal-count constraints.

    Attributes:
        frozen: Root label to the reason why it stays.
        ties: Lists of parts that must stay equally wide.
        out: Layer path to the labels of its output channels.
        inp: Layer path to the labels of its input channels.
    """

    def __init__(self) -> None:
        """Start without labels."""
        self.parent: list[int] = []
        self.frozen: dict[int, str] = {}
        self.ties: list[list[list[int]]] = []
        self.out: dict[str, list[int]] = {}
        self.inp: dict[str, list[int]] = {}

    def new(self, n: int) -> list[int]:
        """Return n labels that nothing else has."""
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        return list(range(start, start + n))

    def find(self, label: int) -> int:
        """Return the root of a label: the same one for all channels that are coupled."""
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def reason(self, label: int) -> str:
        """Return why this channel stays, empty when it can go."""
        return "is fixed" if label == FIXED else self.frozen.get(self.find(label), "")

    def freeze(self, labels: list[int], reason: str) -> None:
        """Keep these channels; the first reason is the one that counts."""
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
        reason = f"enters layer {path}, which is also fed with fixed channels"
        self.inp[path] = self.union(self.inp[path], labels, reason) if path in self.inp else labels

    def produce(self, path: str, n: int) -> list[int]:
        """Return the output labels of a layer, the same ones each time it is called."""
        if path not in self.out:
            self.out[path] = self.new(n)
        return self.out[path]


class Tracer(TorchFunctionMode):
    """Follows labels through every torch function that is called outside the modules that have a rule."""

    def __init__(self, model: nn.Module) -> None:
        """Prepare to trace a model."""
        super().__init__()
        self.labels = Labels()
        self.of: dict[int, list[int]] = {}  # id of a tensor -> labels of its channels
        self.keep: list[Any] = []  # keeps tensors alive, so that ids stay unique
        self.depth = 0
        self.paths = {m: name for name, m in model.named_modules()}
        self.positions: dict[str, int] = {}

    def get(self, x: torch.Tensor) -> list[int] | None:
        """Return the labels of the channels of a tensor, None when it has none."""
        return self.of.get(id(x))

    def put(self, x: torch.Tensor, labels: list[int]) -> None:
        """Label the channels of a tensor."""
        self.keep.append(x)
        self.of[id(x)] = labels

    def freeze(self, tensors: list[torch.Tensor], reason: str) -> None:
        """Keep all channels of these tensors."""
        for t in tensors:
            self.labels.freeze(self.get(t) or [], reason)

    # Functions -------------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a torch function and move the labels of its inputs to its outputs."""
        out = func(*args, **(kwargs or {}))
        if self.depth == 0:
            name = getattr(func, "__name__", "")
            tracked = [t for t in tensors_in((args, kwargs)) if self.get(t) is not None]
            if tracked and (name == "__setitem__" or any(True for _ in tensors_in(out))):
                self._propagate(name, tracked, args, kwargs or {}, out)
        return out

    def _propagate(self, name: str, tracked: list[torch.Tensor], args: tuple, kwargs: dict, out: Any) -> None:
        if name == "type_as" or name.endswith("_like") or name.startswith("new_"):
            # Only the type and shape of the (last) tensor count, so a new constant comes out.
            if name == "type_as" and (labels := self.get(args[0])) is not None:
                self.put(out, labels)
        elif name in SPATIAL or (name in POINTWISE and isinstance(out, torch.Tensor)):
            self._pointwise(name, tracked, args, kwargs, out)
        elif name in ("cat", "concat") and _dim(args, kwargs) == 1:
            parts = args[0] if args else kwargs["tensors"]
            self.put(out, [c for t in parts for c in (self.get(t) or [FIXED] * t.shape[1])])
        elif name in ("chunk", "split", "split_with_sizes") and _dim(args, kwargs, place=2) == 1:
            self._cut(tracked[0], out)
        elif name in RESHAPES and _keeps_channels(tracked[0], out):
            self.put(out, self.get(tracked[0]) or [])
        else:
            self.freeze(tracked, f"{'is reshaped by' if name in RESHAPES else 'goes through'} '{name}'")

    def _pointwise(self, name: str, tracked: list[torch.Tensor], args: tuple, kwargs: dict, out: Any) -> None:
        labels = self.get(tracked[0]) or []
        channels = len(labels)
        for t in tracked[1:]:
            other = self.get(t) or []
            if len(other) != channels:
                return self.freeze(tracked, f"goes through '{name}' with broadcasting over channels")
            labels = self.labels.union(labels, other, f"goes through '{name}' with fixed channels")
        others = [t for t in tensors_in((args, kwargs)) if self.get(t) is None]
        if any(t.ndim >= 2 and t.numel() > 1 and channels in t.shape for t in others):
            self.labels.freeze(labels, f"goes through '{name}' with a parameter or constant")
        for o in tensors_in(out):
            if o.ndim >= 2 and o.shape[1] == channels:
                self.put(o, labels)

    def _cut(self, x: torch.Tensor, out: Any) -> None:
        labels, start, parts = self.get(x) or [], 0, []
        for o in out:
            parts.append(labels[start : start + o.shape[1]])
            self.put(o, parts[-1])
            start += o.shape[1]
        if len({len(part) for part in parts}) > 1:  # such sizes are written in the code, so they cannot change
            self.labels.freeze(labels, "is cut into unequal parts")
        self.labels.ties.append(parts)

    # Modules ---------------------------------------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: tuple) -> None:
        """Stop following functions: a rule speaks for the whole module."""
        self.depth += 1

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        """Apply the rule of a module to its first input."""
        self.depth -= 1
        if self.depth:
            return
        inputs = list(tensors_in((args, kwargs)))
        if len(inputs) != 1 or not isinstance(out, torch.Tensor) or isinstance(module, compat.OPAQUE):
            return self.freeze(inputs, f"enters {type(module).__name__} {self.paths[module]}")
        labels = self.get(inputs[0])
        channels = layer_channels(module)
        labels = labels if labels is not None else [FIXED] * (channels[1] if channels else inputs[0].shape[1])
        rule = next(r for types, r in RULES if isinstance(module, types))
        self.put(out, rule(self, module, self.paths[module], labels, out))


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for v in tree.values():
            yield from tensors_in(v)
    elif isinstance(tree, (list, tuple)):
        for v in tree:
            yield from tensors_in(v)


def _dim(args: tuple, kwargs: dict, place: int = 1) -> int:
    return kwargs.get("dim", args[place] if len(args) > place else 0)


def _keeps_channels(x: torch.Tensor, out: Any) -> bool:
    """Tell whether a reshape only drops spatial dimensions of size one, as before a classifier."""
    return isinstance(out, torch.Tensor) and x.shape[:2] == out.shape[:2] and out.numel() == x.shape[0] * x.shape[1]


def layer_channels(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) channels of a layer with weights, else None."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return None


# Rules: (tracer, module, path, input labels, output) -> output labels -------------------------------------------------
def _weights_rule(t: Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    n_out, n_in = layer_channels(module)  # type: ignore[misc]
    groups = getattr(module, "groups", 1)
    t.positions[path] = out.shape[2] * out.shape[3] if out.ndim == 4 else 1
    if len(labels) != n_in:
        t.labels.freeze(labels, f"is reshaped before {path}")
        labels = [FIXED] * n_in
    t.labels.consume(path, labels)
    if groups == n_out == n_in and groups > 1:  # depthwise: what goes in comes out
        t.labels.out[path] = t.labels.inp[path]
        return t.labels.out[path]
    produced = t.labels.produce(path, n_out)
    if groups > 1:
        t.labels.freeze(labels + produced, f"meets the grouped convolution {path}")
    return produced


def _norm_rule(t: Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    if module.weight is None or module.running_mean is None:
        t.labels.freeze(labels, f"meets {path}, a BatchNorm without weights or statistics")
        return labels
    reason = f"meets {path}, which also norms fixed channels"
    t.labels.out[path] = t.labels.union(t.labels.out[path], labels, reason) if path in t.labels.out else labels
    return labels


def _pass_rule(t: Tracer, module: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    return labels


def _attention_rule(t: Tracer, m: nn.Module, path: str, labels: list[int], out: torch.Tensor) -> list[int]:
    """Attention reshapes by head: q and k rows stay, v rows go at the same rate as the channels of the stream."""
    key, head = m.key_dim, m.head_dim
    flat = t.labels.produce(f"{path}.pe.conv", m.num_heads * head)
    values = [flat[i : i + head] for i in range(0, len(flat), head)]
    qkv = [c for v in values for c in [FIXED] * (2 * key) + v]
    projected = t.labels.produce(f"{path}.proj.conv", m.proj.conv.out_channels)
    for name, inp, produced in (("qkv", labels, qkv), ("pe", flat, flat), ("proj", flat, projected)):
        t.labels.consume(f"{path}.{name}.conv", inp)
        t.labels.out[f"{path}.{name}.conv"] = t.labels.out[f"{path}.{name}.bn"] = produced
        t.positions[f"{path}.{name}.conv"] = out.shape[2] * out.shape[3]
    t.labels.ties.append([labels, *values])
    return projected


RULES: list[tuple[tuple[type[nn.Module], ...], Callable[..., list[int]]]] = [
    ((nn.Conv2d, nn.ConvTranspose2d, nn.Linear), _weights_rule),
    ((nn.BatchNorm2d,), _norm_rule),
    (compat.ATTENTION, _attention_rule),
    (PASS_MODULES + compat.ACTIVATIONS, _pass_rule),
]


def trace(model: nn.Module, imgsz: int) -> Tracer:
    """Run a copy of the model in train and eval mode with labelled channels; train mode shows train-only branches.

    Args:
        model: Any module that takes an image batch; it is not changed.
        imgsz: Side in pixels of the square image.

    Returns:
        The tracer, with all labels.
    """
    model = deepcopy(model).float().cpu().requires_grad_(False)
    tracer = Tracer(model)
    ruled = tuple(t for types, _ in RULES for t in types) + compat.OPAQUE
    for m in model.modules():
        if isinstance(m, ruled):
            m.register_forward_pre_hook(tracer.enter)
            m.register_forward_hook(tracer.leave, with_kwargs=True)
    channels = compat.input_channels(model)
    for training in (True, False):
        model.train(training)
        with torch.no_grad(), tracer:
            out = model(torch.rand(2, channels, imgsz, imgsz))
        for x in compat.returned_tensors(out):
            tracer.freeze([x], "is an output of the model")
    return tracer
