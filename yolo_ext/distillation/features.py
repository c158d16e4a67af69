# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Feature losses between (B, C, H, W) maps of one level, in float32 and per image, and networks trained for them."""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table, suggest

feature_losses = Table("feature loss")
Loss = Callable[..., torch.Tensor]


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


def _norm(norm: str, legal: tuple[str, str]) -> bool:
    if norm not in legal:
        raise UsageError(f"Unknown norm '{norm}'.{suggest(norm, list(legal))} Legal: {', '.join(legal)}.")
    return norm == legal[1]


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
    return alpha * (error.mean() if _norm(norm, ("sum", "mean")) else error.sum() / b)


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
    return error.mean() if _norm(norm, ("sum", "mean")) else error.sum(1).mean()


@_row("pkd", "1 - Pearson correlation of each channel; scale-free",
      "Cao et al., 2022, arXiv:2207.02039", Need.EQUAL_WIDTH)  # fmt: skip
def pkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute half the mean square difference of maps that are standardised per channel, from 0 to 2."""
    return 0.5 * F.mse_loss(standardize(student), standardize(teacher))


def _attention(x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention over positions (B, H, W) and over channels (B, C), each with mean 1."""
    b, c, h, w = x.shape
    size = x.abs()
    space = h * w * (size.mean(1).flatten(1) / temperature).softmax(-1)
    return space.view(b, h, w), c * (size.mean((2, 3)) / temperature).softmax(-1)


def _object_scale(boxes: torch.Tensor, b: int, h: int, w: int) -> torch.Tensor:
    """Return (B, H, W) 1 / area in cells of the smallest box over each cell, 0 where there is none."""
    x, y = (torch.arange(n, device=boxes.device) for n in (w, h))
    scale = boxes.new_zeros(b, h, w)
    for i in range(b):  # image by image, because boxes x H x W of a whole batch may not fit into memory
        own = boxes[boxes[:, 0] == i, 1:] * boxes.new_tensor([w, h, w, h])
        x1, y1, x2, y2 = own.T.unsqueeze(-1)
        inside = ((y + 1 > y1) & (y < y2))[:, :, None] & ((x + 1 > x1) & (x < x2))[:, None]
        if len(own):
            scale[i] = (inside / inside.sum((1, 2), keepdim=True).clamp(min=1)).amax(0)
    return scale


@_row("fgd", "Objects and background apart, weighted by the teacher's attention, and global relations",
      "Yang et al., 2022, arXiv:2111.11837", Need.EQUAL_WIDTH, Need.BOXES, Need.MODULE)  # fmt: skip
def fgd(student: torch.Tensor, teacher: torch.Tensor, *, boxes: torch.Tensor, module: nn.Module | None = None,
        temperature: float = 0.5, alpha: float = 1e-3, beta: float = 5e-4, gamma: float = 1e-3,
        lam: float = 5e-6) -> torch.Tensor:  # fmt: skip
    """Weigh objects in `boxes` (N, 5: image, x1, y1, x2, y2 in 0..1), background, attentions, `module` of contexts."""
    b, _, h, w = student.shape
    (space_s, channel_s), (space_t, channel_t) = (_attention(x, temperature) for x in (student, teacher))
    objects = _object_scale(boxes.to(student), b, h, w)
    ground = (objects == 0).float()
    ground = ground / ground.sum((1, 2), keepdim=True).clamp(min=1)
    error = ((student - teacher).square() * channel_t[:, :, None, None]).sum(1) * space_t
    loss = ((alpha * objects + beta * ground) * error).sum()
    loss = loss + gamma * ((space_s - space_t).abs().sum() + (channel_s - channel_t).abs().sum())
    if module is not None:
        ours, theirs = module
        loss = loss + lam * (ours(student) - theirs(teacher)).square().sum()
    return loss / b


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


class ContextBlock(nn.Module):
    """Add a context pooled over all positions to each of them (GcBlock, Cao et al., 2019, arXiv:1904.11492)."""

    def __init__(self, channels: int) -> None:
        """Build it as the identity: the last layer starts at 0."""
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        narrow, norm = nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1])
        self.transform = nn.Sequential(narrow, norm, nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) features with their context."""
        weights = self.attend(x).flatten(2).softmax(-1)
        context = x.flatten(2) @ weights.transpose(1, 2)
        return x + self.transform(context.unsqueeze(-1))


# What a loss takes as `module`, by the number of channels; two context blocks are of student and teacher.
modules: dict[str, Callable[[int], nn.Module]] = {
    "mgd": lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)),
    "fgd": lambda c: nn.ModuleList([ContextBlock(c), ContextBlock(c)]),
}
