# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Fake quantization by class swap: a stock model that computes what its INT8 graph will compute.

A quantized `nn.Conv2d` keeps its identity, Parameters and state-dict keys; only its class changes and an input
quantizer is added. The `act` of its Ultralytics block is wrapped by the quantizer of the convolution's output, which is
behind the unfused BN, where the folded convolution ends. Weights carry no quantization state: their per-channel
symmetric scale follows from the current weight, and that commutes with folding BN.

Methods: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018; per-channel weights: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from yolo_ext.errors import UsageError
from yolo_ext.quantization.observers import Histogram, with_zero
from yolo_ext.quantization.profiles import Profile, float_modules, quantizable_blocks

MODES = ("float", "off", "observe", "on")
SILU_LOWER = -6.0  # SiLU(-6) = -0.015: spending codes below that costs more than it brings
Ranges = dict[str, dict[str, list[float]]]


class RangeQuantizer(nn.Module):
    """Per-tensor asymmetric fake quantizer of a range, with clipped straight-through gradients.

    Attributes:
        lo: Low end of the range, a float32 scalar buffer; never above zero.
        hi: High end of the range, a float32 scalar buffer; never below zero.
        qmax: Largest code; the smallest is 0.
        mode: One of `MODES`.
        momentum: Weight of the current batch when training updates the range; 0 keeps it fixed.
        ready: Whether the range has been set; until then values pass unchanged.
        lower: Limit below which the range never extends.
        fixed: Whether the range is known beforehand and never observed.
        histogram: What calibration has seen, only while it runs.
    """

    lo: torch.Tensor
    hi: torch.Tensor

    def __init__(self, qmax: int, lower: float = -math.inf) -> None:
        """Make an uncalibrated quantizer."""
        super().__init__()
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))
        self.qmax, self.lower = qmax, lower
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
        scale = (self.hi - self.lo) / self.qmax
        zero = (-self.lo / scale).round().int()
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, self.qmax).to(x.dtype)

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

    def _apply(self, fn: Callable, recurse: bool = True) -> RangeQuantizer:
        kept = {k: v for k, v in self._buffers.items() if v is not None}
        super()._apply(fn, recurse)
        # .half() must not round the ranges, only .to(device) may move them. The EMA holds on to the tensors themselves.
        for k, v in kept.items():
            self._buffers[k] = v.to(self._buffers[k].device)  # type: ignore[union-attr]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A stripped checkpoint has no ranges in its state dict (they came from its manifest): they stay as they are.
        if f"{prefix}lo" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.ready = bool(self.hi > self.lo)


