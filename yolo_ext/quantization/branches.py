# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Merge the branches of re-parameterised blocks, so that they can be quantized as what they are once deployed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import Conv, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv2

from yolo_ext.checkpoint import note, set_tripwire
from yolo_ext.stock.context import evaluating


def branched(model: nn.Module) -> list[str]:
    """Return the paths of the blocks whose branches are not merged yet."""
    return [
        path
        for path, m in model.named_modules()
        if isinstance(m, (RepConv, RepVGGDW, Conv2)) and any(hasattr(m, b) for b in ("conv1", "cv2"))
    ]


@torch.no_grad()
def merge_branches(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[str]:
    """Turn blocks of several branches into stock `Conv` blocks that compute the same.

    Such a block ends in a BatchNorm whose statistics and affine parameters are those of its own output, so that it can
    be trained on: in eval mode it changes nothing, and in training mode nearly nothing.

    Args:
        model: Ultralytics model; changed in place, and guarded against being rebuilt from its YAML.
        batches: Images (B, C, H, W), 0 to 1, on which the statistics are measured.

    Returns:
        The paths of the merged blocks.
    """
    paths = branched(model)
    if not paths:
        return []
    modules = dict(model.named_modules())
    fresh = []
    for path in paths:
        block: Any = modules[path]
        if isinstance(block, Conv2):  # its BatchNorm is behind the sum of the branches and stays
            block.fuse_convs()
            del block.forward
        else:
            block.fuse() if isinstance(block, RepVGGDW) else block.fuse_convs()
            block.conv.requires_grad_(True)
            fresh.append(block)
            block.bn = _neutral(block.conv)
        block.__class__ = Conv
        block.train(model.training)
    _measure(model, fresh, batches)
    note(model, merged=paths)
    set_tripwire(model)
    return paths


def _neutral(conv: nn.Conv2d) -> nn.BatchNorm2d:
    """Return a BatchNorm that changes nothing, in Ultralytics' settings."""
    norm = nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=0.03).to(conv.weight.device, conv.weight.dtype)
    norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    return norm


def _measure(model: nn.Module, blocks: list[Any], batches: Iterable[torch.Tensor]) -> None:
    """Give the BatchNorms of blocks the statistics of what they see, and undo that in their affine parameters."""
    sums = {id(b): [torch.zeros(2, b.conv.out_channels, dtype=torch.float64), 0] for b in blocks}

    def hook(block: Any) -> Any:
        def see(m: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].double().cpu()
            found = sums[id(block)]
            found[0] += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            found[1] += x.numel() // x.shape[1]

        return see

    handles = [b.bn.register_forward_pre_hook(hook(b)) for b in blocks]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for images in batches if blocks else ():
                model(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
    for b in blocks:
        (total, squares), n = sums[id(b)]
        if n < 2:
            continue
        mean = total / n
        var = ((squares / n - mean**2) * n / (n - 1)).clamp_min(1e-6)
        b.bn.running_mean.copy_(mean)
        b.bn.running_var.copy_(var)
        b.bn.weight.copy_((b.bn.running_var.double() + b.bn.eps).sqrt())
        b.bn.bias.copy_(b.bn.running_mean)
