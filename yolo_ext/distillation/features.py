# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Feature losses between maps of one level, and how maps of different width are brought together."""

from __future__ import annotations

import torch
from torch import nn

from yolo_ext.registry import Table

feature_losses = Table("feature loss")


@feature_losses.row(
    "cwd", "KL between the spatial distributions of each channel", paper="Shu et al., 2021, arXiv:2011.13256"
)
def cwd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute channel-wise distillation.

    Args:
        student: (B, C, H, W) features.
        teacher: (B, C, H, W) features.
        temperature: Softmax temperature; the loss is multiplied by its square.

    Returns:
        Scalar: KL divergence summed over positions, averaged over images and channels.
    """
    s, t = ((x.float().flatten(2) / temperature).log_softmax(-1) for x in (student, teacher))
    kl = (t.exp() * (t - s)).sum() / (s.shape[0] * s.shape[1])
    return temperature**2 * kl.clamp(min=0.0)


class Align(nn.Module):
    """Bring student and teacher maps of one level to the same width.

    A student pruned from this very teacher is compared on the kept channels directly, without parameters. Otherwise a
    1x1 convolution maps the student where widths differ, and both sides are normalised per channel, so that the loss
    does not depend on magnitudes (as in RTMDet, Lyu et al., 2022, arXiv:2212.07784).
    """

    def __init__(self, student: int, teacher: int, kept: list[int] | None, *, always: bool = False) -> None:
        """Prepare for `student` and `teacher` channels.

        Args:
            student: Channels of the student's map.
            teacher: Channels of the teacher's map.
            kept: Channels of the teacher that the student, pruned from it, still has; None for any other teacher.
            always: Give equally wide maps a convolution too, because the student is going to be pruned.
        """
        super().__init__()
        self.kept = None if kept is None else torch.tensor(kept)
        direct = kept is not None or (student == teacher and not always)
        self.conv = None if direct else nn.Conv2d(student, teacher, 1, bias=False)
        self.norm = kept is None

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both maps, (B, C, H, W) each, comparable channel by channel."""
        if self.kept is not None:
            return student.float(), teacher[:, self.kept.to(teacher.device)].float()
        if self.conv is not None:
            student = self.conv(student.float())
        pair = (student.float(), teacher.float())
        return tuple(nn.functional.batch_norm(x, None, None, training=True, eps=1e-6) for x in pair)  # type: ignore[return-value]

    def shrink(self, index: list[int]) -> None:
        """Follow a student that is pruned while training: only these of its channels are left."""
        if self.kept is not None:
            self.kept = self.kept[torch.tensor(index)]
            return
        if self.conv is None:
            raise ValueError("An adapter without weights cannot follow a student that loses channels.")
        weight = self.conv.weight.detach()[:, torch.tensor(index, device=self.conv.weight.device)].clone()
        self.conv.weight, self.conv.in_channels = nn.Parameter(weight), len(index)
