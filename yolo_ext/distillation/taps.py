# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Layer outputs of a model while it runs, read without leaving anything in the model."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from yolo_ext.stock.context import evaluating


class Taps:
    """Keeps what chosen layers of a model return in its latest forward pass.

    The hook is one for all modules of the process: hooks on the layers themselves would be copied into the EMA and
    saved with the checkpoint.
    """

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        """Listen to these layers of this very model, not of its copies; without paths to nothing."""
        self.found: dict[str, torch.Tensor] = {}
        if not paths:
            return
        modules, found = dict(model.named_modules()), self.found
        layers = {id(modules[p]): p for p in paths}

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            if (path := layers.get(id(module))) is not None:
                found[path] = output

        self.close = weakref.finalize(self, register_module_forward_hook(keep).remove)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the outputs by path and forget them, which frees their graph."""
        taken = dict(self.found)
        self.found.clear()
        return taken


@torch.no_grad()
def layer_shapes(model: nn.Module, paths: list[str], size: int, channels: int) -> dict[str, Any]:
    """Return what shape chosen layers return for one square image, or None where it is not one (B, C, H, W) map.

    Args:
        model: Any model; modes of its modules are left as they were.
        paths: Paths of the layers.
        size: Side of the image in pixels.
        channels: Channels of the image.
    """
    like = next(model.parameters())
    taps = Taps(model, paths)
    with evaluating(model):
        model(torch.zeros(1, channels, size, size, device=like.device, dtype=like.dtype))
    found = taps.take()
    if paths:
        taps.close()
    return {p: tuple(x.shape) if isinstance(x := found.get(p), torch.Tensor) and x.ndim == 4 else None for p in paths}
