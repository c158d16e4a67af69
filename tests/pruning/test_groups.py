# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.checkpoint import note
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning import groups as module
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import TiedGroups, tied_groups
from yolo_ext.pruning.plan import kept_of, widths_of
from yolo_ext.pruning.surgery import apply_plan

EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reasons(graph) -> dict[str, str]:
    return {g.name: g.frozen for g in graph.groups}


def named(made: list[TiedGroups]) -> dict[str, TiedGroups]:
    return {b.name: b for b in made}


@EXAMPLES
@given(allowed=st.sets(st.integers(1, 64), min_size=1).map(lambda s: sorted(s, reverse=True)), units=st.floats(0, 64))
def test_rounding_is_to_the_nearest_allowed_number(allowed, units):
    tied = TiedGroups([], [], torch.zeros(max(allowed)), allowed)
    assert tied.round(units) in allowed
    assert abs(tied.round(units) - units) == min(abs(a - units) for a in allowed)


def test_of_two_equally_near_numbers_the_larger():
    assert TiedGroups([], [], torch.zeros(16), [16, 8]).round(12) == 16


def test_units_are_ranked(traced):
    model, graph = traced
    for b in tied_groups(model, graph(), PruneConfig()):
        assert (b.scores.diff() >= 0).all()
        assert len(b.scores) == b.units == b.allowed[0]
        assert b.allowed == sorted(b.allowed, reverse=True)
        assert all(sorted(order.tolist()) == list(range(g.size)) for g, order in zip(b.groups, b.order))


def test_a_layer_at_its_floor_says_why(traced):
    model, graph = traced
    used = graph()
    tied_groups(model, used, PruneConfig(min_channels=16))
    assert reasons(used)["model.0.conv"] == "has 16 channels, which the floors do not let shrink"


@pytest.mark.parametrize("options", [{"min_channels": 24}, {"round_to": 8}, {"max_ratio": 0.3}], ids=str)
def test_floors_and_rounding_hold_in_every_group(traced, options):
    model, graph = traced
    cfg = PruneConfig(**{"min_channels": 1, "round_to": 1, "max_ratio": 0.99, **options})
    for b in tied_groups(model, graph(), cfg):
        for u in b.allowed[1:]:
            kept = [u * (g.size // b.units) for g in b.groups]
            assert min(kept) >= cfg.min_channels
            assert max(kept) % cfg.round_to == 0
            assert all(k >= g.size * (1 - cfg.max_ratio) - 1e-6 for k, g in zip(kept, b.groups))


@pytest.mark.slow
def test_floors_count_from_the_first_width(yolo):
    """A floor of 50 % that is used up in one step leaves nothing for the next one."""
    model = deepcopy(yolo("yolo11n"))  # its attention couples groups of different sizes
    dense, cfg = build_graph(model), PruneConfig(max_ratio=0.5)
    made = tied_groups(model, dense, cfg)
    apply_plan(model, kept_of(dense, made, [b.allowed[-1] for b in made]))
    note(model, prune={"shapes": {p: list(s) for p, s in dense.shapes.items()}})
    assert tied_groups(model, build_graph(model), cfg) == []
    note(model, prune=None)  # the same widths as a first model may shrink
    assert len(tied_groups(model, build_graph(model), cfg)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolo11n"])
def test_widths_are_those_of_the_cut_model(yolo, name):
    model = yolo(name)
    graph = build_graph(model)
    made = tied_groups(model, graph, PruneConfig())
    units = [b.allowed[len(b.allowed) // 2] for b in made]
    cut = dict(apply_plan(deepcopy(model), kept_of(graph, made, units)).named_modules())
    found = widths_of(graph, made, units)
    assert len(found) > 50
    for (path, dim), n in found.items():
        if path in graph.norms:
            assert n == cut[path].num_features, path
        elif getattr(cut[path], "groups", 1) == 1 or dim == "out":
            assert n == getattr(cut[path], f"{dim}_channels"), (path, dim)


def test_all_units_are_no_plan(traced):
    model, graph = traced
    used = graph()
    made = tied_groups(model, used, PruneConfig())
    assert kept_of(used, made, [b.units for b in made]) == {}


def test_a_criterion_that_cannot_rank_a_group_keeps_it(traced, monkeypatch):
    model, graph = traced
    score = module.score
    monkeypatch.setattr(module, "score", lambda m, g, **a: None if g.name == "model.1.conv" else score(m, g, **a))
    used = graph()
    assert "model.1.conv" not in named(tied_groups(model, used, PruneConfig(method="slim")))
    assert reasons(used)["model.1.conv"] == "has no layer that 'slim' ranks by, such as BatchNorm"


# Ratios --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"ratios": {"model.9.cv2": 0.9}}, r"keep 51\.2\. Give at most 0\.8,.*prune\.max_ratio=0\.8", id="max"
        ),
        pytest.param(
            {"ratios": {"0": 0.75}}, r"takes 0\.75 of the 16 channels .* keep 8\. Give at most 0\.5", id="min"
        ),
        pytest.param(
            {"ratios": {"0": 0.1}, "min_channels": 16}, "model.0.conv has 16 channels, which the fl", id="none"
        ),
    ],
)
def test_shares_below_a_floor_are_refused(traced, options, message):
    model, graph = traced
    with pytest.raises(UsageError, match=message):
        tied_groups(model, graph(), PruneConfig(**options))


def test_shares_at_the_floor_are_legal(traced):
    model, graph = traced
    made = named(tied_groups(model, graph(), PruneConfig(ratios={"model.9.cv2": 0.8, "0": 0.5, "model.1": 0.0})))
    assert {n: b.share for n, b in made.items() if b.share is not None} == {
        "model.9.cv2.conv": 0.8, "model.0.conv": 0.5, "model.1.conv": 0.0,
    }  # fmt: skip


def test_a_share_lost_in_rounding_is_told(traced, caplog):
    model, graph = traced
    tied_groups(model, graph(), PruneConfig(ratios={"0": 0.2}))
    assert "model.0.conv stays whole: 0.2 of its 16 channels" in caplog.text


def test_frozen_layers_are_refused_unless_kept(traced):
    model, graph = traced
    model = deepcopy(model).requires_grad_(True)
    model.model[:3].requires_grad_(False)
    with pytest.raises(UsageError, match=r"model\.0, model\.1, model\.2\).*prune\.exclude=\[0, 1, 2\]"):
        tied_groups(model, graph(), PruneConfig())
    assert tied_groups(model, graph(), PruneConfig(exclude=["0", "1", "2"]))


def test_a_frozen_dfl_is_no_frozen_layer(traced):
    model, graph = traced
    model = deepcopy(model).requires_grad_(True)
    model.model[-1].dfl.requires_grad_(False)
    assert tied_groups(model, graph(), PruneConfig())


def test_parts_whose_widths_do_not_divide_stay():
    net = nn.Sequential()
    net.model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 1), nn.Conv2d(16, 4, 1))
    graph = build_graph(net)
    graph.ties = [[0, 1], *graph.ties[2:]]
    assert tied_groups(net, graph, PruneConfig(round_to=1, min_channels=1)) == []
    assert graph.groups[0].frozen == "is coupled with a part whose width does not divide its own"
