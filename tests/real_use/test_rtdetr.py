# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""RT-DETR: its export is verified, measured and used; its rows are boxes in shares of a stretched picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ultralytics import RTDETR
from ultralytics.utils import YAML

from yolo_ext.checkpoint import save_model
from yolo_ext.deployment import Detector, decode
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.runtime import describe, predictor
from yolo_ext.deployment.verify import verify_detections, verify_tensors
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import load_model

SMALL = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [width, 3, 2]] for width in (8, 16, 16, 32, 32)],
    "head": [[[2, 3, 4], 1, "RTDETRDecoder", ["nc", 32, 20, 2, 4, 2]]],
}
SIZE = 64


@pytest.fixture(scope="module")
def rtdetr(tmp_path_factory) -> Path:
    """Return a small RT-DETR whose scores lie around 0.5."""
    folder = tmp_path_factory.mktemp("rtdetr")
    YAML.save(folder / "rtdetr-small.yaml", SMALL)
    torch.manual_seed(0)
    net, _ = load_model(folder / "rtdetr-small.yaml")
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_var.fill_(0.05)
        for layer in net.model[-1].dec_score_head:
            layer.weight.normal_(0, 0.5)
            layer.bias.zero_()
    net.names = {0: "circle", 1: "square", 2: "triangle"}
    return save_model(net, folder / "rtdetr.pt")


@pytest.fixture(scope="module")
def exported(rtdetr) -> Path:
    return export_onnx(rtdetr, rtdetr.with_suffix(".onnx"), SIZE, simplify=False)


@pytest.mark.slow
def test_verify_passes_a_right_file_and_finds_a_wrong_one(place, rtdetr, exported, call):
    words = f"verify model={rtdetr} onnx={exported} source=shapes/images/val save_dir=run"
    status, text = call(words)
    assert status == 0, text
    checks = {c["key"]: c for c in json.loads(Path("run/verify.json").read_text())["checks"]}
    assert {"score_max", "box_max", "matched"} <= set(checks)
    proto = onnx.load(exported)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("dec_bbox_head.1.layers.1.bias"))
    values = onnx.numpy_helper.to_array(tensor).copy() + np.float32(0.5)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, "wrong.onnx")
    status, text = call(words.replace(str(exported), "wrong.onnx"))
    assert status == 1 and "FAILED" in text and "Traceback" not in text, text


@pytest.mark.slow
def test_rows_are_detections_in_pixels(place, rtdetr, exported):
    images = sorted(Path("shapes/images/val").iterdir())
    found = verify_tensors(rtdetr, exported, images, SIZE)
    assert found["box_max"] < 1e-2 and found["score_max"] < 1e-4
    agreed = verify_detections(rtdetr, exported, images, SIZE, conf=0.4)
    assert agreed["matched"] == 1.0 and agreed["detections"] > len(images)
    rows = predictor(exported)(np.random.default_rng(0).random((2, 3, SIZE, SIZE), np.float32))[0]
    assert rows.shape[::2] == (2, 6) and (np.diff(rows[..., 4]) <= 0).all()
    assert rows[..., :4].max() > 2 and set(np.unique(rows[..., 5])) <= {0, 1, 2}
    assert describe(exported)["stretch"] and describe(rtdetr)["stretch"]


def test_older_heads_with_a_score_of_each_class():
    scores = np.float32([[0.1, 0.7, 0.2], [0.9, 0.3, 0.1]])
    rows = decode.queries(np.concatenate([np.full((2, 4), 0.5, np.float32), scores], 1))
    assert np.allclose(rows[:, 4:], [[0.9, 0], [0.7, 1]])
    two = np.concatenate([np.full((2, 4), 0.5, np.float32), scores[:, :2]], 1)
    assert np.allclose(decode.queries(two)[:, 4:], [[0.9, 0], [0.7, 1]])
    final = np.float32([[0.5, 0.5, 0.1, 0.1, 0.9, 2], [0.5, 0.5, 0.1, 0.1, 0.8, 0]])
    assert decode.queries(final) is final


@pytest.mark.slow
def test_accuracy_is_that_of_ultralytics(place, rtdetr, exported):
    data = "shapes/data.yaml"
    theirs = RTDETR(str(rtdetr)).val(data=data, imgsz=SIZE, device="cpu", plots=False, verbose=False, project="v")
    for model in (rtdetr, exported):
        assert accuracy(model, data, SIZE)["map"] == pytest.approx(theirs.box.map, abs=1e-3)


@pytest.mark.slow
def test_bench_measures_it(place, rtdetr, exported, call):
    words = f"rounds=2 memory=False imgsz={SIZE} data=shapes/data.yaml save_dir=run"
    status, text = call(f"bench models={rtdetr},{exported} {words}")
    assert status == 0, text
    found = json.loads(Path("run/bench.json").read_text())["models"]
    assert found[str(exported)]["map"] == pytest.approx(accuracy(rtdetr, "shapes/data.yaml", SIZE)["map"], abs=1e-3)


def test_the_detector_equals_predict(place, rtdetr, exported):
    ours, yolo = Detector(exported, conf=0.4), RTDETR(str(exported))
    for image in sorted(Path("shapes/images/val").iterdir()):
        theirs = yolo.predict(str(image), conf=0.4, imgsz=SIZE, device="cpu", verbose=False)[0].boxes
        found = ours(image)
        assert len(found) == len(theirs) > 0
        assert np.abs(theirs.xyxy.numpy() - found.boxes).max() < 1.0
        assert (theirs.cls.numpy() == found.classes).all()
