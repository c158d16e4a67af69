# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import copy
import dataclasses
import io
import json

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.utils.torch_utils import ModelEMA

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.prune import prune_model
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.spec import PROFILES, Spec, State, plan_of

PROFILE = dataclasses.replace(PROFILES["ort-x86"], float_stem=False)
FULL, BESIDE = PROFILES["ort-x86-full"], PROFILES["openvino"]
EACH = [pytest.param(p, id=p.name) for p in (PROFILE, FULL, BESIDE)]


def fill(net: nn.Module) -> State:
    """Give every quantizer a made-up range, every weight made-up ratios; return the state."""
    generator = torch.Generator().manual_seed(2)
    for _, site, q, _ in fq.quantizers(net):
        lo, hi = (0.0, 1.0) if q.fixed else {"input": (-0.3, 4.0), "output": (-5.0, 6.0)}.get(site, (-0.27, 5.0))
        q.set_range(lo, hi)
    for _, layer, _ in fq.quantized_layers(net):
        layer.weight_ratio.data.copy_(0.8 + 0.2 * torch.rand(layer.weight_ratio.shape, generator=generator))
    return fq.get_state(net)


def output(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = net(x)
    return y[0] if isinstance(y, tuple) else y


def pickled(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.fixture(scope="module")
def images(images):
    return images[1:3, :, :64, :64].clone()


@pytest.fixture
def net(small):
    return small()


@pytest.fixture(scope="module")
def pruned(build) -> nn.Module:
    return prune_model(build("yolov8n.yaml"), PruneConfig(ratio=0.4), imgsz=64)


@pytest.fixture
def quantized(net):
    fq.insert_fake_quant(net, PROFILE)
    fill(net)
    return net


@pytest.mark.parametrize("profile", EACH)
def test_gradients_flow_through_the_model(net, images, profile):
    fq.insert_fake_quant(net, profile)
    fill(net)
    y = net.train()(images)
    sum(v.float().square().mean() for v in y.values() if torch.is_tensor(v)).backward()
    layers = [layer for _, layer, _ in fq.quantized_layers(net)]
    assert layers and all(m.weight.grad is not None and m.weight.grad.abs().sum() > 0 for m in layers)
    assert not [n for n, _ in net.named_parameters() if n.endswith((".lo", ".hi", ".weight_ratio"))]


def weights_alone(model):
    for *_, q, _ in fq.quantizers(model):
        q.mode = "float"


@pytest.mark.parametrize("profile", EACH)
def test_modes(net, images, profile):
    stock = output(net, images)
    fq.insert_fake_quant(net, profile)
    fill(net)
    on = output(net, images)
    for mode, expected in (("float", stock), ("on", on)):
        fq.set_mode(net, mode)
        assert torch.equal(output(net, images), expected)
    weights_alone(net)
    found = output(net, images)
    assert not torch.equal(found, stock) and not torch.equal(found, on)
    weights_only = fq.strip_fake_quant(copy.deepcopy(net))
    for path, layer, _ in fq.quantized_layers(net):
        weights_only.get_submodule(path).weight.data = layer.quantized_weight().detach()
    assert torch.equal(output(weights_only, images), found)


@pytest.mark.parametrize("profile", EACH)
def test_strip_restores_exactly_the_stock_model(net, images, profile):
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    acts = [m.act for m in net.modules() if hasattr(m, "act")]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    stock = output(net, images)
    attributes = [set(vars(m)) for m in net.modules()]
    fq.insert_fake_quant(net, profile)
    fill(net)
    assert [k for k in net.state_dict() if k in keys] == keys
    assert {k.rpartition(".")[2] for k in net.state_dict()} - {k.rpartition(".")[2] for k in keys} == {
        "lo",
        "hi",
        "weight_ratio",
    }
    for model in (net, pickled(copy.deepcopy(net))):
        fq.strip_fake_quant(model)
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
        assert not [m for m in model.modules() if type(m).__module__.startswith("yolo_ext")]
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
        assert torch.equal(output(model, images), stock)
    assert [set(vars(m)) for m in net.modules()] == attributes
    assert all(a is b for a, b in zip(acts, (m.act for m in net.modules() if hasattr(m, "act"))))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    assert b"yolo_ext.quantization" not in buffer.getvalue()


@pytest.mark.parametrize("profile", EACH)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "half", "state", "state as JSON"])
def test_round_trips_are_bit_equal(net, small, images, profile, how):
    fq.insert_fake_quant(net, profile)
    state = fill(net)
    expected = output(net, images)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickled(net)
    elif how == "state_dict":
        other = small()
        fq.insert_fake_quant(other, profile)
        other.load_state_dict(net.state_dict())
    elif how == "half":
        other = copy.deepcopy(net).half().float()
        stock = {k: v for k, v in net.state_dict().items() if not k.endswith((".lo", ".hi", ".weight_ratio"))}
        other.load_state_dict(stock)
    else:
        other = fq.strip_fake_quant(copy.deepcopy(net))
        replayed = json.loads(json.dumps(state)) if "JSON" in how else state
        fq.insert_plan(other, plan_of(replayed))
        fq.load_state(other, replayed)
    assert fq.get_state(other) == state
    assert torch.equal(output(other, images), expected)
    assert all(layer.fold[0] is block for _, layer, block in fq.quantized_layers(other) if block is not None)


