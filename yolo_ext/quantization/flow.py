# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Which tensors reach a layer quantized already: one forward pass in which they carry a mark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from yolo_ext import stock
from yolo_ext.quantization.spec import Plan
from yolo_ext.stock.context import evaluating

MARK = "_yolo_ext_quantized"  # on a tensor: path of the layer whose quantizer made its codes
PASS: set[Callable] = {  # operations whose results have codes of their argument
    torch.chunk, torch.split, torch.max_pool2d, torch.reshape, torch.flatten, torch.transpose, torch.permute,
    torch.Tensor.chunk, torch.Tensor.split, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.flatten,
    torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.contiguous, torch.Tensor.narrow,
    torch.Tensor.__getitem__, torch.Tensor.detach,
    F.max_pool2d, F.interpolate,
}  # fmt: skip
JOIN: set[Callable] = {torch.cat, torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


class _Marks(TorchFunctionMode):
    """Hands marks on through operations that keep codes, and notes whose codes a concatenation or sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in JOIN:
            operands = args[0] if func is torch.cat else args[:2]
            self.read |= {getattr(x, MARK) for x in operands if hasattr(x, MARK)}
        elif func in PASS and args and (mark := getattr(args[0], MARK, None)):
            if kwargs.get("mode", "nearest") != "nearest":  # an interpolation that makes new values
                return out
            for y in out if isinstance(out, (tuple, list)) else [out]:
                setattr(y, MARK, mark)
        return out


def _marked(x: torch.Tensor, path: str) -> torch.Tensor:
    """Return a view of a tensor that carries a mark; others may read the tensor as it was."""
    y = x.view_as(x)
    setattr(y, MARK, path)
    return y


@torch.no_grad()
def drop_needless(model: nn.Module, plan: Plan) -> None:
    """Take from a plan the inputs that arrive quantized as they should be, and what nothing quantized reads.

    Args:
        model: The model, which runs once on a small black image; its mode is left as it was.
        plan: Plan with `activation`, `add` or `residual` sites; changed in place.
    """
    arrived, read = _trace(model, plan)
    direct = set()
    for path, mark in arrived.items():
        made = plan[mark]
        kind = next(site for site in ("add", "residual", "activation", "output") if site in made)
        if replace(made[kind], observer=None) == replace(plan[path]["input"], observer=None):
            del plan[path]["input"]  # one that asks for other codes makes them itself
            direct.add(mark)
    for path, sites in plan.items():
        for site, readers in (("activation", read | direct), ("add", read | direct), ("residual", direct)):
            if site in sites and path not in readers:
                del sites[site]


def _trace(model: nn.Module, plan: Plan) -> tuple[dict[str, str], set[str]]:
    """Return layer -> mark of what its input site gets, and the marks that concatenations and sums read."""
    handles = _marking(model, plan)
    arrived: dict[str, str] = {}

    def arrives(path: str) -> Callable:
        def hook(m: nn.Module, x: tuple[torch.Tensor, ...]) -> None:
            if mark := getattr(x[0], MARK, None):
                arrived[path] = mark

        return hook

    modules = dict(model.named_modules())
    handles += [modules[path].register_forward_pre_hook(arrives(path)) for path, s in plan.items() if "input" in s]
    side, like = 2 * stock.max_stride(model), next(model.parameters())
    channels = next(m.in_channels for m in modules.values() if isinstance(m, nn.Conv2d))
    with evaluating(model, handles), _Marks() as marks:
        model(torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype))
    return arrived, marks.read


def _marking(model: nn.Module, plan: Plan) -> list[Any]:
    """Have the sites of a plan that make codes mark them; return the handles of the hooks."""
    handles: list[Any] = []
    functional = any({"activation", "add"} & set(sites) for sites in plan.values())
    for path, m in model.named_modules():
        sites = plan.get(f"{path}.conv", {})
        last = "output" if isinstance(getattr(m, "act", None), nn.Identity) else "activation"
        if functional and last in sites:
            handles.append(m.register_forward_hook(lambda m, x, y, p=path: _marked(y, f"{p}.conv")))
        if "add" in plan.get(path, {}):
            handles.append(m.register_forward_hook(lambda m, x, y, p=path: _marked(y, p)))
        if "residual" in plan.get(path, {}):
            handles.append(m.register_forward_pre_hook(lambda m, x, p=path: (_marked(x[0], p),)))
    return handles
