# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy

import pytest
from torch import nn
from ultralytics.nn.tasks import ClassificationModel

from yolo_ext.checkpoint import set_tripwire
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import matches, refuse_frozen, restrict, shares


@pytest.fixture(scope="module")
def traced(yolo):
    """Model and graph; reasons are written into a graph, so each test gets a copy."""
    model = yolo("yolov8n")
    graph = build_graph(model)
    return model, lambda: deepcopy(graph)


def layers(found: set[str]) -> list[str]:
    """Return the top-level layers of module paths, in order."""
    return [f"model.{i}" for i in sorted({int(p.split(".")[1]) for p in found})]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        pytest.param("9", ["model.9"], id="index"),
        pytest.param("2", ["model.2"], id="index-is-not-a-prefix-of-22"),
        pytest.param("model.9.cv2", ["model.9"], id="path"),
        pytest.param(r"model\.[24]", ["model.2", "model.4"], id="expression-of-a-block"),
        pytest.param(r"model\.(2|15)\.cv1\.conv", ["model.2", "model.15"], id="expression-of-layers"),
        pytest.param("SPPF", ["model.9"], id="type"),
        pytest.param("C2f", [f"model.{i}" for i in (2, 4, 6, 8, 12, 15, 18, 21)], id="type-of-many"),
        pytest.param("backbone", [f"model.{i}" for i in range(10)], id="backbone"),
        pytest.param("neck", [f"model.{i}" for i in range(10, 22)], id="neck"),
        pytest.param("head", ["model.22"], id="head"),
    ],
)
def test_what_a_selector_means(traced, selector, expected):
    assert layers(matches(traced[0], selector)) == expected


def test_a_path_means_all_within_it_and_nothing_beside_it(traced):
    inside = {p for p, _ in traced[0].named_modules() if p == "model.9.cv2" or p.startswith("model.9.cv2.")}
    assert matches(traced[0], "model.9.cv2") == inside
    assert "model.9.cv2.conv" in inside


def test_a_layer_type_means_each_layer(traced):
    convs = {p for p, m in traced[0].named_modules() if isinstance(m, nn.Conv2d)}
    assert matches(traced[0], "Conv2d") == convs


def test_sections_of_a_pruned_model(traced):
    model = deepcopy(traced[0])
    set_tripwire(model)
    assert layers(matches(model, "neck")) == [f"model.{i}" for i in range(10, 22)]


def test_a_classifier_has_no_neck():
    model = ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False)
    assert layers(matches(model, "head")) == ["model.9"]
    with pytest.raises(UsageError, match=r"'prune\.include=neck' matches no layer"):
        matches(model, "neck", "prune.include")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        pytest.param("modle.9", r"'prune.exclude=modle.9' matches no layer\. Did you mean 'model\.9'\?", id="typing"),
        pytest.param("c2f", r"Did you mean 'C2f'\?", id="case"),
        pytest.param("bakbone", r"Did you mean 'backbone'\?", id="section"),
        pytest.param("99", "'prune.exclude=99' matches no layer", id="index"),
        pytest.param("", "'prune.exclude=' matches no layer", id="empty"),
        pytest.param("conv", "matches no layer", id="a-part-of-a-name-is-not-a-name"),
        pytest.param("model.(2", "is no layer and is not a regular expression", id="broken"),
        pytest.param("Upsample", "matches only modules that produce no channels", id="no-channels"),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_selectors_that_mean_nothing(traced, option, selector, message):
    model, graph = traced
    with pytest.raises(UsageError, match=message.replace("exclude", option)) as e:
        restrict(model, graph(), PruneConfig(**{option: [selector]}))
    assert "\n" not in str(e.value)


def test_sections_need_a_yaml():
    net = nn.Sequential()
    net.model = nn.Sequential(nn.Conv2d(3, 6, 1))
    with pytest.raises(UsageError, match="the model has no YAML"):
        matches(net, "backbone")


# Include, exclude ----------------------------------------------------------------------------------------------------
def reasons(graph) -> dict[str, str]:
    return {p: g.frozen for g in graph.groups for p in g.producers}


