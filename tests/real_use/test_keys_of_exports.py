# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Keys of exports are honoured in the files that a command writes, or refused, or named as without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_ext.deployment.runtime import describe

QUANTIZE = "quantize model=tiny.pt data=shapes/data.yaml imgsz=64 quant.calib=8 quant.mode=ptq quant.max_drop=1"
DATA = "data=shapes/data.yaml imgsz=64"
SAYS_MORE = pytest.mark.skipif(DEFAULT_CFG_DICT["nms"] is False, reason="here nms=False is the default")


@pytest.mark.slow
def test_quantize_honours_them(place, call, monkeypatch):
    from yolo_ext.pipeline import stages

    entry = {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 10, "samples": [1.0] * 10}
    monkeypatch.setattr(stages, "bench", lambda files, imgsz, **options: {name: entry for name in files})
    status, text = call(f"{QUANTIZE} opset=17 dynamic=True simplify=False save_dir=run quant.strict=True")
    assert status == 0, text
    for file, precision in (("base/fp32", "fp32"), ("onnx/fp32", "fp32"), ("onnx/int8", "int8")):
        found = describe(f"run/{file}.onnx")
        assert (found["opset"], found["precision"], found["shape"]) == (17, precision, [None, 3, None, None])


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        pytest.param("half=True", ["half"], id="half"),  # newer Ultralytics has no such key
        pytest.param("nms=True", ["'nms=True'", "yolo-ext export"], id="nms"),
        pytest.param("nms=False", ["'nms=False'", "yolo-ext export"], id="NMS-free", marks=SAYS_MORE),
        pytest.param("format=openvino", ["'format=openvino'", "yolo-ext export"], id="format"),
        pytest.param("opset=11", ["'opset=11'", "13 or later"], id="opset"),
    ],
)
def test_quantize_refuses_what_its_files_cannot_have(place, call, words, texts):
    before = set(place.rglob("*"))
    status, text = call(f"{QUANTIZE} {words} save_dir=run")
    assert status == 2 and all(t in text for t in texts), text
    assert set(place.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("data=shapes/data.yaml", "data (only INT8 is calibrated)", id="data of a float file"),
        pytest.param("device=cpu", "device (only INT8 is calibrated)", id="device"),
        pytest.param(f"int8=True {DATA} quant.calib=4 quant.mixed=False quant.epochs=3",
                     "quant.epochs (only in quantize and compress), quant.mixed", id="quant"),
    ],
)  # fmt: skip
def test_export_names_keys_without_effect(place, call, words, text):
    status, said = call(f"export model=tiny.pt imgsz=64 {words} save_dir=run")
    assert status == 0 and "Without effect here:" in said and text in said, said


@pytest.mark.slow
def test_export_without_keys_names_none(place, call):
    status, said = call(f"export model=tiny.pt int8=True {DATA} quant.calib=4 opset=16 device=cpu save_dir=run")
    assert status == 0 and "Without effect" not in said
    assert {describe(f)["opset"] for f in Path().glob("*.onnx")} == {16}


def test_options_of_quantization_are_refused_for_other_formats(place, call):
    status, said = call("export model=tiny.pt format=torchscript quant.profile=auto")
    assert status == 2 and "'quant' options are for onnx and openvino" in said
