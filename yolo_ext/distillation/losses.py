# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Losses per image between student and teacher: of head outputs, a class and a box part, and of (B, C, H, W) maps."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import dist2bbox, make_anchors

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table, suggest

logit_losses, feature_losses = Table("logit loss"), Table("feature loss")
Loss = Callable[..., torch.Tensor]
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
    return norms[_legal(norm, norms)](loss, weight)


def _legal(norm: str, legal: Collection[str]) -> str:
    """Return the name of a norm, which must be one of the legal ones."""
    if norm not in legal:
        raise UsageError(f"Unknown norm '{norm}'.{suggest(norm, list(legal))} Legal: {', '.join(legal)}.")
    return norm


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


# Maps ----------------------------------------------------------------------------------------------------------------
def _row(name: str, summary: str, paper: str, *needs: Need) -> Callable[[Loss], Loss]:
    """Register a loss, which computes in float32 under autocast too, and never sends gradients to the teacher."""

    def add(fn: Loss) -> Loss:
        @wraps(fn)
        def wrapped(student: torch.Tensor, teacher: torch.Tensor, *args, **options) -> torch.Tensor:
            with torch.autocast(student.device.type, enabled=False):
                return fn(student.float(), teacher.detach().float(), *args, **options)

        return feature_losses.row(name, summary, paper=paper, needs=needs)(wrapped)

    return add


def standardize(x: torch.Tensor) -> torch.Tensor:
    """Return (B, C, H, W) features with mean 0 and variance 1 per channel over images and positions."""
    if x[:, 0].numel() == 1:  # which batch_norm refuses
        return x * 0.0
    return F.batch_norm(x, None, None, training=True, eps=1e-6)


@_row("mimic", "Mean squared difference", "Li et al., 2017, CVPR", Need.EQUAL_WIDTH)
def mimic(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the mean square of the difference, on whole maps where the paper samples regions."""
    return F.mse_loss(student, teacher)


@_row("mgd", "A small network restores the teacher from randomly masked student features",
      "Yang et al., 2022, arXiv:2205.01529", Need.EQUAL_WIDTH, Need.MODULE)  # fmt: skip
def mgd(student: torch.Tensor, teacher: torch.Tensor, *, module: nn.Module, masked: float = 0.65, alpha: float = 2e-5,
        norm: str = "sum", random: torch.Generator | None = None) -> torch.Tensor:  # fmt: skip
    """Compute alpha |module(masked student) - teacher|^2, as for one-stage detectors; ``mean``: alpha near 1."""
    b, _, h, w = student.shape
    mask = torch.rand(b, 1, h, w, generator=random, device=student.device) >= masked
    error = (module(student * mask) - teacher).square()
    return alpha * (error.mean() if _legal(norm, ("sum", "mean")) == "mean" else error.sum() / b)


@_row("cwd", "KL between the spatial distributions of each channel",
      "Shu et al., 2021, arXiv:2011.13256", Need.EQUAL_WIDTH)  # fmt: skip
def cwd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute T^2 KL(teacher || student) over positions; a constant added to a channel does not matter."""
    s, t = ((x.flatten(2) / temperature).log_softmax(-1) for x in (student, teacher))
    kl = F.kl_div(s, t, reduction="sum", log_target=True) / (s.shape[0] * s.shape[1])
    return temperature**2 * kl.clamp(min=0.0)


@_row("at", "Difference of normalised attention maps, the mean square over channels; scale-free",
      "Zagoruyko & Komodakis, 2017, arXiv:1612.03928")  # fmt: skip
def at(student: torch.Tensor, teacher: torch.Tensor, *, norm: str = "sum") -> torch.Tensor:
    """Compute the squared difference of unit-length maps, over positions from 0 to 2; ``mean`` is the authors' code."""
    s, t = (F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher))
    error = (s - t).square()
    return error.mean() if _legal(norm, ("sum", "mean")) == "mean" else error.sum(1).mean()


@_row("pkd", "1 - Pearson correlation of each channel; scale-free",
      "Cao et al., 2022, arXiv:2207.02039", Need.EQUAL_WIDTH)  # fmt: skip
def pkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute half the mean square difference of maps that are standardised per channel, from 0 to 2."""
    return 0.5 * F.mse_loss(standardize(student), standardize(teacher))


class Align(nn.Module):
    """Bring maps to one width: as `kept` by a pruned student, or by 1x1 (RTMDet, Lyu et al., 2022, arXiv:2212.07784)"""

    def __init__(self, student: int, teacher: int, kept: list[int] | None, *, always: bool = False) -> None:
        """Prepare for these channels, of which a pruned student has `kept`; `always` has weights and so can shrink."""
        super().__init__()
        self.kept = None if kept is None else torch.tensor(kept)
        direct = kept is not None or (student == teacher and not always)
        self.conv = None if direct else nn.Conv2d(student, teacher, 1, bias=False)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both maps, (B, C, H, W) each, comparable channel by channel."""
        if self.kept is not None:
            return student.float(), teacher[:, self.kept.to(teacher.device)].float()
        if self.conv is not None:
            student = self.conv(student.float())
        return standardize(student.float()), standardize(teacher.float())

    def shrink(self, index: list[int]) -> None:
        """Follow a student that is pruned while training: only these of its channels are left."""
        if self.kept is not None:
            self.kept = self.kept[torch.tensor(index)]
            return
        assert self.conv  # as `always` has seen to
        weight = self.conv.weight.detach()[:, torch.tensor(index, device=self.conv.weight.device)].clone()
        self.conv.weight, self.conv.in_channels = nn.Parameter(weight), len(index)


# What a loss takes as `module`, by the number of channels.
modules: dict[str, Callable[[int], nn.Module]] = {
    "mgd": lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)),
}
