# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The torch-free detector: equal to Ultralytics' predictor, step by step and from file to boxes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from ultralytics import YOLO
from ultralytics.data.augment import LetterBox
from ultralytics.nn import tasks
from ultralytics.utils.metrics import batch_probiou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywhr2xyxyxyxy

import yolo_ext
from yolo_ext.core.errors import UsageError
from yolo_ext.data.shapes import draw_scene
from yolo_ext.deployment import Detections, Detector, decode, detector
from yolo_ext.deployment.export import export_onnx
from yolo_ext.stock.load import as_results

SIZE = 64
KINDS = {"-seg": "SegmentationModel", "-pose": "PoseModel", "-obb": "OBBModel", "-cls": "ClassificationModel"}
META = {"task": "detect", "names": "{0: 'a', 1: 'b'}", "stride": "32", "imgsz": "[64, 64]", "end2end": "False"}
# The limits; on one ONNX file only NumPy's and torch's rounding differ.
PIXELS, SCORE = 1.0, 1e-3
EXPORT = {"format": "onnx", "device": "cpu", "mode": "export", "batch": 1}


# Against the predictor of Ultralytics ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return pictures of three aspect ratios, larger and smaller than the input."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for i, (w, h) in enumerate([(64, 64), (160, 120), (45, 60)]):
        image = cv2.resize(draw_scene(np.random.default_rng(i), 64)[0], (w, h))
        paths.append(str(folder / f"{i}.png"))
        cv2.imwrite(paths[-1], image)
    return paths


def make(name: str) -> Any:
    """Return a random model with scores around 0.5, none saturated: the order of equal scores is undefined."""
    kind = next((k for suffix, k in KINDS.items() if name.endswith(suffix)), "DetectionModel")
    torch.manual_seed(0)
    model = getattr(tasks, kind)(f"{name}.yaml", nc=3, verbose=False)
    images = [draw_scene(np.random.default_rng(i), SIZE)[0][..., ::-1].transpose(2, 0, 1) / 255 for i in range(4)]
    for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        bn.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.from_numpy(np.stack(images)).float())
        for head, gain in (("cv2", 4), ("cv3", 0.3), ("one2one_cv2", 4), ("one2one_cv3", 0.3)):
            for branch in getattr(model.model[-1], head, None) or []:
                branch[-1].weight *= gain
                if head.endswith("cv3"):
                    branch[-1].bias.zero_()
    return model.eval()


def compare(result: Any, found: Detections) -> int:
    """Check that our result equals that of Ultralytics; return the number of objects."""
    if result.probs is not None:
        assert np.abs(result.probs.data.numpy() - found.probs).max() < SCORE
        return 1
    boxes = result.boxes if result.obb is None else result.obb
    assert len(boxes) == len(found)
    assert (boxes.cls.numpy() == found.classes).all()
    if not len(boxes):
        return 0
    assert np.abs(boxes.conf.numpy() - found.scores).max() < SCORE
    assert np.abs(boxes.xyxy.numpy() - found.boxes).max() < PIXELS
    if result.obb is not None:
        assert np.abs(result.obb.xywhr.numpy() - found.rboxes).max() < PIXELS
    if result.keypoints is not None:
        assert np.abs(result.keypoints.data.numpy() - found.keypoints).max() < PIXELS
    if result.masks is not None:
        theirs = result.masks.data.numpy().astype(bool)
        assert theirs.shape == found.masks.shape
        assert (theirs & found.masks).sum() > 0.99 * (theirs | found.masks).sum()
    return len(found)