def test_include_freezes_the_rest_and_takes_coupled_layers_along(traced):
    model, graph = traced
    used = graph()
    restrict(model, used, PruneConfig(include=["model.4.m.0.cv2.conv"]))
    found = reasons(used)
    free = {p for p, reason in found.items() if not reason and p.endswith(".conv")}
    # both bottlenecks add to one half of cv1, and the other half keeps its width
    assert free == {"model.4.cv1.conv", "model.4.m.0.cv2.conv", "model.4.m.1.cv2.conv"}
    assert found["model.4.m.0.cv1.conv"] == "is not in prune.include"


def test_exclude_says_who_asked_and_who_only_follows(traced):
    model, graph = traced
    used = graph()
    restrict(model, used, PruneConfig(exclude=["model.5", "model.4.m.0.cv2"]))
    found = reasons(used)
    assert found["model.5.conv"] == "is excluded by prune.exclude"
    assert found["model.4.m.1.cv2.conv"].startswith("is coupled with model.4.m.0.cv2")
    assert found["model.4.m.1.cv2.conv"].endswith("which prune.exclude keeps")
    assert found["model.4.m.0.cv1.conv"] == ""


def test_exclude_wins_over_include(traced):
    model, graph = traced
    used = graph()
    restrict(model, used, PruneConfig(include=["backbone"], exclude=["0"]))
    assert reasons(used)["model.0.conv"] == "is excluded by prune.exclude"
    assert reasons(used)["model.1.conv"] == ""
    assert reasons(used)["model.16.conv"] == "is not in prune.include"


# Shares --------------------------------------------------------------------------------------------------------------
def test_shares_by_group(traced):
    model, graph = traced
    used = graph()
    found = shares(model, used, PruneConfig(ratios={"model.9": 0.5, "0": 0.25}))
    names = {used.groups[used.ties[i][0]].name: share for i, share in found.items()}
    assert names == {"model.0.conv": 0.25, "model.9.cv1.conv": 0.5, "model.9.cv2.conv": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"ratios": {"model.9": 0.5, "SPPF": 0.4}}, "two shares: 0.5 by 'model.9' and 0.4", id="conflict"),
        pytest.param(
            {"ratios": {"model.4.m.0.cv2": 0.5, "model.4.m.1.cv2": 0.4}}, "coupled layers lose", id="coupled-conflict"
        ),
        pytest.param({"ratios": {"DFL": 0.5}}, "'prune.ratios=DFL' cannot be pruned: model.22", id="frozen"),
        pytest.param(
            {"ratios": {"5": 0.5}, "exclude": ["5"]}, "model.5.conv is excluded by prune.exclude", id="excluded"
        ),
        pytest.param({"ratios": {"nine": 0.5}}, "'prune.ratios=nine' matches no layer", id="nothing"),
    ],
)
def test_shares_that_contradict(traced, options, message):
    model, graph = traced
    used, cfg = graph(), PruneConfig(**options)
    restrict(model, used, cfg)
    with pytest.raises(UsageError, match=message):
        shares(model, used, cfg)


def test_the_same_share_twice_is_no_conflict(traced):
    model, graph = traced
    assert set(shares(model, graph(), PruneConfig(ratios={"model.9": 0.5, "SPPF": 0.5})).values()) == {0.5}


# Frozen layers -------------------------------------------------------------------------------------------------------
def test_layers_that_cannot_learn_are_refused(traced):
    model = deepcopy(traced[0]).requires_grad_(True)
    names = ["model.0.conv", "model.0.bn", "model.1.conv", "model.16.conv"]
    refuse_frozen(model, names)
    model.model[:2].requires_grad_(False)
    with pytest.raises(UsageError, match=r"frozen layers \(model\.0, model\.1\).*prune\.exclude=\[0, 1\]"):
        refuse_frozen(model, names)
    refuse_frozen(model, names[3:])  # kept whole, so nothing is wrong
    refuse_frozen(model.requires_grad_(False), names)  # loaded for inference: nobody froze a part of it
