# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The sites of a plan against the values that a calibrated model really passes on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.modules.block import SPPELAN, SPPF, Bottleneck

from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import merge_branches
from yolo_ext.quantization.plan import drop_needless, make_plan
from yolo_ext.quantization.spec import PROFILES, Spec

FULL = PROFILES["ort-x86-full"]
FAMILIES = ["yolov5n", "yolov9t", "yolov10n", "yolov10s", "yolo11n", "yolo12n", "yolo26n"]
matrix = [pytest.param(f"{name}.yaml", marks=pytest.mark.matrix, id=name) for name in FAMILIES]


def producers(net: nn.Module) -> dict[str, fq.RangeQuantizer]:
    """Return the quantizers whose codes a reader may get without quantizing again."""
    return {
        path: q
        for path, site, q, act in fq.quantizers(net)
        if site in ("add", "residual", "activation") or (site == "output" and isinstance(act, nn.Identity))
    }


@torch.no_grad()
def codes_of(x: torch.Tensor, made: dict[str, fq.RangeQuantizer]) -> list[str]:
    """Return the producers of which every value of `x` is a code."""
    values = x.unique()
    return [path for path, q in made.items() if torch.equal(q(values), values)] if len(values) <= 256 else []


@torch.no_grad()
def seen(net: nn.Module, images: torch.Tensor, modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return what modules read, before any quantizer of their own."""
    inputs, handles = {}, []
    for path, m in modules.items():
        hook = lambda m, x, path=path: inputs.update({path: x[0].clone()})  # noqa: E731
        handles.append(m.register_forward_pre_hook(hook, prepend=True))
    net(images)
    for h in handles:
        h.remove()
    return inputs


@pytest.mark.parametrize("yaml", [pytest.param("yolov8n.yaml", id="yolov8n"), *matrix])
@pytest.mark.parametrize("profile", [FULL, PROFILES["openvino"]], ids=["full", "openvino"])
def test_a_convolution_without_input_site_reads_codes_of_another(build, images, yaml, profile):
    net = build(yaml)
    merge_branches(net, [images])
    fq.insert_fake_quant(net, profile)
    calibrate(net, [images], "minmax")
    made = producers(net)
    layers = {path: layer for path, layer, _ in fq.quantized_layers(net)}
    inputs = seen(net, images, layers)
    pools = {p: m for p, m in net.named_modules() if isinstance(m, (SPPF, SPPELAN))}  # they join one tensor with itself
    pooled = {f"{p}.{'cv2' if isinstance(m, SPPF) else 'cv5'}.conv" for p, m in pools.items()}
    for path, x in inputs.items():
        if layers[path].input_quantizer is None:
            assert codes_of(x, made), f"{path} reads a float tensor"
        elif not layers[path].input_quantizer.fixed and path not in pooled:
            assert not codes_of(x, made), f"{path} quantizes codes once more"
    assert set(inputs) == set(layers)


@pytest.mark.parametrize("yaml", [pytest.param("yolov8n.yaml", id="yolov8n"), *matrix])
def test_what_an_addition_reads_and_makes(build, images, yaml):
    net = build(yaml)
    merge_branches(net, [images])
    fq.insert_fake_quant(net, FULL)
    calibrate(net, [images], "minmax")
    made, blocks = producers(net), {p: m for p, m in net.named_modules() if hasattr(m, "add_quantizer")}
    results = {}
    for path, m in blocks.items():
        m.register_forward_hook(lambda m, x, y, path=path: results.update({path: y.clone()}))
    last = {path: [m for m in block.modules() if isinstance(m, Conv)][-1] for path, block in blocks.items()}
    for path, m in last.items():
        m.register_forward_hook(lambda m, x, y, path=path: results.update({f"{path} branch": y.clone()}))
    inputs = seen(net, images, blocks)
    assert blocks
    for path in blocks:
        assert path in codes_of(results[path], made)
        assert codes_of(results[f"{path} branch"], made)
        assert codes_of(inputs[path], made), path


def test_residual_is_read_by_convolution_and_addition(build, images):
    net = build("yolov8n.yaml")
    fq.insert_fake_quant(net, PROFILES["openvino"])
    state = calibrate(net, [images], "minmax")
    block = net.model[2].m[0]
    assert "input" not in state["model.2.m.0.cv1.conv"] and "residual" in state["model.2.m.0"]
    inner: list[torch.Tensor] = []
    block.cv1.register_forward_pre_hook(lambda m, x: inner.append(x[0]))
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
        assert torch.equal(inner[0], block.residual_quantizer(x)) and not torch.equal(inner[0], x)
        assert torch.allclose(y, inner[0] + block.cv2(block.cv1(inner[0])))


class Joined(nn.Module):
    """A branch that is read by a convolution, one that is concatenated, and one that only float layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.lone = Conv(3, 8, 3), Conv(8, 8), Conv(16, 8), Conv(8, 8)
        self.pool, self.neck = nn.MaxPool2d(3, 1, 1), Bottleneck(8, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = nn.functional.interpolate(self.pool(x), scale_factor=2.0)[:, :, ::2, ::2]
        z = self.neck(self.b(torch.cat([self.a(y), x], 1)))
        return self.head(self.lone(z).mul(2))


FLOAT_STEM_OFF = dataclasses.replace(FULL, float_stem=False)


def test_sites_of_a_small_model():
    plan, _ = make_plan(Joined(), FLOAT_STEM_OFF)
    own = {"stem.conv": True, "a.conv": False, "b.conv": True, "neck.cv1.conv": False, "neck.cv2.conv": False}
    assert {p: "input" in plan[p] for p in own} == own
    assert "activation" in plan["a.conv"] and "activation" in plan["b.conv"]  # read by Concat, by a convolution
    assert "activation" not in plan["lone.conv"]  # its reader is float
    assert plan["neck"] == {"add": Spec(8)}


@pytest.mark.parametrize(
    ("resize", "passes"),
    [
        (lambda x: nn.functional.interpolate(x, scale_factor=2, mode="nearest"), True),
        (lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), False),
        (lambda x: nn.functional.max_pool2d(x, 2), True),
        (lambda x: nn.functional.avg_pool2d(x, 2), False),
        (lambda x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1), False),
        (lambda x: x.flatten(2).view(x.shape).contiguous().detach(), True),
        (lambda x: x.permute(0, 1, 3, 2).transpose(2, 3), True),
        (lambda x: x * 2, False),
        (lambda x: x + x, False),
    ],
    ids=["nearest", "bilinear", "max pool", "average pool", "repeat", "views", "transposes", "product", "sum"],
)
def test_what_keeps_codes(resize, passes):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Conv(3, 4), Conv(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(resize(self.a(x)))

    plan, _ = make_plan(Net(), FLOAT_STEM_OFF)
    assert ("input" not in plan["b.conv"]) is passes


def test_the_model_is_left_as_it_was(build):
    net = build("yolov8n.yaml").train()
    net.model[3].eval()
    norms = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    plan, _ = make_plan(net, dataclasses.replace(FULL, functional=False))
    drop_needless(net, plan)
    assert all(torch.equal(v, norms[k]) for k, v in net.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
