# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.pruning.graph import build_graph


@torch.no_grad()
def calibrated(model: nn.Module) -> nn.Module:
    """Give BatchNorm the statistics of real activations: with fresh ones the signal dies out and faults hide."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.weight.uniform_(0.5, 1.5)
        m.bias.normal_(0, 0.3)
        m.momentum = 1.0
    model.train()(torch.rand(8, 3, 64, 64))
    for m in norms:
        m.momentum = 0.03
    return model.eval()


@pytest.fixture(scope="session")
def calibrate() -> Callable[[nn.Module], nn.Module]:
    return calibrated


@pytest.fixture(scope="session")
def yolo() -> Callable[[str], DetectionModel]:
    """Return a function that gives a detection model with random weights, each made once; do not change them."""

    @cache
    def make(name: str) -> DetectionModel:
        torch.manual_seed(0)
        return calibrated(DetectionModel(f"{name}.yaml", nc=3, verbose=False))

    return make


@pytest.fixture(scope="module")
def traced(yolo) -> tuple[nn.Module, Callable[[], Any]]:
    """Model and graph; a plan writes reasons into its graph, so each one gets a copy."""
    model = yolo("yolov8n")
    graph = build_graph(model)
    return model, lambda: deepcopy(graph)


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the many small convolutions here from spinning on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
