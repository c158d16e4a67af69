# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.checkpoint import fingerprint, manifest, note
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.pruning.labels import layer_channels
from yolo_ext.pruning.plan import _few_because, layer_report
from yolo_ext.pruning.prune import prune_model
from yolo_ext.pruning.surgery import apply_plan, check_trainable, cut_layer

CFG = PruneConfig(ratio=0.4)


@pytest.fixture(scope="module")
def dense(yolo):
    return yolo("yolov8n")


@pytest.fixture(scope="module")
def pruned(dense):
    return prune_model(dense, CFG)


def gather(dense: nn.Module, kept: dict, name: str) -> torch.Tensor:
    """Return a conv weight of the dense model cut directly at the kept positions."""
    weight = dense.get_submodule(name).weight.detach()
    for axis, dim in enumerate(("out", "in")):
        if dim in kept.get(name, {}) and not (dim == "in" and weight.shape[1] == 1):
            weight = weight.index_select(axis, torch.tensor(kept[name][dim]))
    return weight


# Apply ---------------------------------------------------------------------------------------------------------------
def test_replay_of_the_stored_plan_is_bit_equal(dense, pruned):
    kept = json.loads(json.dumps(manifest(pruned).prune["kept"]))
    again = apply_plan(deepcopy(dense), kept).state_dict()
    assert again.keys() == pruned.state_dict().keys()
    assert all(torch.equal(v, again[k]) for k, v in pruned.state_dict().items())


@pytest.mark.slow
def test_the_dense_model_is_left_alone(dense):
    before, yaml = {k: v.clone() for k, v in dense.state_dict().items()}, deepcopy(dense.yaml)
    prune_model(dense, CFG)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert dense.yaml == yaml and not getattr(dense, "yolo_ext", {}).get("prune")


@pytest.mark.slow
def test_what_is_frozen_stays_frozen(dense):
    model = deepcopy(dense)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith("model.1."))
    small = prune_model(model, replace(CFG, exclude=["1"]))
    assert all(p.requires_grad != n.startswith("model.1.") for n, p in small.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_pruned_twice_counts_in_the_numbering_of_the_first_dense_model(yolo, name):
    dense = yolo(name)
    once = prune_model(dense, PruneConfig(method="l2", ratio=0.25, round_to=4))
    twice = prune_model(once, PruneConfig(method="random", ratio=0.4, seed=5, round_to=2))
    record = manifest(twice).prune
    assert record["parent"] == manifest(once).prune["parent"] == fingerprint(dense)
    assert record["shapes"] == manifest(once).prune["shapes"]
    convs = [n for n, m in twice.named_modules() if isinstance(m, nn.Conv2d)]
    assert sum(twice.get_submodule(n).out_channels < once.get_submodule(n).out_channels for n in convs) > 20
    for n in convs:
        assert torch.equal(twice.get_submodule(n).weight.detach(), gather(dense, record["kept"], n)), n
    replayed = apply_plan(deepcopy(dense), record["kept"]).state_dict()
    assert all(torch.equal(v, replayed[k]) for k, v in twice.state_dict().items())


SHRUNK = {  # layer, kept positions, and what must be left: slices of the weight, and the widths that the layer tells
    "conv": (nn.Conv2d(4, 6, 3), {"out": [1, 5], "in": [0, 2, 3]}, lambda w: w[[1, 5]][:, [0, 2, 3]], (2, 3, 1)),
    "one side": (nn.Conv2d(4, 6, 3, bias=False), {"in": [3]}, lambda w: w[:, [3]], (6, 1, 1)),
    "depthwise": (nn.Conv2d(5, 5, 3, groups=5), {"in": [1, 2], "out": [1, 2]}, lambda w: w[[1, 2]], (2, 2, 2)),
    "depthwise, one left": (nn.Conv2d(5, 5, 3, groups=5), {"out": [3], "in": [3]}, lambda w: w[[3]], (1, 1, 1)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), {"out": [0, 4], "in": [1]}, lambda w: w[[1]][:, [0, 4]], (2, 1, 1)),
    "linear": (nn.Linear(4, 6), {"out": [2, 3], "in": [0, 3]}, lambda w: w[[2, 3]][:, [0, 3]], (2, 2, 1)),
    "norm": (nn.BatchNorm2d(6), {"out": [0, 4, 5]}, lambda w: w[[0, 4, 5]], (3, 3, 1)),
}


