# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.export import export_openvino
from yolo_ext.deployment.latency import bench
from yolo_ext.deployment.runtime import compiled, conv_report, run, session

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


def test_without_openvino_its_package_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # which makes its import fail
    with pytest.raises(UsageError, match="pip install openvino"):
        export_openvino(exported("yolov8n")[1], tmp_path / "a_openvino_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_openvino
@pytest.mark.parametrize(("half", "limit"), [(False, 1e-3), (True, 1.0)], ids=["fp32", "fp16"])
def test_openvino_gives_the_same_and_is_measured(half, limit, exported, tmp_path):
    path = exported("yolov8n")[1]
    out = export_openvino(path, tmp_path / "a_openvino_model", half=half)
    assert {p.name for p in out.iterdir()} == {"a.xml", "a.bin", "metadata.yaml"}
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    x = np.random.default_rng(0).random((1, 3, 96, 96), dtype=np.float32)
    y = compiled(out, 1, {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]  # else BF16 on processors that have it
    assert np.abs(y - run(session(path), x)[0]).max() < limit
    assert bench({"ov": out}, 96, rounds=2)["ov"]["runtime"] == "openvino"
    found = conv_report(out)
    assert (found["runtime"], found["convs"], found["int8_convs"]) == ("OpenVINO", 64, 0)
    told = {f"OpenVINO runs it in {kind} on this CPU" for kind in ("f32", "bf16", "f16")}
    assert set(found["float_convs"].values()) <= told


@needs_openvino
def test_wrong_ending(exported, tmp_path):
    with pytest.raises(UsageError, match="_openvino_model"):
        export_openvino(exported("yolov8n")[1], tmp_path / "a")


@needs_openvino
def test_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="holds no OpenVINO model"):
        compiled(tmp_path, 1)
