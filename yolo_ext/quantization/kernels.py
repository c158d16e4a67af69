# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Fake quantization with clipped straight-through gradients.

The operators of torch do not use the vector instructions of a CPU; a few passes over memory are several times faster.

Method: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Quantize and dequantize activations `x` (any shape and float type); scale and zero point are float32 scalars."""
    if x.device.type == "cpu":
        return _Tensor.apply(x, scale, zero, qmin, qmax)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero.round().int(), qmin, qmax).to(x.dtype)


def fake_quantize_weight(w: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
    """Quantize and dequantize a float32 weight with symmetric codes; the scale broadcasts to its shape."""
    return _Weight.apply(w, scale, qmax)


class _Tensor(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int
    ) -> torch.Tensor:
        s, z = scale.item(), round(zero.item())
        low, high = qmin - z, qmax - z
        ctx.save_for_backward(x)
        ctx.ends = (low - 0.5) * s, (high + 0.5) * s
        return (x.float() * (1 / s)).round_().clamp_(low, high).mul_(s).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(g, x, *ctx.ends), None, None, None, None


class _Weight(Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
        ctx.save_for_backward(w, scale)
        ctx.qmax = qmax
        return (w / scale).round_().clamp_(-qmax, qmax).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, scale = ctx.saved_tensors
        return g * (w.abs() <= scale * (ctx.qmax + 0.5)), None, None
