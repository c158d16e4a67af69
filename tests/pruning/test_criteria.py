# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.config import PruneConfig
from yolo_ext.errors import UsageError
from yolo_ext.pruning.criteria import GroupWeights, criteria, group_weights
from yolo_ext.pruning.graph import Group, Member, build_graph
from yolo_ext.pruning.targets import plan

DATA_FREE = [row.name for row in criteria if row.name != "random"]


def group(*layers: list[list[float]], seed: int = 0) -> GroupWeights:
    return GroupWeights([torch.tensor(w) for w in layers], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("method", "layers", "expected"),
    [
        pytest.param("l1", [[[3.0, -4.0], [1.0, 0.0]]], [7 / 4, 1 / 4], id="l1"),
        pytest.param("l2", [[[3.0, -4.0], [1.0, 0.0]]], [25 / 13, 1 / 13], id="l2"),
        pytest.param("lamp", [[[3.0], [1.0], [2.0]]], [9 / 9, 1 / 14, 4 / 13], id="lamp"),
        # coupled layers count alike: magnitudes are averaged channel by channel before anything else
        pytest.param("l1", [[[2.0], [2.0]], [[4.0], [0.0]]], [3 / 2, 1 / 2], id="l1-coupled"),
        pytest.param("lamp", [[[1.0], [2.0]], [[3.0], [0.0]]], [1.0, 2 / 7], id="lamp-coupled"),
        pytest.param("l1", [[[0.0], [0.0]]], [0.0, 0.0], id="l1-dead"),
        pytest.param("lamp", [[[0.0], [1.0]]], [0.0, 1.0], id="lamp-dead-channel"),
    ],
)
def test_by_hand(method, layers, expected):
    assert criteria[method].fn(group(*layers)).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", DATA_FREE)
@settings(deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=2, max_size=12).filter(
        lambda rows: len({sum(v * v for v in r) for r in rows}) == len(rows)  # of equal channels either may go first
    ),
    data=st.data(),
)
def test_the_order_of_the_channels_does_not_matter(method, weights, data):
    w = torch.tensor(weights, dtype=torch.float32)
    order = torch.tensor(data.draw(st.permutations(range(len(w)))))
    score = criteria[method].fn(GroupWeights([w], torch.Generator()))
    moved = criteria[method].fn(GroupWeights([w[order]], torch.Generator()))
    torch.testing.assert_close(moved, score[order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", DATA_FREE)
def test_the_scale_of_a_layer_does_not_matter(method):
    """Groups are ranked against each other, so a layer with large weights must not win for that reason."""
    w = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    small, large = (criteria[method].fn(GroupWeights([s * w], torch.Generator())) for s in (1.0, 100.0))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)


def test_random_is_seeded():
    draw = lambda seed: criteria["random"].fn(group([[1.0]] * 5, seed=seed)).tolist()  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("row", criteria, ids=lambda row: row.name)
def test_rows_say_what_help_needs(row):
    assert row.summary and not row.summary.endswith(".") and row.fn.__doc__
    assert row.paper or row.name == "random"
    assert criteria[row.name] is row


def test_weights_are_those_of_the_deployed_layer():
    """BatchNorm is folded in, a transposed conv counts by output, and only the positions of the group are taken."""
    net = nn.Module()
    net.a = nn.Module()
    net.a.conv, net.a.bn, net.t = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ConvTranspose2d(3, 4, 2)
    with torch.no_grad():
        net.a.bn.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        net.a.bn.running_var.copy_(torch.tensor([4.0, 1.0, 0.25, 1.0]))
    index = torch.tensor([[2], [0]])
    members = [Member(p, "out", index) for p in ("a.conv", "a.bn", "t")] + [Member("t", "in", index)]
    found = group_weights(net, Group("a.conv", members), torch.Generator()).out
    assert len(found) == 2
    scale = net.a.bn.weight / (net.a.bn.running_var + net.a.bn.eps).sqrt()
    torch.testing.assert_close(found[0], (net.a.conv.weight.flatten(1) * scale[:, None])[[2, 0]].detach())
    torch.testing.assert_close(found[1], net.t.weight.transpose(0, 1).flatten(1)[[2, 0]].detach())


# The user's own ------------------------------------------------------------------------------------------------------
MINE = """
import torch
def first(group):
    return torch.arange(group.out[0].shape[0], 0, -1)
def scalar(group):
    return 1.0
def short(group):
    return torch.zeros(3)
def nan(group):
    return torch.full((group.out[0].shape[0],), float("nan"))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_pruning_criteria.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_pruning_criteria"


def test_user_criterion_by_dotted_path(mine, yolo):
    model = yolo("yolov8n")
    cfg = PruneConfig(method=f"{mine}:first", ratio=0.5, scope="local")
    kept = plan(model, build_graph(model), cfg)
    assert kept["model.1.conv"]["out"] == list(range(16))  # the last channels were worst


@pytest.mark.parametrize(("name", "got"), [("scalar", "a float"), ("short", r"shape \(3,\)"), ("nan", "shape")])
def test_user_criterion_that_returns_nonsense(mine, yolo, name, got):
    model = yolo("yolov8n")
    with pytest.raises(UsageError, match=f"returned {got}.* finite scores"):
        plan(model, build_graph(model), PruneConfig(method=f"{mine}:{name}", ratio=0.5))
