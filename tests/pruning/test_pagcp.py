# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.data.check import check_data
from yolo_ext.data.convert import convert
from yolo_ext.pruning import pagcp as module
from yolo_ext.pruning.evidence import Probes
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.pagcp import budget_decay, pagcp, search
from yolo_ext.pruning.plan import Job, kept_of, widths_of
from yolo_ext.pruning.solve import measure
from yolo_ext.pruning.surgery import apply_plan
from yolo_ext.stock.context import recalibrate
from yolo_ext.stock.load import load_model
from yolo_ext.training.prune import make_probes

TEN = list(range(10, 1, -1))  # ten units, of which two must stay
WEIGHTS = Path(__file__).parents[3] / "shared" / "weights" / "bccd_yolov8n_192.pt"


def config(**options) -> PruneConfig:
    return PruneConfig(scope="pagcp", **{"budget": 0.1, "total_budget": 1.3, "topk": 1.0, **options})


def flops(*shares: float):
    """Return relative FLOPs to which group i adds `shares[i]` in proportion to its units."""
    return lambda units: 1 - sum(s * (1 - u / 10) for s, u in zip(shares, units))


def growing(*costs: dict[str, float]):
    """Return losses of 1 to which each unit that group i has lost adds `costs[i]`."""
    tasks = {t for c in costs for t in c}
    return lambda units: {
        t: 1 + sum(c.get(t, 0.0) * (10 - u) for c, u in zip(costs, units)) for t in sorted(tasks | {"other"})
    }


@given(st.floats(1e-3, 0.5), st.floats(1.01, 50), st.integers(2, 80))
def test_budgets_multiply_to_the_total(first: float, excess: float, n: int) -> None:
    total = (1 + first) * excess
    decay = budget_decay(first, total, n)
    product = math.fsum(math.log1p(first * decay**i) for i in range(n))
    assert product == pytest.approx(math.log(total), rel=1e-6)


def test_one_layer_has_one_budget() -> None:
    assert budget_decay(0.1, 1.05, 1) == 1.0


def test_harmless_goes_to_its_floor_and_harmful_stays() -> None:
    units, rows = search([TEN, TEN], growing({"box": 1.0}, {}), flops(0.3, 0.3), config())
    assert units == [10, 2]
    assert [r["limit"] for r in rows] == ["box", ""]
    assert "exceeds its budget" in rows[0]["outcome"] and rows[1]["outcome"] == "is pruned"
    assert rows[1]["ratio"] == 0.8 and rows[1]["trials"] == 1


def test_budgets_fall_with_the_flops_of_the_layer() -> None:
    losses = growing({"box": 0.02}, {"cls": 0.02}, {"box": 0.02})
    cfg = config(total_budget=1.15)
    _, rows = search([TEN] * 3, losses, flops(0.1, 0.3, 0.2), cfg)
    budgets = [r["budget"] for r in rows]
    assert budgets[1] > budgets[2] > budgets[0] and budgets[1] == 0.1
    assert math.prod(1 + b for b in budgets) == pytest.approx(1.15)


def test_rising_budgets_turn_the_order_around() -> None:
    _, rows = search([TEN] * 3, growing({}, {}, {}), flops(0.1, 0.3, 0.2), config(total_budget=3.0))
    assert rows[1]["budget"] > rows[2]["budget"] > rows[0]["budget"] == 0.1


def test_the_worst_task_decides_and_is_named() -> None:
    units, rows = search([TEN], growing({"box": 0.01, "cls": 0.03}), flops(0.5), config())
    assert units == [7] and rows[0]["limit"] == "cls"  # 3 x 0.03 fits into 0.1, 4 x 0.03 does not
    assert rows[0]["growth"] == pytest.approx(1.09)


