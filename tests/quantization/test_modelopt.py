# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import Conv, RepConv

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.runtime import conv_report, run, session
from yolo_ext.quantization.fake_quant import merge_branches
from yolo_ext.quantization.qat import complete, import_state, is_modelopt, load_modelopt
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import PROFILES


def quantizer(amax: torch.Tensor | None, **changes) -> dict:
    """Return the settings that ModelOpt stores of one quantizer."""
    buffers = {} if amax is None else {"_amax": {"shape": amax.shape, "dtype": amax.dtype}}
    known = {"_disabled": amax is None, "_num_bits": 8, "_unsigned": False, "_narrow_range": False}
    return {**known, **changes, "_pytorch_state_metadata": {"params": {}, "buffers": buffers}}


def checkpoint(net: nn.Module, images: torch.Tensor) -> dict:
    """Return what Ultralytics 8.4 saves after training with quantize=8, made without ModelOpt."""
    inputs: dict[str, float] = {}
    layers = {p: m for p, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    hooks = [
        m.register_forward_pre_hook(lambda m, x, p=p: inputs.update({p: float(x[0].abs().max())}))
        for p, m in layers.items()
    ]
    with torch.no_grad():
        net.eval()(images)
    for hook in hooks:
        hook.remove()
    head, ranges, settings = f"model.{len(net.model) - 1}.", {}, {}
    for path, layer in layers.items():
        if path not in inputs:
            continue
        limits = {
            "input_quantizer": torch.tensor(inputs[path]),
            "weight_quantizer": layer.weight.detach().abs().amax((1, 2, 3), keepdim=True) * 0.9,  # where training began
        }
        disabled = path.startswith(head) and (".conv." not in f"{path}." or ".dfl." in path)
        settings[f"{path}.output_quantizer"] = quantizer(None)
        for kind, amax in limits.items():
            ranges[f"{path}.{kind}._amax"] = amax
            settings[f"{path}.{kind}"] = quantizer(amax, _disabled=disabled)
    steps = [
        ("quantize", {"config": {}, "metadata": {"quantizer_state": {k: quantizer(None) for k in settings}}}),
        ("max_calibrate", {"config": {"method": "max"}, "metadata": {"quantizer_state": settings}}),
    ]
    state = {"modelopt_state_dict": steps, "modelopt_version": "0.47.0"}
    return {
        "model": copy.deepcopy(net).half(),
        "ema": None,
        "modelopt": {"modelopt": state, "ranges": ranges},
        "train_args": {"task": "detect", "imgsz": 96},
    }


@pytest.fixture(scope="module")
def trained(exported, images):
    """Return a stock model, its checkpoint as ModelOpt training saves it, and its FP32 file."""
    pt, fp32 = exported("yolov8n.yaml")
    net = YOLO(pt).model.float().eval()
    return net, checkpoint(net, images), fp32


@pytest.mark.slow
def test_the_stock_model_is_loaded_without_modelopt(trained, tmp_path):
    net, ckpt, _ = trained
    torch.save(ckpt, tmp_path / "qat.pt")
    model, found = load_modelopt(tmp_path / "qat.pt")
    assert is_modelopt(found) and "modelopt" not in sys.modules
    assert type(model) is type(net) and model.args["imgsz"] == 96 and model.task == "detect"
    assert next(model.parameters()).dtype is torch.float32 and not model.training
    torch.save({**ckpt, "modelopt": None}, tmp_path / "plain.pt")
    assert not is_modelopt({}) and not is_modelopt({"modelopt": None})
    with pytest.raises(UsageError, match="no checkpoint of Ultralytics' quantization-aware training"):
        load_modelopt(tmp_path / "plain.pt")


def test_ranges_and_float_layers_are_those_of_the_checkpoint(trained):
    net, ckpt, _ = trained
    state, layers = import_state(ckpt, net), dict(net.named_modules())
    assert len(state) == 57 and all(set(sites) == {"input", "weight"} for sites in state.values())
    assert not [p for p in state if "dfl" in p or (p.startswith("model.22.") and not p.endswith(".conv"))]
    for path, sites in state.items():
        amax = {k: ckpt["modelopt"]["ranges"][f"{path}.{k}_quantizer._amax"] for k in ("input", "weight")}
        assert sites["input"] == {
            "bits": 8, "symmetric": True, "per_channel": False, "lo": -float(amax["input"]), "hi": float(amax["input"])
        }  # fmt: skip
        largest = layers[path].weight.detach().abs().amax((1, 2, 3))
        assert torch.tensor(sites["weight"]["ratio"]) * largest == pytest.approx(amax["weight"].flatten(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_runs_what_was_imported(trained, images, tmp_path, name):
    net, ckpt, fp32 = trained
    net, profile = copy.deepcopy(net), PROFILES[name]
    net.model[-1].export, net.model[-1].format = True, "onnx"
    with torch.no_grad():
        full = net(images).numpy()
    given = import_state(ckpt, net)
    state = complete(net, given, profile, [images] if profile.output else [])
    with torch.no_grad():
        fake = net(images).numpy()
    report = write_qdq(fp32, tmp_path / "q.onnx", state, profile)
    assert len(report["quantized"]) == (57 if name == "tensorrt" else 56)  # the image is read in float elsewhere
    for path, sites in state.items():
        for site in {"input", "weight"} & set(sites):
            assert sites[site] == {**given[path][site], "bits": profile.weight_bits if site == "weight" else 8}
    opened = session(tmp_path / "q.onnx", 1)
    got = np.concatenate([run(opened, x[None].numpy())[0] for x in images])
    assert np.abs(got - fake)[:, :4].mean() < 0.1 and np.abs(got - fake)[:, 4:].max() < 0.05
    assert 0 < np.abs(fake - full)[:, 4:].mean() < 0.01
    if profile.output and not profile.signed:
        assert conv_report(tmp_path / "q.onnx")["int8_convs"] == 56


class Merging(nn.Module):
    """A model with a block of several branches."""

    def __init__(self) -> None:
        super().__init__()
        self.yaml = {"backbone": [[-1, 1, "Conv", [8]]]}
        self.model = nn.Sequential(Conv(3, 8, 3), RepConv(8, 8), Conv(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def test_merged_branches_share_their_input_range_and_get_new_weight_ranges():
    torch.manual_seed(0)
    net, x = Merging().eval(), torch.rand(2, 3, 16, 16)
    ckpt = checkpoint(net, x)
    assert "model.1.conv1.conv.input_quantizer._amax" in ckpt["modelopt"]["ranges"]
    with torch.no_grad():
        seen = float(net.model[0](x).abs().max())
    merge_branches(net, [x])
    state = import_state(ckpt, net)
    assert list(state) == ["model.0.conv", "model.1.conv", "model.2.conv"]
    assert state["model.1.conv"]["input"]["hi"] == pytest.approx(seen)
    assert "ratio" not in state["model.1.conv"]["weight"] and "ratio" in state["model.0.conv"]["weight"]


@pytest.mark.parametrize("problem", ["bits", "other model"])
def test_errors(trained, problem):
    net, ckpt, _ = trained
    net, ckpt = copy.deepcopy(net), copy.deepcopy(ckpt)
    if problem == "bits":
        settings = ckpt["modelopt"]["modelopt"]["modelopt_state_dict"][-1][1]["metadata"]["quantizer_state"]
        settings["model.1.conv.weight_quantizer"]["_num_bits"] = (4, 3)
    else:
        net = nn.Sequential(nn.Linear(2, 2))
    message = {"bits": r"'model.1.conv' was trained with \(4, 3\) bits", "other model": "None of the layers"}[problem]
    with pytest.raises(UsageError, match=message):
        import_state(ckpt, net)
