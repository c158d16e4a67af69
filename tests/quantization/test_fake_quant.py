# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.modules import Conv, DWConv
from ultralytics.utils.torch_utils import ModelEMA, fuse_conv_and_bn

from yolo_ext.errors import UsageError
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.profiles import PROFILES

PROFILE = dataclasses.replace(PROFILES["ort-x86"], float_stem=False)


def block_ranges(net: nn.Module) -> fq.Ranges:
    """Return made-up ranges for every quantizer."""
    return {
        path: {"input": [-0.3, 4.0], "output": [-5.0, 6.0]} for path, site, *_ in fq.quantizers(net) if site == "input"
    }


def output(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = net(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.fixture
def net(build):
    return build("yolo11n.yaml")


@pytest.fixture
def quantized(net):
    fq.insert_fake_quant(net, PROFILE)
    fq.load_ranges(net, block_ranges(net))
    return net


@given(
    lo=st.floats(-50, 0), hi=st.floats(0.01, 50), data=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)
)
@settings(max_examples=100, deadline=None)
def test_quantizer_error_and_clipping(lo, hi, data):
    q = fq.RangeQuantizer(255)
    q.set_range(lo, hi)
    x = torch.tensor(data)
    y = q(x)
    scale = (hi - min(lo, 0)) / 255
    low, high = lo - scale / 2, hi + scale / 2  # rounding the zero point shifts the grid by up to half a step
    inside = (x >= lo) & (x <= hi)
    assert ((y - x).abs()[inside] <= scale * 1.001 + 1e-6).all()
    assert (y >= low - 1e-4).all() and (y <= high + 1e-4).all()
    assert q(torch.zeros(1)).item() == 0
    assert torch.equal(q(y), y)


def test_quantizer_error_is_half_a_step_inside_the_grid():
    q = fq.RangeQuantizer(255)
    q.set_range(-1.0, 1.55)
    x = torch.linspace(-1, 1.55, 10_001)
    assert (q(x) - x).abs().max() <= 0.005 * 1.001


def test_gradient_is_clipped_straight_through():
    q = fq.RangeQuantizer(255)
    q.set_range(-1.0, 2.0)
    x = torch.tensor([-3.0, -0.5, 1.5, 4.0], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_gradients_flow_through_the_model(quantized, images):
    quantized.train()
    y = quantized(images)
    sum(v.float().square().mean() for v in y.values() if torch.is_tensor(v)).backward()
    convs = [m for m in quantized.modules() if isinstance(m, fq.QuantConv2d)]
    assert convs and all(c.weight.grad is not None and c.weight.grad.abs().sum() > 0 for c in convs)
    assert not [n for n, _ in quantized.named_parameters() if "quantizer" in n]


@pytest.mark.parametrize("name", PROFILES)
@torch.no_grad()
def test_weight_codes_survive_the_bn_fold(name):
    torch.manual_seed(0)
    net = nn.Sequential(Conv(3, 8, 3), DWConv(8, 8, 3, act=nn.ReLU())).eval()
    for m in net:
        nn.init.normal_(m.bn.weight)  # negative gains flip codes
        m.bn.running_var.uniform_(0.1, 3)
    fq.insert_fake_quant(net, dataclasses.replace(PROFILE, weight_bits=PROFILES[name].weight_bits))
    x = torch.randn(2, 3, 16, 16)
    unfused = output(net, x)
    qmax = PROFILES[name].weight_qmax
    for m in net:
        w = m.conv.quantized_weight()
        codes = w / (m.conv.weight.abs().amax((1, 2, 3), keepdim=True) / qmax)
        assert codes.abs().max() == pytest.approx(qmax, abs=1e-3)
        assert (codes - codes.round()).abs().max() < 1e-3
    fused = copy.deepcopy(net)
    for m in fused:
        m.conv = fuse_conv_and_bn(m.conv, m.bn)
        del m.bn
        m.forward = m.forward_fuse
    assert torch.allclose(output(fused, x), unfused, atol=1e-4)


def test_float_mode_equals_the_stock_model(net, images):
    stock = output(net, images)
    fq.insert_fake_quant(net, PROFILE)
    fq.load_ranges(net, block_ranges(net))
    fq.set_mode(net, "float")
    assert torch.equal(output(net, images), stock)
    fq.set_mode(net, "on")
    assert not torch.equal(output(net, images), stock)


def test_strip_restores_exactly_the_stock_model(net, images):
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    acts = [m.act for m in net.modules() if hasattr(m, "act")]
    stock = output(net, images)
    fq.insert_fake_quant(net, PROFILE)
    fq.load_ranges(net, block_ranges(net))
    assert set(keys) < set(net.state_dict())
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(net), buffer)
    restored = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for model in (net, restored):
        fq.strip_fake_quant(model)
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
        assert not [m for m in model.modules() if type(m).__module__.startswith("yolo_ext")]
        assert torch.equal(output(model, images), stock)
    assert all(a is b for a, b in zip(acts, (m.act for m in net.modules() if hasattr(m, "act"))))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    assert b"yolo_ext.quantization" not in buffer.getvalue()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "half", "channels_last", "ranges"])
