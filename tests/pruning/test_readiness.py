# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import TiedGroups, tied_groups
from yolo_ext.pruning.plan import Job, kept_of, near_zero, near_zero_share, spare_units
from yolo_ext.pruning.prune import make_plan, readiness
from yolo_ext.pruning.surgery import apply_plan

SLIM = PruneConfig(method="slim", speedup=1.5)


@pytest.fixture(scope="module")
def traced(yolo):
    """Model and graph; reasons are written into a graph, so each test gets a copy."""
    model = yolo("yolov8n")
    graph = build_graph(model)
    return model, lambda: deepcopy(graph)


@pytest.fixture(scope="module")
def plant(traced):
    """Return a function that makes a model whose first channels of each group, this share of them, have gamma 0."""
    model, graph = traced

    def make(share: float, trained: str | None = "slim") -> nn.Module:
        planted = deepcopy(model)
        modules = dict(planted.named_modules())
        with torch.no_grad():
            for g in (g for b in tied_groups(planted, graph(), SLIM) for g in b.groups):
                for m in g.members:
                    if isinstance(modules[m.module], nn.BatchNorm2d):
                        modules[m.module].weight[m.index[: round(share * g.size)].flatten()] = 0
        if trained:
            note(planted, sparsity={"method": trained, "threshold": 0.01, "coefficient": 1.0, "epochs": 15})
        return planted

    return make


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([2.0, 0.02, 0.021], [False, True, False], id="relative-to-the-largest"),
        pytest.param([0.002, 0.001, 0.0], [False, False, True], id="small-groups-count-by-themselves"),
        pytest.param([0.0, 0.0], [True, True], id="all-dead"),
        pytest.param([1.0], [False], id="single"),
    ],
)
def test_near_zero(scores, expected):
    assert near_zero(torch.tensor(scores), 0.01).tolist() == expected


class Sized:
    def __init__(self, size: int) -> None:
        self.size = size


def tied(allowed: list[int], *values: list[float]) -> TiedGroups:
    tensors = [torch.tensor(v) for v in values]
    return TiedGroups([Sized(len(v)) for v in values], [], torch.zeros(allowed[0]), allowed, values=tensors)


@pytest.mark.parametrize(
    ("tied", "expected"),
    [
        pytest.param(tied([4, 3, 2, 1], [1.0, 0.0, 0.0, 1.0]), 2, id="what-is-near-zero"),
        pytest.param(tied([4, 3], [1.0, 0.0, 0.0, 0.0]), 3, id="down-to-the-floor"),
        pytest.param(tied([4, 2], [1.0, 0.0, 1.0, 1.0]), 4, id="rounded-to-what-keeps-all-in-use"),
        pytest.param(tied([2, 1], [1.0, 0.0], [1.0, 1.0, 1.0, 1.0]), 2, id="all-groups-must-spare-it"),
        pytest.param(tied([2, 1], [1.0, 0.0], [1.0, 0.0, 1.0, 0.0]), 1, id="groups-of-two-widths"),
        pytest.param(tied([2, 1], [1.0, 0.0], [1.0, 0.0, 1.0, 1.0]), 2, id="half-a-unit-is-none"),
    ],
)
def test_spare_units(tied, expected):
    assert spare_units([tied], 0.01) == [expected]


def test_without_groups_nothing_is_near_zero():
    assert near_zero_share([], 0.01) == 0.0 and spare_units([], 0.01) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"round_to": 1, "min_channels": 1}, {}], ids=["exact", "rounded"])
def test_the_predicted_speed_up_is_that_of_the_pruned_model(plant, traced, options):
    planted, graph = plant(0.5), traced[1]()
    cfg = PruneConfig(method="slim", **options)
    made = tied_groups(planted, graph, cfg)
    units = spare_units(made, 0.01)
    found = readiness(Job(planted, graph, made, cfg), units)
    pruned = apply_plan(deepcopy(planted), kept_of(graph, made, units))
    measured = stock.gflops(planted) / stock.gflops(pruned)
    assert found["speedup"] == pytest.approx(measured, rel=0.02) and measured > 2.5
    assert found["share"] == pytest.approx(0.5, abs=0.01)
    assert found["in_use"] == 0 and found["removed"] == pytest.approx(0.5 * found["channels"], rel=0.02)


