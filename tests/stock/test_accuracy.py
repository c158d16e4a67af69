# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.nn.tasks import ClassificationModel, DetectionModel
from ultralytics.utils import YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.contract import figures, resamples
from yolo_ext.stock.accuracy import accuracy, lost, score
from yolo_ext.stock.evidence import Evidence

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a data.yaml with six pictures of noise and a box in each."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for sub in ("images", "labels"):
        (folder / sub).mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.9 0.9")
    YAML.save(folder / "data.yaml", {"path": str(folder), "train": "images", "val": "images", "names": ["a", "b"]})
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    torch.manual_seed(0)
    net = DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval()
    for level in net.model[-1].cv3:
        torch.nn.init.constant_(level[-1].bias, -1.0)  # scores on both sides of any threshold
    return net


def test_is_what_ultralytics_measures(model, data, tmp_path):
    torch.save({"model": model}, tmp_path / "net.pt")
    found = accuracy(tmp_path / "net.pt", data, SIZE)
    stock = YOLO(tmp_path / "net.pt").val(data=str(data), imgsz=SIZE, rect=False, plots=False, save_dir=str(tmp_path))
    assert (found["map50"], found["map"]) == (stock.box.map50, stock.box.map) and score(found) == found["map"]
    assert accuracy(model, data, SIZE) == found


@pytest.mark.slow
def test_like_a_validator_of_a_trainer(model, data, tmp_path):
    args = {"task": "detect", "data": str(data), "imgsz": SIZE, "rect": False, "device": "cpu", "save_dir": tmp_path}
    own = DetectionValidator(args=args, save_dir=tmp_path)
    found = accuracy(model, like=own)
    assert found == accuracy(model, data, SIZE)
    own(model=model)
    assert accuracy(model, like=own, loader=own.dataloader) == found
    assert accuracy(model, like=own, imgsz=96) == accuracy(model, data, 96)


def test_top1_of_a_classifier(tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name in "ab":
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
                picture.save(tmp_path / split / name / f"{i}.png")
    net = ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False).eval()
    net.names = {0: "a", 1: "b"}
    kept = []
    found = accuracy(net, tmp_path, 32, keep=kept.append)
    assert found == {"top1": 0.5, "top5": 1.0, "images": 8}  # an untrained one gives all images one class
    assert kept[0].images == [f"{name}/{i}.png" for name in "ab" for i in range(4)], "Ultralytics shuffles them"
    assert kept[0].target_cls.tolist() == [0] * 4 + [1] * 4


LOST = {
    "nothing on other ranks": ({}, {}, None, None),
    "detect": ({"map": 0.5, "map50": 0.7}, {"map": 0.4, "map50": 0.1}, 0.4, 0.1),
    "gained": ({"map": 0.5}, {"map": 0.6}, 0.6, -0.1),
    "mask": ({"map": 0.5, "map_mask": 0.4}, {"map": 0.5, "map_mask": 0.3}, 0.4, 0.1),
    "keypoints": ({"map": 0.5, "map_pose": 0.4}, {"map": 0.7, "map_pose": 0.3}, 0.5, 0.1),
    "top-5": ({"top1": 0.5, "top5": 1.0}, {"top1": 0.5, "top5": 0.9}, 0.7, 0.1),
    "measured once": ({"map": None}, {"map": 0.4}, 0.4, None),
}


@pytest.mark.parametrize(("before", "after", "worth", "loss"), LOST.values(), ids=LOST)
def test_the_metric_that_lost_most_decides(before, after, worth, loss):
    assert score(after) == (worth and pytest.approx(worth)) and lost(before, after) == (loss and pytest.approx(loss))


def test_what_cannot_be_measured_is_refused(model, data, tmp_path):
    with pytest.raises(UsageError, match="cannot be used"):
        accuracy(model, tmp_path / "absent.yaml", SIZE)
    with pytest.raises(UsageError, match="Give a folder"):
        accuracy(ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False), tmp_path / "absent", SIZE)
    with pytest.raises(UsageError, match="does not exist"):
        accuracy(tmp_path / "absent.onnx", data, SIZE)
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    with pytest.raises(UsageError, match="no Ultralytics metadata"):
        accuracy(tmp_path / "foreign.onnx", data, SIZE)
    model.task = "semantic"
    with pytest.raises(UsageError, match="'semantic' has no"):
        accuracy(model, data, SIZE)
    model.task = "detect"


def test_the_evidence_gives_the_figures_of_ultralytics(model, data):
    kept: list[Evidence] = []
    found = accuracy(model, data, SIZE, keep=kept.append)
    accuracy(model, data, 2 * SIZE, keep=kept.append)
    small, large = kept
    again = figures(small, resamples(len(small.images), 0), 0.5)
    assert again["map"][0] == pytest.approx(found["map"], abs=1e-9)
    assert small.images == [f"{i}.png" for i in range(6)] and small.about["task"] == "detect"
    assert small.target_cls.tolist() == [0, 1] * 3
    np.testing.assert_allclose(small.target_area, 0.9**2 * 48 * 64, rtol=0.02)  # pixels of the original image
    same = {k: small.about[k] == large.about[k] for k in ("images_hash", "labels_hash", "model_hash", "settings")}
    assert same == {"images_hash": True, "labels_hash": True, "model_hash": True, "settings": False}
    other = deepcopy(model)
    other.model[0].conv.weight.data[0, 0, 0, 0] += 1
    accuracy(other, data, SIZE, keep=kept.append)
    assert kept[2].about["model_hash"] != small.about["model_hash"]
