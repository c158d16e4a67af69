# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch

from yolo_ext.distillation.blocks import ContextBlock, contexts, generator


@pytest.mark.parametrize("c", [1, 7])
@pytest.mark.parametrize("slim", [False, True])
def test_the_generator_keeps_the_shape(c, slim):
    assert generator(c, slim=slim)(torch.rand(2, c, 5, 3)).shape == (2, c, 5, 3)


def test_the_slim_generator_is_much_cheaper():
    sizes = [sum(p.numel() for p in generator(64, slim=s).parameters()) for s in (False, True)]
    assert sizes[1] < sizes[0] / 7


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
