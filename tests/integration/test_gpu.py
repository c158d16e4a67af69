# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every technique on a GPU, under AMP: `pytest -m gpu`. Without one, a case of each kind runs with the slow tests."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from test_resume import Stopped, stop_after
from ultralytics import YOLO
from ultralytics.engine import trainer as engine

import yolo_ext
from yolo_ext.checkpoint import MANIFEST, manifest
from yolo_ext.core.options import PruneConfig, QuantConfig
from yolo_ext.data.check import check_data
from yolo_ext.deployment import export_onnx
from yolo_ext.deployment.verify import verify_int8, verify_tensors
from yolo_ext.quantization import prepare, strip
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import resolve_profile
from yolo_ext.stock import device_of
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import load_model
from yolo_ext.training.prune import make_probes

GPU = {"marks": pytest.mark.gpu}
PLACES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("0", **GPU)]
FEW = {"images": 4, "recalibrate": 4}
QUANT = {"mode": "qat", "calib": 4, "profile": "ort-x86"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "sparsity by scales": {"sparsity": {"method": "group_slim"}},
    "sparsity by weights": {"sparsity": {"method": "group_sl"}},
    "prune at once": {"prune": {"speedup": 1.3, **FEW}},
    "prune by labels": {"prune": {"speedup": 1.3, "method": "taylor", **FEW}},
    "prune while training": {"prune": {"speedup": 1.3, "at": [1], **FEW}},
    "2:4": {"prune": {"kind": "2:4"}},
    "distill": {"distill": {"teacher": "self", "features": ["mgd", "at"], "logits": "bckd"}},
    "prune and distill": {"prune": {"speedup": 1.3, "at": [1], **FEW}, "distill": {"teacher": "self"}},
    "QAT": {"quant": QUANT},
    "QAT by features": {"quant": {**QUANT, "supervision": "features"}},
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def amp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics downloads a model to find out whether AMP works."""
    monkeypatch.setattr(engine, "check_amp", lambda model: True)


@pytest.fixture
def train(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that trains under AMP where there is a GPU, which has to hold what is trained."""

    def run(model: Any, device: str, **options: Any) -> Any:
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        found = fit(model, yolo_ext.DetectionTrainer, **{"device": device, "amp": device != "cpu", **options})
        assert device == "cpu" or torch.cuda.max_memory_allocated() > 1e6
        return found

    return run


def losses(folder: Path) -> dict[str, np.ndarray]:
    table = polars.read_csv(folder / "results.csv")
    return {name.strip(): table[name].to_numpy() for name in table.columns if "loss" in name}


TRAININGS = [pytest.param(name, "0", **GPU) for name in TECHNIQUES]


@pytest.mark.parametrize(("name", "device"), [*TRAININGS, pytest.param("2:4", "cpu", marks=pytest.mark.slow)])
def test_a_training(train, tiny, tmp_path, name, device):
    """It ends with finite losses, its own among them, and a file of stock classes that plain Ultralytics runs."""
    train(tiny, device, epochs=2, **TECHNIQUES[name])
    found = losses(tmp_path / "run")
    assert found and all(np.isfinite(v).all() for v in found.values())
    assert ("distill" in TECHNIQUES[name]) <= any("kd_" in k for k in found)
    net, ckpt = load_model(tmp_path / "run/weights/best.pt")
    assert MANIFEST in ckpt
    assert all(t.isfinite().all() for t in net.state_dict().values())
    YOLO(str(tmp_path / "run/weights/best.pt")).predict(
        np.zeros((64, 64, 3), np.uint8), imgsz=64, device=device, verbose=False
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["prune while training", "QAT", "distill"])
def test_a_training_goes_on(train, tiny, tmp_path, name):
    """Optimizer, adapters, ranges and random numbers are put back on the device that they came from."""
    with pytest.raises(Stopped):
        train(stop_after(YOLO(str(tiny)), 1), "0", epochs=3, **TECHNIQUES[name])
    last = tmp_path / "run/weights/last.pt"
    YOLO(str(last)).train(trainer=yolo_ext.DetectionTrainer, resume=True)
    assert len(next(iter(losses(tmp_path / "run").values()))) == 3
    record = load_model(tmp_path / "run/weights/best.pt")[1][MANIFEST]
    assert name == "distill" or record["quant" if name == "QAT" else "prune"]


@pytest.mark.parametrize("device", PLACES)
def test_evaluation_calibration_and_probes(tiny, shapes, device):
    """What is found on a GPU is what is found on the CPU, but for rounding."""
    on, info = device_of(device), check_data(str(shapes), task="detect")
    found: list[dict[str, Any]] = []
    for place in (torch.device("cpu"), on):
        net = load_model(tiny)[0].to(place)
        probes = make_probes(info, 64, PruneConfig(ratio=0.5, **FEW), "detect", net)
        assert all(b["img"].device == place for b in probes.batches())
        figures = {k: v for k, v in probes.accuracy(net).items() if isinstance(v, float)}
        prepare(net, QuantConfig(calib=4, profile="ort-x86"), info, 64)
        assert all(b.device == place for b in net.buffers())
        state = manifest(strip(net)).quant["state"]
        ends = {f"{p} {s} {k}": v for p, sites in state.items() for s, e in sites.items() for k, v in e.items()}
        found.append({**figures, **{k: v for k, v in ends.items() if k.endswith((" lo", " hi"))}})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=0.05, abs=0.02), key


@pytest.mark.parametrize("device", PLACES)
def test_export_checks(tiny, shapes, tmp_path, device):
    """Torch on the device against ONNX, in full float32, and fake-quant there against the integers of the CPU."""
    on, info = device_of(device), check_data(str(shapes), task="detect")
    images, net = info["images"]["val"], load_model(tiny)[0]
    fp32 = export_onnx(net, tmp_path / "fp32.onnx", 64)
    assert verify_tensors(net, fp32, images, 64, on)["box_max"] < 1e-2
    prepare(net.to(on), QuantConfig(calib=4, profile="ort-x86"), info, 64)
    fake, state = deepcopy(net), manifest(strip(net)).quant["state"]
    write_qdq(fp32, tmp_path / "int8.onnx", state, resolve_profile("ort-x86"))
    found = verify_int8(fp32, tmp_path / "int8.onnx", images, 64, fake, on)
    assert found["torch"]["box_mean"] < max(0.3, 2 * found["rounding"]["box_mean"])
    assert accuracy(fp32, shapes, 64, device=on)["map"] == pytest.approx(accuracy(tiny, shapes, 64)["map"], abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["prune while training", "prune and distill", "QAT", "sparsity by weights"])
def test_two_gpus(train, tiny, tmp_path, name):
    """Ultralytics starts a process for each; rank 0 decides, and measures alone where a budget has to hold."""
    options = {k: dict(v) for k, v in TECHNIQUES[name].items()}
    if "prune" in options:
        options["prune"]["max_drop"] = 0.9
    train(tiny, "0,1", epochs=2, batch=4, **options)
    assert all(np.isfinite(v).all() for v in losses(tmp_path / "run").values())
    assert all(t.isfinite().all() for t in load_model(tmp_path / "run/weights/best.pt")[0].state_dict().values())
