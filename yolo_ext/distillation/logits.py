# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Losses on the outputs of the head. Each returns a classification and a box part, per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from yolo_ext.registry import Table

logit_losses = Table("logit loss")


@dataclass(frozen=True)
class HeadOutput:
    """Raw output of one branch of a detection head.

    Attributes:
        scores: (B, nc, A) class logits.
        ltrb: (B, A, 4) distances to the box sides in units of the stride, decoded from bins where there are any.
        anchors: (A, 2) anchor points in units of the stride.
    """

    scores: torch.Tensor
    ltrb: torch.Tensor
    anchors: torch.Tensor

    def boxes(self) -> torch.Tensor:
        """Return (B, A, 4) corner boxes x1, y1, x2, y2 in units of the stride."""
        # A head without bins may give negative distances, with which GIoU is unbounded.
        left_top, right_bottom = self.ltrb.float().clamp(min=0).chunk(2, -1)
        return torch.cat((self.anchors - left_top, self.anchors + right_bottom), -1)


def foreground(teacher: HeadOutput) -> torch.Tensor:
    """Return (B, A) how much the teacher sees an object at each anchor: its largest class probability."""
    return teacher.scores.float().sigmoid().amax(1)


def _giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from ultralytics.utils.metrics import bbox_iou

    return bbox_iou(a, b, xywh=False, GIoU=True).squeeze(-1)


@logit_losses.row(
    "bckd", "Binary class distillation weighted by disagreement, and GIoU of the boxes",
    paper="Yang et al., 2023, arXiv:2308.14286", needs="sigmoid head",
)  # fmt: skip
def bckd(student: HeadOutput, teacher: HeadOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute bridging cross-task knowledge distillation.

    Both parts sum over all anchors and are divided by the number of objects that the teacher sees, the sum of
    `foreground`, where the paper divides by the number of assigned positives.

    Args:
        student: Output of the student.
        teacher: Output of the teacher on the same images.

    Returns:
        Scalars: classification part (beta = 1) and box part (weight 4 as in the paper).
    """
    z, target = student.scores.float(), teacher.scores.float().sigmoid()
    gap = (target - z.sigmoid()).abs()
    count = foreground(teacher).sum().clamp(min=1.0)
    cls = (F.binary_cross_entropy_with_logits(z, target, reduction="none") * gap).sum() / count
    weight = gap.amax(1).detach()
    box = (weight * (1.0 - _giou(student.boxes(), teacher.boxes()))).sum() / count
    return cls, 4.0 * box
