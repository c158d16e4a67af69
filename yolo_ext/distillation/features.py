# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Feature losses between maps of one level, and how maps of different width are brought together.

All compute in float32, without autocast, and are means per image. What a row needs: equal width (an adapter where
channels differ; the others compare maps of any width), a module (a small network of `adapters.modules` that is trained
along), boxes (of the objects). `SCALE_FREE` losses do not change with the magnitude of either map.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table, suggest

feature_losses = Table("feature loss")
SCALE_FREE = frozenset({"at", "pkd", "spkd", "chsim"})  # cwd is so behind an adapter that normalises


def full_precision(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorate a loss so that it computes in float32 under autocast too, and never sends gradients to the teacher."""

    @wraps(fn)
    def wrapped(student: torch.Tensor, teacher: torch.Tensor, *args, **options) -> torch.Tensor:
        with torch.autocast(student.device.type, enabled=False):
            return fn(student.float(), teacher.detach().float(), *args, **options)

    return wrapped


def standardize(x: torch.Tensor) -> torch.Tensor:
    """Return (B, C, H, W) features with mean 0 and variance 1 per channel over images and positions."""
    if x[:, 0].numel() == 1:  # which batch_norm refuses
        return x * 0.0
    return F.batch_norm(x, None, None, training=True, eps=1e-6)


def _norm(norm: str, legal: tuple[str, str]) -> bool:
    """Return whether the second of two norms is asked for."""
    if norm not in legal:
        raise UsageError(f"Unknown norm '{norm}'.{suggest(norm, list(legal))} Legal: {', '.join(legal)}.")
    return norm == legal[1]


@feature_losses.row("mimic", "Mean squared difference", paper="Li et al., 2017, CVPR", needs=[Need.EQUAL_WIDTH])
@full_precision
def mimic(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute feature mimicking, on whole maps where the paper samples regions.

    Args:
        student, teacher: (B, C, H, W) features.

    Returns:
        Scalar: mean over images, channels and positions.
    """
    return F.mse_loss(student, teacher)


@feature_losses.row("mgd", "A small network restores the teacher from randomly masked student features",
                    paper="Yang et al., 2022, arXiv:2205.01529", needs=[Need.EQUAL_WIDTH, Need.MODULE])  # fmt: skip
@full_precision
def mgd(
    student: torch.Tensor, teacher: torch.Tensor, *, module: nn.Module, masked: float = 0.65, alpha: float = 2e-5,
    norm: str = "sum", random: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute masked generative distillation.

    Args:
        student, teacher: (B, C, H, W) features.
        module: The generator for C channels, trained with the student.
        masked: Share of positions that are set to zero, 0.65 for one-stage detectors in the paper.
        alpha: Weight, 2e-5 for one-stage detectors in the paper.
        norm: ``sum`` over channels and positions as in the paper, or ``mean``, which does not grow with image size
            (use an `alpha` near 1 with it).
        random: Source of the mask.

    Returns:
        Scalar: alpha times the squared difference, averaged over images. It is 0 only where the generator restores.
    """
    b, _, h, w = student.shape
    mask = torch.rand(b, 1, h, w, generator=random, device=student.device) >= masked
    error = (module(student * mask) - teacher).square()
    return alpha * (error.mean() if _norm(norm, ("sum", "mean")) else error.sum() / b)


@feature_losses.row("cwd", "KL between the spatial distributions of each channel",
                    paper="Shu et al., 2021, arXiv:2011.13256", needs=[Need.EQUAL_WIDTH])  # fmt: skip
@full_precision
def cwd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute channel-wise distillation.

    A constant added to a channel does not matter; its scale does, like the temperature.

    Args:
        student, teacher: (B, C, H, W) features.
        temperature: Softmax temperature; the loss is multiplied by its square.

    Returns:
        Scalar: KL divergence summed over positions, averaged over images and channels.
    """
    s, t = ((x.flatten(2) / temperature).log_softmax(-1) for x in (student, teacher))
    kl = F.kl_div(s, t, reduction="sum", log_target=True) / (s.shape[0] * s.shape[1])
    return temperature**2 * kl.clamp(min=0.0)


@feature_losses.row("at", "Difference of normalised attention maps, the mean square over channels; scale-free",
                    paper="Zagoruyko & Komodakis, 2017, arXiv:1612.03928")  # fmt: skip
@full_precision
def at(student: torch.Tensor, teacher: torch.Tensor, *, norm: str = "sum") -> torch.Tensor:
    """Compute attention transfer.

    Args:
        student, teacher: (B, any C, H, W) features.
        norm: ``sum`` over positions, which lies between 0 and 2 at every size, or ``mean`` as in the authors' code,
            which is H x W times smaller.

    Returns:
        Scalar: squared difference of the unit-length maps, averaged over images.
    """
    s, t = (F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher))
    error = (s - t).square()
    return error.mean() if _norm(norm, ("sum", "mean")) else error.sum(1).mean()


@feature_losses.row("pkd", "1 - Pearson correlation of each channel; scale-free",
                    paper="Cao et al., 2022, arXiv:2207.02039", needs=[Need.EQUAL_WIDTH])  # fmt: skip
@full_precision
def pkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute Pearson distillation: features are standardised per channel over images and positions.

    Args:
        student, teacher: (B, C, H, W) features.

    Returns:
        Scalar between 0 and 2: half the mean squared difference.
    """
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


@feature_losses.row("fgd", "Objects and background apart, weighted by the teacher's attention, and global relations",
                    paper="Yang et al., 2022, arXiv:2111.11837",
                    needs=[Need.EQUAL_WIDTH, Need.BOXES, Need.MODULE])  # fmt: skip
@full_precision
def fgd(
    student: torch.Tensor, teacher: torch.Tensor, *, boxes: torch.Tensor, module: nn.Module | None = None,
    temperature: float = 0.5, alpha: float = 1e-3, beta: float = 5e-4, gamma: float = 1e-3, lam: float = 5e-6,
) -> torch.Tensor:  # fmt: skip
    """Compute focal and global distillation.

    Args:
        student, teacher: (B, C, H, W) features.
        boxes: (N, 5) image index in the batch and x1, y1, x2, y2 from 0 to 1; (0, 5) where there are no objects.
        module: Two context blocks for the global part, trained with the student; None leaves that part out.
        temperature: Of both attentions.
        alpha: Weight of the objects, each divided by its area.
        beta: Weight of the background, divided by its area.
        gamma: Weight of the difference of the attentions.
        lam: Weight of the global part. All four are those of the paper for one-stage detectors.

    Returns:
        Scalar: weighted sum over channels and positions, averaged over images.
    """
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


@feature_losses.row("spkd", "Which images of a batch resemble one another; 0 for a batch of one; scale-free",
                    paper="Tung & Mori, 2019, arXiv:1907.09682")  # fmt: skip
@full_precision
def spkd(student: torch.Tensor, teacher: torch.Tensor, *, norm: str = "image") -> torch.Tensor:
    """Compute similarity-preserving distillation. The paper's batches are 64 and larger; it needs some images.

    Args:
        student, teacher: (B, any C, any H, any W) features.
        norm: ``image``: divided by B, the same for a batch repeated, or ``paper``: divided by B squared.

    Returns:
        Scalar: squared difference of the (B, B) similarities, each row of unit length.
    """
    s, t = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (student, teacher))
    return (s - t).square().sum() / len(s) ** (2 if _norm(norm, ("image", "paper")) else 1)


@feature_losses.row("chsim", "Which channels of an image resemble one another; scale-free",
                    paper="Liu et al., 2021, arXiv:2202.03680", needs=[Need.EQUAL_WIDTH])  # fmt: skip
@full_precision
def chsim(student: torch.Tensor, teacher: torch.Tensor, *, norm: str = "row") -> torch.Tensor:
    """Compute inter-channel correlation distillation.

    Args:
        student, teacher: (B, C, any H, any W) features.
        norm: ``row``: each row of the (C, C) correlations has unit length, divided by C, or ``paper``: plain products
            divided by C squared, which grow with the fourth power of the features.

    Returns:
        Scalar: squared difference of the correlations, averaged over images.
    """
    plain = _norm(norm, ("row", "paper"))
    s, t = (x.flatten(2) @ x.flatten(2).transpose(1, 2) for x in (student, teacher))
    if not plain:
        s, t = F.normalize(s, dim=2), F.normalize(t, dim=2)
    return (s - t).square().sum((1, 2)).mean() / s.shape[1] ** (2 if plain else 1)