@pytest.mark.slow
def test_what_is_still_in_use_is_counted(plant, traced):
    """Of 3/4 that go, 1/2 was near zero: a third of them is in use."""
    planted, graph = plant(0.5), traced[1]()
    made = tied_groups(planted, graph, PruneConfig(method="slim", round_to=1, min_channels=1))
    found = readiness(Job(planted, graph, made, SLIM), [b.round(b.units / 4) for b in made])
    assert found["in_use"] == pytest.approx(1 / 3, abs=0.01)


def test_the_threshold_is_that_of_the_training(plant, traced):
    planted, graph = plant(0.0), traced[1]()
    note(planted, sparsity={**manifest(planted).sparsity, "threshold": 1.0})
    made = tied_groups(planted, graph, SLIM)
    assert readiness(Job(planted, graph, made, SLIM), [b.units for b in made])["share"] == 1.0


# share of planted zeros, trained with, options, what happens: nothing (""), a warning, or (!) a refusal
TABLE = [
    pytest.param(0.5, "slim", {"speedup": 2.0}, "", id="ready"),
    pytest.param(0.5, None, {"speedup": 2.0}, "", id="sparse-by-other-means"),
    pytest.param(0.5, "slim", {"speedup": 6.0}, "trained with sparsity.method=slim: .* for more epochs", id="too-far"),
    pytest.param(0.0, "slim", {"speedup": 2.0}, "!trained with sparsity.method=slim: 0%", id="trained-too-little"),
    pytest.param(0.0, None, {"speedup": 2.0}, "!trained without sparsity.method=slim: 0%", id="untrained"),
    pytest.param(0.0, "group_sl", {"speedup": 2.0}, "!with sparsity.method=group_sl, not slim", id="other-penalty"),
    pytest.param(0.0, None, {"speedup": 2.0, "force": True}, "trained without sparsity.method=slim", id="forced"),
    pytest.param(0.0, None, {"ratios": {"5": 0.5}}, "!'prune.ratios={'5': 0.5}' by 'slim'", id="ratios"),
    pytest.param(0.0, None, {"speedup": 2.0, "method": "lamp"}, "", id="criterion-that-needs-none"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "trained", "options", "expected"), TABLE)
def test_warns_and_refuses(plant, traced, caplog, share, trained, options, expected):
    planted, graph = plant(share, trained), traced[1]()
    cfg = PruneConfig(**{"method": "slim", **options})
    if expected.startswith("!"):
        with pytest.raises(UsageError, match=expected[1:].replace("{", r"\{")) as e:
            make_plan(planted, graph, cfg)
        assert "prune.force=True" in str(e.value) and "take prune.method=taylor or lamp" in str(e.value)
        return
    assert make_plan(planted, graph, cfg)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(expected, warnings[0]) if expected else not warnings
    lines = [r.message for r in caplog.records if "channels are near zero (at most 0.01" in r.message]
    assert len(lines) == (cfg.method == "slim")


@pytest.mark.slow
def test_the_realistic_target_is_within_reach(plant, traced):
    planted, graph = plant(0.25), traced[1]()
    with pytest.raises(UsageError, match=r"25% of its channels .* lower the target to prune\.speedup=[\d.]+") as e:
        make_plan(planted, graph, PruneConfig(method="slim", speedup=8.0))
    target = float(re.search(r"speedup=([\d.]+\d), ", str(e.value))[1])
    assert 1.2 < target < 2
    assert make_plan(planted, traced[1](), PruneConfig(method="slim", speedup=target))


def test_a_trial_before_the_training_is_not_asked(plant, traced):
    assert make_plan(plant(0.0, None), traced[1](), SLIM, ready=False)
