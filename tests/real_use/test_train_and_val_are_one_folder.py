# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""coco128 ships with train and val in one folder, and `label` writes such a set: pruning warns, INT8 needs others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ultralytics.utils import YAML

PRUNE = "imgsz=64 epochs=0 prune.ratio=0.2 prune.round_to=1 prune.images=4"


@pytest.fixture
def same(place) -> str:
    content = YAML.load("shapes/data.yaml")
    YAML.save("shapes/same.yaml", {**content, "val": content["train"]})
    return "model=tiny.pt data=shapes/same.yaml"


@pytest.mark.slow
def test_criteria_and_batchnorm_look_at_the_train_images(same, call):
    status, text = call(f"prune {same} {PRUNE} prune.method=taylor save_dir=run")
    assert status == 0, text
    assert "share 8 images, so accuracy is overstated" in text and "INT8" not in text
    assert json.loads(Path("run/summary.json").read_text())["after"]["map"] is not None


@pytest.mark.parametrize("command", ["quantize", "compress"])
def test_int8_is_refused_up_front(same, call, command):
    before = {*Path().rglob("*")}
    status, text = call(f"{command} {same} imgsz=64 epochs=0")
    assert status == 2 and "quant.source" in text and "split" in text
    assert {*Path().rglob("*")} - before <= {*Path().rglob("*.cache")}


@pytest.mark.slow
def test_int8_takes_calibration_images_of_their_own(same, call):
    words = "quant.source=shapes/images/val quant.mode=ptq quant.calib=4 quant.max_drop=1 save_dir=run"
    status, text = call(f"quantize {same} imgsz=64 {words}")
    assert status == 0, text
