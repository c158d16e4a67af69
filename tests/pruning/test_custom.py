# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Layers that users put into their YAMLs, written as they are found in forks, and backbones of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ultralytics.nn import tasks
from ultralytics.nn.tasks import DetectionModel

from yolo_ext import stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import CheckFailed
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.prune import make_plan, prune_model
from yolo_ext.pruning.surgery import TOLERANCE, apply_plan, verify


class SE(nn.Module):
    """Squeeze-and-excitation with linear layers and `expand_as`."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        layers = nn.Linear(c, c // 2, bias=False), nn.ReLU(inplace=True), nn.Linear(c // 2, c, bias=False)
        self.fc = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class CoordAtt(nn.Module):
    """Coordinate attention: rows and columns are pooled, joined, cut apart again, and turned."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        self.conv1, self.bn1, self.act = nn.Conv2d(c, c // 2, 1), nn.BatchNorm2d(c // 2), nn.Hardswish()
        self.conv_h, self.conv_w = nn.Conv2d(c // 2, c, 1), nn.Conv2d(c // 2, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, _, h, w = x.size()
        y = torch.cat([self.pool_h(x), self.pool_w(x).permute(0, 1, 3, 2)], dim=2)
        a, b = torch.split(self.act(self.bn1(self.conv1(y))), [h, w], dim=2)
        return x * self.conv_w(b.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(a).sigmoid()


class ChannelGate(nn.Module):
    """The channel half of CBAM: average and maximum over the places, one shared bottleneck."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(c, c // 2, 1, bias=False), nn.ReLU(), nn.Conv2d(c // 2, c, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return x * sum(self.fc(p) for p in pooled).sigmoid()


class CBAM(ChannelGate):
    """Both halves; the mean and the maximum over all channels change when one goes."""

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class SimAM(nn.Module):
    """Attention without weights."""

    def __init__(self, c: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        y = d / (4 * (d.sum(dim=[2, 3], keepdim=True) / (x.shape[2] * x.shape[3] - 1) + 1e-4)) + 0.5
        return x * torch.sigmoid(y)


class ECA(nn.Module):
    """A convolution over neighbouring channels, which are no neighbours any more when one goes."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class Scaled(nn.Module):
    """Depends on its width in a way that no tracer sees."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) / x.shape[1] ** 0.5


class Outer(nn.Module):
    """Holds a module that does."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(c, c, 1) for _ in range(3))
        self.scaled = Scaled(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.scaled(self.second(self.first(x))))


LOCAL = PruneConfig(method="random", ratio=0.3, scope="local", round_to=1, min_channels=1)


@pytest.fixture
def built(monkeypatch, calibrate) -> Callable[..., DetectionModel]:
    """Return a function that builds a YOLO in which each layer stands once, between convs of 32 channels."""

    def make(*layers: type[nn.Module]) -> DetectionModel:
        backbone = [[-1, 1, "Conv", [16, 3, 2]]]
        for cls in layers:
            monkeypatch.setattr(tasks, cls.__name__, cls, raising=False)
            backbone += [[-1, 1, "Conv", [32, 3, 2]], [-1, 1, cls.__name__, [32]]]
        backbone += [[-1, 1, "C2f", [32, True]], [-1, 1, "Conv", [64, 3, 2]]]
        head = [[[len(backbone) - 2, len(backbone) - 1], 1, "Detect", ["nc"]]]
        torch.manual_seed(0)
        return calibrate(DetectionModel({"nc": 3, "backbone": backbone, "head": head}, verbose=False))

    return make


def reasons(model: nn.Module) -> dict[str, str]:
    """Return why layers outside the head stay whole, by path."""
    head = stock.head_prefix(model)
    return {p: r for p, r in manifest(model).prune["frozen"].items() if not p.startswith(head)}


@pytest.mark.parametrize("cls", [SE, CoordAtt, ChannelGate, SimAM])
def test_attention_over_places_loses_channels(cls, built):
    small = prune_model(built(cls), LOCAL)
    assert manifest(small).prune["gap"] <= TOLERANCE and not reasons(small)
    widths = [
        n for m in small.model[2].modules() for n in (getattr(m, "out_channels", 0), getattr(m, "out_features", 0))
    ]
    assert {n for n in widths if n} <= {22, 11}  # of 32 and 16


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        pytest.param(CBAM, "goes through 'mean' in CBAM model.2", id="spatial-half-of-cbam"),
        pytest.param(ECA, "is reshaped by 'transpose' in ECA model.2", id="conv-over-channels"),
    ],
)
def test_attention_over_channels_keeps_its_stream_and_says_why(cls, reason, built):
    small = prune_model(built(cls), LOCAL)
    assert manifest(small).prune["gap"] <= TOLERANCE
    assert reason in reasons(small).values() and all(f"in {cls.__name__} model.2" in r for r in reasons(small).values())
    assert small.model[1].conv.out_channels == 32 and small.model[0].conv.out_channels < 16


