# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Outputs of the head, and losses between two of them on the same images: a class part and a box part, per image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import dist2bbox, make_anchors

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table, suggest

logit_losses = Table("logit loss")
KL_PAPER = "Hinton et al., 2015, arXiv:1503.02531"
Parts = tuple[torch.Tensor, torch.Tensor]  # scalars per image: of the classes, of the boxes


@dataclass(frozen=True)
class HeadOutput:
    """Raw output of one branch of a detection head, in units of the stride."""

    scores: torch.Tensor  # (B, nc, A) class logits
    ltrb: torch.Tensor  # (B, A, 4) distances to the box sides, decoded from bins where there are any
    anchors: torch.Tensor  # (A, 2)
    bins: torch.Tensor | None = None  # (B, 4, reg_max, A) logits of the distances

    def boxes(self) -> torch.Tensor:
        """Return (B, A, 4) corner boxes x1, y1, x2, y2 in units of the stride."""
        # A head without bins may give negative distances, with which GIoU is unbounded.
        return dist2bbox(self.ltrb.float().clamp(min=0), self.anchors, xywh=False)


def decode(raw: dict[str, Any], stride: torch.Tensor, reg_max: int, classes: torch.Tensor | None = None) -> HeadOutput:
    """Decode `boxes` (B, 4 * reg_max, A), `scores` (B, nc, A) and `feats` of one branch, with these `classes` only."""
    anchors, _ = make_anchors(raw["feats"], stride, 0.5)
    b, _, a = raw["boxes"].shape
    bins = raw["boxes"].float().view(b, 4, reg_max, a)
    ltrb = bins.squeeze(2)
    if reg_max > 1:
        ltrb = (bins.softmax(2) * torch.arange(reg_max, device=bins.device).view(1, 1, -1, 1)).sum(2)
    scores = raw["scores"] if classes is None else raw["scores"][:, classes]
    return HeadOutput(scores, ltrb.transpose(1, 2), anchors.float(), bins)


def resized(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return (B, C, H, W) maps at another height and width, as float32 where they change."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)


def regrid(raw: dict[str, Any], stride: torch.Tensor, grids: list[tuple[int, int]]) -> dict[str, Any]:
    """Bring the raw output of a branch to other grids (H, W) by corners, on which cells agree; bins are lost."""
    shapes = [f.shape[2:] for f in raw["feats"]]
    sizes = [h * w for h, w in shapes]
    out = decode(raw, stride, raw["boxes"].shape[1] // 4)
    corners = dist2bbox(out.ltrb, out.anchors, xywh=False).transpose(1, 2).split(sizes, -1)  # not of clamped distances
    boxes, scores = [], []
    for box, score, (h, w), (new_h, new_w) in zip(corners, raw["scores"].split(sizes, -1), shapes, grids):
        scores.append(resized(score.unflatten(-1, (h, w)), (new_h, new_w)).flatten(2))
        ratio = box.new_tensor([new_w / w, new_h / h] * 2).view(1, 4, 1, 1)
        box = resized(box.unflatten(-1, (h, w)), (new_h, new_w)) * ratio
        y, x = (torch.arange(n, device=box.device) + 0.5 for n in (new_h, new_w))
        anchors = torch.stack(torch.meshgrid(x, y, indexing="xy"))
        boxes.append(torch.cat((anchors - box[:, :2], box[:, 2:] - anchors), 1).flatten(2))
    feats = [resized(f, g) for f, g in zip(raw["feats"], grids)]
    return {"boxes": torch.cat(boxes, -1), "scores": torch.cat(scores, -1), "feats": feats}


def foreground(teacher: HeadOutput) -> torch.Tensor:
    """Return (B, A) how much the teacher sees an object at each anchor: its largest class probability."""
    return teacher.scores.float().sigmoid().amax(1)


def _objects(weight: torch.Tensor) -> torch.Tensor:
    # At least one per image and not per batch, or the loss of images without objects would depend on the batch size.
    return weight.sum().clamp(min=float(len(weight)))


# Weighted sum over the number of objects, plain sum over it, plain mean.
norms: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "weight": lambda loss, weight: (loss * weight).sum() / _objects(weight),
    "pos": lambda loss, weight: loss.sum() / _objects(weight),
    "mean": lambda loss, _: loss.mean(),
}


def average(loss: torch.Tensor, weight: torch.Tensor, norm: str) -> torch.Tensor:
    """Average a loss (B, A) over anchors of some weight (B, A) by a row of `norms`."""
    if norm not in norms:
        raise UsageError(f"Unknown norm '{norm}'.{suggest(norm, list(norms))} Legal: {', '.join(norms)}.")
    return norms[norm](loss, weight)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, dim: int, temperature: float) -> torch.Tensor:
    """Return KL(teacher || student) of the softmax over `dim`, times the squared temperature."""
    s, t = ((x.float() / temperature).log_softmax(dim) for x in (student, teacher))
    return temperature**2 * (t.exp() * (t - s)).sum(dim)


