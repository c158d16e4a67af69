# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from ultralytics.nn.tasks import DetectionModel, PoseModel

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.stock.fit import REMEDIES
from yolo_ext.stock.load import planes, read_image

NAMES = {0: "circle", 1: "square", 2: "triangle"}


def model(ch: int = 3, names: dict[int, str] = NAMES, kpt: list[int] | None = None):
    torch.manual_seed(0)
    if kpt:
        made = PoseModel("yolov8n-pose.yaml", ch=ch, nc=len(names), data_kpt_shape=kpt, verbose=False)
    else:
        made = DetectionModel("yolov8n.yaml", ch=ch, nc=len(names), verbose=False)
    made.names = dict(names)
    return made.eval()


@pytest.fixture(scope="module")
def detector():
    return model()


@pytest.fixture(scope="module")
def pose():
    return model(names={0: "person"}, kpt=[17, 3])


def info(names=NAMES, channels: int = 3, **more):
    names = dict(enumerate(names)) if isinstance(names, list) else names
    return {"names": names, "nc": len(names), "channels": channels, **more}


FITS = {
    "same": info(),
    "case and space": info(["Circle ", "SQUARE", "triangle"]),
    "one renamed": info(["circle", "rectangle", "triangle"]),
    "no names in the data": info(["class_0", "class_1", "class_2"]),
    "numbers as names": info(["0", "1", "2"]),
    "keypoints beside boxes": info(kpt_shape=[4, 2]),
}
MISFITS = {
    "fewer classes": (info(["circle", "square"]), "number of classes", ["3 of the model", "2 of the data"]),
    "other order": (info(["triangle", "square", "circle"]), "class numbers", ["2 for 'triangle'", "0 for 'triangle'"]),
    "two exchanged": (info(["square", "circle", "triangle"]), "class numbers", ["1 for 'square'", "0 for 'square'"]),
    "shifted and renamed": (info(["dot", "circle", "triangle"]), "class numbers", ["0 for 'circle'", "1 for 'circle'"]),
    "none the same": (info(["apple", "pear", "fig"]), "class names", ["circle", "apple"]),
    "gray": (info(channels=1), "image channels", ["3 of the model", "1 of the data"]),
}


@pytest.mark.parametrize("data", FITS.values(), ids=FITS)
def test_data_that_fit(detector, data):
    assert stock.check_fit(detector, data, ("a.pt", "b.yaml")) == ""
    assert stock.rebuilt(detector, data) is detector


@pytest.mark.parametrize(("data", "key", "words"), MISFITS.values(), ids=MISFITS)
def test_data_that_do_not_fit(detector, data, key, words):
    with pytest.raises(UsageError) as e:
        stock.check_fit(detector, data, ("a.pt", "b.yaml"))
    assert all(w in str(e.value) for w in ("'a.pt'", "'b.yaml'", key, REMEDIES[key], *words))
    assert all(w in stock.check_fit(detector, data, ("a.pt", "b.yaml"), rebuilt=True) for w in words)


def test_an_exported_file_is_held_against_data_by_its_names():
    assert stock.check_fit({"names": NAMES}, info(), ("a.onnx", "b.yaml")) == ""
    with pytest.raises(UsageError, match="class numbers"):
        stock.check_fit({"names": NAMES}, info(["square", "circle", "triangle"]), ("a.onnx", "b.yaml"))


def test_keypoints_have_to_be_those_of_the_data(pose):
    assert stock.check_fit(pose, info(["person"], kpt_shape=[17, 3]), ("a.pt", "b.yaml")) == ""
    with pytest.raises(UsageError, match=r"keypoint shape \[17, 3\] of the model, \[4, 2\] of the data"):
        stock.check_fit(pose, info(["person"], kpt_shape=[4, 2]), ("a.pt", "b.yaml"))


def test_names_of_a_single_class_may_differ(pose):
    assert stock.check_fit(pose, info(["dancer"]), ("a.pt", "b.yaml")) == ""


def test_data_of_single_cls_are_one_class():
    data = stock.one_class(info())
    assert data["nc"] == 1 and data["names"] == {0: "item"} and data["single_cls"]
    assert stock.check_fit({"names": {0: "item"}}, data, ("a", "b")) == ""


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        pytest.param(info(channels=1), {"first": 1, "last": 3}, id="gray"),
        pytest.param(info(["circle", "star", "square", "triangle"]), {"first": 3, "last": 4}, id="classes"),
    ],
)
def test_rebuilt_is_what_a_training_would_build(detector, change, shape):
    made, state = stock.rebuilt(detector, change), torch.get_rng_state()
    assert made.model[0].conv.in_channels == shape["first"] and made.model[-1].cv3[0][-1].out_channels == shape["last"]
    assert made.names == change["names"] and torch.equal(state, torch.get_rng_state())
    assert torch.equal(made.model[4].cv1.conv.weight, detector.model[4].cv1.conv.weight)
    row = made.names and next(i for i, n in made.names.items() if n == "triangle")
    same = made.model[-1].cv3[0][-1].weight[row], detector.model[-1].cv3[0][-1].weight[2]
    assert torch.equal(*same)


def test_rebuilt_has_the_keypoints_of_the_data(pose):
    assert stock.rebuilt(pose, info(["person"], kpt_shape=[4, 2])).model[-1].kpt_shape == [4, 2]


def test_differences_between_two_models(detector, pose):
    assert [key for key, *_ in stock.differences(pose, detector)] == ["number of classes", "task"]
    assert not list(stock.differences(detector, model()))


@pytest.mark.parametrize(
    ("yaml", "kind"),
    [("yolov8n-rtdetr.yaml", "RT-DETR"), ("yolov8s-world.yaml", "YOLO-World"), ("yoloe-v8s.yaml", "YOLOE")],
)
def test_models_with_trainers_of_their_own(yaml, kind):
    with pytest.raises(UsageError, match=f"^{kind} is trained and validated in a way of its own"):
        stock.refuse_untrainable(stock.load_model(yaml)[0])


# Pixels -------------------------------------------------------------------------------------------------------------
def test_images_are_read_with_the_channels_of_the_model(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 4), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    assert np.array_equal(read_image(tmp_path / "a.png", 4), pixels)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels[..., :3])
    assert read_image(tmp_path / "a.png", 1).shape == (12, 10, 1)
    assert read_image(tmp_path / "gone.png") is None
    cv2.imwrite(str(tmp_path / "b.png"), pixels[..., :3])
    with pytest.raises(UsageError, match=r"b\.png' has 3 channels, the model takes 4"):
        read_image(tmp_path / "b.png", 4)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_only_three_channels_are_reversed(channels):
    image = np.arange(2 * 3 * channels, dtype=np.uint8).reshape(2, 3, channels)
    order = [2, 1, 0] if channels == 3 else list(range(channels))
    assert np.array_equal(planes(image), image[..., order].transpose(2, 0, 1))