CASES = [
    pytest.param("yolov8n", {}, id="v8"),
    pytest.param("yolo26n", {"end2end": True}, id="v26-nms-free"),
    pytest.param("yolov8n-seg", {}, id="segment"),
    pytest.param("yolov8n-pose", {}, id="pose"),
    pytest.param("yolov8n-obb", {}, id="obb"),
    pytest.param("yolov8n-cls", {}, id="classify"),
    pytest.param("yolov8n", {"dynamic": True}, id="dynamic"),
]
MORE = [
    pytest.param("yolov5n", {}, id="v5"),
    pytest.param("yolov9t", {}, id="v9"),
    pytest.param("yolov10n", {"end2end": True}, id="v10-nms-free"),
    pytest.param("yolo11n", {}, id="v11"),
    pytest.param("yolo12n", {}, id="v12"),
    pytest.param("yolo26n", {}, id="v26-one-to-many"),
    pytest.param("yolo26n-seg", {"end2end": True}, id="v26-segment"),
    pytest.param("yolo26n-pose", {"end2end": True}, id="v26-pose"),
    pytest.param("yolo26n-obb", {"end2end": True}, id="v26-obb"),
    pytest.param("yolo26n-cls", {}, id="v26-classify"),
    pytest.param("yolov8n", {"batch": 2}, id="batch"),
]


def equal_to_ultralytics(file: Path, pictures: list[str], conf: float = 0.5, imgsz: int | None = SIZE) -> int:
    """Compare a detector with `YOLO.predict` on the same file; return the number of objects."""
    yolo, ours = YOLO(str(file)), Detector(file, conf=conf)
    options = {"conf": conf, "iou": 0.7, "imgsz": imgsz, "device": "cpu", "verbose": False, "retina_masks": True}
    found = ours(pictures)
    return sum(compare(yolo.predict(p, **options)[0], d) for p, d in zip(pictures, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [*CASES, *(pytest.param(*c.values, id=c.id, marks=pytest.mark.matrix) for c in MORE)]
)
def test_equals_the_predictor_of_ultralytics(name, options, pictures, tmp_path):
    file = export_onnx(make(name), tmp_path / "m.onnx", SIZE, simplify=False, **options)
    assert equal_to_ultralytics(file, pictures) >= len(pictures)


OTHERS = {"nms": {"nms": True, "conf": 0.5}, "fp16": {"quantize": 16}, "wide": {"imgsz": [32, 96]}}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{kind}")
        for name in ("yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb")
        for kind, options in OTHERS.items()
        if (name, kind) != ("yolov8n-obb", "fp16")  # scores in FP16 tie, and the sort of rotated boxes is not stable
    ],
)
def test_other_exports_of_ultralytics(name, options, pictures, tmp_path):
    from ultralytics.engine.exporter import Exporter

    model = make(name)
    model.pt_path, model.task = str(tmp_path / "m.pt"), tasks.guess_model_task(model)
    file = Exporter(overrides={**EXPORT, "imgsz": SIZE, **options})(model)
    assert equal_to_ultralytics(Path(file), pictures) >= len(pictures)


@pytest.mark.matrix
def test_transformer_head(pictures, tmp_path):
    from ultralytics.engine.exporter import Exporter

    torch.manual_seed(0)
    model = tasks.RTDETRDetectionModel("rtdetr-resnet50.yaml", nc=3, verbose=False).eval()
    model.pt_path, model.task = str(tmp_path / "m.pt"), "detect"
    file = Exporter(overrides={**EXPORT, "imgsz": 160})(model)
    assert equal_to_ultralytics(Path(file), pictures, conf=0.1, imgsz=160)


def channelled(channels: int, folder: Path) -> Path:
    """Return a picture of so many channels: grey, with alpha, or one page of a TIFF for each."""
    planes = [cv2.resize(draw_scene(np.random.default_rng(i), 64)[0], (90, 60))[..., i % 3] for i in range(channels)]
    file = folder / f"{channels}.{'png' if channels in (1, 4) else 'tiff'}"
    picture = planes[0] if channels == 1 else np.dstack(planes)
    cv2.imwrite(str(file), picture) if channels in (1, 4) else cv2.imwritemulti(str(file), planes)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4, 5])
def test_channels_keep_their_order(channels, tmp_path):
    """Only three channels are BGR and turned to RGB; padding is grey in all of them."""
    torch.manual_seed(0)
    model = tasks.DetectionModel("yolov8n.yaml", ch=channels, nc=3, verbose=False).eval()
    with torch.no_grad():
        for branch in model.model[-1].cv3:
            branch[-1].bias.zero_()
            branch[-1].weight.normal_(0, 0.5)
        model.model[0].conv.weight *= torch.arange(1, channels + 1).view(1, -1, 1, 1) / channels
    file = export_onnx(model, tmp_path / "m.onnx", SIZE, simplify=False)
    picture = channelled(channels, tmp_path)
    assert equal_to_ultralytics(file, [str(picture)], conf=0.5) > 0
    x = Detector(file)._prepare(detector._read(picture, channels))
    assert x.shape == (channels, SIZE, SIZE) and np.allclose(x[:, 0], 114 / 255)


