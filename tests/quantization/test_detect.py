# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from yolo_ext.quantization.calibrate import UNLIKE, calibrate, findings, inspect
from yolo_ext.quantization.fake_quant import get_state, insert_fake_quant, insert_plan, load_state
from yolo_ext.quantization.spec import PROFILES, Spec

LAYER = "model.4.cv1.conv"


@pytest.fixture
def quantized(build, images):
    """Return a calibrated YOLOv8n that may be spoiled."""
    net = build("yolov8n.yaml")
    insert_fake_quant(net, PROFILES["ort-x86"])
    calibrate(net, [images], "minmax")
    return net


def spoiled(net, images, lo, hi):
    state = get_state(net)
    state[LAYER]["input"].update(lo=lo, hi=hi)
    load_state(net, state)
    return next(r for r in inspect(net, [images]) if (r["path"], r["site"]) == (LAYER, "input"))


def test_a_calibrated_model_has_no_findings(quantized, images):
    before = get_state(quantized)
    rows = inspect(quantized, [images[:2], images[2:]])
    assert findings(rows) == []
    assert get_state(quantized) == before and not quantized.training
    assert {(r["path"], r["site"]) for r in rows} == {(p, s) for p, sites in before.items() for s in sites}
    assert all(0 <= r["clip"] <= 0.01 and 0 < r["used"] <= 1 and r["channels"] >= 1 for r in rows)
    assert not any(hooks for q in quantized.modules() for hooks in [q._forward_pre_hooks])


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_figures_of_known_values(symmetric):
    net = nn.Sequential(nn.Conv2d(2, 1, 1))
    insert_plan(net, {"0": {"input": Spec(4, symmetric), "weight": Spec(4, True, True)}})
    load_state(net, {"0": {"input": {"lo": -0.7 if symmetric else 0.0, "hi": 0.7 if symmetric else 1.5}}})
    x = torch.zeros(1, 2, 1, 4)
    x[0, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 3.0])
    row = next(r for r in inspect(net, [x]) if r["site"] == "input")
    assert row["clip"] == 1 / 8
    assert row["used"] == 5 / 8  # 0, 1, 2, 3 and the last code, of the eight that eight values could have
    assert row["wide"] == pytest.approx(1.4 / 6 if symmetric else 0.5)
    assert (row["low"], row["high"], row["channels"]) == (0.0, 3.0, 1.0)  # the second channel is dead


@pytest.mark.parametrize(
    ("lo", "hi", "text"),
    [
        pytest.param(0.0, 0.05, "of the values are clipped in model.4.cv1.conv input", id="clipped"),
        pytest.param(-0.3, 400.0, "times as wide as the data in model.4.cv1.conv input.*of the codes", id="wide"),
    ],
)
def test_a_wrong_range_is_found_and_named(quantized, images, lo, hi, text):
    spoiled(quantized, images, lo, hi)
    found = findings(inspect(quantized, [images]))
    assert len(found) == 1
    assert re.search(text, found[0])


def test_codes_of_a_wide_range_lie_idle(quantized, images):
    row = spoiled(quantized, images, -0.3, 4000.0)
    assert row["wide"] > 100 and row["used"] < 0.05 and row["clip"] == 0


def test_what_a_lower_limit_cuts_is_no_finding(quantized, images):
    state = get_state(quantized)
    path, sites = next((p, s) for p, s in state.items() if "output" in s)
    sites["output"]["lo"] = -0.01  # SiLU makes nearly nothing of what lies below its own limit
    load_state(quantized, state)
    row = next(r for r in inspect(quantized, [images]) if (r["path"], r["site"]) == (path, "output"))
    assert row["clip"] < 0.01


def test_nan_and_unlike_channels_are_found(quantized, images):
    with torch.no_grad():
        dict(quantized.named_modules())[LAYER].weight[0] = math.nan
    assert "not finite reach" in findings(inspect(quantized, [images]))[0]


def test_channels_that_one_weight_range_cannot_hold(build, images):
    net = build("yolov8n.yaml")
    net.model[4].cv1.bn.weight.data[3] *= 5000
    entry = {"op_names": [LAYER], "granularity": "per_tensor"}
    insert_fake_quant(net, PROFILES["ort-x86"], config_list=[entry])
    calibrate(net, [images], "minmax")
    rows = inspect(net, [images])
    assert next(r for r in rows if (r["path"], r["site"]) == (LAYER, "weight"))["channels"] > UNLIKE
    assert any(f"median one in {LAYER}" in f or f"{LAYER} weight" in f for f in findings(rows))


def test_a_sentence_names_the_worst_and_counts_the_rest():
    row = {"site": "input", "low": 0.0, "high": 1.0, "used": 1.0, "wide": 1.0, "channels": 1.0}
    text = findings([{**row, "path": f"m{i}", "clip": i / 10} for i in range(1, 7)])[0]
    assert "m6 input (60.0%), m5 input (50.0%), m4 input (40.0%) and 3 more." in text