def test_state_is_plain_and_complete(quantized):
    state = fq.get_state(quantized)
    assert json.loads(json.dumps(state)) == state
    assert [p for p, _ in quantized.named_modules() if p in state] == list(state)
    first = state["model.0.conv"]
    assert first["input"] == {"bits": 8, "symmetric": False, "per_channel": False, "lo": 0.0, "hi": 1.0}
    assert first["weight"].keys() == {"bits", "symmetric", "per_channel", "ratio"}
    assert len(first["weight"]["ratio"]) == 16
    fq.load_state(quantized, {"model.0.conv": {"weight": Spec(7, True, True).as_dict()}})
    assert "ratio" not in fq.get_state(quantized)["model.0.conv"]["weight"]
    fresh = fq.strip_fake_quant(copy.deepcopy(quantized))
    fq.insert_fake_quant(fresh, PROFILE)
    assert "lo" not in fq.get_state(fresh)["model.1.conv"]["input"], "not calibrated"


def test_ema_follows_ranges(quantized):
    state = fq.get_state(quantized)
    ema = ModelEMA(quantized, decay=0.5, tau=1e-9)
    ema.update(quantized)
    same = fq.get_state(ema.ema)["model.1.conv"]["input"]
    assert (same["lo"], same["hi"]) == pytest.approx((-0.3, 4.0), rel=1e-6)
    quantized.model[1].conv.input_quantizer.set_range(-0.6, 8.0)
    quantized.model[1].conv.weight_ratio.data.mul_(0.5)
    ema.update(quantized)
    after = fq.get_state(ema.ema)["model.1.conv"]
    assert (after["input"]["lo"], after["input"]["hi"]) == pytest.approx((-0.45, 6.0), rel=1e-5)
    before = torch.tensor(state["model.1.conv"]["weight"]["ratio"])
    assert torch.allclose(torch.tensor(after["weight"]["ratio"]), 0.75 * before)
    ema.ema.half().float()
    ema.update(quantized)
    assert fq.get_state(ema.ema)["model.1.conv"]["input"]["hi"] == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize("profile", EACH)
def test_half_precision_runs_and_keeps_type(net, images, profile):
    fq.insert_fake_quant(net, profile)
    fill(net)
    net.half()
    assert net.model[:4](images.half()).dtype == torch.float16
    assert {q.lo.dtype for *_, q, _ in fq.quantizers(net)} == {torch.float32}
    assert {layer.weight_ratio.dtype for _, layer, _ in fq.quantized_layers(net)} == {torch.float32}


@pytest.mark.parametrize("profile", EACH)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_fuse_keeps_quantizers_and_weight_codes(net, images, profile, granularity):
    change = [{"op_types": ["Conv2d"], "granularity": granularity}]
    fq.insert_fake_quant(net, profile, config_list=change)
    state = fill(net)
    before = copy.deepcopy(net)
    fused = copy.deepcopy(net).fuse(verbose=False)
    assert fq.get_state(fused) == state
    for model in (before, fused):
        weights_alone(model)
    a, b = output(before, images), output(fused, images)
    assert (a - b).abs().max() < 1e-3 * a.abs().max()
    after = output(fused, images)
    assert output(copy.deepcopy(fused), images).equal(after)  # forward_fuse is bound to the copy, not to the original


@pytest.mark.parametrize("profile", EACH)
def test_fused_models_can_be_quantized(build, images, profile):
    net = build("yolov9t.yaml").fuse(verbose=False)
    reasons = fq.insert_fake_quant(net, profile)
    assert not [r for r in reasons.values() if "merged" in r]
    fill(net)
    assert output(net, images).isfinite().all() and all(m.bias is not None for _, m, _ in fq.quantized_layers(net))
    assert output(fq.strip_fake_quant(net), images).isfinite().all()


