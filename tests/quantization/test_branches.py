# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import Conv, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv2
from ultralytics.nn.tasks import DetectionModel

import yolo_ext
from yolo_ext.checkpoint import TRIPWIRE, is_pruned, manifest, save_model
from yolo_ext.data.shapes import NAMES, make_shapes
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import merge_branches
from yolo_ext.quantization.plan import float_modules
from yolo_ext.quantization.spec import PROFILES
from yolo_ext.stock.context import recalibrate
from yolo_ext.stock.load import load_model
from yolo_ext.stock.model import branched

MODELS = [("yolov9t.yaml", 42), ("yolov10s.yaml", 2)]


def tensors(y: Any) -> list[torch.Tensor]:
    """Return the floating tensors of a prediction, without what a top-k has put in an order of its own."""
    if isinstance(y, torch.Tensor):
        return [y]
    parts = y.values() if isinstance(y, dict) else y
    return [t for part in parts for t in tensors(part)]


@torch.no_grad()
def raw(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = net(x)
    return tensors(y if isinstance(y, dict) else y[1])


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert len(a) == len(b) > 2
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b))


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "count"), MODELS, ids=["v9t", "v10s"])
def test_a_merged_model_computes_the_same(build, images, yaml, count):
    net = build(yaml)
    expected, paths = raw(net, images), branched(net)
    assert len(paths) == count
    merged = copy.deepcopy(net)
    assert merge_branches(merged, [images[:2], images[2:]]) == paths
    assert branched(merged) == [] == merge_branches(merged, [images])
    assert relative(raw(merged, images), expected) < 1e-3
    assert {type(merged.get_submodule(p)) for p in paths} == {Conv}
    assert not [r for r in float_modules(merged).values() if "merged on fuse" in r]
    assert all(p.requires_grad for n, p in merged.named_parameters() if ".dfl." not in n)
    plain, fused = (raw(m.fuse(verbose=False), images) for m in (copy.deepcopy(net), copy.deepcopy(merged)))
    assert relative(fused, plain) < 1e-3
    assert branched(net) == paths and relative(raw(net, images), expected) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "limit"), [("yolov9t.yaml", 0.005), ("yolov10s.yaml", 0.05)], ids=["v9t", "v10s"])
def test_training_mode_is_nearly_the_same_on_the_measured_batch(build, images, yaml, limit):
    net = build(yaml)
    images = nn.functional.interpolate(images, 224)  # of few pixels the variance is another one in eval mode
    recalibrate(net, [images])
    first = branched(net)[0]

    def result(model: nn.Module) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        model.get_submodule(first).register_forward_hook(lambda m, x, y: seen.append(y))
        raw(model.train(), images)
        return seen[0]

    merged, unmeasured = copy.deepcopy(net), copy.deepcopy(net)
    merge_branches(merged, [images])
    merge_branches(unmeasured, [])
    expected = result(net)
    error, naive = (
        float((result(m) - expected).square().mean() / expected.square().mean()) ** 0.5 for m in (merged, unmeasured)
    )
    assert error < limit and error < 0.1 * naive


def test_what_is_measured_is_what_the_batchnorm_sees(build, images):
    net = build("yolov9t.yaml").train()
    net.model[1].eval()
    merge_branches(net, [images[:1], images[1:]])
    assert net.training and not net.model[1].training and net.model[2].training
    block, seen = net.get_submodule(manifest(net).merged[0]), []
    block.bn.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    net.eval()
    raw(net, images)
    var, mean = torch.var_mean(seen[0], (0, 2, 3))
    assert torch.allclose(block.bn.running_mean, mean, atol=1e-4)
    assert torch.allclose(block.bn.running_var, var.clamp_min(1e-6), rtol=1e-3)
    assert block.conv.weight.requires_grad and block.conv.bias is not None


class Blocks(nn.Sequential):
    """One block of each kind."""

    yaml = {"backbone": [[-1, 1, "Conv", []]]}

    def __init__(self) -> None:
        super().__init__(
            Conv2(3, 8, 3), RepConv(8, 8, bn=True), RepConv(8, 16, g=2, act=False), RepVGGDW(16), RepConv(16, 8, s=2)
        )
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight)
                m.running_var.uniform_(0.5, 2)
                m.running_mean.normal_()


