# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the layers do to labelled channels, one rule for each kind of module, and the forward passes that apply them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.labels import FIXED, LAYERS, Labels, Tracer, layer_channels, tensors_in

PASS_MODULES = (nn.Upsample, nn.ZeroPad2d, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
STOCK = ("torch.", "torchvision.", "ultralytics.")
UNFOLLOWED = "is used in a way that cannot be followed"


# Rules: (tracer, module, path, input, output) ------------------------------------------------------------------------
def _input_labels(t: Tracer, x: torch.Tensor, width: int) -> list[int]:
    """Return the labels of an input, fixed ones when it has none."""
    labels = t.get(x)
    return [FIXED] * width if labels is None else labels


def _weights_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Consume the labels of the input of a conv or linear layer and produce new ones; depthwise passes them on."""
    n_out, n_in = layer_channels(m)  # type: ignore[misc]
    labels, groups = _input_labels(t, x, n_in), getattr(m, "groups", 1)
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
    labels = _input_labels(t, x, x.shape[1])
    if m.weight is None or m.running_mean is None:
        t.labels.freeze(labels, f"meets {path}, a BatchNorm without weights or statistics")
    else:
        reason = f"meets {path}, which also norms fixed channels"
        t.labels.out[path] = t.labels.union(t.labels.out[path], labels, reason) if path in t.labels.out else labels
    t.put(out, labels)


def _pass_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Pass labels on through a module that works on each channel by itself."""
    if t.get(x) is not None:
        t.pointwise(type(m).__name__, [x], ((x,), {}), out, m.forward)  # not its call, which would come back here


def _attention_rule(t: Tracer, m: nn.Module, path: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Attention reshapes by head: q and k rows stay, v rows go at the same rate as the channels of the stream."""
    key, head, labels = m.key_dim, m.head_dim, _input_labels(t, x, x.shape[1])
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
    (LAYERS, _weights_rule),
    ((nn.BatchNorm2d,), _norm_rule),
    (stock.ATTENTION, _attention_rule),
    (PASS_MODULES + stock.ACTIVATIONS, _pass_rule),
]


def rule_of(module: nn.Module) -> Callable[..., None] | None:
    """Return the rule of a module; a subclass that computes something else, or computes its weights, has none."""
    for types, rule in RULES:
        for base in (b for b in types if isinstance(module, b)):
            same = all(getattr(type(module), f, None) is getattr(base, f, None) for f in ("forward", "_conv_forward"))
            own = not hasattr(module, "weight") or "weight" in module._parameters
            return rule if same and own else None
    return None


# Tracing -------------------------------------------------------------------------------------------------------------
def _watch(t: Tracer, m: nn.Module, path: str, custom: bool) -> None:
    """Let the tracer know when a module runs, and apply its rule to what it returns."""
    rule, fuses = rule_of(m), isinstance(m, stock.FUSIONS)
    followed = custom or rule is not None or fuses or type(m).__module__.startswith(STOCK) or not path
    silent = rule is not None or fuses or not followed

    def enter(_: nn.Module, args: tuple) -> None:
        t.stack.append(m)
        t.depth += silent

    def leave(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        t.stack.pop()
        t.depth -= silent
        if t.depth or not silent:
            return
        inputs = list(tensors_in((args, kwargs)))
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


def trace(model: nn.Module, imgsz: int, custom: bool = True) -> Tracer:
    """Run a copy in train mode, which has more branches, and eval mode on an image of side `imgsz` in pixels.

    `custom` follows channels through the code of modules of others.
    """
    model = deepcopy(model).float().cpu().requires_grad_(False)
    tracer = Tracer(model)
    for m, path in tracer.paths.items():
        _watch(tracer, m, path, custom)
    for training in (True, False):
        model.train(training)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), tracer:
            torch.manual_seed(0)
            try:
                out = model(torch.rand(2, stock.input_channels(model), imgsz, imgsz))
            except Exception as e:  # whatever the code of the user's modules raises
                mode = "training" if training else "eval"
                raise UsageError(
                    f"The model does not run in {mode} mode on an image of {imgsz}x{imgsz} pixels "
                    f"({type(e).__name__}: {' '.join(str(e).split())[:200]}), so it cannot be pruned. Mend its code."
                ) from e
        for x in stock.returned_tensors(out):
            tracer.freeze([x], "is an output of the model")
    _finish(tracer.labels, tracer.touched)
    return tracer
