# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.modules import Conv, DWConv
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.layers import QuantAct, RangeQuantizer
from yolo_ext.quantization.spec import Spec

specs = st.builds(Spec, st.integers(2, 16), st.booleans())
LOW, HIGH = st.floats(-50, 0), st.floats(0.01, 50)
PER_CHANNEL, PER_TENSOR = Spec(7, True, True), Spec(7, True, False)


def quantizer(spec: Spec, lo: float, hi: float) -> RangeQuantizer:
    q = RangeQuantizer(spec)
    q.set_range(lo, hi)
    return q


@given(specs, LOW, HIGH, st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30))
@settings(max_examples=150, deadline=None)
def test_quantizer_properties(spec, lo, hi, data):
    q, x = quantizer(spec, lo, hi), torch.tensor([*data, 0.0])
    y = q(x)
    step = (max(-lo, hi) if spec.symmetric else hi - lo) / spec.qmax
    zero = 0 if spec.symmetric else round(-lo / step)
    low, high = (spec.qmin - zero) * step, (spec.qmax - zero) * step
    inside = (x >= low) & (x <= high)
    assert ((y - x).abs()[inside] <= step * 0.5005 + x.abs()[inside] * 1e-6).all()
    assert (y >= low - 1e-4).all() and (y <= high + 1e-4).all()
    assert y[-1] == 0
    assert torch.equal(q(y), y)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12, 16])
def test_number_of_codes(bits, symmetric):
    q = quantizer(Spec(bits, symmetric), -1.0, 1.5)
    values = q(torch.linspace(-2, 2, 200_001)).unique()
    assert len(values) == q.spec.qmax - q.spec.qmin + 1 <= 2**bits
    assert torch.allclose(values.diff(), torch.tensor(2.5 if not symmetric else 1.5) / q.spec.qmax, rtol=0.02)


def test_gradient_is_clipped_straight_through():
    q = quantizer(Spec(), -1.0, 2.0)
    x = torch.tensor([-3.0, -0.5, 1.5, 4.0], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_ranges_follow_values_but_not_nan():
    q = RangeQuantizer(Spec()).train()
    q.momentum = 0.1
    q(torch.tensor([float("nan"), 1.0]))
    assert not q.ready
    q(torch.tensor([-1.0, 3.0]))
    q(torch.tensor([float("inf"), 1.0]))
    assert (q.lo.item(), q.hi.item(), q.ready) == (-1.0, 3.0, True)
    q(torch.tensor([-2.0, 13.0]))
    assert (q.lo.item(), q.hi.item()) == pytest.approx((-1.1, 4.0))
    q.eval()(torch.tensor([-9.0, 90.0]))
    assert q.hi.item() == pytest.approx(4.0)


def test_uncalibrated_quantizers_pass_values_on():
    q, x = RangeQuantizer(Spec()), torch.randn(5)
    assert q(x) is x


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [(1.0, 3.0, (0, 3)), (-3.0, -1.0, (-3, 0)), (0.0, 0.0, (0, 1e-5)), (-9.0, 1.0, (-6, 1))],
    ids=["positive", "negative", "empty", "below the limit"],
)
def test_set_range_holds_zero(lo, hi, expected):
    q = RangeQuantizer(Spec(), lower=-6.0)
    q.set_range(lo, hi)
    assert (q.lo.item(), q.hi.item()) == pytest.approx(expected, abs=2e-5)
    assert q(torch.zeros(3)).tolist() == [0, 0, 0] and q(torch.ones(3)).isfinite().all()


def test_half_and_back_keeps_ranges_and_tensors():
    net = nn.Sequential(Conv(3, 4))
    fq.insert_plan(net, {"0.conv": {"input": Spec(), "weight": PER_CHANNEL}})
    q, layer = net[0].conv.input_quantizer, net[0].conv
    q.set_range(-0.1234567, 1.2345678)
    layer.weight_ratio.data.copy_(torch.tensor([0.7777777, 0.1234567, 1.0, 0.9999]))
    held, before = (q.lo, layer.weight_ratio), fq.get_state(net)
    net.half()
    assert net[0].conv.weight.dtype == torch.float16 and net[0](torch.rand(1, 3, 8, 8).half()).dtype == torch.float16
    assert fq.get_state(net) == before == fq.get_state(net.float())
    assert all(a is b for a, b in zip(held, (q.lo, layer.weight_ratio)))


