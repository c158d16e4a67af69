# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.core.registry import Need
from yolo_ext.sparsity.penalties import DEFAULTS, Channels, penalties, segment

PULLS = st.floats(0, 3, allow_nan=False, width=32)
VALUES = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12)


def channels(norms, group=None, gammas=None, owner=None):
    norms = torch.tensor(norms, dtype=torch.float32)
    group = torch.tensor(group if group is not None else [0] * len(norms))
    gammas = norms.clone() if gammas is None else torch.tensor(gammas, dtype=torch.float32)
    owner = torch.arange(len(norms)) if owner is None else torch.tensor(owner)
    return Channels(group, int(group.max()) + 1, gammas, owner, norms)


def test_every_row_has_a_default_paper_and_target():
    assert set(DEFAULTS) == set(penalties.names()) == {"slim", "group_slim", "group_sl"}
    assert all(r.paper and r.needs in ((Need.SCALES,), (Need.WEIGHTS,)) for r in penalties)


@settings(deadline=None)
@given(VALUES, PULLS)
def test_slim_is_the_soft_threshold(values, pull):
    ch = channels([abs(v) for v in values], gammas=values)
    shrunk = ch.gammas * penalties["slim"].fn(ch, pull)
    closed = ch.gammas.sign() * (ch.gammas.abs() - pull).clamp(min=0)
    torch.testing.assert_close(shrunk, closed, atol=1e-6, rtol=0)
    assert (shrunk[ch.gammas.abs() <= pull] == 0).all()  # exactly


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32)), min_size=1, max_size=8), PULLS)
def test_group_slim_is_the_block_soft_threshold(pairs, pull):
    g = torch.tensor(pairs)
    norms = g.square().mean(1).sqrt()
    owner = torch.arange(len(g)).repeat_interleave(2)
    ch = channels(norms.tolist(), gammas=g.flatten().tolist(), owner=owner.tolist())
    shrunk = (ch.gammas * penalties["group_slim"].fn(ch, pull)).view(-1, 2)
    torch.testing.assert_close(shrunk.square().mean(1).sqrt(), (norms - pull).clamp(min=0), atol=1e-5, rtol=0)
    gone = norms < pull - 1e-5
    assert (shrunk[gone] == 0).all()  # exactly, and both of them


@pytest.mark.parametrize(("rank", "share"), [(0.0, 1 / 16), (0.5, 0.25), (1.0, 1.0)])
def test_group_sl_decays_the_weakest_sixteen_times_as_fast(rank, share):
    ch = channels([2.0 - rank, 2.0, 1.0])
    assert penalties["group_sl"].fn(ch, 0.3)[0] == pytest.approx(math.exp(-0.3 * share), rel=1e-5)


@pytest.mark.parametrize("norms", [[0.7] * 4, [0.7], [0.0, 0.0], [0.0, 1.0]], ids=["equal", "single", "zero", "one"])
@pytest.mark.parametrize("name", penalties.names())
@pytest.mark.parametrize("pull", [0.0, 0.5, 5.0])
def test_no_row_leaves_the_legal_range(name, norms, pull):
    factors = penalties[name].fn(channels(norms), pull)
    assert factors.shape == (len(norms),)
    assert ((factors >= 0) & (factors <= 1)).all()  # NaN fails both


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_groups_do_not_see_each_other(sizes):
    torch.manual_seed(sum(sizes))
    norms = torch.rand(sum(sizes))
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    joined = penalties["group_sl"].fn(channels(norms.tolist(), group.tolist()), 0.7)
    alone = [penalties["group_sl"].fn(channels(n.tolist()), 0.7) for n in norms.split(sizes)]
    torch.testing.assert_close(joined, torch.cat(alone))


@pytest.mark.parametrize("name", penalties.names())
def test_every_row_draws_in_proportion_to_ease(name):
    """Two channels that differ in ease only: the easier one goes further, and half of the ease is half of the pull."""
    ch = channels([1.0, 1.0, 2.0, 0.5])
    ch.ease = torch.tensor([4.0, 0.5, 1.0, 1.0])
    first, second, *_ = penalties[name].fn(ch, 0.2).tolist()
    assert first < second <= 1
    if Need.SCALES in penalties[name].needs:
        assert (first, second) == pytest.approx((0.2, 0.9))


def test_segment():
    group, values = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3.0, -1.0, 2.0, 5.0, 4.0])
    assert segment(values, group, 3, "amax").tolist() == [3.0, 2.0, 5.0]
    assert segment(values, group, 3, "amin").tolist() == [-1.0, 2.0, 4.0]
