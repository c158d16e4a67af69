# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands export and verify on the command line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
from ultralytics import YOLO

from yolo_ext import cli
from yolo_ext.deployment.runtime import describe


@pytest.fixture
def place(tiny, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, "tiny.pt")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "file", "shape", "precision"),
    [
        pytest.param("half=True", "tiny_fp16.onnx", [1, 3, 64, 64], "fp16", id="half"),
        pytest.param("quantize=16 opset=14", "tiny_fp16.onnx", [1, 3, 64, 64], "fp16", id="quantize-16"),
        pytest.param("imgsz=[64,96] batch=2", "tiny.onnx", [2, 3, 64, 96], "fp32", id="rectangle"),
        pytest.param("dynamic=True out=a/b.onnx", "a/b.onnx", [None, 3, None, None], "fp32", id="open"),
        pytest.param("nms=True conf=0.1 max_det=7", "tiny.onnx", [1, 3, 64, 64], "fp32", id="nms"),
    ],
)
def test_export(words, file, shape, precision, place):
    assert cli.main(["export", "model=tiny.pt", *words.split(), *_size(words), "save_dir=run"]) == 0
    found = describe(place / file)
    assert (found["shape"], found["precision"]) == (shape, precision)
    assert (found["nms"] is not None) == ("nms" in words)
    if "nms" in words:
        assert found["nms"] == {"conf": 0.1, "iou": 0.7, "max_det": 7, "agnostic_nms": False}
    if "opset" in words:
        assert found["opset"] == 14
    assert json.loads((place / "run/summary.json").read_text())["after"]["size_mb"] > 0


def _size(words: str) -> list[str]:
    return [] if "imgsz" in words else ["imgsz=64"]


@pytest.mark.slow
def test_int8_of_a_float_model_is_calibrated_and_verified(place, shapes, caplog):
    data = f"data={shapes}"
    assert cli.main(["export", "model=tiny.pt", "int8=True", data, "imgsz=64", "quant.calib=4", "save_dir=run"]) == 0
    assert describe("tiny_int8.onnx")["precision"] == "int8"
    assert re.search(r"[1-9]\d* of 3\d convolutions run as INT8", caplog.text)
    assert cli.main(["verify", "model=tiny.pt", "onnx=tiny.onnx", "int8=tiny_int8.onnx", data, "save_dir=run"]) == 0
    found = json.loads((place / "run/verify.json").read_text())
    assert {"map", "int8_box_mean", "weight_max"} <= {c["key"] for c in found["checks"]}
    assert YOLO("tiny_int8.onnx", task="detect").predict(str(shapes.parent / "images/val"), imgsz=64, verbose=False)


@pytest.mark.slow
def test_planted_fault_exits_with_1_and_is_named(place, shapes, capfd):
    assert cli.main(["export", "model=tiny.pt", "imgsz=64", "save_dir=run"]) == 0
    proto = onnx.load("tiny.onnx")
    tensor = next(t for t in proto.graph.initializer if t.name == "model.3.conv.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[5] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, "tiny.onnx")
    source = f"source={shapes.parent / 'images/val'}"
    assert cli.main(["verify", "model=tiny.pt", "onnx=tiny.onnx", source, "save_dir=run"]) == 1
    found = json.loads((place / "run/verify.json").read_text())
    assert found["first_difference"]["module"] == "model.3.conv"
    assert list(found["weights"]["different"]) == ["model.3.conv.weight"]


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        pytest.param("int8=True", ["data=data.yaml"], id="int8-without-data"),
        pytest.param("half=True int8=True", ["exclude each other"], id="two-precisions"),
        pytest.param("quantize=w8a16", ["quantize=w8a16", "8, 16, 32"], id="unknown-precision"),
        pytest.param("conf=0.3", ["conf", "nms=True"], id="conf-without-nms"),
        pytest.param("imgsz=[64,90]", ["imgsz=90", "96"], id="off-the-grid"),
        pytest.param("imgsz=[64,64,64]", ["imgsz=", "height and width"], id="three-sizes"),
        pytest.param("batch=0", ["batch=0"], id="batch"),
        pytest.param("workspace=4", ["workspace", "Legal"], id="key-of-another-format"),
        pytest.param("format=torchscript out=a.torchscript", ["beside the model"], id="out-of-another-format"),
        pytest.param("format=ncnn", ["pip install ncnn"], id="package-missing"),
    ],
)
def test_wrong_options_of_export(words, texts, place, capfd):
    if "ncnn" in words and importlib.util.find_spec("ncnn"):
        pytest.skip("ncnn is installed")
    before = set(place.rglob("*"))
    assert cli.main(["export", "model=tiny.pt", *words.split(), "save_dir=run"]) == 2
    message = capfd.readouterr().err
    assert all(t in message for t in texts), message
    assert set(place.rglob("*")) == before


def test_other_formats_by_ultralytics(place):
    assert cli.main(["export", "model=tiny.pt", "format=torchscript", "imgsz=64"]) == 0
    assert Path("tiny.torchscript").is_file()
