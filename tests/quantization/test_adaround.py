# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization import adaround as module
from yolo_ext.quantization.adaround import Rounding, adaround
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import (
    get_state,
    insert_fake_quant,
    insert_plan,
    load_state,
    merge_branches,
    quantized_layers,
    strip_fake_quant,
)
from yolo_ext.quantization.spec import PROFILES, Spec, plan_of
from yolo_ext.stock.context import recalibrate

FAMILIES = ["yolov5n", "yolov9t", "yolov10n", "yolo11n-seg", "yolo12n", "yolo26n", "yolo26n-pose", "yolo11n-cls"]
TINY = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C2f", [16, True]]],
    "head": [[-1, 1, "Conv", [24, 3, 2]], [[-2, -1], 1, "Detect", ["nc"]]],
}


def pictures(n: int = 16, size: int = 32) -> torch.Tensor:
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def tiny(bits: int = 4, rule: str = "max") -> DetectionModel:
    """Return a calibrated model of two layers, a block and a head."""
    torch.manual_seed(0)
    net = DetectionModel(deepcopy(TINY), verbose=False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    recalibrate(net.eval(), [pictures()])
    insert_fake_quant(net, PROFILES["ort-x86-vnni"], (), [{"op_types": ["Conv2d"], "quant_bits": {"weight": bits}}])
    calibrate(net, [pictures()], weight_observer=rule)
    return net


@pytest.fixture(scope="module", params=["max", "mse"])
def learned(request) -> tuple[DetectionModel, DetectionModel, dict]:
    """Return a model before and after, and the errors of its blocks."""
    before = tiny(rule=request.param)
    after = deepcopy(before)
    return before, after, adaround(after, pictures().split(8), 150)


def codes(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weight codes as the exporter finds them: from weights and the ratios of the state alone."""
    found = {}
    for path, sites in get_state(net).items():
        w = net.get_submodule(path).weight.detach().float().flatten(1)
        qmax = Spec.of(sites["weight"]).qmax
        ratio = torch.tensor(sites["weight"].get("ratio", [1.0] * len(w)))[:, None]
        found[path] = (w / (ratio * w.abs().amax(1, keepdim=True) / qmax)).round().clamp(-qmax, qmax)
    return found


@pytest.mark.slow
def test_every_block_has_less_error(learned):
    """With 4-bit weights learned rounding takes at least 30 % of the error of each block, and half of it on average."""
    _, _, errors = learned
    shares = [after / before for before, after in errors.values()]
    assert max(shares) < 0.7 and sum(shares) / len(shares) < 0.5, errors


@pytest.mark.slow
def test_blocks_and_branches_of_the_head_are_units(learned):
    branches = {f"model.4.{branch}.{i}" for branch in ("cv2", "cv3") for i in (0, 1)}
    assert learned[2].keys() == {"model.1", "model.2", "model.3", *branches}


@pytest.mark.slow
def test_weights_move_by_one_code_at_most_and_nothing_else_moves(learned):
    before, after, _ = learned
    a, b = codes(before), codes(after)
    moved = torch.cat([(a[p] - b[p]).abs().flatten() for p in a])
    assert moved.max() == 1 and 0.03 < moved.mean() < 0.5
    weights = {f"{p}.weight" for p in a}
    rest = {k: v for k, v in before.state_dict().items() if k not in weights}
    assert rest and all(torch.equal(v, after.state_dict()[k]) for k, v in rest.items())
    assert get_state(before) == get_state(after)
    assert not any(m._forward_hooks or "quantized_weight" in vars(m) for m in after.modules())


def test_nearest_rounding_finds_the_learned_codes(learned):
    """Baked weights lie on the grid, but for the largest of a channel, from which the grid comes."""
    before, after, _ = learned
    old = {path: layer.weight.detach().flatten(1) for path, layer, _ in quantized_layers(before)}
    for path, layer, _ in quantized_layers(after):
        first = old[path].abs().argmax(1, keepdim=True)
        new = layer.weight.detach().flatten(1)
        assert torch.equal(new.gather(1, first), old[path].gather(1, first))
        gap = (layer.quantized_weight().detach().flatten(1) - new).abs().scatter_(1, first, 0)
        assert gap.max() < 1e-6 * new.abs().max()


def test_codes_survive_a_checkpoint_in_fp16(learned):
    net = deepcopy(learned[1])
    expected, state = codes(net), get_state(net)
    stored = strip_fake_quant(net).half().float()
    insert_plan(stored, plan_of(state))
    load_state(stored, state)
    assert all(torch.equal(v, codes(stored)[p]) for p, v in expected.items())


def test_codes_survive_folding_of_batchnorm(learned):
    net = deepcopy(learned[1])
    expected, state = codes(net), get_state(net)
    signs = {p: net.get_submodule(p.removesuffix(".conv")).bn.weight.sign()[:, None] for p in expected}
    fused = strip_fake_quant(net).fuse(verbose=False)
    insert_plan(fused, plan_of(state))
    load_state(fused, state)
    assert any((s < 0).any() for s in signs.values())
    assert all(torch.equal(v * signs[p], codes(fused)[p]) for p, v in expected.items())


@pytest.mark.slow
def test_zeros_stay_zeros():
    net = tiny()
    for _, layer, _ in quantized_layers(net):
        layer.weight.data *= torch.rand_like(layer.weight) > 0.5
        layer.weight.data[0] = 0
    zero = {path: layer.weight == 0 for path, layer, _ in quantized_layers(net)}
    adaround(net, [pictures(8)], 20)
    assert all((layer.weight[zero[path]] == 0).all() for path, layer, _ in quantized_layers(net))
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_block_never_gets_worse(monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 50.0)
    monkeypatch.setattr(module, "REGULARISER", 0.0)
    net = tiny()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    errors = adaround(net, [pictures(8)], 3)
    assert all(a == b for a, b in errors.values())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.slow
def test_the_same_images_give_the_same_weights():
    a, b = tiny(), tiny()
    for net in (a, b):
        adaround(net, [pictures(8)], 5)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_modes_and_gradients_are_left_alone():
    net = tiny().train()
    net.model[1].eval()
    adaround(net, [pictures(8)], 2)
    assert net.training and net.model[2].training and not net.model[1].training
    assert all(p.grad is None and p.requires_grad for n, p in net.named_parameters() if "dfl" not in n)


@pytest.mark.slow
def test_only_so_many_images_are_kept(monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 12)
    asked = []

    def batches():
        for i in range(5):
            asked.append(i)
            yield pictures(8)

    adaround(tiny(), batches(), 1)
    assert asked == [0, 1]
    with pytest.raises(UsageError, match="no images"):
        adaround(tiny(), [], 1)


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 8, 2), nn.Linear(6, 8)],
    ids=["grouped", "transposed", "linear"],
)
def test_start_is_the_float_weight_and_half_of_it_is_nearest_rounding(layer, per_channel):
    net = nn.Sequential(deepcopy(layer))
    insert_plan(net, {"0": {"weight": Spec(4, symmetric=True, per_channel=per_channel)}})
    (_, conv, _), *_ = quantized_layers(net)
    rounding = Rounding(conv)
    torch.testing.assert_close(rounding.weight(rounding.up()), conv.weight, atol=2e-3, rtol=0)
    nearest = conv.quantized_weight().detach()
    rounding.bake()
    torch.testing.assert_close(conv.weight.detach(), nearest)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_quantized_layer_of_a_family_is_in_a_block(monkeypatch, name):
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: said.append(text))
    net = YOLO(f"{name}.yaml").model.eval()
    merge_branches(net, [pictures(2, 64)])
    insert_fake_quant(net, PROFILES["ort-x86-full"])
    calibrate(net, [pictures(2, 64)])
    said.clear()
    errors = adaround(net, [pictures(2, 64)], 2)
    assert errors and not said and all(after <= before for before, after in errors.values())
    layers = [path for path, layer, _ in quantized_layers(net) if layer.weight_spec]
    assert all(any(path.startswith(f"{unit}.") for unit in errors) for path in layers)