# Fallback -------------------------------------------------------------------------------------------------------------
def test_only_the_module_that_fails_the_proof_stays_whole(built, caplog):
    small = prune_model(built(SE, Scaled, CoordAtt), LOCAL)
    assert manifest(small).prune["gap"] <= TOLERANCE
    assert set(reasons(small).values()) == {"enters Scaled model.4"}
    assert small.model[2].fc[0].out_features < 16 and small.model[6].conv1.out_channels < 16
    assert "the code of Scaled: what runs through it stays whole" in caplog.text
    assert "written" not in caplog.text and "prune.exclude" not in caplog.text


@pytest.mark.slow
def test_of_nested_modules_the_inner_one_stays_whole(built, caplog):
    small = prune_model(built(Outer), LOCAL)
    assert set(reasons(small).values()) == {"enters Scaled model.2.scaled"}
    assert small.model[2].first.out_channels < 32
    assert "the code of Scaled:" in caplog.text


def test_without_a_module_to_blame_the_proof_fails_with_advice(built, monkeypatch):
    model = built(SimAM)
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: x * x.shape[1])  # stock code that looks at the width
    with pytest.raises(CheckFailed, match=r"not exact .* prune\.exclude"):
        prune_model(model, LOCAL)


# Backbones of torchvision, whose BatchNorm no deployment folds ------------------------------------------------------
BACKBONES = {  # channels, layers left out at the end, (channels, index) of three levels
    "resnet18": (512, ((128, 6), (256, 7), (512, 8))),
    "mobilenet_v2": (320, ((32, 7), (96, 14), (320, 18))),
    "mobilenet_v3_small": (576, ((24, 4), (48, 9), (576, 13))),
    "mnasnet0_5": (1280, ((24, 10), (48, 12), (1280, 16))),
    "efficientnet_b0": (1280, ((40, 4), (112, 6), (1280, 9))),
    "densenet121": (1024, ((512, 7), (1024, 9), (1024, 11))),
    "shufflenet_v2_x0_5": (192, ((48, 5), (96, 6), (192, 7))),
    "convnext_tiny": (768, ((192, 4), (384, 6), (768, 8))),
}
QUICK = ("mobilenet_v2", "mobilenet_v3_small")


@pytest.fixture(scope="module")
def backbone(calibrate):
    """Return a function that builds a YOLO on a backbone of torchvision."""

    def make(name: str) -> DetectionModel:
        pytest.importorskip("torchvision")
        channels, levels = BACKBONES[name]
        rows = [[-1, 1, "TorchVision", [channels, name, None, True, 2, True]]]
        rows += [[0, 1, "Index", list(level)] for level in levels] + [[-1, 1, "SPPF", [128, 5]]]
        head = [[2, 1, "C2f", [64]], [1, 1, "C2f", [32]], [[6, 5, 4], 1, "Detect", ["nc"]]]
        torch.manual_seed(0)
        return calibrate(DetectionModel({"nc": 3, "backbone": rows, "head": head}, verbose=False))

    return make


def figures(model: nn.Module) -> dict[str, float]:
    return {"speedup": stock.gflops(model, 320), "params": sum(p.numel() for p in stock.deployed(model).parameters())}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.matrix) for n in BACKBONES])
def test_targets_are_met_on_backbones_with_their_own_norms(name, backbone, caplog):
    model = backbone(name)
    for target, value in {"speedup": 1.5, "params": 1.5}.items():
        kept = make_plan(model, build_graph(model), PruneConfig(**{target: value}), imgsz=320)
        small = apply_plan(deepcopy(model), kept)
        assert verify(model, small, kept) <= TOLERANCE
        reached = figures(model)[target] / figures(small)[target]
        assert reached == pytest.approx(value, rel=0.01) or f"{target} is {reached:.4g} instead of" in caplog.text
