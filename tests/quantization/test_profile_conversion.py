# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from ultralytics import YOLO

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.runtime import conv_report, run, session
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import insert_fake_quant, insert_plan, load_state
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import PROFILES, State, convert, plan_of

OUTPUT, ACTIVATION, ASYMMETRIC, WIDE = "'output'", "'activation'", "asymmetric", "over 7 bits"
EXACT = None
# Source -> target -> what the refusal names; EXACT where there is none. Targets in the order of PROFILES.
MATRIX = {
    "ort-x86": [EXACT, EXACT, ACTIVATION, ACTIVATION, EXACT, EXACT, ASYMMETRIC],
    "ort-x86-vnni": [WIDE, EXACT, ACTIVATION, ACTIVATION, EXACT, EXACT, ASYMMETRIC],
    "ort-x86-full": [EXACT, EXACT, EXACT, EXACT, EXACT, EXACT, ASYMMETRIC],
    "ort-x86-full-vnni": [WIDE, EXACT, WIDE, EXACT, EXACT, EXACT, ASYMMETRIC],
    "ort-arm": [WIDE, EXACT, ACTIVATION, ACTIVATION, EXACT, EXACT, ASYMMETRIC],
    "openvino": [OUTPUT, OUTPUT, OUTPUT, OUTPUT, OUTPUT, EXACT, ASYMMETRIC],
    "tensorrt": [OUTPUT, OUTPUT, OUTPUT, OUTPUT, OUTPUT, EXACT, EXACT],
}
PAIRS = [(source, target, refusal) for source, row in MATRIX.items() for target, refusal in zip(PROFILES, row)]


@pytest.fixture(scope="module")
def calibrated(exported, images):
    """Return a function that gives the calibrated state of a profile."""
    pt, _ = exported("yolov8n.yaml")
    made: dict[str, State] = {}

    def state(name: str) -> State:
        if name not in made:
            net = YOLO(pt).model.float().eval()
            net.fuse(verbose=False)
            insert_fake_quant(net, PROFILES[name])
            made[name] = calibrate(net, [images], observer="minmax")
        return copy.deepcopy(made[name])

    return state


@pytest.mark.parametrize(("source", "target", "refusal"), PAIRS)
def test_all_pairs(calibrated, source, target, refusal):
    state = calibrated(source)
    before = copy.deepcopy(state)
    if refusal:
        with pytest.raises(UsageError, match=f"(?s)for {source} is not exact for {target}: .*{refusal}.*Give data="):
            convert(state, PROFILES[source], PROFILES[target])
        return
    converted = convert(state, PROFILES[source], PROFILES[target])
    assert state == before
    for path, sites in converted.items():  # nothing is invented, no range and no weight moves
        assert sites == {site: state[path][site] for site in sites}
    dropped = {(p, s) for p, sites in state.items() for s in sites} - {(p, s) for p, v in converted.items() for s in v}
    if PROFILES[target].output == PROFILES[source].output and source != "tensorrt":
        assert not dropped
    elif source != "tensorrt":
        assert dropped and {site for _, site in dropped} == {"output"}


def test_the_matrix_covers_all_profiles():
    assert list(MATRIX) == list(PROFILES) and {len(row) for row in MATRIX.values()} == {len(PROFILES)}


def test_codes_that_others_read_are_kept():
    site = {"bits": 8, "lo": -1.0, "hi": 1.0}
    weight = {"bits": 7, "symmetric": True, "per_channel": True}
    state = {
        "silu.conv": {"input": site, "weight": weight, "output": site, "activation": site},
        "linear.conv": {"weight": weight, "output": site},  # no activation: what follows reads the output's codes
        "reader.conv": {"weight": weight, "output": site},
    }
    converted = convert(state, PROFILES["ort-x86-full"], PROFILES["openvino"])
    assert set(converted["silu.conv"]) == {"input", "weight", "activation"}
    assert converted["linear.conv"] == state["linear.conv"]


def test_openvino_gets_a_float_stem_where_weights_are_wider_than_it_can_run_them(calibrated):
    state = calibrated("tensorrt")
    converted = convert(state, PROFILES["tensorrt"], PROFILES["openvino"])
    assert set(state) - set(converted) == {"model.0.conv"}
    state["model.0.conv"]["weight"]["bits"] = 7
    assert convert(state, PROFILES["tensorrt"], PROFILES["openvino"]) == state


@pytest.mark.parametrize(
    ("source", "target"),
    [("ort-x86", "ort-arm"), ("ort-x86", "openvino"), ("ort-x86-full", "ort-x86"), ("ort-x86-full", "openvino"),
     ("tensorrt", "openvino")],
)  # fmt: skip
def test_converted_files_compute_what_the_converted_state_says(exported, images, calibrated, tmp_path, source, target):
    pt, fp32 = exported("yolov8n.yaml")
    state = calibrated(source)
    converted = convert(state, PROFILES[source], PROFILES[target])
    write_qdq(fp32, tmp_path / "q.onnx", converted, PROFILES[target])
    net = YOLO(pt).model.float().eval()
    net.model[-1].export, net.model[-1].format = True, "onnx"
    net.fuse(verbose=False)
    insert_plan(net, plan_of(converted))
    load_state(net, converted)
    with torch.no_grad():
        fake = net(images).numpy()
    opened = session(tmp_path / "q.onnx", 1, simulate=True)
    got = np.concatenate([run(opened, x[None].numpy())[0] for x in images])
    box, score = (np.abs(a - b) for a, b in zip(np.split(got, [4], 1), np.split(fake, [4], 1)))
    assert box.mean() < 0.05 and score.max() < 0.03
    if target == "ort-x86":  # the same runtime as the source's, with floats between the activations' Q/DQ
        assert conv_report(tmp_path / "q.onnx")["int8_convs"] == sum("weight" in sites for sites in converted.values())


def test_a_symmetric_range_keeps_scale_and_codes_in_unsigned_storage(exported, calibrated, tmp_path):
    _, fp32 = exported("yolov8n.yaml")
    state = calibrated("tensorrt")
    del state["model.0.conv"]
    stored = {}
    for target in ("tensorrt", "openvino"):
        write_qdq(fp32, tmp_path / "q.onnx", convert(state, PROFILES["tensorrt"], PROFILES[target]), PROFILES[target])
        stored[target] = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert set(stored["tensorrt"]) == set(stored["openvino"])
    for name, value in stored["tensorrt"].items():
        other = stored["openvino"][name]
        if name.endswith(("input_zero_point", "residual_zero_point")):
            assert (value.dtype, int(value), other.dtype, int(other)) == (np.int8, 0, np.uint8, 128)
        else:
            assert (value == other).all()