# Step by step ---------------------------------------------------------------------------------------------------------
@given(st.integers(0, 2**31), st.integers(1, 4), st.booleans(), st.sampled_from([0.1, 0.3, 0.9]), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_suppression_equals_ultralytics(seed, nc, rotated, iou, max_det):
    rng = np.random.default_rng(seed)
    output = np.zeros((4 + nc + 1, 90), np.float32)
    output[:2], output[2:4] = rng.uniform(0, 64, (2, 90)), rng.uniform(1, 40, (2, 90))
    output[4 : 4 + nc], output[-1] = rng.random((nc, 90)), rng.uniform(0, np.pi, 90)
    wanted = non_max_suppression(
        torch.from_numpy(output[None].copy()), 0.4, iou, nc=nc, rotated=rotated, max_det=max_det
    )[0].numpy()
    rows = decode.dense(output, nc, 0.4, rotated=rotated)
    found = decode.suppress(rows, iou, max_det, rotated=rotated)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) < 1e-4


def test_suppression_of_nothing_and_of_boxes_without_area():
    assert decode.suppress(np.zeros((0, 6), np.float32), 0.5, 9, rotated=False).shape == (0, 6)
    assert decode.suppress(np.zeros((0, 7), np.float32), 0.5, 9, rotated=True).shape == (0, 7)
    points = np.float32([[5, 5, 5, 5, 0.9, 0], [5, 5, 5, 5, 0.8, 0]])
    assert len(decode.suppress(points, 0.5, 9, rotated=False)) == 2


def test_rotated_boxes(monkeypatch):
    boxes = np.random.default_rng(0).uniform(1, 30, (40, 5)).astype(np.float32)
    ours = decode.prob_iou(boxes, boxes[:7])
    assert np.abs(ours - batch_probiou(boxes, boxes[:7]).numpy()).max() < 1e-4
    points = xywhr2xyxyxyxy(boxes)
    assert np.abs(decode.around(boxes) - np.concatenate([points.min(1), points.max(1)], 1)).max() < 1e-4
    rows = np.insert(boxes, [4, 4], [0.5, 0], 1).astype(np.float32)
    whole = decode.suppress(rows, 0.1, 300, rotated=True)
    monkeypatch.setattr(decode, "BLOCK", 7)
    assert (decode.suppress(rows, 0.1, 300, rotated=True) == whole).all() and 1 < len(whole) < 40