@pytest.mark.parametrize("case", SHRUNK)
@pytest.mark.parametrize("learns", [True, False])
def test_a_layer_keeps_these_positions_and_all_else(case, learns):
    """Weights, statistics and gradients to the bit, what is frozen, and layouts; it still runs."""
    layer, dims, cut, widths = SHRUNK[case]
    layer = deepcopy(layer).requires_grad_(learns)
    for t in layer.state_dict().values():
        t.copy_(torch.rand(t.shape))
    for p in layer.parameters():
        p.grad = torch.rand(p.shape)
    old, gradient = deepcopy(layer), layer.weight.grad
    cut_layer(layer, dims)
    pairs = [(layer.weight, old.weight, cut), (layer.weight.grad, gradient, cut)]
    sides = [n for n in ("bias", "running_mean", "running_var") if getattr(old, n, None) is not None]
    pairs += [(getattr(layer, n), getattr(old, n), lambda t: t[dims.get("out", slice(None))]) for n in sides]
    assert all(torch.equal(new, f(was)) for new, was, f in pairs)
    assert all(p.requires_grad == learns and p.is_leaf and p.grad.shape == p.shape for p in layer.parameters())
    n_out, n_in = layer_channels(layer) or (layer.num_features,) * 2
    assert (n_out, n_in, getattr(layer, "groups", 1)) == widths
    x = torch.rand(2, n_in) if isinstance(layer, nn.Linear) else torch.rand(2, n_in, 4, 4)
    assert layer(x).shape[1] == n_out


# Gate ----------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda m: m.model[22].cv2[0][2].bias.data.add_(1e-6), "Pruning is not exact", id="bias"),
        pytest.param(lambda m: m.model[22].cv3[2][2].bias.data.fill_(float("nan")), "Pruning is not exact", id="nan"),
        pytest.param(lambda m: setattr(m.model[2], "c", m.model[2].c - 1), "does not run|not exact", id="width"),
    ],
)
def test_a_fault_in_the_surgery_is_never_returned(dense, monkeypatch, break_it, message):
    def faulty(model, kept):
        model = apply_plan(model, kept)
        for m in model.modules():
            if hasattr(m, "forward_split"):
                m.forward = m.forward_split  # the one that reads the attribute
        break_it(model)
        return model

    monkeypatch.setattr("yolo_ext.pruning.prune.apply_plan", faulty)
    with pytest.raises(CheckFailed, match=f"(?s){message}.*prune.exclude"):
        prune_model(dense, CFG)


def test_gradients_that_are_not_finite_fail(dense):
    model = deepcopy(dense)
    model.model[0].conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="gradients"):
        check_trainable(model)


def quantized(model: nn.Module) -> nn.Module:
    note(model, quant={"ranges": {}})
    return model


def frozen(model: nn.Module) -> nn.Module:
    model.model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "cfg", "message"),
    [
        pytest.param(deepcopy, PruneConfig(), "No pruning target", id="no-target"),
        pytest.param(lambda m: deepcopy(m).fuse(verbose=False), CFG, "fused", id="fused"),
        pytest.param(lambda m: quantized(deepcopy(m)), CFG, "quantized", id="quantized"),
        pytest.param(lambda m: frozen(deepcopy(m)), CFG, r"frozen layers \(model.1\).*exclude=\[1\]", id="frozen"),
        pytest.param(deepcopy, PruneConfig(speedup=90.0), "cannot be reached", id="out-of-reach"),
        pytest.param(
            deepcopy,
            PruneConfig(speedup=2.0, include=["9"], exclude=["9"]),
            "prune.include.*prune.exclude",
            id="nothing-left",
        ),
        pytest.param(deepcopy, PruneConfig(max_drop=0.1), "data", id="no-data-for-a-drop"),
        pytest.param(deepcopy, PruneConfig(latency=1.5), "latency", id="no-clock"),
        pytest.param(deepcopy, PruneConfig(method="taylor", speedup=2.0), "data", id="no-data-for-a-criterion"),
    ],
)
def test_wrong_input(dense, make, cfg, message):
    with pytest.raises(UsageError, match=message):
        prune_model(make(dense), cfg)


