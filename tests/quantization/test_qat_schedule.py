# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Fake-quantized models as checkpoints: codes that survive rounding, and specs and ranges in the manifest."""

from __future__ import annotations

import pytest
import torch

from yolo_ext.quantization import qat
from yolo_ext.quantization.fake_quant import get_state, insert_fake_quant, insert_state, quantized_layers, quantizers
from yolo_ext.quantization.spec import resolve_profile


@pytest.fixture
def model(build):
    net = build("yolov8n.yaml")
    weights4 = [{"op_types": ["Conv2d"], "quant_bits": {"weight": 4}}]
    insert_fake_quant(net, resolve_profile("ort-x86"), config_list=weights4)
    for *_, q, _ in quantizers(net):
        q.set_range(-1.0, 3.0)
    return net


@pytest.mark.parametrize("per_channel", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.3])
def test_baked_codes_survive_fp16(build, ratio, per_channel):
    """Weights at the border of two codes are the hard case: without baking, rounding moves some of them across."""
    moved = []
    for bake in (False, True):
        net = build("yolov8n.yaml")
        rule = [{"op_types": ["Conv2d"], "quant_bits": {"weight": 4}, "granularity": {"weight": per_channel}}]
        insert_fake_quant(net, resolve_profile("ort-x86"), config_list=rule)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, layer, _ in quantized_layers(net):
                layer.weight_ratio.fill_(ratio)
                w = layer.weight
                scale = w.abs().amax((1, 2, 3), keepdim=True) * ratio / 7
                near = 0.5 + (torch.rand(w.shape, generator=generator) - 0.5) * 1e-3
                border = ((w / scale).floor() + near) * scale
                largest = w.abs() == w.abs().amax((1, 2, 3), keepdim=True)
                w.copy_(torch.where(largest, w, border))
        before = [layer.quantized_weight().clone() for _, layer, _ in quantized_layers(net)]
        if bake:
            qat.bake(net)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p.half().float())
        after = [layer.quantized_weight() for _, layer, _ in quantized_layers(net)]
        moved.append(sum(int((~torch.isclose(a, b, rtol=5e-3, atol=1e-6)).sum()) for a, b in zip(before, after)))
    assert moved[1] == 0
    assert moved[0] > 50 or per_channel == "per_tensor"


def test_strip_and_replay_are_exact(model, images):
    model.eval()
    state, out = get_state(model), model(images)[0]
    qat.strip(model)
    assert not list(quantized_layers(model)) and model.yolo_ext["quant"]["state"] == state
    insert_state(model, model.yolo_ext["quant"]["state"])
    assert get_state(model) == state and torch.equal(model(images)[0], out)