@given(st.integers(8, 300), st.integers(8, 300), st.sampled_from([(64, 64), (32, 96), (160, 64)]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_letterbox_equals_ultralytics(height, width, size, auto):
    image = np.random.default_rng(height * 301 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = LetterBox(size, auto=auto, stride=32)(image=image)
    found = detector.letterbox(image, size, 32 if auto else None)
    assert (found == wanted).all()
    sx, sy, left, top = decode.fit(found.shape, image.shape)
    assert left >= 0 and top >= 0 and left + sx * width <= found.shape[1] + 1e-6
    assert top + sy * height <= found.shape[0] + 1e-6


@pytest.mark.parametrize("shape", [(1, 300, 3), (300, 1, 3), (1, 1, 3)], ids=str)
def test_letterbox_keeps_thin_pictures(shape):
    assert detector.letterbox(np.zeros(shape, np.uint8), (64, 64)).shape == (64, 64, 3)


@given(st.integers(8, 200), st.integers(8, 200), st.sampled_from([(32, 32), (96, 96), (32, 64)]))
@settings(max_examples=40, deadline=None)
def test_classification_crop_equals_torchvision(height, width, size):
    from PIL import Image
    from ultralytics.data.augment import classify_transforms

    image = np.random.default_rng(height * 201 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = np.array(classify_transforms(size)(Image.fromarray(image))).transpose(1, 2, 0) * 255
    # Pillow 13 may resize the height first; the rounding in between then differs by one grey level.
    assert np.abs(detector._crop(image, size) - wanted).max() < 1.01


# One file at a time ---------------------------------------------------------------------------------------------------
def stub(path: Path, output: Any, shape: tuple[Any, ...] = (1, 3, 64, 64), **meta: str | None) -> Path:
    """Write a model that gives the same output for every image."""
    values = np.asarray(output, np.float32)[None]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["y"])],
        "stub",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor("c", TensorProto.FLOAT, values.shape, values.ravel().tolist())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {k: v for k, v in {**META, **meta}.items() if v is not None})
    onnx.save(model, path)
    return path


ANCHORS = np.float32(  # x, y, w, h, score of a, score of b
    [[20, 20, 10, 10, 0.9, 0.1], [20, 20, 10, 9, 0.1, 0.8], [20, 20, 10, 8, 0.7, 0.2], [50, 50, 8, 8, 0.1, 0.3]]
)
ROWS = np.float32([[15, 15, 25, 25, 0.9, 0], [15, 15, 25, 24, 0.8, 0], [40, 40, 50, 50, 0.2, 1]])
BLANK = np.zeros((64, 128, 3), np.uint8)


@pytest.mark.parametrize(
    ("output", "meta", "options", "scores"),
    [
        pytest.param(ANCHORS.T, {}, {}, [0.9, 0.8, 0.3], id="class-aware"),
        pytest.param(ANCHORS.T, {}, {"iou": 0.9}, [0.9, 0.8, 0.7, 0.3], id="iou"),
        pytest.param(ANCHORS.T, {}, {"conf": 0.5}, [0.9, 0.8], id="conf"),
        pytest.param(ANCHORS.T, {}, {"max_det": 1}, [0.9], id="max-det"),
        pytest.param(ANCHORS.T, {}, {"classes": [1]}, [0.8, 0.3], id="class-index"),
        pytest.param(ANCHORS.T, {}, {"classes": ["b"]}, [0.8, 0.3], id="class-name"),
        pytest.param(ROWS, {"end2end": "True"}, {}, [0.9, 0.8], id="nms-free"),
        pytest.param(ROWS, {"args": "{'nms': True}"}, {"max_det": 1}, [0.9], id="embedded-nms"),
        pytest.param(ROWS, {}, {"classes": ["b"], "conf": 0.1}, [0.2], id="six-columns"),
        pytest.param(np.zeros((6, 0)), {}, {}, [], id="no-anchors"),
    ],
)
def test_rows_of_every_kind_of_output(output, meta, options, scores, tmp_path):
    found = Detector(stub(tmp_path / "m.onnx", output, **meta), **options)(BLANK)
    assert found.scores.tolist() == pytest.approx(scores)
    assert len(found) == len(scores) == len(found.boxes) == len(found.classes)


def test_boxes_come_back_to_the_picture_and_stay_inside(tmp_path):
    ours = Detector(stub(tmp_path / "m.onnx", np.float32([[-9, 20, 70, 60, 0.9, 1]]), end2end="True"))
    found = ours(BLANK)  # twice as wide as the input: scaled by 0.5, 16 px of border above and below
    assert found.boxes.tolist() == [[0, 8, 128, 64]]
    assert (found.shape, found.names, found.classes.tolist()) == ((64, 128), {0: "a", 1: "b"}, [1])
    assert found.source is BLANK
    assert ours.task == "detect" and ours.imgsz == (64, 64)


@pytest.mark.parametrize(("output", "end2end"), [(ROWS, "True"), (ANCHORS.T, "False")], ids=["nms-free", "dense"])
def test_types(output, end2end, tmp_path):
    found = Detector(stub(tmp_path / "m.onnx", output, end2end=end2end))(BLANK)
    assert found.boxes.dtype == found.scores.dtype == np.float32 and found.classes.dtype == np.int64
    with pytest.raises(AttributeError):
        found.scores = None
    assert found.masks is found.keypoints is found.rboxes is found.probs is None


def test_a_list_gives_a_list_and_a_file_what_its_array_gives(tmp_path):
    ours, picture = Detector(stub(tmp_path / "m.onnx", ROWS, end2end="True")), tmp_path / "ä b.png"
    picture.write_bytes(cv2.imencode(".png", BLANK)[1].tobytes())
    found = ours([picture, str(picture), BLANK])
    assert [f.boxes.tolist() for f in found] == [ours(BLANK).boxes.tolist()] * 3


@pytest.mark.parametrize(
    ("output", "meta", "count"),
    [
        pytest.param(ANCHORS.T, {"names": "{0: 'a'}"}, 2, id="dense"),
        pytest.param(ANCHORS.T, {"names": "['a', 'b', 'c']"}, 2, id="too many"),
        pytest.param(ROWS[:, [0, 1, 2, 3, 4, 4]] * 9, {"names": "{0: 'a'}", "end2end": "True"}, 9, id="finished rows"),
        pytest.param(ANCHORS.T, {"task": "pose", "kpt_shape": "[1, 1]"}, 1, id="pose"),
        pytest.param([0.9, 0.1, 0.0], {"task": "classify"}, 3, id="classify"),
    ],
)
def test_names_that_do_not_fit(output, meta, count, tmp_path):
    with pytest.raises(UsageError, match=rf"m.onnx' names \d classes in its metadata, its outputs have {count}"):
        Detector(stub(tmp_path / "m.onnx", output, **meta))(BLANK)


# What is found --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Detections]:
    """Return what is found of each task in one picture."""
    folder, picture = tmp_path_factory.mktemp("found"), np.full((64, 64, 3), 200, np.uint8)
    extras = {"detect": (ROWS, {}), "pose": (np.insert(ROWS, [6] * 4, 30, 1), {"kpt_shape": "[2, 2]"}),
              "obb": (np.insert(ROWS, 6, 0.3, 1), {}), "classify": (np.float32([0.2, 0.7]), {})}  # fmt: skip
    made = {task: stub(folder / f"{task}.onnx", output, task=task, end2end="True", **meta)
            for task, (output, meta) in extras.items()}  # fmt: skip
    return {task: Detector(file, conf=0.1)(picture) for task, file in made.items()} | {
        "segment": replace(Detector(made["detect"], conf=0.1)(picture), masks=np.ones((3, 64, 64), bool))
    }


@pytest.mark.parametrize(
    ("chosen", "scores"),
    [
        pytest.param(0, [0.9], id="number"),
        pytest.param(-1, [0.2], id="from the end"),
        pytest.param(slice(1, None), [0.8, 0.2], id="slice"),
        pytest.param([2, 0], [0.2, 0.9], id="numbers"),
        pytest.param(np.array([True, False, True]), [0.9, 0.2], id="mask"),
        pytest.param([], [], id="none"),
    ],
)
@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb"])
def test_boxes_are_chosen_with_what_belongs_to_them(found, task, chosen, scores):
    some = found[task][chosen]
    assert some.scores.tolist() == pytest.approx(scores)
    fields = [v for v in (some.boxes, some.classes, some.masks, some.keypoints, some.rboxes) if v is not None]
    assert {len(v) for v in fields} == {len(scores)} and some.names == found[task].names


def test_boxes_are_gone_through(found):
    assert [(len(one), one.scores[0]) for one in found["obb"]] == [(1, s) for s in found["obb"].scores]
    with pytest.raises(IndexError):
        _ = found["obb"][3]
    assert list(found["classify"]) == []


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb", "classify"])
def test_plot_and_summary_are_those_of_ultralytics(found, task):
    ours = found[task]
    drawn = ours.plot(line_width=1)
    assert drawn.shape == (64, 64, 3) and drawn.dtype == np.uint8
    assert (drawn != ours.source).any() and (ours.source == 200).all()
    theirs = as_results(ours).summary(decimals=5)
    if task == "obb":  # whose box has four corners there
        theirs = [{**row, "box": mine["box"]} for row, mine in zip(theirs, ours.summary(), strict=True)]
    assert [{k: v for k, v in row.items() if k not in ("keypoints", "segments")} for row in theirs] == ours.summary()
    assert json.loads(json.dumps(ours.summary())) == ours.summary()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_plot_of_other_channels(tmp_path, channels):
    ours = Detector(stub(tmp_path / "m.onnx", ROWS, (1, channels, 64, 64), end2end="True"))
    assert ours(np.zeros((64, 64, channels), np.uint8)).plot().shape == (64, 64, 3)


def test_plot_of_a_file(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), BLANK)
    drawn = Detector(stub(tmp_path / "m.onnx", ROWS, end2end="True"))(tmp_path / "a.png").plot()
    assert drawn.shape == BLANK.shape and drawn.any()


