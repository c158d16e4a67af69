# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, SegmentationModel
from ultralytics.utils import LOGGER

from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.deployment import export
from yolo_ext.deployment.detector import read_metadata
from yolo_ext.deployment.export import export_onnx, max_relative_error, simplify_checked
from yolo_ext.deployment.runtime import run, session

KEYS = {
    *("description", "author", "date", "version", "license", "docs", "stride", "task", "head", "batch", "imgsz"),
    *("names", "args", "channels", "end2end"),
}


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    torch.manual_seed(0)
    net = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    for bn in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        bn.momentum = 1.0
    with torch.no_grad():  # statistics of real activations: with fresh ones the signal dies out before the head
        net.train()(torch.rand(8, 3, 64, 64))
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "end2end", "shape"),
    [
        pytest.param("yolov5n", False, [1, 7, 84], id="v5"),
        pytest.param("yolov8n", False, [1, 7, 84], id="v8"),
        pytest.param("yolo11n", False, [1, 7, 84], id="v11"),
        pytest.param("yolo26n", False, [1, 7, 84], id="v26-one-to-many"),
        pytest.param("yolo26n", True, [1, 84, 6], id="v26-nms-free"),
    ],
)
def test_families(name, end2end, shape, tmp_path):
    net = DetectionModel(f"{name}.yaml", nc=3, verbose=False)
    opened = session(export_onnx(net, tmp_path / "m.onnx", 64, end2end=end2end))
    assert opened.get_outputs()[0].shape == shape
    meta = read_metadata(opened, "m.onnx")
    assert meta["end2end"] is end2end and meta["task"] == "detect" and meta["imgsz"] == [64, 64]
    assert meta["names"] == {0: "0", 1: "1", 2: "2"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SegmentationModel, ClassificationModel], ids=["segment", "classify"])
def test_other_tasks(kind, tmp_path):
    name = {SegmentationModel: "yolov8n-seg.yaml", ClassificationModel: "yolov8n-cls.yaml"}[kind]
    opened = session(export_onnx(kind(name, nc=3, verbose=False), tmp_path / "m.onnx", 64))
    assert len(opened.get_outputs()) == (2 if kind is SegmentationModel else 1)


@pytest.mark.slow
def test_metadata_is_ultralytics_own_once_each(model, tmp_path):
    keys = [p.key for p in onnx.load(export_onnx(model, tmp_path / "m.onnx", 64)).metadata_props]
    assert len(keys) == len(set(keys))
    assert set(keys) == KEYS


@pytest.mark.slow
def test_simplified_is_smaller_and_equal(model, tmp_path):
    plain = export_onnx(model, tmp_path / "plain.onnx", 64, simplify=False)
    small = export_onnx(model, tmp_path / "small.onnx", 64)
    assert len(onnx.load(small).graph.node) < len(onnx.load(plain).graph.node)
    x = np.random.default_rng(1).random((1, 3, 64, 64), dtype=np.float32)
    assert max_relative_error(run(session(plain), x), run(session(small), x)) < 1e-5


@pytest.mark.slow
def test_simplifier_that_changes_the_net_is_refused(model, tmp_path, monkeypatch, caplog):
    import onnxsim

    def spoil(proto):
        spoilt = onnx.ModelProto()
        spoilt.CopyFrom(proto)
        weight = next(t for t in spoilt.graph.initializer if t.name == "model.0.conv.weight")
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return spoilt, True

    proto = onnx.load(export_onnx(model, tmp_path / "m.onnx", 64, simplify=False))
    monkeypatch.setattr(onnxsim, "simplify", spoil)
    monkeypatch.setattr(LOGGER, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert simplify_checked(proto, (1, 3, 64, 64)) is proto
    assert "changed the outputs" in caplog.text


@pytest.mark.slow
def test_dynamic_graph_takes_other_shapes(model, tmp_path):
    opened = session(export_onnx(model, tmp_path / "m.onnx", 64, dynamic=True))
    assert run(opened, np.zeros((2, 3, 96, 64), np.float32))[0].shape == (2, 7, 126)


@pytest.mark.slow
def test_batch_and_opset(model, tmp_path):
    path = export_onnx(model, tmp_path / "m.onnx", 64, batch=2, opset=13)
    assert session(path).get_inputs()[0].shape == [2, 3, 64, 64]
    assert onnx.load(path).opset_import[0].version == 13


@pytest.mark.slow
def test_leaves_no_trace(model, tmp_path, monkeypatch, capfd):
    weights = tmp_path / "user" / "w.pt"
    weights.parent.mkdir()
    torch.save({"model": model}, weights)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)
    level, training = LOGGER.level, model.training
    for source in (weights, model):
        export_onnx(source, tmp_path / "out" / "m.onnx", 64)
    assert [p.name for p in weights.parent.iterdir()] == ["w.pt"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.onnx"]
    assert not list(work.iterdir())
    assert LOGGER.level == level and model.training is training and not hasattr(model, "pt_path")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    printed = "".join(capfd.readouterr())
    assert "ONNX" not in printed and "export" not in printed.lower()


@pytest.mark.parametrize(
    ("source", "out", "imgsz", "text"),
    [
        pytest.param("absent.pt", "m.onnx", 64, "absent.pt", id="missing"),
        pytest.param("broken.pt", "m.onnx", 64, "broken.pt", id="broken"),
        pytest.param(None, "m.engine", 64, ".onnx", id="suffix"),
        pytest.param(None, "m.onnx", 70, "Try imgsz=64", id="stride"),
        pytest.param(None, "m.onnx", 0, "Try imgsz=32", id="zero"),
    ],
)
def test_wrong_input(source, out, imgsz, text, model, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=text):
        export_onnx(tmp_path / source if source else model, tmp_path / out, imgsz)
    assert not Path(tmp_path / out).exists()


def test_exporter_failure_is_reported_and_writes_nothing(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(export, "export_file", fail)
    with pytest.raises(CheckFailed, match="no kernel"):
        export_onnx(model, tmp_path / "m.onnx", 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param([np.array([1.0, 100.0])], [np.array([1.0, 101.0])], 0.01, id="relative"),
        pytest.param([np.array([0.0])], [np.array([0.5])], 0.5, id="absolute-below-one"),
        pytest.param([np.zeros(2)], [np.zeros(3)], np.inf, id="shape"),
        pytest.param([np.zeros(2)], [np.array([0.0, np.nan])], np.inf, id="nan"),
        pytest.param([], [], 0.0, id="empty"),
    ],
)
def test_max_relative_error(a, b, expected):
    assert max_relative_error(a, b) == pytest.approx(expected)
