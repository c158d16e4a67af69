# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.distillation.logits import HeadOutput, bckd, foreground, logit_losses

LOSSES = [pytest.param(row.fn, id=row.name) for row in logit_losses]


def head(seed: int = 0, b: int = 2, nc: int = 3, a: int = 12, spread: float = 2.0, low: float = 0.1) -> HeadOutput:
    """Return a random output; `low` below zero gives distances that only a head without bins can give."""
    g = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(b, nc, a, generator=g)
    ltrb = low + 6 * torch.rand(b, a, 4, generator=g)
    anchors = torch.stack(torch.meshgrid(torch.arange(a) + 0.5, torch.tensor([0.5]), indexing="ij"), -1).view(-1, 2)
    return HeadOutput(scores, ltrb, anchors)


def cast(out: HeadOutput, dtype: torch.dtype) -> HeadOutput:
    return HeadOutput(out.scores.to(dtype), out.ltrb.to(dtype), out.anchors)


def repeated(out: HeadOutput) -> HeadOutput:
    return HeadOutput(torch.cat([out.scores] * 2), torch.cat([out.ltrb] * 2), out.anchors)


def learning(out: HeadOutput) -> HeadOutput:
    return HeadOutput(out.scores.clone().requires_grad_(), out.ltrb.clone().requires_grad_(), out.anchors)


def giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    side = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    hull = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    inter = side.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / union - (hull - union) / hull


def test_boxes_are_anchor_plus_distances():
    out = HeadOutput(torch.zeros(1, 1, 1), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[10.0, 20.0]]))
    assert out.boxes().tolist() == [[[9.0, 18.0, 13.0, 24.0]]]


def test_foreground_is_the_largest_class_probability():
    scores = torch.tensor([[[0.0, -100.0], [np.log(3.0), -100.0]]]).float()
    assert torch.allclose(
        foreground(HeadOutput(scores, torch.zeros(1, 2, 4), torch.zeros(2, 2))), torch.tensor([[0.75, 0.0]])
    )


def test_bckd_is_the_formula_of_the_paper():
    s, t = head(0), head(1)
    p, q = (1 / (1 + np.exp(-x.scores.double().numpy())) for x in (t, s))
    count = p.max(1).sum()
    gap = np.abs(p - q)
    cls = (-(p * np.log(q) + (1 - p) * np.log(1 - q)) * gap).sum() / count
    xy = s.anchors.double().numpy()
    boxes = [
        np.concatenate([xy - x.ltrb.double().numpy()[..., :2], xy + x.ltrb.double().numpy()[..., 2:]], -1)
        for x in (s, t)
    ]
    box = 4 * (gap.max(1) * (1 - giou(*boxes))).sum() / count
    got = bckd(s, t)
    assert [float(g) for g in got] == pytest.approx([cls, box], rel=1e-4)


def test_bckd_of_one_anchor_by_hand():
    """Teacher 0.75, student 0.5: gap 0.25, BCE ln 2, both divided by at least one object."""
    anchors = torch.tensor([[2.0, 2.0]])
    s = HeadOutput(torch.tensor([[[0.0]]]), torch.ones(1, 1, 4), anchors)
    t = HeadOutput(torch.tensor([[[np.log(3.0)]]]).float(), torch.tensor([[[1.0, 1.0, 3.0, 1.0]]]), anchors)
    cls, box = bckd(s, t)  # boxes of 2x2 inside 4x2: IoU = GIoU = 0.5
    assert cls.item() == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert box.item() == pytest.approx(4 * 0.25 * 0.5, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nc", [1, 3])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(loss, nc):
    t = head(nc=nc)
    s = learning(t)
    parts = loss(s, t)
    sum(parts).backward()
    assert all(0 <= p.item() <= 1e-6 for p in parts)
    assert max(s.scores.grad.abs().max(), s.ltrb.grad.abs().max()) <= 1e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nc", [1, 3])
def test_any_other_student_learns_scores_and_boxes(loss, nc):
    s = learning(head(0, nc=nc))
    parts = loss(s, head(1, nc=nc))
    assert all(p.shape == () and p.item() > 0.01 for p in parts)
    sum(parts).backward()
    assert s.scores.grad.abs().max() > 1e-4 and s.ltrb.grad.abs().max() > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 40),
    b=st.integers(1, 3),
    nc=st.integers(1, 4),
    low=st.floats(-5, 1),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_bounded_and_the_same_for_a_batch_repeated(loss, seed, spread, b, nc, low):
    s, t = head(seed, b, nc, spread=spread, low=low), head(seed + 1, b, nc, spread=spread, low=low)
    parts = loss(s, t)
    limit = s.scores.numel() * (spread * 6 + 1) * 8
    assert all(p.isfinite() and 0 <= p <= limit for p in parts)
    for one, two in zip(parts, loss(repeated(s), repeated(t))):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_negative_distances_cannot_blow_the_loss_up(loss):
    """Boxes turned inside out once gave a GIoU of -1000."""
    s, t = head(0, 4, a=2000, low=-2.0), head(1, 4, a=2000, low=-2.0)
    s, t = (HeadOutput(x.scores, x.ltrb, torch.rand(2000, 2) * 20) for x in (s, t))
    assert loss(s, t)[1] <= 4 * 2 * 4 * 2000 / foreground(t).sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_foreground_is_finite_and_small(loss):
    t, s = head(0), learning(head(1))
    t = HeadOutput(torch.full_like(t.scores, -30.0), t.ltrb, t.anchors)
    quiet = HeadOutput(torch.full_like(t.scores, -29.0).requires_grad_(), s.ltrb, s.anchors)
    assert all(p.item() < 1e-6 for p in loss(quiet, t))
    parts = loss(s, t)
    sum(parts).backward()
    assert all(p.isfinite() for p in parts) and s.scores.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_does_not_matter(loss):
    s, t = head(0), head(1)
    for a, b in zip(loss(cast(s, torch.float16), cast(t, torch.float16)), loss(s, t)):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-2)
    huge = HeadOutput(6e4 * torch.sign(s.scores).half(), s.ltrb.half(), s.anchors)
    assert all(p.isfinite() for p in loss(huge, cast(t, torch.float16)))
