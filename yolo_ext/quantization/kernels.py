# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Fake quantization with clipped straight-through gradients, and with those of learned ranges.

The operators of torch do not use the vector instructions of a CPU; a few passes over memory are several times faster.

Methods: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018; gradients of ranges: Esser et al., "Learned Step Size Quantization", 2020, and Bhalgat et al., "LSQ+", 2020.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from yolo_ext import stock


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Quantize and dequantize activations.

    Args:
        x: Any shape and float type.
        scale: Positive float32 scalar; gradients reach it where it requires them.
        zero: Zero point, a float32 scalar, rounded inside.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        Values in the shape and type of `x`.
    """
    factor = 1 / math.sqrt(x.numel() * qmax)
    if x.device.type == "cpu":
        return _Tensor.apply(x, scale, zero, qmin, qmax, factor)
    if scale.requires_grad and torch.is_grad_enabled():
        return stock.learned_fake_quantize(x.float(), scale, zero, None, qmin, qmax, factor).to(x.dtype)
    y = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero.round().int(), qmin, qmax)
    return y.to(x.dtype)


def fake_quantize_weight(w: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
    """Quantize and dequantize a weight with symmetric codes.

    Args:
        w: Float32 weight.
        scale: Positive float32 scale in a shape that broadcasts to that of `w`; gradients reach it where it requires
            them.
        qmax: Largest code.

    Returns:
        Values in the shape of `w`.
    """
    return _Weight.apply(w, scale, qmax, 1 / math.sqrt(w.numel() / scale.numel() * qmax))


class _Tensor(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int, factor: float
    ) -> torch.Tensor:
        s, z = scale.item(), round(zero.item())
        ctx.save_for_backward(x)
        ctx.grid, ctx.factor = (s, qmin - z, qmax - z), factor
        return _rounded(x, *ctx.grid).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (s, low, high) = ctx.saved_tensors, ctx.grid
        gx = torch.ops.aten.hardtanh_backward(g, x, (low - 0.5) * s, (high + 0.5) * s)
        gs = gz = None
        if ctx.needs_input_grad[1]:  # inside d y / d scale is (y - x) / scale, outside y / scale
            gs = ((g * _rounded(x, s, low, high)).sum() - (gx * x).sum()).float() / s * ctx.factor
            gz = (gx.sum() - g.sum()).float() * s * ctx.factor
        return gx, gs, gz, None, None, None


class _Weight(Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, scale: torch.Tensor, qmax: int, factor: float) -> torch.Tensor:
        ctx.save_for_backward(w, scale)
        ctx.qmax, ctx.factor = qmax, factor
        return (w / scale).round_().clamp_(-qmax, qmax).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, scale = ctx.saved_tensors
        gw, gs = g * (w.abs() <= scale * (ctx.qmax + 0.5)), None
        if ctx.needs_input_grad[1]:
            y = (w / scale).round_().clamp_(-ctx.qmax, ctx.qmax)
            gs = (y.mul_(g).sub_(gw * w / scale)).sum_to_size(scale.shape) * ctx.factor
        return gw, gs, None, None


def _rounded(x: torch.Tensor, scale: float, low: int, high: int) -> torch.Tensor:
    return (x.float() * (1 / scale)).round_().clamp_(low, high).mul_(scale)
