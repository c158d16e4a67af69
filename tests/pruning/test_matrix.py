# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every model YAML of Ultralytics x every criterion that needs no data: exact, trainable, stock, and exportable."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import ultralytics
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, yaml_model_load

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, save_model
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.registry import Need
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.runtime import predictor
from yolo_ext.pruning.criteria import criteria
from yolo_ext.pruning.prune import prune_model
from yolo_ext.pruning.surgery import TOLERANCE
from yolo_ext.stock.load import load_model

CRITERIA = [row.name for row in criteria if Need.DATA not in row.needs]

# YAML in Ultralytics -> the models to build from it. "*" marks those that are too large for every criterion.
MODELS = {
    "yolov3-tiny": ["yolov3-tiny"],
    "yolov3": ["yolov3*"],
    "yolov3-spp": ["yolov3-spp*"],
    "yolov5": ["yolov5n"],
    "yolov5-p6": ["yolov5n-p6"],
    "yolov6": ["yolov6n"],
    "yolov8": ["yolov8n"],
    **{f"yolov8-{v}": [f"yolov8n-{v}"] for v in ("p2", "p6", "ghost", "ghost-p2", "ghost-p6", "world", "worldv2")},
    **{f"yolov8-{v}": [f"yolov8n-{v}"] for v in ("seg", "seg-p6", "pose", "pose-p6", "obb", "cls")},
    **{f"yolov8-cls-resnet{n}": [f"yolov8n-cls-resnet{n}*"] for n in (50, 101)},
    **{f"yolov9{s}": [f"yolov9{s}"] for s in "tsmce"},
    **{f"yolov9{s}-seg": [f"yolov9{s}-seg*"] for s in "ce"},
    **{f"yolov10{s}": [f"yolov10{s}" + "*" * (s != "n")] for s in "nsmblx"},
    **{f"yolo{f}": [f"yolo{f}n"] for f in (11, 12, 26)},
    **{f"yolo{f}-{t}": [f"yolo{f}n-{t}"] for f in (11, 12, 26) for t in ("seg", "pose", "obb", "cls")},
    "yolo11-cls-resnet18": ["yolo11-cls-resnet18"],
    **{f"yolo26-{v}": [f"yolo26n-{v}"] for v in ("p2", "p6", "sem", "depth")},
    **{f"yoloe-{f}": [f"yoloe-{f}n"] for f in ("v8", 11, 26)},
    **{f"yoloe-{f}-seg": [f"yoloe-{f}n-seg"] for f in ("v8", 11, 26)},
    **{f"rtdetr-{v}": [f"rtdetr-{v}*"] for v in ("l", "x", "resnet50", "resnet101")},
    "yolov8-rtdetr": ["yolov8n-rtdetr"],
}
NAMES = [name for names in MODELS.values() for name in names]
# Embeddings of their class names come from a text encoder, which is downloaded; exports fuse them in.
NEED_TEXT = ("world", "yoloe")
# What a run without the marker covers: each kind of block and head once.
FAST = {
    **{"yolov9t": "lamp", "yolov10n": "fpgm", "yolo12n": "group_norm", "yolov8n-ghost": "l1", "yolov5n-p6": "random"},
    **{"yolo11n-cls": "l2", "yolo26n-pose": "slim", "yolov8n-world": "group_sl", "yolov8n-rtdetr": "l2"},
}


def marked(cases: list[tuple], fast: set[tuple]) -> list:
    return [pytest.param(*c, id="-".join(c), marks=() if c in fast else pytest.mark.matrix) for c in cases]


def test_the_table_covers_every_model_yaml():
    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    assert {p.stem for p in folder.rglob("*.yaml")} == set(MODELS)


@lru_cache(maxsize=1)  # the tests of one model run one after the other
def dense(name: str) -> nn.Module:
    """Return a model with random weights and BatchNorm statistics of real activations; do not change it."""
    torch.manual_seed(0)
    if name.endswith("resnet18"):  # its YAML asks for weights from the internet
        config = yaml_model_load(f"{name}.yaml")
        config["backbone"][0][3][2] = None
        model = ClassificationModel(config, verbose=False)
        model.args = {"task": "classify"}  # as a model from `load_model` has it
    else:
        model, _ = load_model(f"{name}.yaml")
    if "kpt_shape" in model.yaml:
        model.kpt_shape = model.yaml["kpt_shape"]  # as after training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in norms:
            m.weight.uniform_(0.5, 1.5)
            m.bias.normal_(0, 0.3)
            m.momentum = 1.0
        model.train()(torch.rand(16, 3, stock.probe_size(model), stock.probe_size(model)))
    for m in norms:
        m.momentum = 0.03
    return model.eval()


@lru_cache(maxsize=1)
def pruned(name: str, method: str) -> nn.Module:
    return prune_model(dense(name), PruneConfig(method=method, ratio=0.2, force=True))  # not sparse


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    marked(
        [(n.rstrip("*"), m) for n in NAMES for m in (CRITERIA if n[-1] != "*" else ["l2"])],
        set(FAST.items()),
    ),
)
def test_pruned_equals_masked_and_trains(name, method):
    """`prune_model` refuses a model that differs from the masked one, cannot train, or gets gradients not finite."""
    model = pruned(name, method)
    assert manifest(model).prune["gap"] <= TOLERANCE
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense(name), model))
    assert after < 0.95 * before or re.search("rtdetr|world", name)  # where decoder and text layers stay
    assert after < before
    stock = ("ultralytics.", "torch.", "torchvision.")
    assert all(type(m).__module__.startswith(stock) for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", marked([(n.rstrip("*"),) for n in NAMES], {("yolov9t",), ("yolo11n-cls",), ("yolo26n-pose",)})
)
def test_pruned_loads_in_stock_ultralytics_and_exports(name, tmp_path):
    model, size = pruned(name, "l2"), stock.probe_size(dense(name))
    file = save_model(model, tmp_path / "pruned.pt")
    loaded = YOLO(file)
    assert ("rtdetr" in name) == (type(loaded).__name__ == "RTDETR")
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = list(stock.returned_tensors(deepcopy(model).half().float()(x)))
    for a, b in zip(expected, stock.returned_tensors(loaded.model.float().eval()(x)), strict=True):
        assert torch.equal(a, b)
    loaded.predict(np.zeros((size, size, 3), np.uint8), imgsz=size, verbose=False, device="cpu")
    if any(word in name for word in NEED_TEXT) or name.endswith("sem"):  # the export of the latter is a map of classes
        return
    onnx = export_onnx(file, tmp_path / "pruned.onnx", size, simplify=False)
    for a, b in zip(predictor(file)(x.numpy()), predictor(onnx)(x.numpy()), strict=True):
        if "rtdetr" in name:  # rows sorted by score: neighbours with nearly equal scores may change places
            a, b = a[..., 4], b[..., 4]
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(a).max())  # boxes are in pixels
