# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER, YAML

from yolo_ext import stock
from yolo_ext.checkpoint import set_tripwire
from yolo_ext.core.errors import UsageError
from yolo_ext.pipeline.compare import smaller, smaller_yaml


@pytest.fixture(scope="module")
def yolo() -> Callable[[str], tasks.DetectionModel]:
    """Return a function that gives a detection model with random weights, each made once; do not change them."""
    return cache(lambda name: tasks.DetectionModel(f"{name}.yaml", nc=3, verbose=False))


def gflops(model) -> float:
    return stock.gflops(model, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "speedup", "tolerance"),
    [
        pytest.param("yolov8n", 2, 0.03, id="v8n 2x"),
        pytest.param("yolov8n", 3, 0.06, id="v8n 3x"),
        pytest.param("yolov5nu", 2, 0.05, id="v5n"),
        pytest.param("yolov9t", 2, 0.10, id="v9t: inner widths that Ultralytics does not scale"),
        pytest.param("yolov10n", 2, 0.05, id="v10n"),
        pytest.param("yolo11n", 2, 0.05, id="11n"),
        pytest.param("yolo12n", 2, 0.10, id="12n: heads of 32 channels"),
        pytest.param("yolo26n", 2, 0.10, id="26n"),
    ],
)
def test_flops_meet_the_target(yolo, name, speedup, tolerance):
    dense = yolo(name)
    label, model = smaller(dense, gflops(dense) / speedup, 64)
    assert gflops(dense) / gflops(model) == pytest.approx(speedup, rel=tolerance)
    assert type(model) is type(dense) and model.names == dense.names and len(model.model) == len(dense.model)
    assert label == f"{name} width {label.split()[-1]}"
    model.train()(torch.rand(2, 3, 64, 64))


@pytest.mark.slow
def test_depth_and_cap_are_kept_and_widths_are_multiples_of_8(yolo):
    dense = yolo("yolov8n")
    yaml = smaller_yaml(dense, gflops(dense) / 2, 64)
    (depth, width, most), (depth_before, width_before, most_before) = (y["scales"]["n"] for y in (yaml, dense.yaml))
    assert (depth, most) == (depth_before, most_before) and width < width_before
    assert yaml["nc"] == 3
    model = smaller(dense, gflops(dense) / 2, 64)[1]
    blocks = (m for layer in model.model[:-1] for m in layer.children() if hasattr(m, "conv"))
    assert {m.conv.out_channels % 8 for m in blocks} == {0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "narrowest"),
    [pytest.param(0.0, True, id="none is small enough"), pytest.param(2.0, False, id="all are smaller")],
)
def test_target_out_of_reach_gives_the_end_of_the_range(yolo, share, narrowest):
    dense = yolo("yolov8n")
    width = smaller_yaml(dense, gflops(dense) * share, 64)["scales"]["n"][1]
    assert width == (8 / 1024 if narrowest else 0.25)


@pytest.mark.slow
def test_yaml_file_builds_the_same_model(yolo, tmp_path):
    dense = yolo("yolov8n")
    YAML.save(tmp_path / "yolov8n-narrow.yaml", smaller_yaml(dense, gflops(dense) / 3, 64))
    built = YOLO(tmp_path / "yolov8n-narrow.yaml", verbose=False).model
    shapes = [tuple(p.shape) for p in smaller(dense, gflops(dense) / 3, 64)[1].parameters()]
    assert [tuple(p.shape) for p in built.parameters()] == shapes


@pytest.mark.slow
def test_pruned_model_is_compared_by_its_first_yaml(yolo):
    dense = yolo("yolov8n")
    pruned = deepcopy(dense)
    set_tripwire(pruned)
    assert smaller_yaml(pruned, 0.02, 64) == smaller_yaml(dense, 0.02, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(tasks.ClassificationModel, "yolov8n-cls", id="classify"),
        pytest.param(tasks.SegmentationModel, "yolo11n-seg", id="segment"),
        pytest.param(tasks.PoseModel, "yolov8n-pose", id="pose"),
        pytest.param(tasks.OBBModel, "yolo11n-obb", id="obb"),
    ],
)
def test_tasks(kind, name):
    dense = kind(f"{name}.yaml", nc=2, verbose=False)
    model = smaller(dense, gflops(dense) / 2, 64)[1]
    assert type(model) is kind
    assert gflops(dense) / gflops(model) == pytest.approx(2, rel=0.12)


@pytest.mark.slow
def test_leaves_no_trace(yolo, caplog):
    dense = yolo("yolov8n")
    caplog.clear()
    before, yaml, level = torch.get_rng_state(), deepcopy(dense.yaml), LOGGER.level
    smaller(dense, gflops(dense) / 2, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert dense.yaml == yaml and LOGGER.level == level and not caplog.records


def test_yaml_that_cannot_be_built_is_refused(yolo):
    dense = deepcopy(yolo("yolov8n"))
    dense.yaml["backbone"][0][2] = "NoSuchModule"
    with pytest.raises(UsageError, match=r"cannot build the YAML of this model .*NoSuchModule"):
        smaller_yaml(dense, 0.01, 64)
