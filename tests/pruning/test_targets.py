# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext import compat
from yolo_ext.config import PruneConfig
from yolo_ext.errors import UsageError
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.surgery import apply_plan
from yolo_ext.pruning.targets import Bundle, bundles, plan

EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def traced(yolo):
    """Model and graph; a plan writes reasons into its graph, so each one gets a copy."""
    model = yolo("yolov8n")
    graph = build_graph(model)
    return model, lambda: deepcopy(graph)


def widths(model: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def flops(model: nn.Module) -> float:
    """Return GFLOPs at 64 pixels, counted from the shapes that the layers really see."""
    total = 0.0

    def count(m: nn.Conv2d, args: tuple, out: torch.Tensor) -> None:
        nonlocal total
        total += 2e-9 * m.weight.numel() * out.shape[2] * out.shape[3]

    model = deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    return total


@EXAMPLES
@given(
    method=st.sampled_from(["l1", "l2", "lamp", "random"]),
    ratio=st.floats(0.0, 0.95),
    scope=st.sampled_from(["global", "local"]),
    round_to=st.sampled_from([1, 2, 4, 8, 16]),
    min_channels=st.integers(1, 48),
    max_ratio=st.floats(0.0, 0.95),
)
def test_floors_and_rounding_hold_in_every_layer(traced, **options):
    model, graph = traced
    cfg = PruneConfig(**options)
    try:
        kept = plan(model, graph(), cfg)
    except UsageError as e:
        assert "Nothing can be pruned" in str(e)  # floors at or above all widths
        return
    before, after = widths(model), widths(apply_plan(deepcopy(model), kept))
    for path, n in after.items():
        if n != before[path]:
            assert n % cfg.round_to == 0
            assert n >= cfg.min_channels
            assert n >= before[path] * (1 - cfg.max_ratio) - 1e-9


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("method", ["lamp", "l1"])
def test_flops_fall_with_the_ratio(traced, method, scope):
    model, graph = traced
    found = []
    for ratio in (0.0, 0.1, 0.25, 0.4, 0.6, 0.8):
        cfg = PruneConfig(method=method, ratio=ratio, scope=scope, round_to=1)
        found.append(flops(apply_plan(deepcopy(model), plan(model, graph(), cfg))))
    assert found[0] == flops(model)
    assert all(a > b for a, b in pairwise(found))


@pytest.mark.parametrize("scope", ["global", "local"])
def test_ratio_zero_is_the_identity(traced, scope):
    model, graph = traced
    assert plan(model, graph(), PruneConfig(ratio=0.0, scope=scope)) == {}


@pytest.mark.parametrize("speedup", [1.1, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_speedup_is_met(traced, scope, speedup):
    model, graph = traced
    kept = plan(model, graph(), PruneConfig(speedup=speedup, scope=scope))
    small = apply_plan(deepcopy(model), kept)
    assert compat.gflops(model, 64) / compat.gflops(small, 64) == pytest.approx(speedup, rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"speedup": 500.0}, r"'prune\.speedup=500' cannot be reached: .* at most \d+\.\d\d", id="unreachable"
        ),
        pytest.param({"speedup": 1.5, "max_ratio": 0.0}, "Nothing can be pruned", id="no-room"),
        pytest.param({"ratio": 0.5, "min_channels": 4096}, "Nothing can be pruned", id="floor-too-high"),
        pytest.param(
            {"ratio": 0.5, "method": "lmap"}, "Unknown pruning criterion 'lmap'. Did you mean 'lamp'", id="method"
        ),
        pytest.param({"ratio": 0.5, "method": "nowhere.mod:fn"}, "Cannot import pruning criterion", id="user-method"),
        pytest.param({"ratio": 0.5, "exclude": ["model.(2"]}, "is not a regular expression", id="bad-regex"),
        pytest.param({"ratio": 0.5, "exclude": ["modle"]}, "matches no layer", id="no-match"),
        pytest.param({"ratio": 0.5, "exclude": [""]}, "Nothing can be pruned", id="everything-excluded"),
    ],
)
def test_wrong_input(traced, options, message):
    model, graph = traced
    with pytest.raises(UsageError, match=message) as e:
        plan(model, graph(), PruneConfig(**options))
    assert "\n" not in str(e.value)


def test_the_reachable_speedup_that_the_error_names_is_reachable(traced):
    model, graph = traced
    with pytest.raises(UsageError) as e:
        plan(model, graph(), PruneConfig(speedup=500.0))
    most = float(str(e.value).split("at most ")[1].split(". ")[0])
    assert plan(model, graph(), PruneConfig(speedup=most))


def test_exclude_keeps_the_layer_and_says_why(traced):
    model, graph = traced
    cfg, used = PruneConfig(ratio=0.5, exclude=[r"^model\.2\.", "model.5.conv"]), graph()
    before, after = widths(model), widths(apply_plan(deepcopy(model), plan(model, used, cfg)))
    kept_whole = [n for n in before if n.startswith("model.2.")] + ["model.5.conv"]
    assert all(after[n] == before[n] for n in kept_whole)
    assert any(after[n] < before[n] for n in before)
    reasons = {g.name: g.frozen for g in used.groups}
    assert reasons["model.5.conv"] == "is excluded by 'model.5.conv'"


def test_a_layer_at_its_floor_says_why(traced):
    model, graph = traced
    used = graph()
    bundles(model, used, PruneConfig(min_channels=16))
    reasons = {g.name: g.frozen for g in used.groups}
    assert reasons["model.0.conv"] == "has 16 channels, which the floors do not let shrink"


@pytest.mark.parametrize("options", [{"method": "lamp", "speedup": 2.0}, {"method": "random", "ratio": 0.4, "seed": 3}])
def test_plans_are_repeatable(traced, options):
    model, graph = traced
    cfg = PruneConfig(**options)
    assert plan(model, graph(), cfg) == plan(deepcopy(model), build_graph(model), PruneConfig(**asdict(cfg)))


def test_another_seed_is_another_random_plan(traced):
    model, graph = traced
    plans = [plan(model, graph(), PruneConfig(method="random", ratio=0.4, seed=s)) for s in (0, 1)]
    assert plans[0] != plans[1]


def test_the_worst_channels_go():
    """Local ranking by l2 in a chain: exactly the filters with the smallest norm are removed."""
    net = nn.Sequential()
    net.model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        for i, scale in enumerate([5, 1, 4, 2, 6, 3]):
            net.model[0].weight[i] = scale
    cfg = PruneConfig(method="l2", ratio=0.5, scope="local", round_to=1, min_channels=1)
    assert plan(net, build_graph(net), cfg) == {"model.0": {"out": [0, 2, 4]}, "model.1": {"in": [0, 2, 4]}}


@EXAMPLES
@given(allowed=st.sets(st.integers(1, 64), min_size=1).map(lambda s: sorted(s, reverse=True)), units=st.floats(0, 64))
def test_rounding_is_to_the_nearest_allowed_number(allowed, units):
    bundle = Bundle([], [], torch.zeros(max(allowed)), allowed)
    assert bundle.round(units) in allowed
    assert abs(bundle.round(units) - units) == min(abs(a - units) for a in allowed)


def test_of_two_equally_near_numbers_the_larger():
    assert Bundle([], [], torch.zeros(16), [16, 8]).round(12) == 16
