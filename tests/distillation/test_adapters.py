# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch

from yolo_ext.distillation.adapters import Align, ContextBlock, contexts, generator
from yolo_ext.distillation.features import cwd, standardize


@pytest.mark.parametrize("c", [1, 7])
def test_the_generator_keeps_the_shape(c):
    assert generator(c)(torch.rand(2, c, 5, 3)).shape == (2, c, 5, 3)


@pytest.mark.parametrize("c", [1, 2, 9])
def test_contexts_start_as_the_identity_and_learn(c):
    ours, theirs = contexts(c)
    x = torch.randn(2, c, 4, 3)
    assert torch.equal(ours(x), x) and ours is not theirs
    ours(x).square().sum().backward()
    # One or two channels leave one hidden value, which LayerNorm turns into 0.
    assert (ours.transform[-1].weight.grad.abs().max() > 0) == (c > 3)


def test_the_context_is_the_same_everywhere_and_follows_the_attention():
    torch.manual_seed(0)
    block = ContextBlock(3)
    torch.nn.init.normal_(block.transform[-1].weight)
    x = torch.randn(2, 3, 4, 5)
    added = block(x) - x
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-5)
    moved = x.flip(-1)  # the same features elsewhere give the same context
    assert torch.allclose(block(moved) - moved, added, atol=1e-5)


def test_kept_channels_are_gathered_and_left_as_they_are():
    align = Align(2, 5, [0, 3])
    s, t = torch.randn(1, 2, 3, 3), torch.randn(1, 5, 3, 3)
    a, b = align(s, t.half())
    assert torch.equal(a, s) and torch.equal(b, t.half()[:, [0, 3]].float())
    assert not list(align.parameters())


@pytest.mark.parametrize(("student", "teacher", "adapter"), [(4, 4, False), (4, 8, True), (8, 4, True)])
def test_other_widths_get_a_1x1_adapter_and_both_sides_are_normalised(student, teacher, adapter):
    align = Align(student, teacher, None)
    assert [tuple(p.shape) for p in align.parameters()] == ([(teacher, student, 1, 1)] if adapter else [])
    s, t = (x * 37 + 5 for x in (torch.randn(3, student, 6, 6), torch.randn(3, teacher, 6, 6)))
    for side in align(s, t.half()):
        assert side.shape == (3, teacher, 6, 6) and side.dtype == torch.float32
        assert side.mean((0, 2, 3)).abs().max() < 1e-3
        assert (side.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-2


def test_the_loss_does_not_depend_on_the_magnitude_of_either_side():
    s, t = torch.randn(2, 2, 4, 6, 6)
    align = Align(4, 4, None)
    assert torch.allclose(cwd(*align(s, t)), cwd(*align(10 * s, 0.1 * t)), rtol=1e-3)


def test_a_constant_channel_gives_no_nan():
    s, t = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    value = cwd(*Align(3, 3, None)(s, t))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


def test_a_single_value_per_channel_has_no_spread():
    assert standardize(torch.full((1, 3, 1, 1), 7.0)).abs().max() == 0
    a, b = Align(3, 5, None)(torch.rand(1, 3, 1, 1), torch.rand(1, 5, 1, 1))
    assert a.shape == b.shape == (1, 5, 1, 1)
