# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Untrained models that behave like trained ones, their exports, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, OBBModel, PoseModel, SegmentationModel

from yolo_ext.deployment.export import export_onnx

SIZE = 96
KINDS = {
    "": DetectionModel,
    "-seg": SegmentationModel,
    "-pose": PoseModel,
    "-obb": OBBModel,
    "-cls": ClassificationModel,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """Return an untrained model whose signal reaches the head and whose scores lie on both sides of 0.25."""
    torch.manual_seed(seed)
    kind = KINDS["-" + name.split("-")[1] if "-" in name else ""]
    net: Any = kind(f"{name}.yaml", nc=3, verbose=False)
    head = net.model[-1]
    for branch in (getattr(head, n, None) for n in ("cv3", "one2one_cv3")):
        for level in branch or []:
            nn.init.constant_(level[-1].bias, -1.0)
            nn.init.normal_(level[-1].weight, std=0.3)
    for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.momentum = 1.0
        nn.init.constant_(bn.weight, 0.5)  # keeps the random net from amplifying rounding, as training does
    flat = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, SIZE, SIZE)
    smooth = nn.functional.interpolate(torch.rand(7, 3, 12, 12), SIZE, mode="bilinear")
    with torch.no_grad():  # statistics of real activations: with fresh ones the signal dies out before the head
        net.train()(torch.cat([flat, smooth, torch.rand(7, 3, SIZE, SIZE)]))
    return net.eval()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(6)]
    for path in paths:
        cv2.imwrite(str(path), cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (120, 90)))
    return paths


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[..., tuple[nn.Module, Path]]:
    """Return a function that builds and exports a model once; do not change either."""
    folder, models, cache = tmp_path_factory.mktemp("onnx"), {}, {}

    def get(name: str, end2end: bool = False, imgsz: Any = SIZE, **options: Any) -> tuple[nn.Module, Path]:
        key = (name, end2end, imgsz, repr(options))
        if key not in cache:
            models[name] = models.get(name) or make(name)
            file = folder / f"{len(cache)}.onnx"
            cache[key] = models[name], export_onnx(models[name], file, imgsz, end2end=end2end, **options)
        return cache[key]

    return get


@pytest.fixture(scope="session")
def spoil() -> Callable[..., Path]:
    """Return a function that writes a copy of an ONNX file in which a weight is scaled, all of it or one value."""

    def write(source: Path, out: Path, weight: str, factor: float, value: int | None = None) -> Path:
        proto = onnx.load(source)
        tensor = next(t for t in proto.graph.initializer if t.name.endswith(weight))
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[slice(None) if value is None else value] *= np.float32(factor)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(proto, out)
        return out

    return write