@pytest.mark.parametrize("batches", [0, 1], ids=["without images", "with images"])
def test_each_kind_of_block(batches):
    torch.manual_seed(0)
    net, x = Blocks().eval().requires_grad_(False), torch.rand(2, 3, 16, 16)
    expected = net(x)
    acts = [m.act for m in net]
    assert merge_branches(net, [x] * batches) == ["0", "1", "2", "3", "4"]
    assert torch.allclose(net(x), expected, atol=1e-4 * float(expected.abs().max()))
    assert all(type(m) is Conv and m.act is act for m, act in zip(net, acts))
    fq.insert_fake_quant(net, PROFILES["ort-x86"])
    assert len(list(fq.quantized_layers(net))) == 4  # all but the first


def test_nothing_to_merge_changes_nothing(build, images):
    net = build("yolov8n.yaml")
    assert merge_branches(net, [images]) == [] and not manifest(net).merged and not is_pruned(net)


@pytest.mark.slow
def test_checkpoint_loads_with_plain_ultralytics_and_is_guarded(build, images, tmp_path: Path):
    net = build("yolov9t.yaml")
    merge_branches(net, [images])
    expected = raw(copy.deepcopy(net).half().float(), images)
    path = save_model(net, tmp_path / "merged.pt")
    plain = YOLO(path).model.float().eval()
    assert relative(raw(plain, images), expected) < 1e-4
    assert YOLO(path).predict(images[:1], imgsz=96, verbose=False)[0].boxes is not None
    ours, ckpt = load_model(path)
    assert ckpt["yolo_ext"]["merged"] == manifest(ours).merged and is_pruned(ours) and branched(ours) == []
    assert plain.yaml["backbone"][0][2] == TRIPWIRE and manifest(ours).yaml["backbone"][0][2] != TRIPWIRE
    with pytest.raises(KeyError, match=TRIPWIRE):
        type(plain)(plain.yaml, verbose=False)


@pytest.mark.parametrize("yaml", ["yolov9t.yaml", "yolov10s.yaml"])
def test_a_merged_and_quantized_model_learns(build, images, yaml):
    net = build(yaml)
    merge_branches(net, [images])
    fq.insert_fake_quant(net, PROFILES["ort-x86"])
    calibrate(net, [images], "minmax")
    y = raw_with_grad(net.train(), images)
    sum(v.float().square().mean() for v in y).backward()
    for path in manifest(net).merged:
        block = net.get_submodule(path)
        assert isinstance(block.conv, fq.QuantLayer)
        assert block.conv.weight.grad.abs().sum() > 0 and block.bn.weight.grad.abs().sum() > 0


BRANCHED = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "RepNCSPELAN4", [16, 16, 8, 1]],
        [-1, 1, "Conv", [32, 3, 2]],
    ],
    "head": [[-1, 1, "C2fCIB", [32, True, True]], [-1, 1, "RepC3", [32]], [[3, 6], 1, "Detect", ["nc"]]],
}


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["merged by the run", "merged before"])
def test_a_merged_model_trains_with_and_without_fake_quantization(tmp_path, early):
    data = make_shapes(tmp_path / "shapes", train=8, val=4, imgsz=64)
    torch.manual_seed(0)
    net = DetectionModel(copy.deepcopy(BRANCHED), nc=3, verbose=False)
    net.names = dict(enumerate(NAMES))
    if early:
        merge_branches(net.eval(), [torch.rand(4, 3, 64, 64)])
    start = save_model(net, tmp_path / "start.pt")
    quant = {"mode": "qat", "profile": "ort-x86", "calib": 8}
    for name, options in (("quantized", {"quant": quant}), ("float", {})):
        YOLO(start).train(
            trainer=yolo_ext.DetectionTrainer, data=str(data), imgsz=64, epochs=1, batch=4, nbs=4, device="cpu",
            workers=0, plots=False, optimizer="SGD", lr0=0.01, warmup_epochs=0.0, save_dir=str(tmp_path / name),
            **options,
        )  # fmt: skip
        ours, ckpt = load_model(tmp_path / name / "weights" / "best.pt")
        merged = early or name == "quantized"
        assert (branched(ours) == []) is merged and is_pruned(ours) is merged
        assert ("quant" in ckpt["yolo_ext"]) is (name == "quantized")
        if early:
            before = load_model(start)[0]
            path = f"{manifest(before).merged[0]}.conv.weight"
            assert not torch.equal(before.state_dict()[path], ours.state_dict()[path])
        assert raw(YOLO(tmp_path / name / "weights" / "best.pt").model.float().eval(), torch.rand(1, 3, 64, 64))


def raw_with_grad(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return tensors(net(x))