def block(groups: int = 1, act: nn.Module | bool = True) -> nn.Sequential:
    """Return blocks with positive, negative and zero BatchNorm gains."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv(4, 8, 3, g=groups, act=act), DWConv(8, 8, 3, act=nn.ReLU())).eval()
    for m in net:
        nn.init.normal_(m.bn.weight)
        nn.init.normal_(m.bn.bias)
        m.bn.weight.data[2] = 0
        m.bn.running_var.uniform_(0.1, 3)
        m.bn.running_mean.normal_()
    return net


def fuse(net: nn.Module) -> nn.Module:
    for m in net:
        m.conv = fuse_conv_and_bn(m.conv, m.bn)
        del m.bn
        m.forward = m.forward_fuse
    return net


@pytest.mark.parametrize("bits", [2, 4, 7, 8, 16])
@pytest.mark.parametrize("spec", [PER_CHANNEL, PER_TENSOR], ids=["per channel", "per tensor"])
@torch.no_grad()
def test_quantization_and_folding_commute(spec, bits):
    spec = Spec(bits, True, spec.per_channel)
    plan = {"0.conv": {"weight": spec}, "1.conv": {"weight": spec}}
    net, x = block(groups=2), torch.randn(2, 4, 12, 12)
    stock = copy.deepcopy(net)
    fq.insert_plan(net, plan)
    for m in net:
        m.conv.weight_ratio.uniform_(0.5, 1)
    unfused, state = net(x), fq.get_state(net)
    fused_after = fuse(copy.deepcopy(net))
    fused_before = fuse(stock)
    fq.insert_plan(fused_before, plan)
    fq.load_state(fused_before, state)
    for other in (fused_after, fused_before):
        assert torch.allclose(other(x), unfused, atol=1e-5 * float(unfused.abs().max()))
    assert not torch.allclose(fq.strip_fake_quant(fused_before)(x), unfused, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.ConvTranspose2d(6, 4, 2, 2),
        nn.ConvTranspose2d(6, 9, 3, 2, 1, 1, groups=3),
        nn.Linear(6, 5),
    ],
    ids=["conv", "grouped conv", "depthwise", "transposed", "grouped transposed", "linear"],
)
@pytest.mark.parametrize("spec", [PER_CHANNEL, PER_TENSOR], ids=["per channel", "per tensor"])
@torch.no_grad()
def test_each_layer_kind(layer, spec):
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(2, 3, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 5, 5)
    expected = layer(x)
    fq.insert_plan(net, {"0": {"input": Spec(12), "weight": spec, "output": Spec(12)}})
    ours = net[0]
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    assert ours.weight_ratio.numel() == (layer.weight.shape[axis] if spec.per_channel else 1)
    w, q = layer.weight.transpose(0, axis), ours.quantized_weight().transpose(0, axis)
    rows, codes = (w.flatten(1), q.flatten(1)) if spec.per_channel else (w.reshape(1, -1), q.reshape(1, -1))
    step = rows.abs().amax(1, keepdim=True) / spec.qmax
    assert ((codes - rows).abs() <= step * 0.5005).all()
    assert (codes / step - (codes / step).round()).abs().max() < 1e-3
    assert (codes / step).abs().amax(1).allclose(torch.tensor(float(spec.qmax)))
    ours.input_quantizer.set_range(-4, 4)
    ours.output_quantizer.set_range(float(expected.min()), float(expected.max()))
    got = net(x)
    assert got.shape == expected.shape and 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()
    assert [site for _, site, *_ in fq.quantizers(net)] == ["input", "output"]
    assert type(fq.strip_fake_quant(net)[0]) is type(layer) and torch.equal(net(x), expected)


@pytest.mark.parametrize("spec", [PER_CHANNEL, PER_TENSOR], ids=["per channel", "per tensor"])
def test_a_ratio_below_one_clips(spec):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    fq.insert_plan(net, {"0": {"weight": spec}})
    layer = net[0]
    layer.weight_ratio.data.fill_(0.5)
    w = layer.weight.detach()
    limit = w.abs().amax((1, 2, 3), keepdim=True) / 2 if spec.per_channel else w.abs().max() / 2
    step = limit / spec.qmax
    q = layer.quantized_weight()
    assert ((q.detach() - w.clamp(-limit, limit)).abs() <= step * 0.5005).all()
    q.sum().backward()
    clear = (w.abs() - limit).abs() > step  # at the very end rounding decides
    assert torch.equal(layer.weight.grad[clear], (w.abs() <= limit).float()[clear])
    assert 0 < layer.weight.grad.sum() < w.numel()


@torch.no_grad()
def test_silu_with_a_quantized_result_runs_as_the_runtime_does():
    act = QuantAct(nn.SiLU(), quantizer(Spec(), -6, 6), quantizer(Spec(), -0.2784, 6))
    x = torch.linspace(-8, 8, 4001)
    steps = 12 / 255, 6.2784 / 255
    y = act(x)
    assert len(y.unique()) <= 256 and torch.equal(act.activation_quantizer(y), y)
    exact = torch.nn.functional.silu(x.clamp(-6, 6))
    assert (y - exact).abs().max() <= 0.55 * steps[0] * 1.1 + 6 * 0.5 / 255 + 0.5 * steps[1] + 1e-4
    gate = (torch.sigmoid(act.output_quantizer(x)) * 255).round() / 255
    assert torch.equal(y, act.activation_quantizer(act.output_quantizer(x) * gate))


def test_dead_channels_and_empty_ranges_stay_finite():
    net = nn.Sequential(Conv(3, 4)).eval()
    net[0].conv.weight.data[1] = 0
    for spec in (PER_CHANNEL, PER_TENSOR):
        other = copy.deepcopy(net)
        fq.insert_plan(other, {"0.conv": {"input": Spec(), "weight": spec, "output": Spec()}})
        for *_, q, _ in fq.quantizers(other):
            q.set_range(0.0, 0.0)
        y = other(torch.rand(1, 3, 4, 4))
        assert y.isfinite().all() and other[0].conv.quantized_weight().isfinite().all()
