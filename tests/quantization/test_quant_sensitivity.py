# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import ClassificationModel

from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import QuantConfig
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import get_state, insert_fake_quant, strip_fake_quant
from yolo_ext.quantization.plan import make_plan
from yolo_ext.quantization.search import config_list, leave_float, order, sensitivity, table, write
from yolo_ext.quantization.spec import PROFILES


def calibrated(net, images, profile="ort-x86", **plan):
    insert_fake_quant(net, PROFILES[profile], **plan)
    calibrate(net, [images], "minmax")
    state = get_state(net)
    strip_fake_quant(net)
    return net, state


@pytest.fixture(scope="module")
def found(build, images):
    """Return an analysis in which one layer has 2-bit weights and so the largest error."""
    entries = [{"default": "all"}, {"op_names": ["model.15.cv1.conv"], "quant_bits": {"weight": 2}}]
    net, state = calibrated(build("yolov8n.yaml"), images, config_list=entries)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    costs = {path: 0.1 for path in state}
    result = sensitivity(net, state, [images[:2], images[2:]], costs=costs)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    return result, net, state


@pytest.mark.slow
def test_the_coarse_layer_is_the_worst(found):
    result, _, state = found
    assert result["groups"][0]["name"] == "model.15.cv1.conv"
    assert {g["name"] for g in result["groups"]} == set(state)
    assert result["images"] == 4 and result["anchors"] >= 100
    errors = [g["error"] for g in result["groups"]]
    assert errors == sorted(errors, reverse=True) and errors[-1] >= 0
    assert result["all"]["box_mean"] > result["groups"][1]["box_mean"]
    assert result["groups"][0]["sqnr"] < result["groups"][-1]["sqnr"]


@pytest.mark.slow
def test_branches_of_the_head_touch_their_own_output_only(found):
    box, cls = (next(g for g in found[0]["groups"] if g["name"] == f"model.22.{b}.0.1.conv") for b in ("cv2", "cv3"))
    assert box["box_mean"] > 0 == box["score_max"]
    assert cls["score_max"] > 0 == cls["box_mean"]


@pytest.mark.slow
def test_same_again(found, images):
    result, net, state = found
    again = sensitivity(net, state, [images[:2], images[2:]], costs={path: 0.1 for path in state})
    assert again == result


@pytest.mark.slow
def test_blocks_take_their_layers_together(found, images):
    _, net, state = found
    result = sensitivity(net, state, [images], by="block")
    groups = {g["name"]: g["layers"] for g in result["groups"]}
    assert sorted(p for layers in groups.values() for p in layers) == sorted(state)
    assert {"model.2", "model.22.cv2", "model.22.cv3"} <= set(groups) and len(groups["model.2"]) == 4


@pytest.mark.slow
def test_order_prefers_layers_that_save_little_time(found):
    result, *_ = found
    slow = result["groups"][1]["name"]
    groups = [{**g, "ms": 0.0 if g["name"] == slow else g["ms"]} for g in result["groups"]]
    assert order({"groups": [{**g, "error_per_ms": g["error"] / max(g["ms"], 0.025)} for g in groups]})[0] == [slow]
    assert [p for [p] in order(result)] == [g["name"] for g in result["groups"]]  # all cost the same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("yaml", "profile"),
    [
        pytest.param("yolov10n.yaml", "ort-x86", id="two heads"),
        pytest.param("yolo26n.yaml", "ort-x86", id="v26"),
        pytest.param("yolov8n.yaml", "ort-x86-full", id="full"),
        pytest.param("yolov8n.yaml", "tensorrt", id="tensorrt"),
    ],
)
def test_heads_and_profiles(yaml, profile, build, images):
    net, state = calibrated(build(yaml), images, profile)
    few = {p: s for i, (p, s) in enumerate(state.items()) if i % 8 == 0 or "one2one" in p or i > len(state) - 4}
    result = sensitivity(net, few, [images])
    names = {g["name"] for g in result["groups"]}
    assert names and all("weight" in few[n] for n in names)
    assert all(g["sqnr"] > 0 and g["error"] >= 0 for g in result["groups"])


def test_classification(images):
    torch.manual_seed(0)
    net = ClassificationModel("yolov8n-cls.yaml", nc=5, verbose=False)
    for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.momentum = 1.0
    net.train()(images)  # statistics of these images: with fresh ones the signal dies out on the way
    net, state = calibrated(net.eval(), images)
    few = {p: state[p] for p in list(state)[::9]}
    result = sensitivity(net, few, [images])
    assert result["anchors"] == len(images)
    assert all(g["box_mean"] == 0 for g in result["groups"]) and result["all"]["score_max"] > 0


def test_score_of_each_group(found, images):
    _, net, state = found
    seen = []
    few = {p: state[p] for p in list(state)[:2]}
    result = sensitivity(net, few, [images], score=lambda m: seen.append(m) or 0.5 - 0.1 * (len(seen) > 1))
    assert result["base"]["map"] == 0.5
    assert [g["map_drop"] for g in result["groups"]] == pytest.approx([0.1, 0.1])


def test_files(found, tmp_path):
    files = write(found[0], tmp_path)
    assert json.loads(files[0].read_text()) == found[0]
    rows = list(csv.DictReader(files[1].open()))
    assert [r["name"] for r in rows] == [g["name"] for g in found[0]["groups"]]
    assert float(rows[0]["box_mean"]) == found[0]["groups"][0]["box_mean"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    text = table(found[0], 3)
    assert "model.15.cv1.conv" in text and "everything" in text and "more layers with smaller errors" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"by": "neck"}, "by=neck.*layer, block", id="by"),
        pytest.param({"batches": []}, "needs images", id="no images"),
        pytest.param({"state": {}}, "at least one quantized layer", id="no layers"),
    ],
)
def test_wrong_input(found, images, change, text):
    _, net, state = found
    with pytest.raises(UsageError, match=text):
        sensitivity(**{"model": net, "state": state, "batches": [images], **change})


# Leaving layers float ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("profile", ["ort-x86", "ort-x86-full", "openvino"])
def test_left_float_is_what_planning_without_the_layers_gives(build, images, profile):
    net, state = calibrated(build("yolov8n.yaml"), images, profile)
    excluded = ["model.4.cv1.conv", "model.16.conv"]
    cfg, asked = QuantConfig(observer="minmax"), []

    def batches():
        asked.append(1)
        return [images]

    part = leave_float(net, state, excluded, PROFILES[profile], cfg, batches)
    plan, _ = make_plan(net, PROFILES[profile], (), config_list(excluded))
    assert {p: set(s) for p, s in part.items()} == {p: set(s) for p, s in plan.items()}
    assert not set(excluded) & set(part)
    same = [(p, s) for p, sites in part.items() for s in sites if s in state.get(p, {})]
    assert all(part[p][s] == state[p][s] for p, s in same)
    assert len(asked) == (1 if profile == "ort-x86-full" else 0)  # new sites need images, others none
    assert all("lo" in e for sites in part.values() for s, e in sites.items() if s != "weight")
