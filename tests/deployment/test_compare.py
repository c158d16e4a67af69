# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from yolo_ext.deployment.compare import compare, first_difference, summary
from yolo_ext.reporting.tables import TEXT
from yolo_ext.stock import module_path


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, 96, 96), dtype=np.float32)


def attribute(proto: onnx.ModelProto, node: str, name: str, value) -> None:
    found = next(n for n in proto.graph.node if n.name == node)
    kept = [a for a in found.attribute if a.name != name]
    del found.attribute[:]
    found.attribute.extend([*kept, helper.make_attribute(name, value)])


def operator(proto: onnx.ModelProto, node: str, op: str) -> None:
    next(n for n in proto.graph.node if n.name == node).op_type = op


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "node", "module"),
    [
        pytest.param(
            "yolov8n", lambda p: operator(p, "/model.4/cv1/act/Sigmoid", "HardSigmoid"), "/model.4/cv1/act/Sigmoid",
            "model.4.cv1.act", id="activation",
        ),
        pytest.param(
            "yolov8n", lambda p: attribute(p, "/model.10/Resize", "nearest_mode", "ceil"), "/model.10/Resize",
            "model.10", id="upsample",
        ),
        pytest.param(
            "yolov8n", lambda p: attribute(p, "/model.9/m/MaxPool", "kernel_shape", [5, 5]), None, None, id="nothing"
        ),
        pytest.param(
            "yolo11n", lambda p: attribute(p, "/model.10/m/m.0/attn/Softmax", "axis", 2),
            "/model.10/m/m.0/attn/Softmax", "model.10.m.0.attn", id="attention",
        ),
    ],
)  # fmt: skip
def test_changed_node_is_named(name, fault, node, module, exported, x, tmp_path):
    model, path = exported(name)
    proto = onnx.load(path)
    fault(proto)
    onnx.save(proto, tmp_path / "bad.onnx")
    found = first_difference(model, tmp_path / "bad.onnx", x)
    assert (found and found["node"]) == node and (found and found["module"]) == module


@pytest.mark.slow
def test_changed_weight_is_named_with_its_size(exported, spoil, x, tmp_path):
    model, path = exported("yolov8n")
    bad = spoil(path, tmp_path / "bad.onnx", "model.6.m.0.cv1.conv.weight", 1.5)
    found = first_difference(model, bad, x, {"model.6.m.0.cv1.conv.weight": {"error": 0.5, "values": 9216, "of": 9216}})
    assert found["module"] == "model.6.m.0.cv1.conv" and found["op"] == "Conv" and found["error"] > 0.01
    text = TEXT.get_template("verify.txt.j2").render(checks=[], images=1, first_difference=found)
    assert "9216 of 9216 values of 'model.6.m.0.cv1.conv.weight' differ, by up to 50 %" in text


@pytest.mark.slow
def test_another_model_differs_from_the_stem_on(build, exported, x):
    found = first_difference(build("yolov8n", seed=1), exported("yolov8n")[1], x)
    assert found["node"] == "/model.0/conv/Conv"


@pytest.mark.slow
def test_short_batch_is_filled_up(exported, spoil, x, tmp_path):
    model, path = exported("yolov8n", batch=3)
    bad = spoil(path, tmp_path / "bad.onnx", "model.1.conv.weight", 2.0)
    assert first_difference(model, bad, x)["module"] == "model.1.conv"


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ("/model.2/m/m.0/cv1/conv/Conv", "model.2.m.0.cv1.conv"),
        ("/model.22/cv3.0/cv3.0.2/Conv", "model.22.cv3.0.2"),
        ("/model/model.0/conv/Conv", "model.0.conv"),
        ("Conv_3", ""),
    ],
    ids=["list", "nested-list", "embedded-nms", "foreign"],
)
def test_module_path(node, path):
    assert module_path(node).rpartition(".")[0] == path


def test_embedded_nms_that_finds_nothing_differs_in_nothing(x):
    def nothing(images):
        return [np.zeros((len(images), 5, 6), np.float32)]

    meta = {"task": "detect", "nc": 3, "end2end": False, "stretch": False, "nms": {"conf": 0.25}}
    found = compare(nothing, nothing, [x], meta)
    assert found["inputs"] == 1 and set(summary(found["rows"]).values()) == {0.0}