def test_text_of_detections(found):
    assert repr(found["detect"]) == "Detections(a 0.90, a 0.80, b 0.20)"
    assert repr(found["detect"][[0] * 7]) == f"Detections({'a 0.90, ' * 5}2 more)"
    assert repr(found["classify"]) == "Detections(b 0.70, a 0.20)"
    assert repr(found["detect"][[]]) == "Detections(nothing)"


def test_a_pickled_detector_finds_the_same(tmp_path, monkeypatch):
    file = stub(tmp_path / "m.onnx", ROWS, ("b", 3, "h", "w"), end2end="True")
    monkeypatch.chdir(tmp_path)
    ours = Detector(file.name, conf=0.1, iou=0.6, classes=["b"], threads=1, max_det=7, imgsz=(32, 64))
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(ours))
    assert again(BLANK).boxes.tolist() == ours(BLANK).boxes.tolist() != []
    kept = ("conf", "iou", "classes", "max_det", "imgsz", "task", "names", "_threads")
    assert [getattr(again, k) for k in kept] == [getattr(ours, k) for k in kept]


def test_threads_share_a_detector(tmp_path):
    ours = Detector(stub(tmp_path / "m.onnx", ANCHORS.T, ("b", 3, "h", "w")), threads=1)
    images = [np.full((50 + 9 * i, 200 - 9 * i, 3), i, np.uint8) for i in range(8)]
    alone = [ours(image) for image in images]
    with ThreadPool(8) as pool:
        together = pool.map(ours, images * 8)
    assert len({one.boxes.tobytes() for one in alone}) == 8
    for one, other in zip(alone * 8, together, strict=True):
        assert (one.boxes == other.boxes).all() and (one.scores == other.scores).all()


