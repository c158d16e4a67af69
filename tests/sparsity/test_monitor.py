# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_ext import stock
from yolo_ext.core.config import PruneConfig, SparsityConfig
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.plan import kept_of, spare_units
from yolo_ext.pruning.surgery import apply_plan
from yolo_ext.sparsity.monitor import EDGES, conclusion, noted, observe, plot

PRUNE = PruneConfig(speedup=2.0)


@pytest.fixture(scope="module")
def dense():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small convolutions on shared cores
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
    yield model, build_graph(model)
    torch.set_num_threads(threads)


@pytest.fixture
def planted(dense):
    """Half of the channels of `model.5`, and a quarter of those of `model.7`, are gone."""
    model = deepcopy(dense[0])
    with torch.no_grad():
        model.model[5].bn.weight[::2] = 0
        model.model[7].bn.weight[:64] = 1e-3
    return model


def look(model, graph=None, method="slim", **options):
    cfg = SparsityConfig(method=method, **options)
    return observe(model, cfg, PRUNE, epoch=3, coefficient=0.5, penalty=1.25, imgsz=64, pull=0.1, graph=graph)


@pytest.mark.parametrize("method", ["slim", "group_slim"])
def test_a_record_says_what_is_gone(dense, planted, method):
    found = look(planted, dense[1], method)
    channels = sum(found["histogram"])
    assert found["share"] == pytest.approx((64 + 64) / channels)
    assert {k: v for k, v in found["layers"].items() if v} == {"model.5.conv": 0.5, "model.7.conv": 0.25}
    assert (found["epoch"], found["coefficient"], found["penalty"], found["pull"]) == (3, 0.5, 1.25, 0.1)
    assert found["histogram"][0] == 64 and len(found["histogram"]) == len(EDGES) - 1
    assert found["scores"] == "|gamma|"
    assert json.loads(json.dumps(found)) == found


def test_weight_penalties_are_seen_by_norms(dense):
    """A channel is gone when all that produces and reads it is small, not when its scale is."""
    model = deepcopy(dense[0])
    group = next(g for g in dense[1].groups if g.name == "model.22.cv2.0.0.conv")
    with torch.no_grad():
        for m in group.members:
            layer = model.get_submodule(m.module)
            if isinstance(layer, nn.Conv2d):
                (layer.weight if m.dim == "out" else layer.weight.transpose(0, 1))[m.index[:16].flatten()] *= 1e-3
    found = look(model, dense[1], "group_sl")
    assert {k: v for k, v in found["layers"].items() if v} == {group.name: 16 / group.size}
    assert found["scores"] == "relative norm" and sum(found["histogram"][:41]) == 16  # the bins up to 0.01


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.01, 0.7])
def test_the_predicted_size_is_that_of_the_pruned_model(dense, planted, threshold):
    found = look(planted, dense[1], threshold=threshold)
    graph = build_graph(planted)
    made = tied_groups(planted, graph, PruneConfig(method="slim"))
    pruned = apply_plan(deepcopy(planted), kept_of(graph, made, spare_units(made, threshold)))
    assert found["speedup"] == pytest.approx(stock.gflops(planted, 64) / stock.gflops(pruned, 64), rel=0.02)
    sizes = [sum(p.numel() for p in stock.deployed(m).parameters()) for m in (planted, pruned)]
    assert found["params"] == pytest.approx(sizes[0] / sizes[1], rel=0.02)
    assert found["speedup"] > 1.02


def test_without_zeros_there_is_nothing_to_gain(dense):
    found = look(*dense)
    assert found["share"] == 0 and found["speedup"] == found["params"] == 1


def test_excluded_layers_do_not_count(dense, planted):
    found = observe(planted, SparsityConfig(), PruneConfig(exclude=["5"]), 0, 1.0, 0.0, 64)
    assert "model.5.conv" not in found["layers"] and found["layers"]["model.7.conv"] == 0.25


@pytest.mark.slow
def test_shares_and_targets_of_pruning_do_not_matter(dense, planted):
    cfg = PruneConfig(method="lamp", ratios={"7": 0.5}, max_ratio=0.8)
    found = observe(planted, SparsityConfig(), cfg, 3, 0.5, 1.25, 64, pull=0.1)
    assert found == look(planted)


@pytest.mark.slow
def test_the_model_is_not_changed(dense):
    model = deepcopy(dense[0]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    look(model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_penalty_of_the_users_own_is_seen_by_scales(dense, planted):
    own = look(planted, dense[1], "my.module:penalty")
    assert own == {**look(planted, dense[1]), "method": "my.module:penalty"}


def test_what_goes_into_results_csv_are_numbers(dense, planted):
    found = look(planted, dense[1])
    assert all(isinstance(found[k], float) for k in ("share", "speedup", "coefficient", "pull"))


def test_a_penalty_that_is_not_a_number_is_still_json(dense):
    found = observe(*dense[:1], SparsityConfig(), PRUNE, 0, 1.0, float("nan"), 64, graph=dense[1])
    assert json.loads(json.dumps(found, allow_nan=False))["penalty"] is None


# History -------------------------------------------------------------------------------------------------------------
def test_history_of_a_resumed_run_has_each_epoch_once(tmp_path):
    for epoch, run in [(0, "a"), (1, "a"), (2, "a"), (3, "a"), (2, "b"), (3, "b")]:
        history = noted(tmp_path / "run", {"epoch": epoch, "run": run})
    assert [(r["epoch"], r["run"]) for r in history["epochs"]] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert history["edges"] == EDGES and history == json.loads((tmp_path / "run" / "sparsity.json").read_text())


@pytest.mark.slow
def test_history_draws_its_pictures(tmp_path, dense, planted):
    noted(tmp_path, {**look(*dense), "epoch": 0})
    pictures = plot(noted(tmp_path, {**look(planted, dense[1]), "epoch": 1, "collapsed": ["model.2.cv1"]}), tmp_path)
    assert [p.name for p in pictures] == ["sparsity.png", "sparsity_layers.png"]
    assert all(p.stat().st_size > 10_000 for p in pictures)


@pytest.mark.parametrize(
    ("last", "held", "hint"),
    [
        pytest.param({"speedup": 1.01, "fitness": 0.5}, [], "give more epochs or a larger", id="too-little"),
        pytest.param({"speedup": 1.8, "fitness": 0.3}, list("abcd"), "holds a, b, c and 1 more: lower", id="too-much"),
        pytest.param({"speedup": 1.8, "fitness": 0.49}, ["a"], "", id="held-without-harm"),
        pytest.param({"speedup": 1.8, "fitness": 0.3}, [], "", id="lost-by-something-else"),
        pytest.param({"speedup": 1.8}, ["a"], "", id="no-validation"),
    ],
)
def test_hints_are_given_where_they_apply_and_only_one(last, held, hint):
    told = conclusion([{"fitness": 0.5 if "fitness" in last else 0.0}, {"share": 0.4, **last}], held, 0.05)
    assert told.startswith(f"40.0% of the channels are near zero, which is worth FLOPs / {last['speedup']:.2f}")
    assert hint in told and told.count("sparsity.coefficient") == bool(hint)
