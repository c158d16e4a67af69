# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""One rule for the size of the input, whoever asks."""

from __future__ import annotations

import pytest
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.core.errors import UsageError
from yolo_ext.stock.model import image_size


@pytest.fixture(scope="module")
def net() -> DetectionModel:
    return DetectionModel("yolov8n.yaml", nc=3, verbose=False)


@pytest.mark.parametrize(
    ("trained", "given", "expected"),
    [
        pytest.param(None, None, 640, id="nothing known"),
        pytest.param(192, None, 192, id="as trained"),
        pytest.param(192, 320, 320, id="as given"),
        pytest.param(100, None, 128, id="trained off the grid"),
        pytest.param([480, 640], None, 640, id="trained on a rectangle"),
    ],
)
def test_default_and_given(net, trained, given, expected):
    assert image_size(net, {"train_args": {"imgsz": trained}}, given) == expected
    assert image_size(net, {}, expected) == expected == image_size(net, {"train_args": None}, expected)


@pytest.mark.parametrize(
    ("given", "near"), [(65, 64), (1, 32), (100.0, 96), ("big", 640), (True, 32), (0, 32), (-64, 32), ([64, 64], 640)]
)
def test_off_the_grid_is_refused_with_the_nearest(net, given, near):
    with pytest.raises(UsageError) as e:
        image_size(net, {"train_args": {"imgsz": 64}}, given)
    assert str(e.value) == f"'imgsz={given}' is illegal. Legal: a multiple of 32, such as {near}."


def test_a_training_rounds_as_ultralytics_does_and_says_so(net, caplog, monkeypatch):
    from ultralytics.utils import LOGGER

    monkeypatch.setattr(LOGGER, "propagate", True)
    assert image_size(net, {}, 65, rounded=True) == 96
    assert "updating to [96]" in caplog.text
    with pytest.raises(UsageError, match="imgsz=-64"):
        image_size(net, {}, -64, rounded=True)
