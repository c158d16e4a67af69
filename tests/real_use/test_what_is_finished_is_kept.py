# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a result is complete without may fail: the result, its summary and its report are written all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO

from yolo_ext.checkpoint import save_model
from yolo_ext.stock import load_model

torchvision = pytest.importorskip("torchvision")
PRUNE = "epochs=0 imgsz=64 prune.ratio=0.3 prune.round_to=1 save_dir=run"


def kept(text: str, stage: str) -> None:
    assert f"Stage {stage} is left out" in text
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["after"]["params"] < summary["before"]["params"]
    assert YOLO("run/weights/best.pt").model and f"Stage {stage} is left out" in Path("run/report.html").read_text()


class Deform(nn.Module):
    """A convolution that samples where another one says; ONNX files of today's opsets cannot hold it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 18, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.deform_conv2d(x, self.offset(x), self.weight, padding=1)


@pytest.mark.slow
def test_latency_of_a_model_that_onnx_cannot_express(place, call):
    net, _ = load_model("tiny.pt")
    net.model[4] = nn.Sequential(net.model[4], Deform(net.model[4].cv2.conv.out_channels))
    net.model[4].i, net.model[4].f, net.model[4].type = 4, -1, "Deform"
    save_model(net, Path("deform.pt"))
    status, text = call(f"prune model=deform.pt trust=True {PRUNE}")  # a layer of this file
    assert status == 0, text
    kept(text, "latency")
    assert not Path("run/latency/stage.json").exists()


@pytest.mark.slow
def test_a_stage_that_was_left_out_is_tried_again(place, call, monkeypatch):
    from yolo_ext.pipeline import stages

    with monkeypatch.context() as m:
        m.setattr(stages, "export_onnx", None)
        assert call(f"prune model=tiny.pt {PRUNE}")[0] == 0
    assert call(f"prune model=tiny.pt {PRUNE} resume=True")[0] == 0
    assert Path("run/latency/stage.json").exists()


def test_a_finished_pruning_survives_what_fails_behind_it(place, call, monkeypatch):
    from dataclasses import replace

    from yolo_ext.core.errors import UsageError
    from yolo_ext.pipeline import stages

    def fail(_):
        raise UsageError("no more")

    chosen = tuple(replace(s, work=fail, extra=False) if s.name == "latency" else s for s in stages.STAGES)
    monkeypatch.setattr(stages, "STAGES", chosen)
    status, _ = call(f"prune model=tiny.pt {PRUNE}")
    assert status == 2 and Path("run/prune/weights/pruned.pt").exists()


@pytest.mark.slow
def test_a_text_prompted_model_is_pruned_without_data_and_refused_with_them(place, call):
    net, _ = load_model("yolov8s-world.yaml")
    save_model(net, Path("world.pt"))
    status, text = call("prune model=world.pt epochs=0 imgsz=64 prune.ratio=0.2 save_dir=run")
    assert status == 0, text
    assert Path("run/weights/best.pt").exists() and Path("run/summary.json").exists()
    data = "data=shapes/data.yaml imgsz=64"
    for words in ("train model=world.pt epochs=1", "distill model=world.pt epochs=1 distill.teacher=tiny.pt",
                  "sensitivity model=world.pt", "quantize model=world.pt",
                  "distill model=tiny.pt epochs=1 distill.teacher=world.pt"):  # fmt: skip
        status, text = call(f"{words} {data}")
        assert status == 2 and "YOLO-World is trained and validated in a way of its own" in text, words
