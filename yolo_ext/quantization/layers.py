# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What computes as integer kernels do: quantizers of activations, and layers with quantized weights.

As in Jacob et al., 2018 (per channel: Krishnamoorthi, 2018); gradients are clipped straight-through ones. Weight scales
are the largest current weight of each channel times a ratio, which commutes with folding BatchNorm.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from yolo_ext.quantization.observers import with_zero
from yolo_ext.quantization.spec import Spec

OWN = ("lo", "hi", "weight_ratio")  # buffers that ranges are made of
ADDED = ("_quantizer.lo", "_quantizer.hi", ".weight_ratio")  # ends of what they add to a state dict


# The operators of torch do not use the vector instructions of a CPU; a few passes over memory are several times faster.
def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Quantize and dequantize activations `x` (any shape and float type); scale and zero point are float32 scalars."""
    if x.device.type == "cpu":
        return _Tensor.apply(x, scale, zero, qmin, qmax)  # type: ignore[no-any-return]
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero.round().int(), qmin, qmax).to(x.dtype)


class _Tensor(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int) -> Any:
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


fake_quantize_weight: Callable[..., torch.Tensor] = _Weight.apply  # float32, symmetric; scales broadcast


class _Float32:
    """Keeps what ranges are made of in float32: `.half()` must not round it, only `.to(device)` may move it."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        own: Any = self
        kept = {k: t for k in OWN if (t := getattr(own, k, None)) is not None}
        data = {k: t.data for k, t in kept.items()}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for k, t in kept.items():
            t.data = data[k].to(getattr(own, k).device)
            own._buffers[k] = t  # the same tensor as before: the EMA holds on to it
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keep the ranges where a stripped checkpoint has none: they came from its manifest."""
        for k in OWN:
            if (t := getattr(self, k, None)) is not None:
                state_dict.setdefault(f"{prefix}{k}", t.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class RangeQuantizer(_Float32, nn.Module):  # type: ignore[misc]
    """Per-tensor fake quantizer of a range, whose ends `lo` <= 0 <= `hi` are float32 scalar buffers."""

    __call__: Callable[..., torch.Tensor]

    def __init__(self, spec: Spec, lower: float = -math.inf) -> None:
        super().__init__()
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))
        self.spec, self.lower = spec, lower  # below which the range never extends
        self.mode, self.momentum = "on", 0.0  # weight of the current batch where training updates the range
        self.ready = False  # until the range is set, values pass unchanged
        self.fixed = False  # known beforehand, and never observed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize `x` (any shape and float type), or pass it on as the mode says."""
        if self.mode != "on":
            return x
        if self.training and self.momentum and not self.fixed:
            self._follow(x.detach())
        return fake_quantize(x, *self._params(), self.spec.qmin, self.spec.qmax) if self.ready else x

    def _params(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point, float32 scalars; the latter is not rounded."""
        if self.spec.symmetric:
            return torch.maximum(-self.lo, self.hi) / self.spec.qmax, torch.zeros_like(self.lo)
        scale = (self.hi - self.lo) / self.spec.qmax
        return scale, -self.lo / scale

    @torch.no_grad()
    def _follow(self, x: torch.Tensor) -> None:
        """Move the range towards that of a batch, unless it holds NaN or inf."""
        lo, hi = (v.float() for v in torch.aminmax(x))
        m = self.momentum if self.ready else 1.0
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


class QuantAct(nn.Module):  # type: ignore[misc]
    """The activation of a block between the quantizers of the convolution's output and of its own."""

    def __init__(self, act: nn.Module, output: RangeQuantizer | None, activation: RangeQuantizer | None) -> None:
        super().__init__()
        self.act, self.output_quantizer, self.activation_quantizer = act, output, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the pre-activation `x` of shape (batch, channels, height, width), activate it, quantize that."""
        x = x if self.output_quantizer is None else self.output_quantizer(x)
        q = self.activation_quantizer
        if q is None:
            return self.act(x)  # type: ignore[no-any-return]
        if isinstance(self.act, nn.SiLU) and q.mode == "on" and q.ready:  # runs as quantized Sigmoid and Mul
            scale = torch.full((), 1 / q.spec.qmax, device=x.device)
            gate = fake_quantize(torch.sigmoid(x.float()), scale, torch.zeros_like(scale), 0, q.spec.qmax)
            return q((x * gate).to(x.dtype))
        return q(self.act(x))


class QuantLayer(_Float32):
    """What the quantized layers share; made only by `insert_plan`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    input_quantizer: RangeQuantizer | None  # None where the input arrives quantized or stays float
    weight_spec: Spec | None
    weight_ratio: torch.Tensor  # value of the largest code / largest weight, float32 (channels,) or, per tensor, (1,)
    output_quantizer: RangeQuantizer | None  # of the result of a layer without a block around it
    fold: tuple[nn.Module, ...]  # the block around it, so that it is no submodule; for the BN of per-tensor weights
    mode: str
    _compute: Callable[..., torch.Tensor]  # what the layer does to its input, with another weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with `x`, of the shape that the layer takes, as the INT8 kernel does."""
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        y = self._compute(x, self.quantized_weight() if self.mode == "on" else self.weight)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def quantized_weight(self) -> torch.Tensor:
        """Return the fake-quantized weight, in the shape and type of the weight."""
        if self.weight_spec is None:
            return self.weight
        spec, w, axis = self.weight_spec, self.weight.float(), channel_axis(self)
        shape = [-1 if d == axis else 1 for d in range(w.ndim)]
        if (fold := self.folding()) is not None:
            w = w * fold.view(shape)
        dims = [d for d in range(w.ndim) if d != axis or not spec.per_channel]
        largest = w.detach().abs().amax(dims, keepdim=True)
        scale = (largest * self.weight_ratio.view(shape)).clamp_min(1e-12) / spec.qmax
        q = fake_quantize_weight(w, scale, spec.qmax)
        return (q if fold is None else q / fold.view(shape)).to(self.weight.dtype)

    def folding(self) -> torch.Tensor | None:
        """Return the factors (channels,) by which folding BatchNorm changes a per-tensor weight, if it does."""
        per_channel = self.weight_spec is not None and self.weight_spec.per_channel  # whose scales take part
        norm: Any = getattr(self.fold[0], "bn", None) if self.fold and not per_channel else None
        if norm is None:
            return None
        factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().float()
        return torch.where(factor.abs() < 1e-12, torch.full_like(factor, 1e-12), factor)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """An `nn.Conv2d` that quantizes its input and its weight."""

    def _compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):  # type: ignore[misc]
    """An `nn.ConvTranspose2d` that quantizes its input and its weight."""

    def _compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shape: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, weight, self.bias, *shape)


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """An `nn.Linear` that quantizes its input and its weight."""

    def _compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.bias)


SWAPS: dict[type, type] = {nn.Conv2d: QuantConv2d, nn.ConvTranspose2d: QuantConvTranspose2d, nn.Linear: QuantLinear}
STOCK = {ours: stock for stock, ours in SWAPS.items()}


def channel_axis(layer: Any) -> int:
    """Return the axis of the output channels in the weight of a layer."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def channel_rows(layer: QuantLayer | nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> torch.Tensor:
    """Return the weight of a layer as float32 of shape (channels, n)."""
    return layer.weight.detach().float().transpose(0, channel_axis(layer)).flatten(1)


def weight_rows(layer: Any) -> torch.Tensor:
    """Return the weight of a layer as its scales see it: (channels, n); per tensor (1, n), BatchNorm folded."""
    w = channel_rows(layer)
    if layer.weight_spec.per_channel:
        return w
    fold = layer.folding()
    return (w if fold is None else w * fold[:, None]).reshape(1, -1)
