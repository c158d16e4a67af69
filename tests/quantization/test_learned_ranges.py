# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Learned ranges: what moves, in which parameter group, and that it helps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer

from yolo_ext import quant_loop
from yolo_ext.core.options import QuantConfig
from yolo_ext.quantization.fake_quant import get_state, insert_fake_quant, insert_plan, quantizers
from yolo_ext.quantization.profiles import resolve_profile
from yolo_ext.quantization.spec import Spec

WEIGHT = {"weight": Spec(4, symmetric=True, per_channel=True)}


def layer_of(bits: int = 4, symmetric: bool = False) -> nn.Sequential:
    """Return a convolution of input and weight of few bits, whose ranges are learned and far too wide."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    insert_plan(net, {"0": {"input": Spec(bits, symmetric), **WEIGHT}}, learned=True)
    net[0].input_quantizer.fixed = False
    net[0].input_quantizer.set_range(-20.0, 20.0)
    with torch.no_grad():
        net[0].weight_ratio.fill_(3.0)
    return net.train()


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_training_finds_ranges_that_fit(symmetric):
    """The float layer teaches; only ranges may move."""
    net, x = layer_of(symmetric=symmetric), torch.randn(8, 3, 12, 12)
    target = torch.conv2d(x, net[0].weight.detach())
    ranges = [net[0].input_quantizer.gain, net[0].weight_ratio]
    optimizer, errors = torch.optim.AdamW(ranges, lr=0.04, weight_decay=0.0), []
    for _ in range(80):
        optimizer.zero_grad()
        error = (net(x) - target).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    lo, hi = net[0].input_quantizer.ends()
    assert errors[-1] < 0.3 * errors[0]
    assert hi < 8 and net[0].weight_ratio.abs().max() < 2
    assert lo <= 0 < hi


def test_a_range_that_is_known_is_not_learned(build, images):
    net = build("yolov8n.yaml").train()
    rule = [{"op_names": ["model.0"]}]
    insert_fake_quant(net, resolve_profile("openvino"), config_list=rule, learned=True)
    for *_, q, _ in quantizers(net):
        q.ready or q.set_range(-1.0, 3.0)
    sum(v.sum() for v in net(images)["feats"]).backward()
    found = {path: q for path, site, q, _ in quantizers(net) if site == "input"}
    assert found["model.0.conv"].fixed and found["model.0.conv"].gain.grad is None
    assert found["model.1.conv"].gain.grad.abs().sum() > 0
    assert get_state(net)["model.0.conv"]["input"]["hi"] == 1.0


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "MuSGD"])
def test_learned_ranges_have_a_group_of_their_own(build, optimizer):
    net = build("yolov8n.yaml")
    insert_fake_quant(net, resolve_profile("ort-x86"), learned=True)
    args = SimpleNamespace(optimizer=optimizer, lr0=1e-3, warmup_bias_lr=0.1)
    stock = BaseTrainer.build_optimizer(
        SimpleNamespace(args=args, data={}), net, name=optimizer, lr=1e-3, momentum=0.9, decay=5e-4
    )
    quant_loop.attach(SimpleNamespace(compression={"quant": QuantConfig(learned=True)}), net, stock)
    chosen = {n for n, _ in net.named_parameters() if n.endswith((".gain", ".weight_ratio"))}
    group = stock.param_groups[-1]
    ids = {id(p) for p in group["params"]}
    assert {n for n, p in net.named_parameters() if id(p) in ids} == chosen and chosen
    assert group["weight_decay"] == 0.0 and group["param_group"] == quant_loop.GROUP
    assert group["lr"] == pytest.approx(1e-3 * quant_loop.RANGE_LR)
    every = [id(p) for g in stock.param_groups for p in g["params"]]
    assert len(every) == len(set(every)) == len(list(net.parameters()))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    stock.step()


def test_fixed_ranges_leave_the_optimizer_alone(build):
    net = build("yolov8n.yaml")
    insert_fake_quant(net, resolve_profile("ort-x86"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quant_loop.attach(SimpleNamespace(compression={"quant": QuantConfig()}), net, optimizer)
    assert len(optimizer.param_groups) == 1
    assert not [n for n, _ in net.named_parameters() if n.endswith((".gain", ".weight_ratio"))]
