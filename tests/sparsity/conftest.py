# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

SMALL = {
    "nc": 3,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "C2f", [64, True]],
    ],
    "head": [[[2, 4], 1, "Detect", ["nc"]]],
}


@cache
def _made(name: str) -> DetectionModel:
    torch.manual_seed(0)
    model = DetectionModel(deepcopy(SMALL) if name == "small" else f"{name}.yaml", nc=3, verbose=False).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="session")
def fresh() -> Callable[..., DetectionModel]:
    """Return a function that gives a new detection model with random weights and unequal scales."""
    return lambda name="small": deepcopy(_made(name))


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the many small convolutions here from spinning on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
