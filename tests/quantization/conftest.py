# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.stock.load import head_args

SIZE = 96
SMALL = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 1, "SPPF", [128, 5]],
        [-1, 1, "C2PSA", [128]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C2f", [64]],
        [[9, 6], 1, "Detect", ["nc"]],
    ],
}


def random_net(yaml: str | dict[str, Any], nc: int = 3) -> DetectionModel:
    """Return a model whose BN statistics and class scores are not trivial."""
    torch.manual_seed(0)
    net = DetectionModel(yaml, nc=nc, verbose=False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.8, 2.0)
            nn.init.normal_(m.bias, 0, 0.3)
    head = net.model[-1]
    for name in ("cv3", "one2one_cv3"):
        for branch in getattr(head, name, None) or []:
            nn.init.normal_(branch[-1].weight, 0, 0.5)
            nn.init.zeros_(branch[-1].bias)
    return net.eval()


@pytest.fixture(scope="session")
def build() -> Callable[[str], DetectionModel]:
    """Return a function that gives a fresh copy of a model."""
    made = cache(random_net)
    return lambda yaml: deepcopy(made(yaml))


@pytest.fixture(scope="session")
def small() -> Callable[[], DetectionModel]:
    """Return a function that gives a copy of a small model with a bottleneck, pooling, attention and a head."""
    made = random_net(SMALL)
    return lambda: deepcopy(made)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Return noisy and smooth images, values k / 255."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(2, 3, SIZE, SIZE, generator=generator)
    smooth = F.interpolate(torch.rand(2, 3, 6, 6, generator=generator), (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (torch.cat([noise, smooth]) * 255).round() / 255


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that gives checkpoint and FP32 ONNX file of a model, each made once."""
    folder = tmp_path_factory.mktemp("onnx")

    def export(yaml: str) -> tuple[Path, Path]:
        pt = folder / yaml.replace("yolo", "random_").replace(
            ".yaml", ".pt"
        )  # YOLO("yolov5n.pt") looks for yolov5nu.pt
        if not pt.exists():
            model = YOLO(yaml)
            model.model = random_net(yaml)
            model.save(pt)
            YOLO(pt).export(format="onnx", imgsz=SIZE, simplify=False, opset=18, **head_args(end2end=False))
        return pt, pt.with_suffix(".onnx")

    return export
