# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Models of one and of four image channels go through every command that reads images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolo_ext.data.check import letterbox_batches
from yolo_ext.stock import load_model, seen_by

TRAIN = "imgsz=64 batch=4 device=cpu workers=0 plots=False"  # of a training that takes seconds
FEW = "imgsz=64 epochs=0 prune.ratio=0.2 prune.round_to=1 prune.images=8 prune.recalibrate=8"
COMMANDS = {
    "prune": f"prune {{}} {FEW} prune.method=taylor",
    "sensitivity": "sensitivity {} imgsz=64 ratios=0.5 prune.images=4 prune.include=[9]",
    "sensitivity quant": "sensitivity {} imgsz=64 kind=quant quant.calib=4 images=4 by=block",
    "quantize": "quantize {} imgsz=64 quant.mode=ptq quant.calib=8 quant.max_drop=1",
    "export": "export {} imgsz=64 int8=True quant.calib=8",
}


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_that_read_images(channelled, call, command, channels):
    status, text = call(command.format(channelled(channels)))
    assert status == 0, text


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_files_are_verified_measured_and_label(channelled, call, channels):
    given = channelled(channels)
    assert call(f"export model={channels}.pt imgsz=64")[0] == 0
    status, text = call(f"verify {given} onnx={channels}.onnx")
    assert status == 0, text
    status, text = call(f"bench models={channels}.pt,{channels}.onnx imgsz=64 rounds=2 data={channels}/data.yaml")
    assert status == 0, text
    for model in (f"{channels}.pt", f"{channels}.onnx"):
        status, text = call(f"label model={model} source={channels}/images/val out=out_{model} conf=0.001 imgsz=64")
        assert status == 0, text
    found = [json.loads(Path(f"out_{channels}.{kind}/label.json").read_text()) for kind in ("pt", "onnx")]
    assert found[0]["skipped"] == {} and found[0]["labelled"] == 4
    assert found[0]["classes"] == found[1]["classes"]
    assert f"channels: {channels}" in Path(f"out_{channels}.pt/data.yaml").read_text()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_is_fed_as_many_channels_as_it_takes(channelled, channels):
    channelled(channels)
    net, _ = load_model(f"{channels}.pt")
    (batch,) = letterbox_batches(sorted(Path(f"{channels}/images/val").iterdir())[:2], 64, **seen_by(net))
    assert batch.shape == (2, channels, 64, 64) and net(batch)


@pytest.mark.slow
def test_an_rgb_model_is_fine_tuned_on_gray_images(channelled, call):
    channelled(1)
    words = f"data=1/data.yaml {TRAIN} epochs=1 prune.speedup=1.3 prune.round_to=1 prune.images=8 save_dir=run"
    status, text = call(f"train model=tiny.pt {words}")
    assert status == 0 and "image channels 3 of the model, 1 of the data" in text, text
    assert load_model("run/weights/best.pt")[0].model[0].conv.in_channels == 1


@pytest.mark.slow
def test_a_gray_teacher_teaches_a_gray_student(channelled, call):
    given = channelled(1)
    status, text = call(f"distill {given} {TRAIN} epochs=1 distill.teacher=1.pt save_dir=run")
    assert status == 0, text


@pytest.mark.parametrize("command", ["distill", "compress"])
def test_an_rgb_teacher_does_not_teach_a_gray_student(channelled, call, command):
    status, text = call(f"{command} {channelled(1)} {TRAIN} epochs=1 distill.teacher=tiny.pt")
    assert status == 2 and "'tiny.pt' has the image channels 3, the student 1" in text


@pytest.mark.parametrize("command", ["quantize", "compress"])
def test_rgb_models_are_refused_on_gray_data(channelled, call, command):
    channelled(1)
    status, text = call(f"{command} model=tiny.pt data=1/data.yaml imgsz=64")
    assert status == 2 and "image channels 3 of the model, 1 of the data" in text
