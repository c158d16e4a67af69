# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Small networks that a feature loss trains along with the student. They are never part of a saved model."""

from __future__ import annotations

import torch
from torch import nn


def generator(channels: int, *, slim: bool = False) -> nn.Module:
    """Return the generator of masked generative distillation (Yang et al., 2022, arXiv:2205.01529).

    Args:
        channels: Channels of the teacher's map.
        slim: Depthwise 3x3 and 1x1 convolutions instead of dense 3x3 ones, about 8 times cheaper.
    """
    if slim:
        first = [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1)]
        return nn.Sequential(*first, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                             nn.Conv2d(channels, channels, 1))  # fmt: skip
    dense = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    return nn.Sequential(dense[0], nn.ReLU(), dense[1])


class ContextBlock(nn.Module):
    """Add a context pooled over all positions to each of them (GcBlock, Cao et al., 2019, arXiv:1904.11492)."""

    def __init__(self, channels: int) -> None:
        """Build for this number of channels, as the identity: the last layer starts at 0."""
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) features with their context."""
        weights = self.attend(x).flatten(2).softmax(-1)
        context = x.flatten(2) @ weights.transpose(1, 2)
        return x + self.transform(context.unsqueeze(-1))


def contexts(channels: int) -> nn.Module:
    """Return the context blocks of the student and of the teacher for focal and global distillation."""
    return nn.ModuleList(ContextBlock(channels) for _ in range(2))
