# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Improvements of a calibrated model that need images but no labels and no training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, TQDM

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.fake_quant import quantized_layers, set_mode
from yolo_ext.quantization.layers import QuantAct
from yolo_ext.stock.context import evaluating, recalibrate

DEAD = 1e-6  # added to variances: that of a dead channel stays as it is
CHANGE = (0.1, 10.0)  # of a variance, at most
STEP = 0.01  # of the slope of an activation
FLAT = 0.1  # least slope: where nearly all values are in the flat part, a shift cannot help


class _Pair(nn.Module):
    """Two models that see the same images."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: torch.Tensor) -> None:
        for m in self.models:
            m(x)


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Move BatchNorm statistics by what quantization does to them.

    Statistics of the images themselves would be those of another distribution than the augmented one of training, so
    only their difference between the quantized and the float model counts.

    Args:
        model: A calibrated model; its running means and variances are changed.
        batches: Images of shape (batch, channels, height, width), 0 to 1.

    Returns:
        Number of images used.

    Raises:
        UsageError: If the model has no BatchNorm.
    """
    norms = _norms(model)
    if not norms:
        raise UsageError("quant.bn needs BatchNorm, but this model is fused. Quantize the unfused .pt.")
    trained = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    exact = deepcopy(model)
    set_mode(exact, "float")
    set_mode(model, "on", momentum=0.0)
    with evaluating(model):
        seen = recalibrate(_Pair(model, exact).eval(), TQDM(batches, desc="re-estimating BatchNorm"))
    for m, e, (mean, var) in zip(norms, _norms(exact), trained if seen else []):
        m.running_mean.sub_(e.running_mean).add_(mean)
        m.running_var.add_(DEAD).div_(e.running_var + DEAD).clamp_(*CHANGE).mul_(var)
    return seen


def _norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]


@torch.no_grad()
def correct_bias(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Take the mean error of every output channel of the quantized layers out of their biases.

    Empirical bias correction of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019: each layer is corrected for inputs from layers that are corrected already. The mean is that
    behind the activation: before it, values that SiLU makes zero would outweigh all others.

    Args:
        model: A calibrated model; biases of BatchNorm, or of layers without it, are changed.
        batches: Images of shape (batch, channels, height, width), 0 to 1.

    Returns:
        Layer path -> largest change of a channel. Layers without any bias are left out.
    """
    targets = {path: _biased(layer, block) for path, layer, block in quantized_layers(model)}
    targets = {path: t for path, t in targets.items() if t[0].bias is not None}
    means: dict[str, list[torch.Tensor]] = defaultdict(list)  # of this batch in float, by call
    total: dict[str, torch.Tensor] = {}
    device, seen = next(model.parameters()).device, 0

    def remember(path: str, act: Callable) -> Callable:
        return lambda m, x, y: means[path].append(_channel_means(m, act(y.clone())))

    def correct(path: str, act: Callable) -> Callable:
        def hook(m: nn.Module, x: Any, y: torch.Tensor) -> torch.Tensor:
            mean = _channel_means(m, act(y.clone()))
            slope = (_channel_means(m, act(y + STEP)) - mean) / STEP
            shift = (means[path].pop(0) - mean) / slope.clamp_min(FLAT)
            shift = torch.where(shift.isfinite(), shift, 0)
            total[path] = total.get(path, 0) + shift * len(x[0])
            return y + shift.to(y.dtype).view([-1 if d == _axis(m) % y.ndim else 1 for d in range(y.ndim)])

        return hook

    with evaluating(model):
        for images in TQDM(batches, desc="correcting biases"):
            for mode, make in (("float", remember), ("on", correct)):
                set_mode(model, mode)
                handles = [m.register_forward_hook(make(path, act)) for path, (m, act) in targets.items()]
                try:
                    model(images.to(device))
                finally:
                    set_mode(model, "on")
                    for handle in handles:
                        handle.remove()
            seen += len(images)
    for path, shift in total.items():
        bias = targets[path][0].bias
        bias += (shift / seen).to(bias.dtype)
    if total:
        LOGGER.info(f"Bias correction: {len(total)} layers over {seen} images")
    return {path: float((shift / seen).abs().max()) for path, shift in total.items()}


def _biased(layer: Any, block: Any) -> tuple[Any, Callable]:
    """Return the module whose bias shifts the output of a layer, and the activation behind it."""
    norm, act = getattr(block, "bn", None), getattr(block, "act", nn.Identity())
    act = act.act if isinstance(act, QuantAct) else act
    return (norm if isinstance(norm, nn.BatchNorm2d) and norm.affine else layer), act


def _axis(m: nn.Module) -> int:
    return -1 if isinstance(m, nn.Linear) else 1


def _channel_means(m: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return y.float().movedim(_axis(m), 0).flatten(1).mean(1)
