# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Data that a model cannot be used with are refused up front, or the training says what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ultralytics.utils import YAML

from yolo_ext.checkpoint import save_model
from yolo_ext.stock import load_model

TRAIN = "imgsz=64 batch=4 device=cpu workers=0 plots=False"  # of a training that takes seconds
ORDER = ["class numbers", "'triangle'", "Number the classes of the data as the model does"]


@pytest.fixture
def other(place) -> str:
    """Return `model= data=` with data that list the classes of the model in another order."""
    names = [*YAML.load("shapes/data.yaml")["names"].values()]
    YAML.save("shapes/other.yaml", {**YAML.load("shapes/data.yaml"), "names": dict(enumerate(reversed(names)))})
    return "model=tiny.pt data=shapes/other.yaml"


COMMANDS = {
    "quantize": "quantize {} imgsz=64",
    "compress": "compress {} imgsz=64 epochs=0",
    "prune": "prune {} imgsz=64 epochs=0",
    "sensitivity": "sensitivity {} imgsz=64",
    "sensitivity quant": "sensitivity {} imgsz=64 kind=quant",
    "bench": "bench models=tiny.pt data=shapes/other.yaml imgsz=64 rounds=1 memory=False",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_classes_in_another_order(other, call, command):
    before = {*Path().rglob("*")}
    status, text = call(command.format(other))
    assert status == 2 and all(word in text for word in ORDER)
    assert {*Path().rglob("*")} - before <= {*Path().rglob("*.cache")}


@pytest.mark.slow
def test_a_training_sorts_classes_in_another_order_anew(other, call):
    status, text = call(f"train {other} {TRAIN} epochs=1 save_dir=run")
    assert status == 0 and "not measured on them as it is: class numbers" in text
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["before"]["map"] is None and summary["before"]["params"] and summary["after"]["map"] is not None


@pytest.mark.slow
def test_a_pruned_model_is_not_built_anew(other, call):
    assert call("prune model=tiny.pt imgsz=64 epochs=0 prune.ratio=0.3 prune.round_to=1 save_dir=cut")[0] == 0
    status, text = call(f"train model=cut/weights/best.pt data=shapes/other.yaml {TRAIN} epochs=1")
    assert status == 2 and all(word in text for word in ORDER)


# One class for all --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_single_cls_prunes_and_is_measured_on_the_data_that_it_was_trained_on(place, call):
    words = f"data=shapes/data.yaml {TRAIN} prune.speedup=1.3 prune.round_to=1 prune.images=8"
    status, text = call(f"train model=tiny.pt epochs=1 single_cls=True {words} save_dir=run")
    assert status == 0, text
    net, _ = load_model("run/weights/best.pt")
    assert net.names == {0: "item"}
    status, text = call("prune model=run/weights/best.pt data=shapes/data.yaml imgsz=64 epochs=0 prune.ratio=0.1 "
                       "prune.round_to=1 prune.method=taylor prune.images=8 save_dir=again")  # fmt: skip
    assert status == 0, text
    after = json.loads(Path("again/summary.json").read_text())["before"]["map50"]
    assert after == pytest.approx(json.loads(Path("run/summary.json").read_text())["after"]["map50"], abs=1e-6)


# Keypoints ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def pose(place) -> str:
    """Return `model= data=` of a pose model with 17 keypoints and data with 2."""
    net, _ = load_model("yolov8n-pose.yaml")
    net.names = {0: "circle"}
    save_model(net, Path("pose.pt"))
    for file in Path("shapes/labels").rglob("*.txt"):
        rows = (line.split()[1:] for line in file.read_text().splitlines())
        file.write_text("".join(f"0 {' '.join(r)} {r[0]} {r[1]} 2 {r[0]} {r[1]} 2\n" for r in rows))
    YAML.save("shapes/pose.yaml", {**YAML.load("shapes/data.yaml"), "names": {0: "circle"}, "kpt_shape": [2, 3]})
    return "model=pose.pt data=shapes/pose.yaml"


def test_another_number_of_keypoints_is_refused_where_nothing_is_trained_anew(pose, call):
    status, text = call(f"prune {pose} imgsz=64 epochs=0")
    assert status == 2 and "keypoint shape [17, 3] of the model, [2, 3] of the data" in text


@pytest.mark.slow
def test_another_number_of_keypoints_trains_as_with_stock(pose, call):
    status, text = call(f"train {pose} {TRAIN} epochs=1 prune.speedup=1.2 save_dir=run")
    assert status == 0, text
    assert "keypoint shape" in text
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["before"]["map"] is None and summary["after"]["map"] is not None
