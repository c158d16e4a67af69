# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Labelled channels: which output channels reach which inputs, followed through the torch functions of a forward pass.

`cat` joins label lists, `chunk` cuts them, `+` makes two channels one (union-find); what is not understood freezes its
labels with the reason. A tensor is `lifted` when a channel that is zero before comes out of it as something else, as
after a sigmoid: such a channel cannot be removed from the input of a layer without changing the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from yolo_ext import stock

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # with weights and channels
FIXED = -1  # label of a channel that cannot be removed (image, constants)
FUNCTIONS = """
    add add_ sub mul mul_ div __add__ __radd__ __iadd__ __sub__ __rsub__ __mul__ __rmul__ __imul__ __truediv__
    maximum minimum max_pool2d avg_pool2d interpolate adaptive_avg_pool2d adaptive_max_pool2d pad
    relu relu_ relu6 leaky_relu leaky_relu_ elu celu selu gelu silu silu_ mish hardswish hardtanh sigmoid sigmoid_
    hardsigmoid logsigmoid softplus tanh clamp clip dropout dropout2d abs neg exp sqrt square pow __pow__
    detach clone contiguous to float half type expand expand_as
"""
POINTWISE = frozenset(FUNCTIONS.split())
JOINS = {"cat": 1, "concat": 1, "concatenate": 1}  # place of the argument `dim`
CUTS = {"chunk": 2, "split": 2, "split_with_sizes": 2}
RESHAPES = frozenset(["flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"])
MOVES = frozenset(["permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"])
PICKS = frozenset(["__getitem__", "narrow", "select", "flip", "roll"])
MEANS = frozenset(["mean", "sum", "amax", "amin"])
Function = Callable[..., Any]  # of torch
Call = tuple[tuple[Any, ...], dict[str, Any]]  # its arguments