@pytest.mark.parametrize("profile", EACH)
def test_pruned_models_can_be_quantized(pruned, images, profile):
    net = copy.deepcopy(pruned)
    stock = output(net, images)
    fq.insert_fake_quant(net, profile)
    state = fill(net)
    assert not torch.equal(output(net, images), stock)
    other = fq.strip_fake_quant(copy.deepcopy(net))
    assert torch.equal(output(other, images), stock)
    fq.insert_plan(other, plan_of(state))
    fq.load_state(other, state)
    assert torch.equal(output(other, images), output(net, images))


def test_ranges_follow_training_data_until_frozen(quantized, images):
    fq.set_mode(quantized, "on", momentum=0.5)
    before = fq.get_state(quantized)
    quantized.eval()(images)
    assert fq.get_state(quantized) == before
    quantized.train()(images)
    moved = fq.get_state(quantized)
    assert moved["model.1.conv"]["input"] != before["model.1.conv"]["input"]
    assert moved["model.1.conv"]["weight"] == before["model.1.conv"]["weight"]
    assert moved["model.0.conv"]["input"] == before["model.0.conv"]["input"]  # images are 0 to 1 whatever comes
    ends = [e for sites in moved.values() for site, e in sites.items() if site != "weight"]
    assert all(e["lo"] <= 0 <= e["hi"] for e in ends)
    assert moved["model.1.conv"]["output"]["lo"] >= fq.SILU_LOWER["output"]
    fq.set_mode(quantized, "on", momentum=0.0)
    quantized(images)
    assert fq.get_state(quantized) == moved


@pytest.mark.parametrize(
    ("act", "lowest"), [(nn.SiLU(), (-6.0, -0.27846)), (nn.ReLU(), (-20, -20)), (nn.Identity(), (-20, -20))],
    ids=["silu", "relu", "none"],
)  # fmt: skip
def test_only_silu_limits_the_low_end(act, lowest):
    net = nn.Sequential(Conv(3, 4, act=act))
    fq.insert_plan(net, {"0.conv": {"output": Spec(), "activation": Spec()}})
    for *_, q, _ in fq.quantizers(net):
        q.set_range(-20, 5)
    assert [e["lo"] for e in fq.get_state(net)["0.conv"].values()] == pytest.approx(lowest, abs=1e-4)


def test_only_the_first_convolution_reads_images(net):
    fq.insert_fake_quant(net, PROFILE)
    assert [p for p, _, q, _ in fq.quantizers(net) if q.fixed] == ["model.0.conv"]
    fq.strip_fake_quant(net)
    reasons = fq.insert_fake_quant(net, PROFILES["ort-x86"], exclude=("re:attn",))
    assert "image input" in reasons["model.0.conv"] and "model.1.conv" not in reasons
    assert reasons["model.6.m.0.attn.qkv.conv"] == "excluded by 're:attn'"
    assert type(net.model[0].conv) is nn.Conv2d and type(net.model[1].conv) is fq.SWAPS[nn.Conv2d]
    assert not [p for p, _, q, _ in fq.quantizers(net) if q.fixed]


def test_named_layers_without_a_block(build, images):
    net, head = build("yolov8n.yaml"), "model.22.cv2.0.2"
    fq.insert_fake_quant(net, PROFILES["ort-x86"], config_list=[{"op_names": [head], "quant_bits": 4}])
    stock = output(net, images)
    assert {site for path, site, *_ in fq.quantizers(net) if path == head} == {"input", "output"}
    layer = net.get_submodule(head)
    layer.input_quantizer.set_range(-0.28, 4)
    layer.output_quantizer.set_range(-4, 4)
    results = []
    layer.register_forward_hook(lambda m, x, y: results.append(y))
    assert not torch.equal(output(net, images), stock) and len(results[0].unique()) <= 16


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda n: fq.insert_fake_quant(n, PROFILE), "Strip them first"),
        (lambda n: fq.load_state(n, {"model.99.conv": {"input": Spec().as_dict()}}), "model.99.conv"),
        (lambda n: fq.load_state(n, {"model.1.conv": {"activation": Spec().as_dict()}}), "model.1.conv"),
        (lambda n: fq.insert_plan(fq.strip_fake_quant(n), {"model.99.conv": {"input": Spec()}}), "model.99.conv"),
        (lambda n: fq.insert_fake_quant(fq.strip_fake_quant(n), PROFILE, ("(",)), "not a regular expression"),
        (lambda n: fq.insert_fake_quant(fq.strip_fake_quant(n), PROFILE, ("modle",)), "matches no layer"),
    ],
    ids=["twice", "path of a state", "site of a state", "plan", "regex", "no match"],
)
def test_usage_errors(quantized, action, message):
    with pytest.raises(UsageError, match=message):
        action(quantized)
