# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.modules import block
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import torch_utils

from yolo_ext import stock
from yolo_ext.core.errors import UsageError

NAMES = ["yolov5n", "yolov8n", "yolo11n", "yolo26n"]
MORE = [pytest.param(n, marks=pytest.mark.matrix) for n in ("yolov3-tiny", "yolov6n", "yolov9t", "yolov10n", "yolo12n")]


def make(name: str) -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel(f"{name}.yaml", nc=3, verbose=False).eval()


def test_natural_order():
    paths = ["model.10.cv1", "model.2.cv2", "model.2.cv1.conv", "model.2.cv1", "model"]
    assert sorted(paths, key=stock.natural_key) == [
        *("model", "model.2.cv1", "model.2.cv1.conv", "model.2.cv2", "model.10.cv1")
    ]


@pytest.mark.parametrize(
    ("cls", "yaml", "task"),
    [
        pytest.param("DetectionModel", "yolov8n", "detect", id="detect"),
        pytest.param("SegmentationModel", "yolov8n-seg", "segment", id="segment"),
        pytest.param("PoseModel", "yolov8n-pose", "pose", id="pose"),
        pytest.param("OBBModel", "yolov8n-obb", "obb", id="obb"),
        pytest.param("ClassificationModel", "yolov8n-cls", "classify", id="classify"),
        pytest.param("SemanticSegmentationModel", "yolo26n-sem", "semantic", id="semantic"),
        pytest.param("DepthModel", "yolo26n-depth", "depth", id="depth"),
        pytest.param("RTDETRDetectionModel", "yolov8n-rtdetr", "detect", id="transformer"),
    ],
)
def test_task_by_class(cls, yaml, task):
    model = getattr(tasks, cls)(f"{yaml}.yaml", verbose=False)
    assert stock.task_of(model) == task
    assert stock.detection_head(model) is model.get_submodule(stock.head_prefix(model).rstrip("."))
    assert stock.max_stride(model) == 32 and stock.input_channels(model) == 3


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_deployed_layers_are_those_of_the_fused_model(name):
    """Same number of layers with the same kernels and widths as after fusing, named as before it."""
    model = make(name)
    shape = lambda m: tuple(m.weight.shape)  # noqa: E731
    fused = [m for m in stock.deployed(model).modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    named = [model.get_submodule(p) for p in stock.deployed_layers(model)]
    assert sorted(map(shape, named)) == sorted(map(shape, fused))


@pytest.mark.parametrize("name", ["yolov9t", "yolov10n"])
def test_deployed_layers_of_reparameterised_blocks(name):
    """Of several branches that fusing makes one, only the widest counts."""
    model = make(name)
    found = stock.deployed_layers(model)
    kinds = {"RepConv": ("conv1.conv", "conv2.conv"), "RepVGGDW": ("conv.conv", "conv1.conv")}
    blocks = [(p, *kinds[type(m).__name__]) for p, m in model.named_modules() if type(m).__name__ in kinds]
    for path, stays, merged in blocks:
        assert f"{path}.{stays}" in found and f"{path}.{merged}" not in found
    assert blocks


@pytest.mark.parametrize("end2end", [True, False])
def test_deployed_layers_have_one_branch_of_a_dual_head(end2end):
    model = make("yolo26n")
    model.end2end = end2end
    found = stock.deployed_layers(model)
    counts = [sum(p.startswith(f"model.23.{branch}.") for p in found) for branch in ("one2one_cv2", "cv2")]
    assert counts in ([[9, 0]] if end2end else [[0, 9], [9, 9]])  # older releases never drop the one-to-one branch


@pytest.mark.parametrize("name", NAMES)
def test_deployed_is_a_copy(name):
    model = make(name)
    before = deepcopy(model.state_dict())
    fused = stock.deployed(model.train())
    assert model.training and not fused.training and fused.is_fused() and not model.is_fused()
    assert model.state_dict().keys() == before.keys()


def test_gflops_are_those_ultralytics_prints():
    model = make("yolov8n")
    assert stock.gflops(model, 640) == pytest.approx(torch_utils.get_flops(stock.deployed(model), 640))
    assert stock.gflops(model, 320) == pytest.approx(stock.gflops(model, 640) / 4, rel=0.01)


@pytest.mark.parametrize("name", ["yolov8n-cls", "yolov9t", "yolov10n", "yolo11n-obb", "yolo26n-seg", "yolov8n-rtdetr"])
def test_gflops_of_any_head_are_those_ultralytics_prints(name):
    model = tasks.RTDETRDetectionModel(f"{name}.yaml") if "rtdetr" in name else YOLO(f"{name}.yaml").model
    assert stock.gflops(model, 320) == pytest.approx(torch_utils.get_flops(stock.deployed(model), 320), rel=1e-9)


class Picky(nn.Module):
    """A block that looks at values, and cannot take what happens to lie in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.isfinite().all():
            raise ValueError("not finite")
        return x


def test_flops_are_counted_on_zeros():
    model, plain = make("yolov8n"), stock.gflops(make("yolov8n"), 64)
    model.model[1].act = Picky()
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    try:
        assert stock.gflops(model, 64) == pytest.approx(plain)
    finally:
        torch.use_deterministic_algorithms(False)


def test_flops_that_nothing_can_count_are_an_error(monkeypatch):
    model = make("yolov8n")
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(UsageError, match="pip uninstall -y thop"):
        stock.gflops(model)


def raw(model: nn.Module) -> nn.Module:
    """Put a model in eval mode, with a head that does not decode."""
    model.eval().model[-1].training = True
    return model


@pytest.mark.parametrize("name", NAMES)
def test_fused_blocks_give_the_same_raw_outputs(name):
    model = make(name)
    fused = stock.fuse_blocks(deepcopy(model))
    assert not any(hasattr(m, "bn") and hasattr(m, "forward_fuse") and "Rep" not in type(m).__name__
                   for m in fused.modules())  # fmt: skip
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = (list(stock.returned_tensors(raw(m)(x))) for m in (model, fused))
    assert len(a) == len(b) > 0
    for s, t in zip(a, b):
        torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_raw_outputs_by_branch(name):
    model = raw(make(name).train())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        branches = stock.branches(model(torch.rand(1, 3, 64, 64)))
    assert set(branches) == ({"one2many", "one2one"} if name == "yolo26n" else {""})
    assert all(b["boxes"].shape[2] == b["scores"].shape[2] == 84 for b in branches.values())


@pytest.mark.parametrize("name", NAMES)
def test_level_inputs_are_what_the_neck_hands_over(name):
    model = make(name)
    seen = []
    stock.detection_head(model).register_forward_pre_hook(lambda m, args: seen.append([x.shape[1] for x in args[0]]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert stock.level_widths(model) == seen[0]


def test_returned_tensors_skip_the_neck_maps():
    t = [torch.zeros(i + 1) for i in range(4)]
    out = ({"boxes": t[0], "feats": [t[1]], "one2one": {"scores": t[2], "feats": t[1]}}, [t[3]], None, 3)
    assert [len(x) for x in stock.returned_tensors(out)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("name", "size"), [("yolov8n", 64), ("yolov8n-p6", 128), ("yolov8n-cls", 64), ("yolov8n-rtdetr", 128)]
)
def test_probe_size_is_enough(name, size):
    """A transformer head of older releases needs as many cells as it has queries: 16x16 + 8x8 + 4x4 >= 300."""
    kind = next(k for k in ("rtdetr", "cls", "") if k in name)
    model = {"rtdetr": tasks.RTDETRDetectionModel, "cls": tasks.ClassificationModel, "": DetectionModel}[kind]
    model = model(f"{name}.yaml", verbose=False).eval()
    assert stock.probe_size(model) == size
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))


def test_refresh_widths_of_parts_that_shrink_on_their_own():
    model = nn.Module()
    model.cut = block.CBLinear(4, [3, 5, 2])
    model.model = nn.ModuleList([model.cut])
    stock.refresh_widths(model)
    assert model.cut.c2s == [3, 5, 2]
    stock.refresh_widths(model, {"cut.conv": {"out": [0, 2, 3, 4, 7, 9]}})
    assert model.cut.c2s == [2, 3, 1]


def test_refresh_widths_after_a_cut():
    model = make("yolo11n")
    block, attention = model.model[2], model.model[10].m[0].attn
    block.cv1.conv.out_channels, attention.proj.conv.in_channels = 10, 2 * attention.num_heads
    stock.refresh_widths(model)
    assert block.c == 5 and attention.head_dim == 2 and stock.detection_head(model).shape is None
