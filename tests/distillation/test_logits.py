# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.losses import (
    HeadOutput,
    average,
    bckd,
    decode,
    foreground,
    kl,
    kl_binary,
    l1,
    ld,
    logit_losses,
    regrid,
    resized,
)  # fmt: skip

ROWS = [pytest.param(row, id=row.name) for row in logit_losses]
SILENT = {"kl": 1, "kl_binary": 1, "ld": 0}  # the part that these losses leave out
NO_CLASSES = [(row.name, nc) for row in logit_losses for nc in (1, 3) if (row.name, nc) != ("kl", 1)]


def head(
    seed: int = 0, b: int = 2, nc: int = 3, a: int = 12, spread: float = 2.0, low: float = 0.1, bins: int = 5
) -> HeadOutput:
    """Return a random output; `low` below zero gives distances that only a head without bins can give."""
    g = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(b, nc, a, generator=g)
    ltrb = low + 6 * torch.rand(b, a, 4, generator=g)
    anchors = torch.stack(torch.meshgrid(torch.arange(a) + 0.5, torch.tensor([0.5]), indexing="ij"), -1).view(-1, 2)
    return HeadOutput(scores, ltrb, anchors, spread * torch.randn(b, 4, bins, a, generator=g))


def run(name: str, s: HeadOutput, t: HeadOutput, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both parts."""
    return logit_losses[name].fn(s, t, **options)


def tensors(out: HeadOutput) -> list[torch.Tensor]:
    return [out.scores, out.ltrb, out.bins]


def changed(out: HeadOutput, fn) -> HeadOutput:
    scores, ltrb, bins = (fn(x) for x in tensors(out))
    return replace(out, scores=scores, ltrb=ltrb, bins=bins)


def cast(out: HeadOutput, dtype: torch.dtype) -> HeadOutput:
    return changed(out, lambda x: x.to(dtype))


def learning(out: HeadOutput) -> HeadOutput:
    return changed(out, lambda x: x.clone().requires_grad_())


def grads(out: HeadOutput) -> list[float]:
    return [0.0 if x.grad is None else x.grad.abs().max().item() for x in tensors(out)]


def sigmoid(x: torch.Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-x.double().numpy()))


def softmax(x: torch.Tensor, dim: int, temperature: float) -> np.ndarray:
    e = np.exp(x.double().numpy() / temperature)
    return e / e.sum(dim, keepdims=True)


def giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    side = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    hull = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    inter = side.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / union - (hull - union) / hull


def corners(x: HeadOutput) -> np.ndarray:
    xy, ltrb = x.anchors.double().numpy(), x.ltrb.double().numpy()
    return np.concatenate([xy - ltrb[..., :2], xy + ltrb[..., 2:]], -1)


# What the head gives -----------------------------------------------------------------------------------------------
def test_boxes_are_anchor_plus_distances():
    out = HeadOutput(torch.zeros(1, 1, 1), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[10.0, 20.0]]))
    assert out.boxes().tolist() == [[[9.0, 18.0, 13.0, 24.0]]]


def test_foreground_is_the_largest_class_probability():
    scores = torch.tensor([[[0.0, -100.0], [np.log(3.0), -100.0]]]).float()
    assert torch.allclose(
        foreground(HeadOutput(scores, torch.zeros(1, 2, 4), torch.zeros(2, 2))), torch.tensor([[0.75, 0.0]])
    )


@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo26n.yaml"])
def test_decoded_boxes_are_those_of_the_head(build, yaml):
    model = build(yaml)
    detect = model.model[-1]
    detect.end2end = False  # what is chosen at first depends on the release
    with torch.no_grad():
        boxes, raw = model(torch.rand(2, 3, 64, 64))
    raw = raw.get("one2many", raw)
    out = decode(raw, detect.stride, detect.reg_max, torch.tensor([2, 0]))
    strides = torch.cat([torch.full((f[0, 0].numel(), 1), float(s)) for f, s in zip(raw["feats"], detect.stride)])
    plain = torch.cat((out.anchors - out.ltrb[..., :2], out.anchors + out.ltrb[..., 2:]), -1) * strides
    centre = torch.cat(((plain[..., :2] + plain[..., 2:]) / 2, plain[..., 2:] - plain[..., :2]), -1)
    assert torch.allclose(centre.transpose(1, 2), boxes[:, :4], rtol=1e-3, atol=1e-2)
    assert out.bins.shape[2] == detect.reg_max and torch.equal(out.scores, raw["scores"][:, [2, 0]])


# How anchors are averaged ------------------------------------------------------------------------------------------
NORMS = [("weight", 7 / 2), ("pos", 16 / 2), ("mean", 4.0)]


@pytest.mark.parametrize(("norm", "expected"), NORMS)
def test_norms_by_hand(norm, expected):
    loss, weight = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert average(loss, weight, norm).item() == pytest.approx(expected)


@pytest.mark.parametrize(("norm", "expected"), [("weight", 0.2), ("pos", 4.0), ("mean", 4.0)])
@pytest.mark.parametrize("copies", [1, 8])
def test_images_without_objects_count_as_one_object_each(norm, expected, copies):
    loss, weight = torch.full((copies, 1), 4.0), torch.full((copies, 1), 0.05)
    assert average(loss, weight, norm).item() == pytest.approx(expected)


def test_unknown_norm_is_refused():
    with pytest.raises(UsageError, match=r"Unknown norm 'wieght'.*'weight'.*Legal: weight, pos, mean"):
        l1(head(), head(1), norm="wieght")


# Values ------------------------------------------------------------------------------------------------------------
def test_l1_is_the_weighted_mean_difference():
    s, t = head(0), head(1)
    w = sigmoid(t.scores).max(1)
    cls = np.abs((s.scores - t.scores).double().numpy()).mean(1)
    box = np.abs((s.ltrb - t.ltrb).double().numpy()).mean(-1)
    expected = [(x * w).sum() / w.sum() for x in (cls, box)]
    assert [float(p) for p in l1(s, t)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_formula_of_the_paper(temperature):
    s, t = head(0), head(1)
    p, q = (softmax(x.scores, 1, temperature) for x in (t, s))
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    cls, box = kl(s, t, temperature=temperature, norm="mean")
    assert cls.item() == pytest.approx(expected, rel=1e-4) and box == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_binary_kl_sums_over_classes(temperature):
    s, t = head(0), head(1)
    p, q = (sigmoid(x.scores / temperature) for x in (t, s))
    w = sigmoid(t.scores).max(1)
    loss = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1)
    cls, box = kl_binary(s, t, temperature=temperature)
    assert cls.item() == pytest.approx(temperature**2 * (loss * w).sum() / w.sum(), rel=1e-4) and box == 0


def test_binary_kl_is_the_cross_entropy_less_the_entropy():
    s, t = head(0, nc=1), head(1, nc=1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    target = t.scores.sigmoid()
    expected = bce(s.scores, target) - bce(t.scores, target)
    assert kl_binary(s, t, temperature=1.0, norm="mean")[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_bckd_is_the_formula_of_the_paper():
    s, t = head(0), head(1)
    p, q = sigmoid(t.scores), sigmoid(s.scores)
    count = p.max(1).sum()
    gap = np.abs(p - q)
    cls = (-(p * np.log(q) + (1 - p) * np.log(1 - q)) * gap).sum() / count
    box = 4 * (gap.max(1) * (1 - giou(corners(s), corners(t)))).sum() / count
    assert [float(g) for g in bckd(s, t)] == pytest.approx([cls, box], rel=1e-4)


def test_bckd_of_one_anchor_by_hand():
    """Teacher 0.75, student 0.5: gap 0.25, BCE ln 2, both divided by at least one object."""
    anchors = torch.tensor([[2.0, 2.0]])
    s = HeadOutput(torch.tensor([[[0.0]]]), torch.ones(1, 1, 4), anchors)
    t = HeadOutput(torch.tensor([[[np.log(3.0)]]]).float(), torch.tensor([[[1.0, 1.0, 3.0, 1.0]]]), anchors)
    cls, box = bckd(s, t)  # boxes of 2x2 inside 4x2: IoU = GIoU = 0.5
    assert cls.item() == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert box.item() == pytest.approx(4 * 0.25 * 0.5, rel=1e-5)
    assert bckd(s, t, beta=2.0)[0].item() == pytest.approx(0.25**2 * np.log(2), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_ld_is_the_formula_of_the_paper(temperature):
    s, t = head(0), head(1)
    p, q = (softmax(x.bins, 2, temperature) for x in (t, s))
    w = sigmoid(t.scores).max(1)
    loss = (p * np.log(p / q)).sum(2).mean(1)
    cls, box = ld(s, t, temperature=temperature)
    assert box.item() == pytest.approx(temperature**2 * (loss * w).sum() / w.sum(), rel=1e-3) and cls == 0


# What holds for all ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ROWS)
def test_rows_say_where_they_come_from_and_their_options_can_be_read(row):
    options = inspect.signature(row.fn).parameters.values()
    assert row.paper and row.summary
    assert [p.name for p in options if p.kind is p.POSITIONAL_OR_KEYWORD] == ["student", "teacher"]


@pytest.mark.parametrize(("name", "nc"), NO_CLASSES)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(name, nc):
    t = head(nc=nc)
    s = learning(t)
    parts = run(name, s, t)
    sum(parts).backward()
    assert all(0 <= p.item() <= 1e-6 for p in parts)
    assert max(grads(s)) <= 1e-6


@pytest.mark.parametrize(("name", "nc"), NO_CLASSES)
def test_any_other_student_learns_scores_and_boxes(name, nc):
    s = learning(head(0, nc=nc))
    parts = run(name, s, head(1, nc=nc))
    quiet = SILENT.get(name)
    assert all(p.shape == () and (p == 0 if i == quiet else p > 0.01) for i, p in enumerate(parts))
    sum(parts).backward()
    scores, ltrb, bins = grads(s)
    assert (scores > 1e-4) == (quiet != 0) and (max(ltrb, bins) > 1e-4) == (quiet != 1)


@pytest.mark.parametrize("norm", ["weight", "pos", "mean", None])
@pytest.mark.parametrize("row", ROWS)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 40),
    b=st.integers(1, 3),
    nc=st.integers(2, 4),
    low=st.floats(-5, 1),
    quiet=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_parts_are_finite_and_the_same_for_a_batch_repeated(row, norm, seed, spread, b, nc, low, quiet):
    s, t = head(seed, b, nc, spread=spread, low=low), head(seed + 1, b, nc, spread=spread, low=low)
    if quiet:  # no objects
        t = replace(t, scores=t.scores - 80)
    options = {"norm": norm} if norm else {}
    parts = run(row.name, s, t, **options)
    assert all(p.isfinite() and p >= 0 and p.dtype == torch.float32 for p in parts)
    twice = [changed(x, lambda v: torch.cat([v, v])) for x in (s, t)]
    for one, two in zip(parts, run(row.name, *twice, **options)):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def test_negative_distances_cannot_blow_the_loss_up():
    """Boxes turned inside out once gave a GIoU of -1000."""
    s, t = head(0, 4, a=2000, low=-2.0, bins=1), head(1, 4, a=2000, low=-2.0, bins=1)
    s, t = (replace(x, anchors=torch.rand(2000, 2) * 20) for x in (s, t))
    assert run("bckd", s, t, norm="mean")[1] <= 8.0


@pytest.mark.parametrize("row", ROWS)
def test_no_foreground_is_finite_and_small(row):
    t, s = head(0), learning(head(1))
    t = replace(t, scores=torch.full_like(t.scores, -30.0))
    quiet = replace(s, scores=torch.full_like(t.scores, -29.0).requires_grad_())
    assert all(p.item() < 1e-6 for p in run(row.name, quiet, t))
    parts = run(row.name, s, t)
    sum(parts).backward()
    assert all(p.isfinite() for p in parts) and np.isfinite(grads(s)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_half_precision_does_not_matter(row, dtype):
    s, t = head(0, a=400), head(1, a=400)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(row.name, cast(s, dtype), cast(t, dtype))
    for a, b in zip(half, run(row.name, s, t)):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-2)
    huge = learning(replace(cast(s, dtype), scores=6e4 * torch.sign(s.scores).to(dtype)))
    parts = run(row.name, huge, cast(t, dtype))
    sum(parts).float().backward()
    assert all(p.isfinite() for p in parts)


# Invariances -------------------------------------------------------------------------------------------------------
@given(seed=st.integers(0, 10_000), shift=st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_kl_and_ld_ignore_a_constant_that_the_softmax_ignores(seed, shift):
    s, t = head(seed), head(seed + 1)
    moved = replace(s, scores=s.scores + shift, bins=s.bins + shift * torch.arange(4.0).view(1, 4, 1, 1))
    assert torch.allclose(kl(moved, t)[0], kl(s, t)[0], rtol=1e-3, atol=1e-4)
    assert torch.allclose(ld(moved, t)[1], ld(s, t)[1], rtol=1e-2, atol=1e-3)
    if abs(shift) > 1:  # the sigmoid does not ignore it
        assert not torch.allclose(kl_binary(moved, t)[0], kl_binary(s, t)[0], rtol=1e-2)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_binary_kl_treats_yes_and_no_alike(seed):
    s, t = head(seed), head(seed + 1)
    turned = [replace(x, scores=-x.scores) for x in (s, t)]
    assert torch.allclose(kl_binary(*turned, norm="mean")[0], kl_binary(s, t, norm="mean")[0], rtol=1e-4)


@pytest.mark.parametrize("row", ROWS)
@given(seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=10, deadline=None)
def test_order_of_classes_and_images_does_not_matter(row, seed, data):
    s, t = head(seed, b=3), head(seed + 1, b=3)
    images, classes = data.draw(st.permutations(range(3))), data.draw(st.permutations(range(3)))
    turned = [changed(x, lambda v: v[images]) for x in (s, t)]
    turned = [replace(x, scores=x.scores[:, classes]) for x in turned]
    for one, two in zip(run(row.name, *turned), run(row.name, s, t)):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_a_classifier_is_one_anchor_without_boxes():
    s, t = (torch.randn(4, 10, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    heads = [HeadOutput(x[..., None], x.new_zeros(4, 1, 4), x.new_zeros(1, 2)) for x in (s, t)]
    expected = torch.nn.functional.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    assert torch.allclose(kl(*heads, temperature=1.0, norm="mean")[0], expected, rtol=1e-5)


# Grids -----------------------------------------------------------------------------------------------------------
STRIDES = torch.tensor([8.0, 16.0])


def raw_of(box: torch.Tensor, sides: tuple[int, int], bins: int, classes: int = 2) -> dict[str, object]:
    """Return the raw output of a head all of whose cells say: this box, x1, y1, x2, y2 in pixels."""
    boxes, feats = [], []
    for s in STRIDES:
        h, w = (int(x / s) for x in sides)
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        d = torch.stack((x - box[0] / s, y - box[1] / s, box[2] / s - x, box[3] / s - y)).flatten(1)
        if bins > 1:  # two neighbouring bins share the probability, so that the mean is the distance
            d = d.clamp(0, bins - 1.001)
            low = d.floor()
            p = torch.zeros(4, bins, d.shape[1])
            p.scatter_(1, low.long().unsqueeze(1), (1 - d + low).unsqueeze(1))
            p.scatter_(1, low.long().unsqueeze(1) + 1, (d - low).unsqueeze(1))
            d = p.clamp(min=1e-9).log().flatten(0, 1)
        boxes.append(d)
        feats.append(torch.rand(1, 4, h, w))
    boxes = torch.cat(boxes, -1)[None]
    return {"boxes": boxes, "scores": torch.randn(1, classes, boxes.shape[-1]), "feats": feats}


@pytest.mark.parametrize("bins", [1, 64], ids=["distances", "bins"])
@settings(max_examples=20, deadline=None)
@given(
    scale=st.sampled_from([(0.5, 0.5), (0.75, 0.75), (1.5, 1.5), (2.0, 2.0), (1.5, 2.0)]),
    x=st.tuples(st.floats(0, 64), st.floats(128, 192)),
    y=st.tuples(st.floats(0, 32), st.floats(96, 128)),
)
def test_boxes_land_where_they_are(bins, scale, x, y):
    """Each cell that is well inside of an object knows its corners, whatever the size at which the teacher saw it."""
    true = torch.tensor([x[0], y[0], x[1], y[1]])
    seen = int(128 * scale[0]), int(192 * scale[1])
    found = regrid(raw_of(true * torch.tensor([scale[1], scale[0]] * 2), seen, bins), STRIDES, [(16, 24), (8, 12)])
    there = decode(found, STRIDES, 1)
    assert found["boxes"].shape == (1, 4, 16 * 24 + 8 * 12) and [f.shape[2:] for f in found["feats"]] == [
        (16, 24),
        (8, 12),
    ]
    stride = torch.cat([torch.full((16 * 24, 1), 8.0), torch.full((8 * 12, 1), 16.0)])
    # Bins hold no negative distances, so only cells whose neighbours in the teacher are inside too tell the truth.
    inside = ((there.ltrb[0] * stride).amin(-1) >= 2 * stride[:, 0] / min(scale)) if bins > 1 else slice(None)
    corners = torch.cat((there.anchors - there.ltrb[0, :, :2], there.anchors + there.ltrb[0, :, 2:]), -1) * stride
    gaps = (corners - true).abs()[inside]
    assume(gaps.numel())  # a box at the border may have no such cell
    assert gaps.max() < 0.01


@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([0.5, 0.75, 1.5, 2.0]))
def test_maps_and_logits_that_vary_slowly_stay(scale):
    h, w = int(64 * scale) // 8, int(96 * scale) // 8
    slope = lambda h, w: ((torch.arange(w) + 0.5) / w).expand(1, 1, h, w)  # noqa: E731
    found = resized(slope(h, w), (8, 12))
    assert torch.allclose(found[..., 2:-2], slope(8, 12)[..., 2:-2], atol=1e-5)


def test_the_same_size_is_left_alone():
    x = torch.rand(1, 2, 4, 6, dtype=torch.float16)
    assert resized(x, (4, 6)) is x