@logit_losses.row("l1", "Absolute difference of logits and of box distances where the teacher sees objects",
                  paper="after Mehta & Ozturk, 2018, arXiv:1805.06361")  # fmt: skip
def l1(student: HeadOutput, teacher: HeadOutput, *, norm: str = "weight") -> Parts:
    """Compute the mean absolute difference; `foreground` stands in for the objectness of the paper."""
    cls = (student.scores.float() - teacher.scores.float()).abs().mean(1)
    box = (student.ltrb.float() - teacher.ltrb.float()).abs().mean(-1)  # decoded: bins have a free constant per side
    return average(cls, foreground(teacher), norm), average(box, foreground(teacher), norm)


@logit_losses.row("kl", "KL between the softmax over classes", paper=KL_PAPER, needs=[Need.SEVERAL_CLASSES])
def kl(student: HeadOutput, teacher: HeadOutput, *, temperature: float = 2.0, norm: str = "weight") -> Parts:
    """Compute T^2 KL(teacher || student) over classes, with norm ``mean`` in the paper; 0 for the boxes."""
    loss = _divergence(student.scores, teacher.scores, 1, temperature)
    return average(loss, foreground(teacher), norm).clamp(min=0.0), student.scores.new_zeros((), dtype=torch.float32)


@logit_losses.row("kl_binary", "KL between the sigmoid of each class", paper=f"{KL_PAPER}, per class")
def kl_binary(student: HeadOutput, teacher: HeadOutput, *, temperature: float = 2.0, norm: str = "weight") -> Parts:
    """Compute T^2 times the binary cross entropy less the teacher's entropy, summed over classes; 0 for the boxes."""
    s, t = (x.scores.float() / temperature for x in (student, teacher))
    p = t.sigmoid()
    loss = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1.0 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    loss = average(temperature**2 * loss.sum(1), foreground(teacher), norm)
    return loss.clamp(min=0.0), student.scores.new_zeros((), dtype=torch.float32)


@logit_losses.row("bckd", "Binary class distillation weighted by disagreement, and GIoU of the boxes",
                  paper="Yang et al., 2023, arXiv:2308.14286")  # fmt: skip
def bckd(student: HeadOutput, teacher: HeadOutput, *, beta: float = 1.0, norm: str = "pos") -> Parts:
    """Compute |p_t - p_s|^beta BCE and 4 |p_t - p_s| (1 - GIoU), over `foreground` where the paper has positives."""
    z, target = student.scores.float(), teacher.scores.float().sigmoid()
    gap = (target - z.sigmoid()).abs()
    cls = F.binary_cross_entropy_with_logits(z, target, reduction="none") * gap**beta
    loss = 1.0 - bbox_iou(student.boxes(), teacher.boxes(), xywh=False, GIoU=True).squeeze(-1)
    box = gap.amax(1).detach() * loss.clamp(min=0.0)  # rounding may leave it below
    return average(cls.sum(1), foreground(teacher), norm), 4.0 * average(box, foreground(teacher), norm)


@logit_losses.row("ld", "KL between the bins of each box side where the teacher sees objects",
                  paper="Zheng et al., 2022, arXiv:2102.12252", needs=[Need.EQUAL_BINS])  # fmt: skip
def ld(student: HeadOutput, teacher: HeadOutput, *, temperature: float = 10.0, norm: str = "weight") -> Parts:
    """Compute T^2 KL(teacher || student) over bins, mean of the four sides."""
    assert student.bins is not None and teacher.bins is not None  # as `terms.check` has seen to
    loss = _divergence(student.bins, teacher.bins, 2, temperature).mean(1)
    return student.scores.new_zeros((), dtype=torch.float32), average(loss, foreground(teacher), norm).clamp(min=0.0)