def test_a_task_has_its_own_budget_and_its_base_rises() -> None:
    cfg = config(total_budget=1.1**2)  # decay 1
    units, _ = search([TEN, TEN], growing({"box": 0.05}, {"box": 0.05}), flops(0.3, 0.2), cfg)
    assert units == [8, 8]  # 1.00 -> 1.10, and again by a tenth, to at most 1.21
    units, _ = search([TEN, TEN], growing({"box": 0.05}, {"cls": 0.05}), flops(0.3, 0.2), cfg)
    assert units == [8, 8]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 0.3), min_size=1, max_size=5),
    st.lists(st.floats(0.0, 0.2), min_size=5, max_size=5),
)
def test_bisection_equals_the_walk_over_all_ratios(costs: list[float], shares: list[float]) -> None:
    shares = [0.02 + round(s, 6) / 2 for s in shares[: len(costs)]]  # an order that rounding decides is nobody's
    allowed, losses, cfg = [TEN] * len(costs), growing(*({"box": c} for c in costs)), config(total_budget=1.4)
    expected, base, found = [10] * len(costs), 1.0, 1.0
    decay = budget_decay(cfg.budget, cfg.total_budget, len(costs))
    order = sorted(range(len(costs)), key=lambda i: -shares[i])
    theta = cfg.budget
    for i in order if decay <= 1 else order[::-1]:
        for u in TEN:
            trial = losses([*expected[:i], u, *expected[i + 1 :]])["box"]
            if trial > base * (1 + theta):
                break
            expected[i], found = u, trial
        base, theta = max(base, found), theta * decay
    if expected == [10] * len(costs):
        with pytest.raises(UsageError, match="Nothing can be pruned within"):
            search(allowed, losses, flops(*shares), cfg)
    else:
        assert search(allowed, losses, flops(*shares), cfg)[0] == expected


def test_topk_gives_the_dearest_flops_back() -> None:
    losses, cfg = growing({"box": 0.001}, {"box": 0.01}, {"box": 0.001}), config(topk=0.6)
    units, rows = search([TEN] * 3, losses, flops(0.3, 0.05, 0.3), cfg)
    assert units == [2, 10, 2]
    assert "cost too much" in rows[1]["outcome"] and rows[1]["ratio"] == 0.0


@pytest.mark.parametrize("target", [1.1, 1.25, 1.4])
def test_walk_ends_at_the_flops_target(target: float, caplog: pytest.LogCaptureFixture) -> None:
    cost = flops(0.2, 0.18, 0.16, 0.14, 0.1)
    units, rows = search([TEN] * 5, growing({}, {}, {}, {}, {}), cost, config(speedup=target))
    assert target <= 1 / cost(units) <= target * 1.06  # one unit of ten is that coarse
    assert rows[-1]["outcome"] == "was not needed for the target" and rows[-1]["trials"] == 0
    passed = f"speedup is {1 / cost(units):.4g} instead of {target:g}: the last group shrinks in steps"
    assert (passed in caplog.text) == (1 / cost(units) > 1.01 * target)


def test_budgets_that_end_before_the_target_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.LOGGER, "warning", said.append)
    units, _ = search([TEN], growing({"box": 0.03}), flops(0.5), config(speedup=3.0))
    assert units == [7] and "budgets end at 1.18 of prune.speedup=3" in said[0]


def test_a_layer_without_flops_is_left_alone() -> None:
    units, rows = search([TEN, TEN], growing({}, {}), flops(0.0, 0.5), config())
    assert units == [10, 2] and rows[0]["trials"] == 0 and "no FLOPs" in rows[0]["outcome"]


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        pytest.param(growing({"box": 1.0}), {}, UsageError, "Nothing can be pruned within", id="nothing fits"),
        pytest.param(lambda units: {"box": math.nan}, {}, CheckFailed, "not finite", id="NaN"),
        pytest.param(lambda units: {"box": 0.0}, {}, UsageError, "losses of the model are zero", id="zero"),
    ],
)
def test_wrong_input(losses, options, error, message) -> None:
    with pytest.raises(error, match=message):
        search([TEN], losses, flops(0.5), config(**options))