class QuantConv2d(nn.Conv2d):
    """An `nn.Conv2d` that quantizes its input and its weight; made only by `insert_fake_quant`."""

    input_quantizer: RangeQuantizer
    weight_qmax: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x` of shape (batch, in, height, width) as the INT8 kernel does."""
        x = self.input_quantizer(x)
        quantized = self.input_quantizer.mode in ("off", "on")
        return self._conv_forward(x, self.quantized_weight() if quantized else self.weight, self.bias)

    def quantized_weight(self) -> torch.Tensor:
        """Return the fake-quantized weight, per-channel symmetric; nothing is clipped, so gradients pass unchanged."""
        w = self.weight.float()
        scale = w.detach().abs().amax((1, 2, 3)).clamp_min(1e-12) / self.weight_qmax
        zero = torch.zeros_like(scale, dtype=torch.int32)
        q = torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -self.weight_qmax, self.weight_qmax)
        return q.to(self.weight.dtype)


class QuantAct(nn.Module):
    """The activation of a block behind the quantizer of its convolution's output."""

    def __init__(self, act: nn.Module, quantizer: RangeQuantizer) -> None:
        """Wrap `act`."""
        super().__init__()
        self.act = act
        self.output_quantizer = quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the pre-activation `x` of shape (batch, channels, height, width), then activate it."""
        return self.act(self.output_quantizer(x))


def insert_fake_quant(model: nn.Module, profile: Profile, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """Insert fake quantizers in place for what the profile runs in INT8.

    Args:
        model: An Ultralytics model, fused or not.
        profile: What the runtime executes.
        exclude: Regular expressions searched in module paths; a match keeps the convolution float.

    Returns:
        Path -> reason of every convolution and linear layer that stays float.

    Raises:
        UsageError: If the model carries fake quantizers already, or an expression is broken or matches nothing.
    """
    if any(isinstance(m, QuantConv2d) for m in model.modules()):
        raise UsageError("This model carries fake quantizers already. Strip them first.")
    reasons = float_modules(model)
    blocks = {
        f"{path}.conv": block for path, block in quantizable_blocks(model).items() if f"{path}.conv" not in reasons
    }
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    stem = [path for path, block in blocks.items() if block.conv is first]
    reasons.update({path: "image input: faster and more accurate in float" for path in stem if profile.float_stem})
    for pattern in exclude:
        matches = _search(pattern, [*blocks, *reasons])
        reasons.update({path: f"excluded by '{pattern}'" for path in matches if path in blocks})
    for path, block in blocks.items():
        if path not in reasons:
            _swap(block, profile, reads_image=block.conv is first)
    return reasons


def _swap(block: Any, profile: Profile, reads_image: bool) -> None:
    conv = block.conv
    conv.__class__ = QuantConv2d
    conv.weight_qmax = profile.weight_qmax
    conv.input_quantizer = RangeQuantizer(profile.activation_qmax).to(conv.weight.device).train(conv.training)
    if reads_image:  # images are k / 255, which this range represents without any error
        conv.input_quantizer.set_range(0.0, 1.0)
        conv.input_quantizer.fixed = True
    if profile.output_quantizers:
        lower = SILU_LOWER if isinstance(block.act, nn.SiLU) else -math.inf
        quantizer = RangeQuantizer(profile.activation_qmax, lower).to(conv.weight.device)
        block.act = QuantAct(block.act, quantizer).train(block.training)


def _search(pattern: str, paths: list[str]) -> list[str]:
    try:
        matches = [path for path in paths if re.search(pattern, path)]
    except re.error as e:
        raise UsageError(f"The exclude pattern '{pattern}' is not a regular expression: {e}.") from e
    if not matches:
        raise UsageError(
            f"The exclude pattern '{pattern}' matches none of the {len(paths)} layers, such as {paths[:2]}."
        )
    return matches


def strip_fake_quant(model: nn.Module) -> nn.Module:
    """Remove all fake quantizers in place and return the model, which then holds the stock classes it had before."""
    for module in list(model.modules()):
        act = getattr(module, "act", None)
        if isinstance(act, QuantAct):
            module.act = act.act
        if isinstance(module, QuantConv2d):
            del module.input_quantizer, module.weight_qmax
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model


def quantizers(model: nn.Module) -> Iterator[tuple[str, str, RangeQuantizer, Any]]:
    """Yield convolution path, `input` or `output`, quantizer and the block's activation for every quantizer."""
    for path, block in model.named_modules():
        conv, act = getattr(block, "conv", None), getattr(block, "act", None)
        if isinstance(conv, QuantConv2d):
            yield f"{path}.conv", "input", conv.input_quantizer, act
            if isinstance(act, QuantAct):
                yield f"{path}.conv", "output", act.output_quantizer, act.act


def set_mode(model: nn.Module, mode: str, momentum: float | None = None) -> None:
    """Set what the quantizers of a model do.

    Args:
        model: A model with fake quantizers.
        mode: `float` (nothing is quantized), `off` (weights only), `observe` (float, collecting calibration
            statistics) or `on` (weights and calibrated activations).
        momentum: If given, weight of the current batch with which ranges follow the data in training mode.

    Raises:
        UsageError: If there is no such mode.
    """
    if mode not in MODES:
        raise UsageError(f"Unknown fake-quant mode '{mode}'. Legal: {', '.join(MODES)}.")
    for *_, q, _ in quantizers(model):
        q.mode = mode
        q.momentum = q.momentum if momentum is None else momentum


def get_ranges(model: nn.Module) -> Ranges:
    """Return `{convolution path: {"input": [lo, hi], "output": [lo, hi]}}` of all calibrated quantizers, as floats."""
    ranges: Ranges = {}
    for path, site, q, _ in quantizers(model):
        if q.ready:
            ranges.setdefault(path, {})[site] = [float(q.lo), float(q.hi)]
    return ranges


def load_ranges(model: nn.Module, ranges: Ranges) -> None:
    """Set the ranges returned by `get_ranges`.

    Args:
        model: A model with fake quantizers for the same convolutions.
        ranges: Ranges keyed by convolution path.

    Raises:
        UsageError: If a range has no quantizer in this model.
    """
    sites = {(path, site): q for path, site, q, _ in quantizers(model)}
    unknown = sorted({path for path, r in ranges.items() for site in r if (path, site) not in sites})
    if unknown:
        raise UsageError(
            f"Ranges of {len(unknown)} convolutions, such as '{unknown[0]}', have no quantizer in this model. "
            "Insert fake quantizers with the same profile and exclude list, and fuse both models or neither."
        )
    for path, r in ranges.items():
        for site, (lo, hi) in r.items():
            sites[path, site].set_range(lo, hi)