# Report --------------------------------------------------------------------------------------------------------------
def test_layer_report_explains_every_layer_that_stays(dense):
    model = prune_model(dense, replace(CFG, exclude=[r"model\.4\.cv2"]))
    rows = {r["name"]: r for r in layer_report(model)}
    convs = {n: m.out_channels for n, m in dense.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n: r["before"] for n, r in rows.items()} == convs
    assert {n: r["after"] for n, r in rows.items()} == {n: model.get_submodule(n).out_channels for n in convs}
    assert rows["model.4.cv2.conv"]["reason"] == "kept whole: it is excluded by prune.exclude"
    output = "kept whole: it is an output of the model: classes and box values set its width"
    assert rows["model.22.cv3.1.2"]["reason"] == output
    assert rows["model.22.dfl.conv"]["reason"] == "kept whole: it has one channel"
    assert all(r["reason"].startswith("kept whole: ") for r in rows.values() if r["after"] == r["before"])
    whole = sum(r["after"] for r in rows.values()) / sum(r["before"] for r in rows.values())
    gave = {n: (1 - r["after"] / r["before"]) / (1 - whole) for n, r in rows.items()}
    assert {n for n, r in rows.items() if r["reason"]} == {n for n, share in gave.items() if share < 0.5}


@pytest.mark.slow
def test_layer_report_gives_the_reason_to_all_layers_of_a_group(dense):
    """The layers of a residual stream share their fate: an excluded one keeps the others, which must say so too."""
    model = prune_model(dense, replace(CFG, exclude=[r"model\.4\.cv1\.conv"]))
    reasons = {r["name"]: r["reason"] for r in layer_report(model)}
    told = "kept whole: it is coupled with model.4.cv1.conv, which prune.exclude keeps"
    assert reasons["model.4.m.0.cv2.conv"] == told


FLOORS = "prune.min_channels=8, prune.round_to=8, prune.max_ratio=0.5"


@pytest.mark.parametrize(
    ("frozen", "config", "words"),
    [
        pytest.param(
            "has 16 channels, which the floors do not let shrink", {}, f"it is at the floor ({FLOORS})", id="floor"
        ),
        pytest.param(
            "is reshaped by 'flatten' in AIFI t", {}, "its channels are split into attention heads", id="attention"
        ),
        pytest.param(
            "must stay as wide as a part that is reshaped by 'view'",
            {},
            "coupled with a part that cannot change: its channels are reshaped (by 'view'), after which they",
            id="tied",
        ),
        pytest.param("goes through 'x' with {y}", {}, "it goes through 'x' with {y}", id="any other"),
        pytest.param("", {"method": "lamp"}, "'lamp' ranks its channels above those of other layers", id="global"),
        pytest.param("", {"scope": "local"}, "each layer gives the same share", id="local"),
        pytest.param("", {"sensitivity": "s.json"}, "'s.json' shows that accuracy falls sooner", id="sensitivity"),
    ],
)
def test_a_reason_is_in_plain_words(frozen, config, words):
    found = {"frozen": {"a": frozen}, "config": {"max_ratio": 0.5, **config}}
    assert _few_because(found, [(64, 64)], "a").startswith(f"kept whole: {words}")


def test_few_channels_at_a_floor_say_so():
    found = {"frozen": {}, "config": {"max_ratio": 0.1}}
    assert _few_because(found, [(80, 72)], "a").startswith("kept most: it is at the floor (prune.min_channels=8")
    assert "ranks its channels" in _few_because(found, [(160, 152)], "a")
    assert "queries and keys" in _few_because(found, [(256, 240)], "model.10.m.0.attn.qkv.conv")


def test_layer_report_of_a_stock_model_is_empty(dense):
    assert layer_report(deepcopy(dense)) == []


@pytest.mark.slow
def test_half_precision_models_stay_half():
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).half().eval()
    assert {p.dtype for p in prune_model(model, CFG).parameters()} == {torch.float16}
