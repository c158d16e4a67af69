# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A checkpoint of Ultralytics' own QAT becomes an INT8 file by the export command, without ModelOpt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from yolo_ext.commands.deploy import export
from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.runtime import conv_report
from yolo_ext.stock.load import load_model


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Return a checkpoint as Ultralytics 8.4 saves it after training with quantize=8."""
    model, ckpt = load_model(tiny)
    inputs: dict[str, torch.Tensor] = {}
    convs = {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and ".dfl" not in p}
    hooks = [
        m.register_forward_pre_hook(lambda m, x, p=p: inputs.update({p: x[0].abs().max()})) for p, m in convs.items()
    ]
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    head = f"model.{len(model.model) - 1}."
    ranges = {}
    for path, conv in convs.items():
        if path in inputs and not (path.startswith(head) and ".conv" not in path):
            ranges[f"{path}.input_quantizer._amax"] = inputs[path].detach()
            ranges[f"{path}.weight_quantizer._amax"] = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True)
    file = tmp_path_factory.mktemp("modelopt") / "qat.pt"
    state = {"modelopt": {"modelopt_state_dict": []}, "ranges": ranges}
    torch.save({**ckpt, "model": copy.deepcopy(model).half(), "ema": None, "modelopt": state}, file)
    return file


@pytest.mark.slow
def test_its_ranges_become_integer_convolutions(trained, shapes, tmp_path):
    found = export(trained, out=tmp_path / "a.onnx", imgsz=64, data=str(shapes), save_dir=str(tmp_path / "run"))
    assert [f.name for f in found["files"]] == ["a.onnx", "a_int8.onnx"]
    report = conv_report(found.int8)
    assert report["int8_convs"] >= 0.7 * report["convs"]
    assert all(r.startswith("no Q/DQ") for r in report["float_convs"].values())


def test_what_it_lacks_is_asked_for_and_nothing_is_written(trained, tmp_path):
    with pytest.raises(UsageError, match=r"those of convolution inputs.*Give data="):
        export(trained, out=tmp_path / "a.onnx", imgsz=64, save_dir=str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_needs_no_more_asks_for_no_data(trained, tmp_path):
    found = export(
        trained, out=tmp_path / "a.onnx", imgsz=64, quant={"profile": "tensorrt"}, save_dir=str(tmp_path / "r")
    )
    assert found.int8.is_file() and found.onnx.name == "a.onnx"


@pytest.mark.slow
def test_the_key_that_every_checkpoint_of_ultralytics_has_is_no_sign_of_qat(tiny, tmp_path):
    torch.save({**torch.load(tiny, weights_only=False), "modelopt": None}, tmp_path / "best.pt")
    found = export(tmp_path / "best.pt", imgsz=64, save_dir=str(tmp_path / "r"))
    assert [f.name for f in found["files"]] == ["best.onnx"] and found.int8 is None
