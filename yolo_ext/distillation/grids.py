# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Outputs of a teacher that saw images of another size, brought to the grid of the student."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from yolo_ext.distillation.logits import decode


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return (B, C, H, W) maps at another height and width, as float32 where they change."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)


def regrid(raw: dict[str, Any], stride: torch.Tensor, grids: list[tuple[int, int]]) -> dict[str, Any]:
    """Bring the raw output of one branch to other grids of the same strides.

    Corners are interpolated, not distances: all cells of an object agree on its corners.

    Args:
        raw: ``boxes`` (B, 4 * reg_max, A), ``scores`` (B, nc, A) and ``feats``, one (B, C, H, W) map per level.
        stride: Stride of each level in pixels.
        grids: Height and width in cells of each level.

    Returns:
        The three on the new grids: logits and maps interpolated, boxes (B, 4, A) as distances without bins, in cells.
    """
    shapes = [f.shape[2:] for f in raw["feats"]]
    sizes = [h * w for h, w in shapes]
    corners = _corners(raw, stride).split(sizes, -1)
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


def _corners(raw: dict[str, Any], stride: torch.Tensor) -> torch.Tensor:
    """Return (B, 4, A) x1, y1, x2, y2 in cells, also where a head without bins gives negative distances."""
    out = decode(raw, stride, raw["boxes"].shape[1] // 4)
    left_top, right_bottom = out.ltrb.chunk(2, -1)
    return torch.cat((out.anchors - left_top, out.anchors + right_bottom), -1).transpose(1, 2)
