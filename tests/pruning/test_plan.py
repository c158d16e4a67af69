# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.graph import Group, Member, build_graph
from yolo_ext.pruning.groups import TiedGroups, tied_groups
from yolo_ext.pruning.plan import by_rank, by_sensitivity, isomorphic, read_sensitivity, scopes


def tied(name: str, scores: list[float]) -> TiedGroups:
    """Return one group alone, without floors."""
    n = len(scores)
    group = Group(name, [Member(name, "out", torch.arange(n)[:, None])])
    return TiedGroups([group], [torch.arange(n)], torch.tensor(scores), list(range(n, 0, -1)))


TIES = [tied("a", [1, 2, 3, 4]), tied("b", [5, 6, 7, 8]), tied("c", [0.1, 0.2, 9, 10])]


@pytest.mark.parametrize(
    ("classes", "share", "kept"),
    [
        pytest.param([0, 0, 0], 0.5, [1, 4, 2], id="one-ranking"),  # a keeps one: no group vanishes
        pytest.param([0, 1, 2], 0.5, [2, 2, 2], id="each-for-itself"),
        pytest.param([0, 0, 1], 0.5, [1, 4, 2], id="two-classes"),
        pytest.param([0, 1, 1], 0.25, [3, 4, 2], id="classes-lose-the-same-share"),
        pytest.param([0, 1, 1], 0.0, [4, 4, 4], id="nothing"),
    ],
)
def test_ranking_within_classes(classes, share, kept):
    assert by_rank(TIES, classes)(share) == kept


def test_without_groups_there_is_nothing_to_rank():
    assert by_rank([], [])(0.5) == []
    assert by_sensitivity([], {"groups": [], "base": {"map": 0.5}})(0.5) == []


@settings(deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=6).map(sorted), scope=st.sampled_from([[0] * 3, [0, 1, 2]])
)
def test_more_share_never_keeps_more(shares, scope):
    steps = by_rank(TIES, scope)
    rows = [steps(s) for s in shares]
    assert all(u >= v for before, after in pairwise(rows) for u, v in zip(before, after))


def test_scopes_are_those_of_the_options():
    choices = PruneConfig.__dataclass_fields__["scope"].metadata["choices"]
    assert set(scopes.names()) == set(choices)


@pytest.mark.slow
def test_isomorphic_groups_of_a_yolo(yolo):
    model = yolo("yolov8n")
    made = tied_groups(model, build_graph(model), PruneConfig())
    of = dict(zip((b.name for b in made), isomorphic(made, model)))
    # the same branch of the head on each level; the repeats of one block
    assert of["model.22.cv2.0.0.conv"] == of["model.22.cv2.1.0.conv"] == of["model.22.cv2.2.0.conv"]
    assert of["model.6.m.0.cv1.conv"] == of["model.6.m.1.cv1.conv"]
    assert of["model.6.m.0.cv1.conv"] != of["model.8.m.0.cv1.conv"]  # wider
    assert of["model.22.cv2.0.0.conv"] != of["model.4.m.0.cv1.conv"]
    assert 5 < len(set(of.values())) < len(made)


def test_depthwise_is_another_structure():
    net = nn.Sequential()
    net.model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    )
    made = tied_groups(net, build_graph(net), PruneConfig(round_to=1, min_channels=1))
    classes = isomorphic(made, net)
    assert len(made) == len(set(classes)) == 3


# Sensitivity ---------------------------------------------------------------------------------------------------------
def curves(**drops: list[float]) -> dict:
    """Return a sensitivity file for groups of four channels, with the mAP drops at 25, 50 and 75 %."""
    groups = [
        {"name": n, "channels": 4, "curve": [{"ratio": r, "map": 0.5 - d} for r, d in zip((0.25, 0.5, 0.75), row)]}
        for n, row in drops.items()
    ]
    return {"base": {"map": 0.5}, "groups": groups}


def test_the_touchy_layer_is_spared():
    steps = by_sensitivity(TIES, curves(a=[0.3, 0.4, 0.5], b=[0.0, 0.0, 0.01], c=[0.1, 0.2, 0.45]))
    assert steps(0.0) == [4, 4, 4]
    assert steps(1.0) == [1, 1, 1]
    assert steps(0.5) == [4, 1, 3]


def test_all_groups_stop_at_one_drop():
    """Half way between two measured ratios the drop is taken as half way too."""
    fine = [tied(n, [0.0] * 100) for n in "ab"]
    found = curves(a=[0.1, 0.2, 0.3], b=[0.2, 0.4, 0.6])
    for g in found["groups"]:
        g["channels"] = 100
    steps = by_sensitivity(fine, found)
    for share in (0.2, 0.5, 0.7):
        a, b = (100 - u for u in steps(share))
        assert a == pytest.approx(min(2 * b, 75), abs=1.1)


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-0.1, 0.5), min_size=3, max_size=3), min_size=3, max_size=3),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=6).map(sorted),
)
def test_noisy_curves_still_give_monotone_steps(rows, shares):
    steps = by_sensitivity(TIES, curves(**dict(zip("abc", rows))))
    found = [steps(s) for s in shares]
    assert all(u >= v for before, after in pairwise(found) for u, v in zip(before, after))
    assert steps(0.0) == [4, 4, 4]
    assert steps(1.0) == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda g: g.pop(), r"does not know c at all, so it belongs to another model", id="name"),
        pytest.param(lambda g: g[1].update(channels=8), "does not know b with 8 channels instead of 4", id="channels"),
    ],
)
def test_curves_of_another_model(change, message):
    found = curves(a=[0.1] * 3, b=[0.1] * 3, c=[0.1] * 3)
    change(found["groups"])
    with pytest.raises(UsageError, match=message):
        by_sensitivity(TIES, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param("{", "is not a file of `yolo-ext sensitivity`", id="broken"),
        pytest.param("[]", "is not a file of `yolo-ext sensitivity`", id="other"),
        pytest.param(json.dumps({"base": {"map": 0.5}, "groups": [{"name": "a"}]}), "KeyError: 'curve'", id="part"),
    ],
)
def test_files_that_are_no_curves(tmp_path, text, message):
    file = tmp_path / "sensitivity.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=message) as e:
        read_sensitivity(str(file))
    assert "\n" not in str(e.value)