@dataclass
class Labels:
    """Union-find over channel labels, with freeze reasons and equal-count constraints."""

    parent: list[int] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)  # root label -> why it stays
    ties: list[list[list[int]]] = field(default_factory=list)  # lists of parts that must stay equally wide
    out: dict[str, list[int]] = field(default_factory=dict)  # layer path -> labels of its output channels
    inp: dict[str, list[int]] = field(default_factory=dict)  # layer path -> labels of its input channels

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
        super().__init__()
        self.labels = Labels()
        self.of: dict[int, tuple[list[int], str]] = {}  # id of a tensor -> labels of its channels, why it is lifted
        self.keep: list[Any] = []  # keeps tensors alive, so that ids stay unique
        self.stack: list[nn.Module] = []  # the modules that are running, innermost last
        self.depth = 0  # how many of them have a rule, which speaks for all that happens inside
        self.paths = {m: name for name, m in model.named_modules()}
        self.head = stock.detection_head(model)
        self.owner: dict[int, str] = {}  # id of a parameter -> the layer with a rule that it belongs to
        self.touched: set[str] = set()  # layers whose weights are used outside of them as well
        self.positions: dict[str, int] = {}  # layer path -> number of its output positions in the traced image

    def get(self, x: torch.Tensor) -> list[int] | None:
        """Return the labels of the channels of a tensor, None when it has none."""
        return self.of[id(x)][0] if id(x) in self.of else None

    def lifted(self, *tensors: torch.Tensor) -> str:
        """Return why removed channels are not zero in one of these tensors, empty when they are in all."""
        return next((why for t in tensors if id(t) in self.of and (why := self.of[id(t)][1])), "")

    def put(self, x: torch.Tensor, labels: list[int], lifted: str = "") -> None:
        """Label the channels of a tensor, which lie in its second dimension."""
        self.keep.append(x)
        self.of[id(x)] = labels, lifted

    def freeze(self, tensors: list[torch.Tensor], reason: str) -> None:
        """Keep all channels of these tensors."""
        for t in tensors:
            self.labels.freeze(self.get(t) or [], reason)

    def where(self) -> str:
        """Return the innermost running block for a reason; that of a layer in the head is clear without."""
        m = self.stack[-1] if self.stack and self.head not in self.stack else None
        return f" in {type(m).__name__} {self.paths[m]}" if m is not None and self.paths[m] else ""

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function and move the labels of its inputs to its outputs."""
        out = func(*args, **(kwargs or {}))
        if self.depth == 0 and tensors_in(out):
            inputs = tensors_in((args, kwargs))
            self.touched.update(self.owner[id(t)] for t in inputs if id(t) in self.owner)
            if tracked := [t for t in inputs if id(t) in self.of]:
                self._propagate(func, tracked, args, kwargs or {}, out)
        elif self.depth == 0 and getattr(func, "__name__", "") == "__setitem__":
            self.freeze([t for t in tensors_in((args, kwargs)) if id(t) in self.of], "is written into" + self.where())
        return out

    def _propagate(self, func: Function, tracked: list[torch.Tensor], args: Any, kwargs: Any, out: Any) -> None:
        """Move the labels of the tracked inputs of a function to what it returned."""
        name, x = getattr(func, "__name__", ""), tracked[0]
        place = {**JOINS, **CUTS}.get(name)
        along = 0 if place is None else kwargs.get("dim", args[place] if len(args) > place else 0) % x.ndim
        if name == "type_as" or name.endswith("_like") or name.startswith("new_"):
            # Only the type and shape of the (last) tensor count, so a new constant comes out.
            if name == "type_as" and (labels := self.get(args[0])) is not None:
                self.put(out, labels, self.lifted(args[0]))
        elif name in POINTWISE or along > 1:
            self.pointwise(name, tracked, (args, kwargs), out, func)
        elif along == 1 and name in JOINS:
            parts = args[0] if args else kwargs["tensors"]
            self.put(out, [c for t in parts for c in (self.get(t) or [FIXED] * t.shape[1])], self.lifted(*parts))
        elif along == 1:
            self._cut(name, x, out)
        elif len(tracked) == 1 and _keeps_channels(func, x, (args, kwargs), out):
            self.put(out, self.get(x) or [], self.lifted(x))
        else:
            verb = "is reshaped by" if name in RESHAPES | MOVES else "goes through"
            self.freeze(tracked, f"{verb} '{name}'{self.where()}")

    def pointwise(self, name: str, tracked: list[torch.Tensor], call: Call, out: Any, func: Function) -> None:
        """Apply the rule of functions that work on each channel by itself, and couple their `tracked` tensors."""
        labels, outs, through = self.get(tracked[0]) or [], tensors_in(out), f"goes through '{name}'"
        shapes = {(t.ndim, t.shape[1] if t.ndim > 1 else 0) for t in [*tracked, *outs]}
        if len({self.get(t) is not None and len(self.get(t) or []) for t in tracked}) > 1 or len(shapes) > 1:
            return self.freeze(tracked, f"{through} with broadcasting over channels{self.where()}")
        for t in tracked[1:]:
            labels = self.labels.union(labels, self.get(t) or [], f"{through} with fixed channels{self.where()}")
        for t in tensors_in(call):
            axis = t.ndim - outs[0].ndim + 1  # of the channels, when aligned from the right
            if id(t) not in self.of and axis >= 0 and t.shape[axis] > 1:
                self.labels.freeze(labels, f"{through} with a parameter or constant{self.where()}")
        lifted = ""
        if self._lifts(func, call):
            lifted = self.lifted(*tracked) or f"{through}{self.where()}, which makes zero channels nonzero"
        for o in outs:
            self.put(o, labels, lifted)

    def _lifts(self, func: Function, call: Call) -> bool:
        """Tell by trying whether a function makes removed channels, which are zero, anything else."""

        def zero(t: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(t) if id(t) in self.of and not self.lifted(t) else t.clone()

        args, kwargs = tree_map_only(torch.Tensor, zero, call)
        return any(bool((o != 0).any()) for o in tensors_in(func(*args, **kwargs)) if o.is_floating_point())

    def _cut(self, name: str, x: torch.Tensor, out: Any) -> None:
        """Label the parts of a tensor that is cut along its channels, and tie them."""
        labels, start, parts = self.get(x) or [], 0, []
        for o in out:
            parts.append(labels[start : start + o.shape[1]])
            self.put(o, parts[-1], self.lifted(x))
            start += o.shape[1]
        block = self.stack[-1] if self.stack else None
        if isinstance(block, stock.FREE_CUTS):
            return  # it holds the width of each part, which surgery brings up to date
        if name != "chunk" and not isinstance(block, stock.WIDTH_ATTRIBUTES):
            self.labels.freeze(labels, f"is cut at places written in the code{self.where()}")
        if len({len(part) for part in parts}) > 1:
            self.labels.freeze(labels, f"is cut into unequal parts{self.where()}")
        self.labels.ties.append(parts)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of nested lists, tuples and dicts."""
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _keeps_channels(func: Function, x: torch.Tensor, call: Call, out: Any) -> bool:
    """Tell whether a function works on places only: pooling before a classifier, `permute(0, 1, 3, 2)`, a slice."""
    name, (args, kwargs) = getattr(func, "__name__", ""), call
    if not isinstance(out, torch.Tensor) or x.shape[:2] != out.shape[:2]:
        return False
    if name in MEANS:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims or [0]
        return all(d % x.ndim > 1 for d in dims)
    if name in MOVES | PICKS:  # by trying where a number for each image and channel comes out
        numbers = torch.arange(x.shape[0] * x.shape[1]).view(*x.shape[:2], *[1] * (x.ndim - 2))
        args, kwargs = tree_map_only(torch.Tensor, lambda t: numbers.expand(x.shape) if t is x else t, call)
        return torch.equal(func(*args, **kwargs), numbers.view(*x.shape[:2], *[1] * (out.ndim - 2)).expand(out.shape))
    return name in RESHAPES and out.numel() == x.shape[0] * x.shape[1]


def layer_channels(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) channels of a layer with weights, else None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.out_channels, module.in_channels) if isinstance(module, LAYERS) else None


def weight_dim(layer: nn.Module, dim: str) -> int:
    """Return the dimension of the weight of a layer that holds its ``out`` or its ``in`` channels."""
    return int((dim == "in") != isinstance(layer, nn.ConvTranspose2d))


def norm_behind(modules: Mapping[str, nn.Module], path: str) -> nn.BatchNorm2d | None:
    """Return the BatchNorm with weights that follows a layer in its Conv block, None without."""
    bn, channels = modules.get(path.rpartition(".")[0] + ".bn"), layer_channels(modules[path]) or (0, 0)
    fits = isinstance(bn, nn.BatchNorm2d) and bn.weight is not None and bn.num_features == channels[0]
    return bn if fits else None
