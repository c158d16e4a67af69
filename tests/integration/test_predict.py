# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`predict compare=`: Ultralytics' outputs as ever, two models side by side, and the same boxes as the detector's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import LOGGER, SETTINGS

from yolo_ext import cli
from yolo_ext.checkpoint import save_model
from yolo_ext.deployment import Detector
from yolo_ext.deployment.export import export_onnx
from yolo_ext.stock.load import load_model

SHARED = Path(__file__).parents[2].parent / "shared"
BCCD, WEIGHTS = SHARED / "data" / "bccd", SHARED / "weights" / "bccd_yolov8n_192.pt"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture(scope="module")
def lively(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny detector with scores around 0.5, so that it finds something."""
    net, _ = load_model(tiny)
    with torch.no_grad():
        for box, score in zip(net.model[-1].cv2, net.model[-1].cv3):
            box[-1].weight *= 3
            score[-1].weight *= 3
            score[-1].bias.fill_(-0.5)
    return save_model(net, tmp_path_factory.mktemp("lively") / "lively.pt")


@pytest.fixture(scope="module")
def lively_onnx(lively: Path) -> Path:
    return export_onnx(lively, lively.with_suffix(".onnx"), 64, simplify=False)


def run(place: Path, *words: Any, expect: int = 0) -> dict[str, Any]:
    common = ["predict", "imgsz=64", "device=cpu", f"project={place}", "name=p", "exist_ok=True"]
    assert cli.main([*common, *map(str, words)]) == expect
    return json.loads((place / "p/compare.json").read_text()) if (place / "p/compare.json").is_file() else {}


@pytest.mark.slow
def test_an_export_finds_what_its_model_finds(place, lively, lively_onnx, shapes, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    source = shapes.parent / "images/val"
    found = run(place, f"model={lively_onnx}", f"source={source}", f"compare={lively}", "conf=0.4", "save_txt=True")
    assert found["total"]["base"] == found["total"]["new"] > 0 == found["total"]["missed"] + found["total"]["added"]
    assert (
        len(found["images"]) == 4 == len(list((place / "p").glob("*.jpg"))) == len(list((place / "p/labels").glob("*")))
    )
    pictures = {p.name for p in (place / "p/compare").iterdir()}
    assert pictures == {row["picture"] for row in found["images"]}
    assert "Total of 4 images: base" in caplog.text


def test_every_difference_is_counted_and_matched_by_class_name(place, tiny, lively, shapes):
    net, _ = load_model(lively)
    head = net.model[-1]
    order, last = [2, 0, 1], len(head.cv3) - 1
    with torch.no_grad():
        for branch in head.cv3:
            branch[-1].weight.copy_(branch[-1].weight[order])
            branch[-1].bias.copy_(branch[-1].bias[order])
        head.cv3[last][-1].bias.fill_(-20)  # the coarse level goes blind
    net.names = {i: load_model(lively)[0].names[k] for i, k in enumerate(order)}
    other = save_model(net, place / "other.pt")
    words = [f"model={other}", f"compare={lively}", "conf=0.4", "iou=1.0", "max_det=1000"]
    found = run(place, *words, f"source={shapes.parent / 'images/val'}")
    total = found["total"]
    assert total["missed"] > 0 == total["added"], "without suppression, what a level finds does not hang on another"
    assert total["base"] - total["missed"] == total["new"] - total["added"] > 0
    for key in total:
        assert total[key] == sum(row[key] for row in found["images"])


def test_videos_and_pictures_of_one_name(place, lively, shapes):
    first = sorted((shapes.parent / "images/val").glob("*.jpg"))
    writer = cv2.VideoWriter(str(place / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for path in first[:3]:
        writer.write(cv2.imread(str(path)))
    writer.release()
    (place / "a").mkdir()
    for name in ("v.png", "v-2.png"):
        cv2.imwrite(str(place / "a" / name), cv2.imread(str(first[0])))
    (place / "v.avi").rename(place / "a" / "v.avi")
    found = run(place, f"model={lively}", f"compare={lively}", f"source={place / 'a'}")
    names = [row["picture"] for row in found["images"]]
    assert len(names) == 5 == len(set(names)) and all((place / "p/compare" / n).is_file() for n in names)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("model=gone.pt compare=lively.pt source=a", "gone.pt", id="model"),
        pytest.param("model=lively.pt compare=gone.pt source=a", "gone.pt", id="base"),
        pytest.param("model=lively.pt compare=text.pt source=a", "text.pt", id="no model"),
        pytest.param("model=lively.pt compare=lively.pt source=gone", "gone", id="source"),
        pytest.param("model=lively.pt compare=lively.pt source=empty", "empty", id="empty folder"),
        pytest.param("model=lively.pt compare=lively.pt", "source=...", id="no source"),
        pytest.param("model=lively.pt compare= source=a", "compare=", id="no base"),
        pytest.param("model=lively.pt compare=lively.pt source=a cnof=0.3", "cnof", id="key"),
        pytest.param("model=lively.pt compare=lively.pt source=a conf=2", "conf", id="value"),
        pytest.param("model=lively.pt compare=renamed.pt source=a", "different classes", id="classes"),
        pytest.param("model=cls.pt compare=lively.pt source=a", "classify", id="task"),
    ],
)
def test_wrong_input_is_one_line(words, text, place, lively, capsys):
    from ultralytics.nn.tasks import ClassificationModel

    (place / "lively.pt").write_bytes(lively.read_bytes())
    (place / "text.pt").write_text("no model")
    (place / "empty").mkdir()
    (place / "a").mkdir()
    cv2.imwrite(str(place / "a/1.png"), np.zeros((64, 64, 3), np.uint8))
    if "renamed" in words:
        net, _ = load_model(lively)
        net.names = {0: "x", 1: "y", 2: "z"}
        save_model(net, place / "renamed.pt")
    if "cls" in words:
        net = ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False)
        net.task = "classify"  # as a trainer sets it
        save_model(net, place / "cls.pt")
    run(place, *words.split(), expect=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("yolo-ext:")]
    assert len(lines) == 1 and text in lines[0]


# The detector on real files ----------------------------------------------------------------------------------------
def agree(detector: Detector, yolo: YOLO, images: list[Path], **options: Any) -> int:
    """Check that both find the same boxes within a pixel, whatever their order; return how many.

    Where torch and ONNX Runtime round two nearly equal scores differently, the two boxes swap places.
    """
    objects = 0
    for path in images:
        wanted = yolo.predict(str(path), conf=detector.conf, iou=0.7, device="cpu", verbose=False, **options)[0].boxes
        found = detector(path)
        assert len(wanted) == len(found), path
        gap = np.abs(wanted.xyxy.numpy()[:, None] - found.boxes).max(2)
        gap[wanted.cls.numpy()[:, None] != found.classes] = np.inf
        score = np.abs(wanted.conf.numpy()[:, None] - found.scores)
        partner = (gap + 1000 * score).argmin(1) if len(found) else np.zeros(0, int)
        assert sorted(partner) == list(range(len(found))), path
        assert gap[range(len(found)), partner].max(initial=0) < 1.0, path
        assert score[range(len(found)), partner].max(initial=0) < 1e-3, path
        objects += len(found)
    return objects


def test_the_detector_equals_the_model_it_was_exported_from(lively, lively_onnx, shapes):
    images = sorted((shapes.parent / "images").rglob("*.jpg"))
    assert agree(Detector(lively_onnx, conf=0.4), YOLO(str(lively)), images, imgsz=64, rect=False) > len(images)


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (BCCD.is_dir() and WEIGHTS.is_file()):
        pytest.skip("BCCD data and weights are not beside the checkout")
    out = tmp_path_factory.mktemp("bccd") / "bccd"
    assert cli.main(["convert", "format=voc", f"source={BCCD}", f"out={out}", "train=trainval", "val=test"]) == 0
    return out / "data.yaml"


@pytest.mark.slow
@pytest.mark.bccd
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_the_detector_equals_ultralytics_on_blood_cells(name, bccd, tmp_path):
    from yolo_ext.core.config import QuantConfig
    from yolo_ext.data.check import check_data
    from yolo_ext.quantization.fake_quant import get_state
    from yolo_ext.quantization.qat import prepare
    from yolo_ext.quantization.qdq import write_qdq
    from yolo_ext.quantization.spec import resolve_profile

    weights, imgsz, conf = WEIGHTS, 192, 0.25
    if name != "yolov8n":  # a short training: scores that mean something are not needed, only some that differ
        imgsz, conf, weights = 96, 0.05, tmp_path / "run/weights/last.pt"
        YOLO(f"{name}.yaml").train(
            data=str(bccd), imgsz=imgsz, epochs=3, batch=8, nbs=8, device="cpu", workers=0, plots=False, val=False,
            optimizer="AdamW", lr0=0.002, warmup_epochs=0.5, mosaic=0.0, save_dir=str(tmp_path / "run"), exist_ok=True,
        )  # fmt: skip
    images = sorted((bccd.parent / "images/val").glob("*.jpg"))[:50]
    assert len(images) == 50
    for end2end in (False, True) if name == "yolo26n" else (False,):
        fp32, int8 = tmp_path / f"{end2end}.onnx", tmp_path / f"{end2end}_int8.onnx"
        export_onnx(weights, fp32, imgsz, end2end=end2end)
        head = {"nms": None if not end2end else False}
        same = agree(Detector(fp32, conf=conf), YOLO(str(weights)), images, imgsz=imgsz, rect=False, **head)
        assert same == agree(Detector(fp32, conf=conf), YOLO(str(fp32)), images) > 50
        net, _ = load_model(weights)
        net.end2end = end2end
        prepare(net, QuantConfig(profile="auto", calib=32), check_data(bccd), imgsz)
        write_qdq(fp32, int8, get_state(net), resolve_profile("auto"))
        assert agree(Detector(int8, conf=conf), YOLO(str(int8)), images) > 50