def test_round_trips_are_bit_equal(quantized, build, images, how):
    expected, ranges = output(quantized, images), fq.get_ranges(quantized)
    if how == "deepcopy":
        other = copy.deepcopy(quantized)
    elif how == "pickle":
        buffer = io.BytesIO()
        torch.save(quantized, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    elif how == "state_dict":
        other = build("yolo11n.yaml")
        fq.insert_fake_quant(other, PROFILE)
        other.load_state_dict(quantized.state_dict())
    elif how == "half":
        other = copy.deepcopy(quantized).half().float()
        other.load_state_dict({k: v for k, v in quantized.state_dict().items() if "quantizer" not in k}, strict=False)
    elif how == "channels_last":
        other = copy.deepcopy(quantized).to(memory_format=torch.channels_last)
        assert fq.get_ranges(other) == ranges
        assert torch.allclose(output(other, images)[:, 4:], expected[:, 4:], atol=0.1)
        return
    else:
        other = fq.strip_fake_quant(copy.deepcopy(quantized))
        fq.insert_fake_quant(other, PROFILE)
        fq.load_ranges(other, ranges)
    assert fq.get_ranges(other) == ranges
    assert torch.equal(output(other, images), expected)


def test_ema_keeps_ranges(quantized):
    ema = ModelEMA(quantized)
    ema.update(quantized)
    ours, its = fq.get_ranges(quantized), fq.get_ranges(ema.ema)
    assert ours.keys() == its.keys()
    for path, r in ours.items():
        for site, ends in r.items():
            assert its[path][site] == pytest.approx(ends, rel=1e-6)


def test_half_precision_runs_and_keeps_type(quantized, images):
    block = quantized.half().model[0]
    assert block(images.half()).dtype == torch.float16
    assert block.conv.input_quantizer.lo.dtype == torch.float32


def test_fuse_keeps_quantizers_and_result(quantized, images):
    before = output(quantized, images)
    fused = copy.deepcopy(quantized).fuse(verbose=False)
    assert fq.get_ranges(fused).keys() == fq.get_ranges(quantized).keys()
    after = output(fused, images)
    assert (after[:, :4] - before[:, :4]).abs().mean() < 0.1
    assert (after[:, 4:] - before[:, 4:]).abs().mean() < 0.02
    assert output(copy.deepcopy(fused), images).equal(after)  # forward_fuse is bound to the copy, not to the original


def test_ranges_follow_training_data_until_frozen(quantized, images):
    fq.set_mode(quantized, "on", momentum=0.5)
    before = fq.get_ranges(quantized)
    quantized.eval()(images)
    assert fq.get_ranges(quantized) == before
    quantized.train()(images)
    moved = fq.get_ranges(quantized)
    assert moved["model.1.conv"] != before["model.1.conv"]
    assert moved["model.0.conv"]["input"] == before["model.0.conv"]["input"]  # images are 0 to 1 whatever comes
    assert all(lo >= fq.SILU_LOWER and lo <= 0 <= hi for r in moved.values() for lo, hi in r.values())
    fq.set_mode(quantized, "on", momentum=0.0)
    quantized(images)
    assert fq.get_ranges(quantized) == moved


def test_following_survives_nan():
    q = fq.RangeQuantizer(255).train()
    q.momentum = 0.1
    q(torch.tensor([float("nan"), 1.0]))
    assert not q.ready
    q(torch.tensor([-1.0, 3.0]))
    q(torch.tensor([float("inf"), 1.0]))
    assert (q.lo.item(), q.hi.item(), q.ready) == (-1.0, 3.0, True)


def test_uncalibrated_quantizers_pass_values_on():
    q, x = fq.RangeQuantizer(255), torch.randn(5)
    assert q(x) is x


def test_exclude_gives_reasons(net):
    reasons = fq.insert_fake_quant(net, PROFILE, exclude=(r"^model\.0\.", "attn"))
    assert reasons["model.0.conv"] == r"excluded by '^model\.0\.'"
    assert reasons["model.10.m.0.attn.qkv.conv"] == "excluded by 'attn'"
    assert type(net.model[0].conv) is nn.Conv2d and type(net.model[1].conv) is fq.QuantConv2d
    assert not net.model[1].conv.input_quantizer.fixed


def test_float_stem_is_a_matter_of_the_profile(net):
    reasons = fq.insert_fake_quant(net, PROFILES["ort-x86"])
    assert "image input" in reasons["model.0.conv"] and "model.1.conv" not in reasons


def test_profile_without_output_quantizers(net):
    fq.insert_fake_quant(net, dataclasses.replace(PROFILE, output_quantizers=False))
    assert {site for _, site, *_ in fq.quantizers(net)} == {"input"}


@pytest.mark.parametrize(
    ("act", "lowest"), [(nn.SiLU(), -6.0), (nn.ReLU(), -20.0), (nn.Identity(), -20.0)], ids=["silu", "relu", "none"]
)
def test_only_silu_limits_the_low_end(act, lowest):
    net = nn.Sequential(Conv(3, 4, act=act))
    fq.insert_fake_quant(net, PROFILE)
    net[0].act.output_quantizer.set_range(-20, 5)
    assert fq.get_ranges(net)["0.conv"]["output"] == [lowest, 5.0]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda n: fq.insert_fake_quant(n, PROFILE), "Strip them first"),
        (lambda n: fq.set_mode(n, "of"), "Legal: float, off, observe, on"),
        (lambda n: fq.load_ranges(n, {"model.99.conv": {"input": [0, 1]}}), "model.99.conv"),
        (lambda n: fq.insert_fake_quant(fq.strip_fake_quant(n), PROFILE, ("(",)), "not a regular expression"),
        (lambda n: fq.insert_fake_quant(fq.strip_fake_quant(n), PROFILE, ("modle",)), "matches none of the"),
    ],
    ids=["twice", "mode", "ranges", "regex", "no match"],
)
def test_usage_errors(quantized, action, message):
    with pytest.raises(UsageError, match=message):
        action(quantized)
