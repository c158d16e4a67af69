# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.core.errors import UsageError
from yolo_ext.stock.load import float_model, load_model


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()


def test_float_model_is_an_independent_copy():
    source = DetectionModel("yolov8n.yaml", nc=3, verbose=False).half().train()
    source.criterion = object()
    copy = float_model(source)
    assert not copy.training and source.training
    assert next(copy.parameters()).dtype is torch.float32 and next(source.parameters()).dtype is torch.float16
    assert copy.criterion is None and source.criterion is not None and copy.task == "detect"


def test_yaml_gives_an_untrained_model():
    net, ckpt = load_model("yolov8n.yaml")
    assert isinstance(net, DetectionModel) and ckpt == {} and not net.training


def write(folder: Path, name: str, content) -> Path:
    if isinstance(content, (bytes, str)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    elif content is not None:
        torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.pt", None, id="missing"),
        pytest.param("a.onnx", b"x", id="other-suffix"),
        pytest.param("a", b"x", id="no-suffix"),
        pytest.param("a.pt", b"", id="empty"),
        pytest.param("a.pt", b"no pickle at all", id="corrupt"),
        pytest.param("a.pt", b"PK\x03\x04 half a zip", id="truncated"),
        pytest.param("a.pt", {"some": "dict"}, id="random-dict"),
        pytest.param("a.pt", {"model": None}, id="no-model"),
        pytest.param("a.pt", {"model": nn.Conv2d(3, 3, 1)}, id="no-yolo"),
        pytest.param("a.pt", {"w": torch.zeros(3)}, id="state-dict"),
        pytest.param("a.pt", torch.zeros(3), id="tensor"),
        pytest.param("a.yaml", None, id="missing-yaml"),
        pytest.param("a.yaml", "", id="empty-yaml"),
        pytest.param("a.yaml", "just text", id="text-yaml"),
        pytest.param("a.yaml", "nc: 3\nbackbone: 7\nhead: []\n", id="nonsense-yaml"),
        pytest.param("a.yaml", "nc: 3\nbackbone:\n  - [-1, 1, NoSuchLayer, [8]]\nhead: []\n", id="unknown-layer"),
        pytest.param("a.yaml", "a: [1\nb: }", id="broken-yaml"),
    ],
)
def test_wrong_files(tmp_path, name, content):
    file = write(tmp_path, name, content)
    with pytest.raises(UsageError) as e:
        load_model(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert "Give" in str(e.value) or "Legal" in str(e.value)


def test_a_class_that_is_not_installed_is_an_error_and_installs_nothing(model, tmp_path, monkeypatch):
    """Ultralytics would run pip for the name of any module that a checkpoint asks for."""
    from ultralytics.utils import checks

    (tmp_path / "my_layers_not_on_pypi.py").write_text("from torch import nn\nclass Mine(nn.Module):\n    pass\n")
    with monkeypatch.context() as m:
        m.syspath_prepend(tmp_path)
        import my_layers_not_on_pypi

        net = deepcopy(model)
        net.extra = my_layers_not_on_pypi.Mine()
        torch.save({"model": net}, tmp_path / "a.pt")
    del sys.modules["my_layers_not_on_pypi"]
    ran = []
    monkeypatch.setattr(checks, "AUTOINSTALL", True)
    monkeypatch.setattr(checks.subprocess, "check_output", lambda *a, **k: ran.append(a) or b"")
    with pytest.raises(UsageError, match="my_layers_not_on_pypi"):
        load_model(tmp_path / "a.pt")
    assert not ran and checks.AUTOINSTALL is True