@pytest.mark.parametrize(
    ("shape", "given", "size"),
    [
        pytest.param((1, 3, 64, 96), None, (64, 96), id="fixed"),
        pytest.param((1, 3, 64, 96), (64, 96), (64, 96), id="fixed-and-given"),
        pytest.param(("b", 3, "h", "w"), None, (64, 64), id="of-the-export"),
        pytest.param(("b", 3, "h", "w"), 128, (128, 128), id="one-side"),
        pytest.param(("b", 3, "h", "w"), [32, 64], (32, 64), id="two-sides"),
        pytest.param(("b", 3, 64, 64), None, (64, 64), id="only-batch-open"),
    ],
)
def test_input_size(shape, given, size, tmp_path):
    file = stub(tmp_path / "m.onnx", ROWS, shape, end2end="True")
    ours = Detector(file, imgsz=given)
    assert ours.imgsz == size and len(ours(BLANK)) == 2


@pytest.mark.parametrize("given", [0, 70, (64, 64, 64), (64, 0.5), "ab"], ids=str)
def test_wrong_input_size(given, tmp_path):
    with pytest.raises(UsageError, match="multiples of 32"):
        Detector(stub(tmp_path / "m.onnx", ROWS, ("b", 3, "h", "w")), imgsz=given)


def test_grey_pictures(tmp_path):
    ours = Detector(stub(tmp_path / "m.onnx", ROWS, (1, 1, 64, 64), end2end="True"))
    assert len(ours(BLANK[..., 0])) == len(ours(BLANK[..., :1])) == 2


