# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""An INT8 file is one that runs in integers: what a list leaves out is said, and `quant.strict` fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolo_ext.checkpoint import save_model
from yolo_ext.pipeline import int8
from yolo_ext.stock.load import load_model

EXPORT = (
    "export model=tiny.pt int8=True data=shapes/data.yaml imgsz=64 quant.calib=4 quant.profile=ort-x86 save_dir=run"
)
QUANTIZE = "quantize model=tiny.pt data=shapes/data.yaml imgsz=64 quant.calib=8 quant.mode=ptq quant.max_drop=1"
BITS = "'quant_bits':{'weight':8,'input':8}"
NNI = f"[{{'quant_types':['weight','input'],{BITS},'op_types':['Conv2d','Linear']}}]"
WEIGHTS = "[{'quant_types':['weight'],'quant_bits':8,'op_types':['Conv2d']}]"
WIDE = "[{'default':'all'},{'op_names':['model.4'],'quant_bits':{'weight':16}}]"


@pytest.fixture
def quick(monkeypatch):
    """Leave the measurement of latency out."""
    from yolo_ext.pipeline import stages

    entry = {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 10, "samples": [1.0] * 10}
    monkeypatch.setattr(stages, "bench", lambda files, imgsz, **options: {name: entry for name in files})


def test_the_usual_list_of_nni_gives_integer_convolutions(place, call):
    status, text = call(f"{EXPORT} quant.strict=True quant.config_list={NNI}")
    assert status == 0, text
    assert "the outputs too, without which ONNX Runtime has no integer convolutions" in text
    assert "30 of 36 convolutions run as INT8 in ONNX Runtime; float: 4 head output, 1 image input, 1 DFL" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "count", "why"),
    [
        pytest.param(WEIGHTS, "30 of 30", "no output and no input", id="weights alone"),
        pytest.param(WIDE, "4 of 30", "16 bits, for which ONNX Runtime has no integer convolution", id="16 bits"),
    ],
)
def test_convolutions_that_a_list_keeps_float_are_counted(place, call, entries, count, why):
    status, text = call(f"{EXPORT} quant.config_list={entries}")
    assert status == 0 and f"quantize: {count} convolutions that should run as INT8 are float" in text
    assert f"'model.4.cv1.conv': {int8.LISTED} {why}" in text or f"'model.1.conv': {int8.LISTED} {why}" in text
    status, text = call(f"{EXPORT} quant.strict=True quant.config_list={entries}")
    assert status == 1 and count in text and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["openvino", "tensorrt"])
def test_a_file_for_another_runtime_is_not_proven(place, call, profile):
    words = EXPORT.replace("ort-x86", profile)
    status, text = call(words)
    assert status == 0 and f"Profile '{profile}' is for another runtime" in text and "0 of 36 are" in text
    assert call(f"{words} quant.strict=True")[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "count", "told"),
    [
        pytest.param("", "30 of 36", "", id="all"),
        pytest.param(f"quant.config_list={WEIGHTS}", "0 of 36", "30 of 30 convolutions that should", id="none"),
    ],
)
def test_openvino_counts_its_own_convolutions(place, call, entries, count, told):
    pytest.importorskip("openvino")
    words = EXPORT.replace("quant.profile=ort-x86", f"format=openvino {entries}")
    status, text = call(words)
    assert status == 0 and f"{count} convolutions run as INT8 in OpenVINO" in text and told in text
    assert call(f"{words} quant.strict=True")[0] == bool(told)
    status, text = call("bench models=tiny_int8_openvino_model rounds=1 imgsz=64 memory=False save_dir=bench")
    assert status == 0 and count in text


@pytest.mark.slow
def test_a_checkpoint_with_ranges_is_exported_strictly_without_data(place, call, quick):
    assert call(f"{QUANTIZE} quant.profile=tensorrt save_dir=q")[0] == 0
    status, text = call("export model=q/ptq/weights/ptq.pt out=a.onnx quant.strict=True imgsz=64 save_dir=run")
    assert status == 1 and "Profile 'tensorrt' is for another runtime" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "counts", "statuses"),
    [
        pytest.param(NNI, (30, 30), (0, 0), id="NNI"),
        pytest.param(WEIGHTS, (0, 30), (1, 1), id="weights alone"),
        pytest.param(WIDE, (26, 30), (0, 1), id="16 bits"),
        pytest.param("[{'op_names':['model.4.cv1.conv']}]", (1, 1), (0, 0), id="one"),
    ],
)
def test_quantize_counts_what_was_planned(place, call, quick, entries, counts, statuses):
    for strict, status in zip((False, True), statuses):
        found, text = call(f"{QUANTIZE} quant.config_list={entries} quant.strict={strict} save_dir=run_{strict}")
        assert found == status, text
    record = json.loads(Path("run_False/ptq/stage.json").read_text())
    assert (record["metrics"]["int8_convs"], record["planned"]) == counts
    assert len(record["accidents"]) == counts[1] - counts[0]
    assert ("should run as INT8 are float" in text) == (counts[0] < counts[1])


@pytest.mark.slow
def test_a_convolution_that_runs_twice_counts_twice(place, call):
    """Heads that share their convolutions over the levels run one layer several times."""
    net, _ = load_model("tiny.pt")
    for branch in (net.model[-1].cv2, net.model[-1].cv3):
        branch[1][1] = branch[0][1]  # of one width
    save_model(net, Path("shared.pt"))
    status, text = call(f"{EXPORT} quant.strict=True".replace("tiny.pt", "shared.pt"))
    assert status == 0 and "30 of 36 convolutions run as INT8 in ONNX Runtime; float: 4 head" in text, text