def test_total_below_the_first_budget() -> None:
    with pytest.raises(UsageError, match=r"Legal: above 1\.1"):
        search([TEN, TEN], growing({}, {}), flops(0.3, 0.2), config(total_budget=1.05))


def test_a_loss_that_becomes_nan_is_over_budget() -> None:
    losses = lambda units: {"box": 1.0 if units[0] > 5 else math.nan, "cls": 1.0}  # noqa: E731
    units, rows = search([TEN], losses, flops(0.5), config())
    assert units == [6] and rows[0]["limit"] == "box"


def test_a_task_that_has_no_loss_does_not_count() -> None:
    losses = lambda units: {"box": 1.0, "angle": 0.0 if units[0] == 10 else 0.1}  # noqa: E731
    assert search([TEN], losses, flops(0.5), config())[0] == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probes", "options", "message"),
    [
        pytest.param(Probes(), {}, "Give data=", id="no data"),
        pytest.param(Probes(batches=list), {"params": 2.0}, "cannot aim at 'prune.params'", id="other target"),
    ],
)
def test_wrong_input_of_a_model(yolo, probes: Probes, options: dict, message: str) -> None:
    model = yolo("yolov8n")
    graph = build_graph(model)
    with pytest.raises(UsageError, match=message):
        pagcp(Job(model, graph, tied_groups(model, graph, config()), config(**options), probes))


@pytest.mark.slow
def test_trials_are_pruned_copies_and_shares_are_kept(yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    model = yolo("yolov8n")
    before = deepcopy(model.state_dict())
    full = model.model[4].cv2.conv.out_channels

    def losses(trial, batches):
        return {"box": 3.0 - 2 * trial.model[4].cv2.conv.out_channels / full}

    monkeypatch.setattr(module, "task_losses", losses)
    cfg = config(include=["model.4.cv2", "model.5", "model.6.cv2"], ratios={"model.6.cv2": 0.25})
    graph = build_graph(model)
    made = tied_groups(model, graph, cfg)
    batches = lambda: [{"img": torch.rand(2, 3, 64, 64)}]  # noqa: E731
    units = pagcp(Job(model, graph, made, cfg, Probes(batches=batches)))
    rows = {r["name"]: r for r in graph.notes}
    assert rows["model.4.cv2.conv"]["limit"] == "box" and rows["model.4.cv2.conv"]["ratio"] == 0.0
    assert rows["model.5.conv"]["ratio"] > 0.7
    assert rows["model.6.cv2.conv"]["ratio"] == 0.25 and rows["model.6.cv2.conv"]["outcome"] == "is set by prune.ratios"
    assert apply_plan(deepcopy(model), kept_of(graph, made, units)).model[6].cv2.conv.out_channels == 96
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.bccd
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="BCCD data and weights are not beside the checkout")
def test_blood_cells_at_twice_the_speed(tmp_path: Path) -> None:
    splits = {"train": "trainval", "val": "test"}
    convert(WEIGHTS.parents[1] / "data" / "bccd", tmp_path / "bccd", splits=splits)
    model, _ = load_model(WEIGHTS)
    cfg = config(budget=0.05, total_budget=5.0, topk=0.8, speedup=2.0, images=32)
    probes = make_probes(check_data(tmp_path / "bccd" / "data.yaml"), 192, cfg, "detect", model)
    graph = build_graph(model, 192)
    made = tied_groups(model, graph, cfg)
    units = pagcp(Job(model, graph, made, cfg, probes, 192))
    figures = measure(model, graph, 192)
    assert figures({})[0] / figures(widths_of(graph, made, units))[0] == pytest.approx(2.0, rel=0.02)
    assert {r["limit"] for r in graph.notes} == {"", "box_loss", "cls_loss"}
    pruned = apply_plan(deepcopy(model), kept_of(graph, made, units))
    recalibrate(pruned, probes.images())
    assert probes.accuracy(pruned)["map"] > 0.40  # 0.556 before; 0.359 with global LAMP