# Wrong input ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("meta", "options", "text"),
    [
        pytest.param({"names": None}, {}, "no Ultralytics metadata", id="no names"),
        pytest.param({"task": None}, {}, "no Ultralytics metadata", id="no task"),
        pytest.param({"task": "depth"}, {}, "depth.* Legal", id="task"),
        pytest.param({"names": "__import__('os')"}, {}, "cannot be read", id="code"),
        pytest.param({"names": "(" * 5000}, {}, "cannot be read", id="nested"),
        pytest.param({"names": "7"}, {}, "cannot be read", id="number"),
        pytest.param({"names": "{1: 'a', 2: 'b'}"}, {}, "not from 0 on", id="numbers of names"),
        pytest.param({"imgsz": "{"}, {}, "cannot be read", id="brace"),
        pytest.param({}, {"conf": 1.5}, "conf=1.5", id="conf"),
        pytest.param({}, {"iou": -1}, "iou=-1", id="iou"),
        pytest.param({}, {"conf": float("nan")}, "conf=nan", id="nan"),
        pytest.param({}, {"iou": "0.5"}, "iou=0.5", id="text"),
        pytest.param({}, {"threads": 0}, "threads=0", id="threads"),
        pytest.param({}, {"max_det": 2.5}, "max_det=2.5", id="max_det"),
        pytest.param({}, {"classes": ["c"]}, "'c'. Legal: 0 a, 1 b", id="class name"),
        pytest.param({}, {"classes": [2]}, "'2'. Legal: 0 a, 1 b", id="class index"),
        pytest.param({}, {"imgsz": 96}, "64x64 pixels only", id="fixed size"),
    ],
)
def test_wrong_model_or_option(meta, options, text, tmp_path):
    with pytest.raises(UsageError, match=text):
        Detector(stub(tmp_path / "m.onnx", ROWS, **meta), **options)


@pytest.mark.parametrize("path", [None, 5, ".", b"x"], ids=str)
def test_what_is_no_file(path):
    with pytest.raises(UsageError, match=r"(does not exist|cannot load)"):
        Detector(path)


@pytest.mark.parametrize("content", [None, b"", b"nothing"], ids=["missing", "empty", "broken"])
def test_wrong_file(content, tmp_path):
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(UsageError, match="onnx"):
        Detector(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "image",
    [
        pytest.param("absent.jpg", id="missing"),
        pytest.param(".", id="folder"),
        pytest.param("empty.jpg", id="empty"),
        pytest.param("text.jpg", id="text"),
        pytest.param(np.zeros((8, 8, 3), np.float32), id="float"),
        pytest.param(np.zeros((8, 8), np.uint8), id="grey"),
        pytest.param(np.zeros((0, 8, 3), np.uint8), id="no-pixels"),
        pytest.param(np.zeros((8, 8, 4), np.uint8), id="channels"),
        pytest.param(np.zeros((2, 8, 8, 3), np.uint8), id="batch"),
        pytest.param(Image.new("RGB", (8, 8)), id="picture of Pillow"),
        pytest.param(torch.zeros(1, 3, 8, 8), id="tensor"),
        pytest.param(None, id="nothing"),
        pytest.param([BLANK, None], id="nothing in a list"),
        pytest.param([], id="empty list"),
    ],
)
def test_wrong_picture(image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jpg").touch()
    Path("text.jpg").write_text("no picture")
    ours = Detector(stub(tmp_path / "m.onnx", ROWS, end2end="True"))
    texts = {str: "Give readable image files", np.ndarray: "Legal"}
    with pytest.raises(UsageError, match=texts.get(type(image), "Give")):
        ours(image)


# Without torch --------------------------------------------------------------------------------------------------------
def test_needs_neither_torch_nor_ultralytics_and_starts_in_a_second(tmp_path):
    file = stub(tmp_path / "m.onnx", ROWS, end2end="True")
    cv2.imwrite(str(tmp_path / "a.png"), BLANK)
    code = (
        "import sys, time\n"
        "for name in ('torch', 'torchvision', 'ultralytics', 'onnx', 'PIL', 'yaml', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # makes every import of it fail
        "from yolo_ext.deployment import Detector\n"
        "from yolo_ext.core.errors import UsageError\n"
        f"found = Detector({str(file)!r})({str(tmp_path / 'a.png')!r})\n"
        "print(len(found), time.process_time())\n"
    )
    root = Path(yolo_ext.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    count, seconds = done.stdout.split()
    assert count == "2" and float(seconds) < 1.0  # CPU time, whatever else the machine does


def test_other_names_of_the_package():
    import yolo_ext.deployment as package

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing
