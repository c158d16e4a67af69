# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.distillation.grids import regrid, resized
from yolo_ext.distillation.logits import decode

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
    assert (corners - true).abs()[inside].max() < 0.01


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
