# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import cv2
import pytest
import torch

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.footprint import peak_memory
from yolo_ext.deployment.latency import around, operators, runtime_of, saved_ms
from yolo_ext.stock import module_path


@pytest.mark.slow
def test_profile_adds_up(exported):
    found = operators(exported("yolov8n")[1], 96, runs=3)
    nodes, ops = found["nodes"], found["ops"]
    assert nodes == sorted(nodes, key=lambda n: -n["ms"]) and ops == sorted(ops, key=lambda o: -o["ms"])
    assert sum(n["share"] for n in nodes) == pytest.approx(1) == pytest.approx(sum(o["share"] for o in ops))
    assert sum(o["count"] for o in ops) == len(nodes)
    assert ops[0]["op"] == "Conv" and ops[0]["count"] == 64  # YOLOv8n has 64 convolutions, and they take the time


@pytest.mark.slow
def test_profile_refuses_another_size(exported):
    with pytest.raises(UsageError, match="static graph"):
        operators(exported("yolov8n")[1], 64)


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ("/model.22/cv2.0/cv2.0.1/conv/Conv", "model.22.cv2.0.1.conv.Conv"),
        ("/model.2/m/m.0/cv1/conv/Conv_token_55", "model.2.m.0.cv1.conv.Conv_token_55"),
        ("/model.2/m.0/cv1/act/Mul", "model.2.m.0.cv1.act.Mul"),
        ("model.2.cv2.conv.input_QuantizeLinear", "model.2.cv2.conv.input_QuantizeLinear"),
        ("ReorderInput_token_133", "ReorderInput_token_133"),
    ],
)
def test_module_path_of_a_node(node, path):
    assert module_path(node) == path


@pytest.mark.slow
def test_time_saved_by_layer(exported):
    small, large = exported("yolov8n")[1], exported("yolov8n", imgsz=192)[1]
    layers = ["model.0.conv", "model.2.cv1.conv", "model.22.cv2.0.2"]
    same = saved_ms(small, small, layers, 96, runs=5)
    assert list(same) == layers
    whole = {n["name"]: n["ms"] for n in operators(small, 96, runs=5)["nodes"]}
    assert all(abs(ms) < 0.5 * sum(whole.values()) for ms in same.values())
    with pytest.raises(UsageError, match="static graph"):
        saved_ms(small, large, layers, 96)


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-cls"])
def test_letterbox_and_nms(name, exported, images):
    found = around(exported(name)[1], cv2.imread(str(images[0])), 96, rounds=2)
    assert found["pre_ms"] > 0
    assert (found["post_ms"] > 0, found["detections"] > 0) == ((True, True) if name == "yolov8n" else (False, False))


def test_memory_of_an_onnx_file_needs_no_torch(exported):
    big = torch.zeros(100_000_000)  # 400 MB here must not show there
    big += 1
    found = peak_memory(exported("yolov8n")[1], 96)
    assert found is not None
    assert 20 < found["runtime_mb"] < found["peak_mb"] < 350


def test_memory_of_a_broken_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    assert peak_memory(tmp_path / "m.onnx", 96) is None


@pytest.mark.parametrize(
    ("name", "runtime"), [("a.onnx", "ort"), ("a.pt", "torch"), ("a_int8_openvino_model", "openvino"), ("a", None)]
)
def test_runtime_of_a_file(name, runtime):
    if runtime:
        assert runtime_of(name) == runtime
    else:
        with pytest.raises(UsageError, match=r"Cannot measure 'a'.*\.onnx"):
            runtime_of(name)
