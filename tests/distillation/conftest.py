# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn import tasks

from yolo_ext.checkpoint import save_model

CLASSES = {"-seg": tasks.SegmentationModel, "-pose": tasks.PoseModel, "-obb": tasks.OBBModel}


def random_model(yaml: str, seed: int = 0, nc: int = 3) -> nn.Module:
    """Return a model with up to three classes a, b, c whose BatchNorm and class scores are not trivial."""
    torch.manual_seed(seed)
    cls = next((c for suffix, c in CLASSES.items() if suffix in yaml), tasks.DetectionModel)
    net = cls(yaml, nc=nc, verbose=False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    head = net.model[-1]
    for name in ("cv3", "one2one_cv3"):
        for branch in getattr(head, name, None) or []:
            nn.init.normal_(branch[-1].weight, 0, 0.3)
            nn.init.zeros_(branch[-1].bias)
    net.names = dict(enumerate("abc"[:nc]))
    return net.eval()


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    return random_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a checkpoint of a model, made once."""
    folder = tmp_path_factory.mktemp("teachers")

    def save(yaml: str, seed: int = 0, nc: int = 3) -> Path:
        file = folder / f"{yaml.removesuffix('.yaml')}-{seed}-{nc}.pt"
        return file if file.exists() else save_model(random_model(yaml, seed, nc), file)

    return save


@pytest.fixture(autouse=True)
def _teachers_in_float32(monkeypatch):
    """Tests state float32 tolerances; on a processor with bfloat16 a teacher would use that by default."""
    from yolo_ext import stock

    monkeypatch.setattr(stock, "native_bf16", lambda: False)
