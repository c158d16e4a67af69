# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.runtime import (
    conv_report,
    describe,
    load_image,
    postprocess,
    predictor,
    run,
    session,
)


def conv_graph(tmp_path, *, x=True, w=True, q=True, users=1, relu=False, act=TensorProto.UINT8, named=True):
    """Write images -> [Q/DQ] -> Conv -> [Relu] -> [Q/DQ] -> out with the chosen parts."""
    rng = np.random.default_rng(0)
    init = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.02]),
        helper.make_tensor("zero", act, [], [0]),
        helper.make_tensor("zero8", TensorProto.INT8, [], [0]),
        numpy_helper.from_array(rng.integers(-63, 63, (4, 3, 3, 3)).astype(np.int8), "wq"),
        numpy_helper.from_array(rng.random((4, 3, 3, 3), dtype=np.float32), "wf"),
    ]
    nodes = []

    def node(op, inputs, output, name=""):
        nodes.append(helper.make_node(op, inputs, [output], name))
        return output

    data = "images"
    if x:
        data = node("DequantizeLinear", [node("QuantizeLinear", [data, "scale", "zero"], "xq"), "scale", "zero"], "xd")
    weight = node("DequantizeLinear", ["wq", "scale", "zero8"], "wd") if w else "wf"
    out = node("Conv", [data, weight], "c", "conv0" if named else "")
    if relu:
        out = node("Relu", [out], "r")
    last = out
    if q:
        last = node("DequantizeLinear", [node("QuantizeLinear", [out, "scale", "zero"], "yq"), "scale", "zero"], "yd")
    last = node("Sigmoid", [last], "out")
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    if users == 2:
        node("Exp", [out], "out2")
        outputs.append(helper.make_tensor_value_info("out2", TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, init), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        pytest.param({}, None, id="integer"),
        pytest.param({"relu": True}, None, id="integer-with-relu"),
        pytest.param({"x": False, "w": False, "q": False}, "no Q/DQ (kept float by the profile)", id="no-qdq"),
        pytest.param({"x": False}, "input not dequantized", id="input"),
        pytest.param({"w": False, "q": False}, "weight not dequantized", id="weight"),
        pytest.param({"q": False}, "no Q on the output", id="output"),
        pytest.param({"users": 2}, "more than one consumer of the output", id="consumers"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_conv_report(parts, reason, named, tmp_path):
    found = conv_report(conv_graph(tmp_path, named=named, **parts))
    expected = {} if reason is None else {"conv0" if named else "c": reason}
    done = [] if expected else ["conv0" if named else "c"]
    assert found.pop("runtime") == "ONNX Runtime"
    assert found == {"convs": 1, "int8_convs": len(done), "int8": done, "float_convs": expected}


def test_simulation_runs_the_graph_in_float(tmp_path):
    path = conv_graph(tmp_path)
    x = np.random.default_rng(1).random((1, 3, 8, 8), dtype=np.float32)
    integer, simulated = run(session(path), x)[0], run(session(path, simulate=True), x)[0]
    assert np.allclose(integer, simulated, atol=0.02)  # one output step


@pytest.mark.parametrize("call", [session, conv_report, describe], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["absent.onnx", "broken.onnx"])
def test_unusable_files(call, name, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(UsageError, match=name):
        call(tmp_path / name)


def test_foreign_model_is_named(tmp_path):
    with pytest.raises(UsageError, match="no Ultralytics metadata"):
        describe(conv_graph(tmp_path))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_taken_over(threads, tmp_path):
    assert session(conv_graph(tmp_path), threads).get_session_options().intra_op_num_threads == threads


def test_load_image_matches_the_predictor(tmp_path):
    from ultralytics.engine.predictor import BasePredictor

    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "i.png"), picture)
    stock: Any = BasePredictor(overrides={"imgsz": 96, "rect": False, "save_dir": str(tmp_path), "device": "cpu"})
    stock.imgsz, stock.device = (96, 96), torch.device("cpu")
    stock.model = type("M", (), {"format": "onnx", "dynamic": False, "stride": 32, "fp16": False})()
    assert np.allclose(load_image(tmp_path / "i.png", 96), stock.preprocess([picture]).numpy(), atol=1e-6)


def test_load_image_names_what_it_cannot_read(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    for name in ("x.jpg", "absent.jpg"):
        with pytest.raises(UsageError, match=name):
            load_image(tmp_path / name, 64)


@pytest.mark.parametrize(("name", "dual"), [("yolov8n", False), ("yolo26n", True)])
def test_describe_torch(name, dual):
    found = describe(DetectionModel(f"{name}.yaml", nc=3, verbose=False))
    assert found == {"task": "detect", "nc": 3, "end2end": found["end2end"], "dual": dual, "nms": None,
                     "stretch": False, "channels": 3}  # fmt: skip


@pytest.mark.parametrize("end2end", [False, True], ids=["dense", "nms-free"])
def test_predictor_and_detections_of_both_heads(end2end):
    predict = predictor(DetectionModel("yolo26n.yaml", nc=3, verbose=False), end2end=end2end)
    x = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    assert [y.shape for y in predict(x)] == [(1, 84, 6) if end2end else (1, 7, 84)]
    meta = {"task": "detect", "nc": 3, "end2end": end2end, "nms": None}
    found = postprocess(predict(x)[0], meta, conf=0.0, iou=0.7)
    assert found.shape[1] == 6 and len(found) and set(found[:, 5].tolist()) <= {0.0, 1.0, 2.0}


def test_importing_the_package_loads_no_runtime():
    code = "import sys, yolo_ext, yolo_ext.deployment; sys.exit(bool({'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
