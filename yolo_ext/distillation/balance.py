# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A factor that keeps the distillation loss at a chosen share of the task loss."""

from __future__ import annotations

import torch
from torch import nn

MEMORY = 0.95  # of the running means, so that they follow the last 20 batches or so


class Balance(nn.Module):
    """Running means of both losses, as buffers, so that they are resumed with the adapters."""

    means: torch.Tensor

    def __init__(self) -> None:
        """Start without a mean; the first batch sets it."""
        super().__init__()
        self.register_buffer("means", torch.zeros(2))

    def forward(self, task: torch.Tensor, distillation: torch.Tensor, share: float) -> torch.Tensor:
        """Take in the losses of a batch and return the factor on the distillation loss.

        Args:
            task: Scalar task loss per image.
            distillation: Scalar distillation loss per image, as it is without schedule and factor.
            share: Distillation loss / task loss that the factor is to bring about.

        Returns:
            Detached scalar; batches with a loss that is not finite change nothing.
        """
        now = torch.stack((task.detach(), distillation.detach())).to(self.means)
        if now.isfinite().all():
            first = self.means.sum() == 0
            self.means.copy_(torch.where(first, now, MEMORY * self.means + (1.0 - MEMORY) * now))
        return share * self.means[0] / self.means[1].clamp(min=1e-9)
