# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A block of one's own, written so that its channels can be followed."""

import torch
from torch import nn
from ultralytics.nn.modules import Conv


class Fork(nn.Module):
    """Two branches of half the width, joined."""

    def __init__(self, c: int) -> None:
        """Make a block that reads and gives c channels."""
        super().__init__()
        self.a, self.b = Conv(c, c // 2, 1), Conv(c, c // 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, c, H, W) for (B, c, H, W)."""
        return torch.cat([self.a(x), self.b(x)], 1)
