# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Modules that compute what integer kernels compute: quantizers of activations, and layers with quantized weights.

The scale of a weight follows from the largest current weight of each channel times a ratio, which commutes with folding
BatchNorm.

Methods: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018; per-channel weights: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from yolo_ext.quantization.kernels import fake_quantize, fake_quantize_weight
from yolo_ext.quantization.observers import Histogram, with_zero
from yolo_ext.quantization.spec import Spec

OWN = ("lo", "hi", "weight_ratio")  # buffers that ranges are made of
ADDED = ("_quantizer.lo", "_quantizer.hi", ".weight_ratio")  # ends of what they add to a state dict


class _Float32:
    """Keeps what ranges are made of in float32: `.half()` must not round it, only `.to(device)` may move it."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        own: Any = self
        kept = {k: t for k in OWN if (t := getattr(own, k, None)) is not None}
        data = {k: t.data for k, t in kept.items()}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for k, t in kept.items():
            t.data = data[k].to(getattr(own, k).device)
            own._buffers[k] = t  # the same tensor as before: the EMA holds on to it
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A stripped checkpoint has no ranges in its state dict (they came from its manifest): they stay as they are.
        for k in OWN:
            if (t := getattr(self, k, None)) is not None:
                state_dict.setdefault(f"{prefix}{k}", t.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class RangeQuantizer(_Float32, nn.Module):
    """Per-tensor fake quantizer of a range, with clipped straight-through gradients.

    Attributes:
        spec: Bits and scheme.
        lo: Low end of the range, a float32 scalar buffer; never above zero.
        hi: High end of the range, a float32 scalar buffer; never below zero.
        mode: One of `MODES`.
        momentum: Weight of the current batch when training updates the range; 0 keeps it fixed.
        ready: Whether the range has been set; until then values pass unchanged.
        lower: Limit below which the range never extends.
        fixed: Whether the range is known beforehand and never observed.
        histogram: What calibration has seen, only while it runs.
    """

    lo: torch.Tensor
    hi: torch.Tensor

    def __init__(self, spec: Spec, lower: float = -math.inf) -> None:
        """Make an uncalibrated quantizer."""
        super().__init__()
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))
        self.spec, self.lower = spec, lower
        self.mode, self.momentum, self.ready, self.fixed = "on", 0.0, False, False
        self.histogram: Histogram | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize `x` (any shape and float type), or pass it on as the mode says."""
        if self.mode == "observe":
            if self.histogram is not None and not self.fixed:
                self.histogram.update(x)
            return x
        if self.mode != "on":
            return x
        if self.training and self.momentum and not self.fixed:
            self._follow(x.detach())
        if not self.ready:
            return x
        scale, zero = self._params()
        return fake_quantize(x, scale, zero, self.spec.qmin, self.spec.qmax)

    def _params(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point, float32 scalars; the latter is not rounded."""
        if self.spec.symmetric:
            return torch.maximum(-self.lo, self.hi) / self.spec.qmax, torch.zeros_like(self.lo)
        scale = (self.hi - self.lo) / self.spec.qmax
        return scale, -self.lo / scale

    @torch.no_grad()
    def _follow(self, x: torch.Tensor) -> None:
        lo, hi = (v.float() for v in torch.aminmax(x))
        m = self.momentum if self.ready else 1.0
        # A batch with NaN or inf must not poison the range.
        valid = lo.isfinite() & hi.isfinite()
        lo = torch.where(valid, lo.clamp(min=max(self.lower, -3e38), max=0), self.lo)
        hi = torch.where(valid, hi.clamp(min=1e-5), self.hi)
        self.lo.lerp_(lo, m)
        self.hi.lerp_(hi, m)
        self.ready = self.ready or bool(valid)

    def set_range(self, lo: float, hi: float) -> None:
        """Set the range, widened to hold zero and clipped at `lower`."""
        lo, hi = with_zero(max(lo, self.lower), hi)
        self.lo.fill_(lo)
        self.hi.fill_(hi)
        self.ready = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = bool(self.hi > self.lo)


class QuantLayer(_Float32):
    """What the quantized layers share; made only by `insert_plan`.

    Attributes:
        input_quantizer: Quantizer of the input, None where it arrives quantized or stays float.
        weight_spec: Bits and granularity of the weight, None where it stays float.
        weight_ratio: Value of the largest code / largest weight, a float32 buffer (channels,) or, per tensor, (1,).
        output_quantizer: Quantizer of the result of a layer without a block around it, otherwise None.
        fold: The block around the layer, in a tuple so that it is no submodule; its BatchNorm, gone once it is fused,
            counts for per-tensor weights.
        mode: One of `MODES`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    input_quantizer: RangeQuantizer | None
    weight_spec: Spec | None
    weight_ratio: torch.Tensor
    output_quantizer: RangeQuantizer | None
    fold: tuple[nn.Module, ...]
    mode: str

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input and weight as the integer kernel sees them."""
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return x, self.quantized_weight() if self.mode in ("off", "on") else self.weight

    def result(self, y: torch.Tensor) -> torch.Tensor:
        """Return what the layer made as its readers see it."""
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def quantized_weight(self) -> torch.Tensor:
        """Return the fake-quantized weight, in the shape and type of the weight."""
        if self.weight_spec is None:
            return self.weight
        spec, w, axis = self.weight_spec, self.weight.float(), channel_axis(self)
        shape = [-1 if d == axis else 1 for d in range(w.ndim)]
        fold = None if spec.per_channel else self._fold()
        if fold is not None:
            w = w * fold.view(shape)
        dims = [d for d in range(w.ndim) if d != axis or not spec.per_channel]
        largest = w.detach().abs().amax(dims, keepdim=True)
        scale = (largest * self.weight_ratio.view(shape)).clamp_min(1e-12) / spec.qmax
        q = fake_quantize_weight(w, scale, spec.qmax)
        return (q if fold is None else q / fold.view(shape)).to(self.weight.dtype)

    def _fold(self) -> torch.Tensor | None:
        """Return the factor of each channel by which folding BatchNorm changes the weight."""
        norm: Any = getattr(self.fold[0], "bn", None) if self.fold else None
        if norm is None:
            return None
        factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().float()
        return torch.where(factor.abs() < 1e-12, torch.full_like(factor, 1e-12), factor)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """An `nn.Conv2d` that quantizes its input and its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x` of shape (batch, in, height, width) as the INT8 kernel does."""
        x, weight = self.operands(x)
        return self.result(self._conv_forward(x, weight, self.bias))


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """An `nn.ConvTranspose2d` that quantizes its input and its weight."""

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Convolve `x` of shape (batch, in, height, width) as the INT8 kernel does."""
        x, weight = self.operands(x)
        y = F.conv_transpose2d(
            x, weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )  # type: ignore[arg-type]
        return self.result(y)


class QuantLinear(QuantLayer, nn.Linear):
    """An `nn.Linear` that quantizes its input and its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `x` of shape (..., in) as the INT8 kernel does."""
        x, weight = self.operands(x)
        return self.result(F.linear(x, weight, self.bias))


SWAPS: dict[type, type] = {nn.Conv2d: QuantConv2d, nn.ConvTranspose2d: QuantConvTranspose2d, nn.Linear: QuantLinear}
STOCK = {ours: stock for stock, ours in SWAPS.items()}


def channel_axis(layer: Any) -> int:
    """Return the axis of the output channels in the weight of a layer."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


class QuantAct(nn.Module):
    """The activation of a block between the quantizers of the convolution's output and of its own."""

    def __init__(
        self, act: nn.Module, output: RangeQuantizer | None = None, activation: RangeQuantizer | None = None
    ) -> None:
        """Wrap `act`."""
        super().__init__()
        self.act = act
        self.output_quantizer = output
        self.activation_quantizer = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the pre-activation `x` of shape (batch, channels, height, width), activate it, quantize that."""
        x = x if self.output_quantizer is None else self.output_quantizer(x)
        q = self.activation_quantizer
        if q is None:
            return self.act(x)
        if isinstance(self.act, nn.SiLU) and q.mode == "on" and q.ready:  # runs as quantized Sigmoid and Mul
            scale = torch.full((), 1 / q.spec.qmax, device=x.device)
            gate = fake_quantize(torch.sigmoid(x.float()), scale, torch.zeros_like(scale), 0, q.spec.qmax)
            return q((x * gate).to(x.dtype))
        return q(self.act(x))
