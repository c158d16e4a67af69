# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import insert_fake_quant, insert_plan, set_mode, strip_fake_quant
from yolo_ext.quantization.improve import correct_bias, reestimate_bn
from yolo_ext.quantization.spec import PROFILES, Spec
from yolo_ext.stock.context import recalibrate

SITES = {"input": Spec(), "weight": Spec(3, symmetric=True, per_channel=True), "output": Spec()}


def batches(n: int = 3) -> list[torch.Tensor]:
    return [torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def chain() -> nn.Sequential:
    """Return three calibrated blocks with 3-bit weights."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv(3, 16, 3), Conv(16, 16, 3), Conv(16, 8, 1))
    for block in net:
        nn.init.normal_(block.conv.weight, 0.05, 0.2)
        nn.init.uniform_(block.bn.weight, -1.0, 1.5)
        block.bn.running_mean.normal_(0, 0.2)
    return quantized(net)


def quantized(net: nn.Module) -> nn.Sequential:
    insert_plan(net, {f"{i}.conv": SITES for i in range(len(net))})
    calibrate(net.eval(), batches(), "minmax")
    return net


def chain_float() -> nn.Sequential:
    return strip_fake_quant(chain())


def fuse(net: nn.Sequential) -> nn.Sequential:
    for block in net:
        block.conv = fuse_conv_and_bn(block.conv, block.bn)
        del block.bn
        block.forward = block.forward_fuse
    return net


@torch.no_grad()
def means(net: nn.Module, depth: int, mode: str) -> torch.Tensor:
    """Return channel means behind the activation of a block, before any quantizer of its output."""
    set_mode(net, mode)
    seen = []
    handle = (net[depth].bn if hasattr(net[depth], "bn") else net[depth].conv).register_forward_hook(
        lambda m, x, y: seen.append(nn.functional.silu(y).mean((0, 2, 3)))
    )
    for x in batches():
        net(x)
    handle.remove()
    set_mode(net, "on")
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("fused", [False, True], ids=["behind BN", "fused"])
def test_bias_correction_removes_the_mean_error(fused):
    """At least four fifths of it; the rest is the curvature of the activation."""
    net = chain() if not fused else quantized(fuse(chain_float()))
    target = [means(net, i, "float") for i in range(3)]
    before = [(means(net, i, "on") - t).abs().mean() for i, t in enumerate(target)]
    moved = correct_bias(net, batches())
    after = [(means(net, i, "on") - t).abs().mean() for i, t in enumerate(target)]
    assert moved.keys() == {"0.conv", "1.conv", "2.conv"} and all(v > 0 for v in moved.values())
    assert all(a < 0.2 * b for a, b in zip(after, before)), (before, after)


def test_what_the_activation_makes_zero_does_not_count():
    """A channel far below zero: its mean before SiLU says nothing about what the next layer reads."""
    net = chain()
    with torch.no_grad():
        net[2].bn.bias[0] = -30
    before = net[2].bn.bias.clone()
    correct_bias(net, batches())
    moved = (net[2].bn.bias - before).abs()
    assert moved[0] < 1e-3 < moved[1:].max()


def test_only_biases_move_and_everything_is_as_it_was():
    net = chain().train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    correct_bias(net, batches(1))
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{i}.bn.bias" for i in range(3)}
    assert net.training and not net[1].training
    assert not any(m._forward_hooks for m in net.modules())


def test_dead_channels_stay_dead():
    net = chain()
    with torch.no_grad():
        net[1].bn.weight[3] = 0
        net[1].bn.bias[3] = 0.25
        net[1].conv.weight[5] = 0
        bias = net[1].bn.bias[[3, 5]].clone()
    correct_bias(net, batches())
    assert torch.equal(net[1].bn.bias[[3, 5]], bias) and all(p.isfinite().all() for p in net.parameters())


def test_a_layer_without_any_bias_is_left_out():
    net = nn.Sequential(Conv(3, 4), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 16 * 16, 2))
    insert_plan(net, {p: {k: v for k, v in SITES.items() if k != "output"} for p in ("0.conv", "1", "3")})
    calibrate(net, batches())
    assert correct_bias(net, batches()).keys() == {"0.conv", "3"} and net[1].bias is None


def test_a_failing_batch_leaves_no_hooks():
    net = chain()
    with pytest.raises(RuntimeError):
        correct_bias(net, [torch.rand(1, 7, 8, 8)])
    assert not any(m._forward_hooks for m in net.modules())


def test_reestimated_statistics_move_by_what_quantization_does():
    """In the first layer exactly: both models read the same images there."""
    net = chain()
    old = net[0].bn.running_mean.clone(), net[0].bn.running_var.clone()
    assert reestimate_bn(net, batches()) == 12
    assert not net.training

    def statistics(mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        set_mode(net, mode)
        maps = [net[0].conv(x).detach() for x in batches()]
        return tuple(
            torch.stack([f(m) for m in maps]).mean(0) for f in (lambda m: m.mean((0, 2, 3)), lambda m: m.var((0, 2, 3)))
        )

    (mean_q, var_q), (mean, var) = statistics("on"), statistics("float")
    torch.testing.assert_close(net[0].bn.running_mean, old[0] + mean_q - mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net[0].bn.running_var, old[1] * var_q / var, atol=1e-5, rtol=1e-3)
    assert not torch.allclose(mean_q, mean, atol=1e-3)


def test_images_of_another_kind_than_in_training_do_not_matter():
    """With 16 bits everywhere quantization does nothing, so statistics stay, whatever the images are like."""
    net = strip_fake_quant(chain())
    recalibrate(net, batches())  # or ranges would not fit what training mode makes of the activations
    fine = {"input": Spec(16), "weight": Spec(16, symmetric=True, per_channel=True)}
    insert_plan(net, {f"{i}.conv": fine for i in range(3)})
    calibrate(net, batches(), "minmax")
    before = [(b.bn.running_mean.clone(), b.bn.running_var.clone()) for b in net]
    reestimate_bn(net, [0.1 * x for x in batches()])
    for (mean, var), block in zip(before, net):
        torch.testing.assert_close(block.bn.running_mean, mean, atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(block.bn.running_var, var, atol=2e-3, rtol=2e-2)


def test_dead_channels_and_modes_stay():
    net = chain().train()
    net[1].eval()
    with torch.no_grad():
        net[1].conv.weight[5] = 0
    before = net[1].bn.running_mean[5].clone(), net[1].bn.running_var[5].clone()
    reestimate_bn(net, batches())
    assert (net[1].bn.running_mean[5], net[1].bn.running_var[5]) == before
    assert net.training and net[2].training and not net[1].training and not net[1].bn.training


def test_without_images_statistics_stay():
    net = chain()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert reestimate_bn(net, []) == 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_reestimation_brings_the_outputs_back():
    """BatchNorm whose statistics are those of its data undoes shifts and gains of coarse weights."""
    net = chain()
    set_mode(net, "float")
    recalibrate(net, batches())
    x = torch.cat(batches())

    def error(target: torch.Tensor) -> float:
        with torch.no_grad():
            return float((net(x) - target).square().mean())

    with torch.no_grad():
        target = net(x)
    set_mode(net, "on")
    before = error(target)
    reestimate_bn(net, batches())
    assert error(target) < before


def test_ranges_do_not_follow_the_reestimation():
    net = chain()
    set_mode(net, "on", momentum=0.5)
    before = {k: v.clone() for k, v in net.state_dict().items() if "quantizer" in k}
    reestimate_bn(net, batches())
    assert before and all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_a_fused_model_has_nothing_to_reestimate():
    with pytest.raises(UsageError, match="fused"):
        reestimate_bn(quantized(fuse(chain_float())), batches())


@pytest.mark.slow
@pytest.mark.parametrize("improve", [reestimate_bn, correct_bias])
def test_a_whole_model_gets_better(build, images, improve):
    """With 4-bit weights at least a tenth of the error of the outputs goes."""
    net = build("yolov8n.yaml")
    bits = [{"op_types": ["Conv2d"], "quant_bits": {"weight": 4}}]
    insert_fake_quant(net, PROFILES["ort-x86"], (), bits)
    set_mode(net, "float")
    recalibrate(net, [images])  # random statistics do not fit the activations
    calibrate(net, [images])

    @torch.no_grad()
    def run(mode: str) -> torch.Tensor:
        set_mode(net, mode)
        return net.eval()(images)[0]

    target, before = run("float"), run("on")
    improve(net, [images])
    assert (run("on") - target).square().mean() < 0.9 * (before - target).square().mean()
