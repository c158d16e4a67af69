# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every family and task: calibrated, written as INT8, run by ONNX Runtime, and equal to what torch simulates."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from ultralytics import YOLO

from yolo_ext.checkpoint import save_model
from yolo_ext.core.config import QuantConfig
from yolo_ext.data.check import calibration_images, check_data, letterbox_batches
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.runtime import conv_report, predictor
from yolo_ext.deployment.verify import verify_int8
from yolo_ext.quantization.fake_quant import get_state, insert_plan, load_state
from yolo_ext.quantization.qat import prepare, strip
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import PROFILES, plan_of, resolve_profile
from yolo_ext.stock.load import load_model

SIZE = 128
FAMILIES = ["yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"]
HEADS = ("cv2", "cv3", "one2one_cv2", "one2one_cv3")
TASKS = ["yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolo26n-seg", "yolo26n-pose"]


def trained_like(name: str, folder: Path) -> Path:
    """Return a checkpoint with BatchNorm statistics of real images, and scores that differ between anchors."""
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml", verbose=False)
    model = yolo.model.float()
    x = (
        torch.rand(4, 3, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3) * 0.7
        + torch.rand(4, 3, 128, 128) * 0.3
    )
    model.train()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.7, 1.5)
                nn.init.normal_(m.bias, 1.5, 0.2)
                m.momentum = 0.5
        for _ in range(6):
            model(x)
        # Untrained networks are chaotic: a pixel changed by 1e-6 moves single codes, which spread. Small last layers
        # bring that to the size it has in a trained one.
        for branch in (b for n in HEADS for b in getattr(model.model[-1], n, None) or []):
            nn.init.normal_(branch[-1].weight, 0, 0.01)
            nn.init.constant_(branch[-1].bias, -1.0)
    return save_model(
        model.eval(), folder / f"{name.replace('yolo', 'made_')}.pt"
    )  # YOLO("yolov5n.pt") looks for yolov5nu.pt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("families"), {}

    def get(name: str) -> Path:
        files[name] = files.get(name) or trained_like(name, folder)
        return files[name]

    return get


def quantized(file: Path, profile: str, data: Path, folder: Path) -> tuple[Path, Path, nn.Module, dict]:
    """Return FP32 file, INT8 file, fake-quantized torch model and what was written."""
    model, _ = load_model(file)
    reasons = prepare(model, QuantConfig(profile=profile, calib=8), check_data(data), SIZE)
    state = get_state(model)
    fp32 = export_onnx(strip(deepcopy(model)), folder / "fp32.onnx", SIZE)
    written = write_qdq(fp32, folder / "int8.onnx", state, resolve_profile(profile))
    return fp32, folder / "int8.onnx", model, {**written, "reasons": reasons, "state": state}


def check(name: str, profile: str, made, shapes, folder) -> None:
    fp32, int8, model, written = quantized(made(name), profile, shapes, folder)
    report = conv_report(int8)
    known = ("no Q/DQ", "ONNX Runtime has no integer kernel for transposed")  # as the profile leaves them
    assert not {k: v for k, v in report["float_convs"].items() if not v.startswith(known)}
    present = [path for path in written["quantized"] if isinstance(dict(model.named_modules())[path], nn.Conv2d)]
    assert report["int8_convs"] == len(present) >= 0.6 * report["convs"]
    assert report["convs"] == conv_report(fp32)["convs"] == len(written["convs"])
    assert not any("merged" in reason for reason in written["reasons"].values())
    images = calibration_images(check_data(shapes), 8)
    if name.endswith("-cls"):
        x = next(letterbox_batches(images, SIZE)).numpy()
        a, b = predictor(int8)(x)[0], predictor(int8, simulate=True)(x)[0]
        with torch.no_grad():
            c = model(torch.from_numpy(x))
        c = (c[0] if isinstance(c, (tuple, list)) else c).numpy()
        assert np.abs(a - b).max() < 0.03 and np.abs(b - c).max() < 0.03
        return
    found = verify_int8(fp32, int8, images, SIZE, model)
    for pair in ("simulation", "torch"):
        assert found[pair]["box_mean"] < 0.3 and found[pair]["score_p99"] < 0.03, (pair, found[pair])


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["ort-x86", "ort-x86-full"])
def test_one_family_with_each_way_through_the_file(made, shapes, tmp_path, profile):
    check("yolo11n", profile, made, shapes, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("profile", ["ort-x86", "ort-x86-full"])
@pytest.mark.parametrize("name", [*FAMILIES, *TASKS])
def test_family(made, shapes, tmp_path, name, profile):
    check(name, profile, made, shapes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_a_legal_file_that_onnx_runtime_runs(made, shapes, tmp_path, profile):
    fp32, int8, model, written = quantized(made("yolov8n"), profile, shapes, tmp_path)
    onnx.checker.check_model(onnx.load(int8), full_check=True)
    x = next(letterbox_batches(calibration_images(check_data(shapes), 4), SIZE)).numpy()
    ran, simulated = predictor(int8)(x)[0], predictor(fp32)(x)[0]
    assert ran.shape == simulated.shape and np.isfinite(ran).all()
    again, _ = load_model(made("yolov8n"))
    insert_plan(again, plan_of(written["state"]))
    load_state(again, written["state"])
    with torch.no_grad():
        a, b = model(torch.from_numpy(x))[0], again.eval()(torch.from_numpy(x))[0]
    assert torch.equal(a, b)
