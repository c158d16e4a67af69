# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization-aware training through the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics import YOLO

import yolo_ext
from yolo_ext.checkpoint import MANIFEST, load_model
from yolo_ext.quantization.fake_quant import QuantConv2d, RangeQuantizer, get_ranges, insert_fake_quant, load_ranges
from yolo_ext.quantization.profiles import resolve_profile

QUANT = {"mode": "qat", "calib": 8, "profile": "ort-x86"}


def recorded(path: Path) -> dict:
    return load_model(path)[1][MANIFEST]["quant"]


@pytest.fixture
def watch(tiny):
    """Return a model and what its training saw: ranges of model and EMA at the start and after each epoch."""
    seen: list[tuple[dict, dict]] = []
    yolo = YOLO(str(tiny))
    for event in ("on_train_start", "on_model_save"):
        yolo.add_callback(event, lambda t: seen.append((get_ranges(t.model), get_ranges(t.ema.ema))))
    return yolo, seen


def test_run_ends_with_ranges_and_stock_classes(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, quant=QUANT)
    for name in ("best.pt", "last.pt"):
        model, ckpt = load_model(tmp_path / "run/weights" / name)
        assert not any(isinstance(m, (QuantConv2d, RangeQuantizer)) for m in model.modules())
        found = ckpt[MANIFEST]["quant"]
        assert found["profile"] == "ort-x86" and found["exclude"] == []
        insert_fake_quant(model, resolve_profile("ort-x86"))
        load_ranges(model, found["ranges"])
        assert get_ranges(model) == found["ranges"]
        assert all(hi > lo for r in found["ranges"].values() for lo, hi in r.values())


def test_training_moves_float_weights_on_the_quantized_loss(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, "float")
    fit(tiny, yolo_ext.DetectionTrainer, "quant", quant=QUANT)
    base, a, b = (
        load_model(p)[0].state_dict()
        for p in (tiny, tmp_path / "float/weights/last.pt", tmp_path / "quant/weights/last.pt")
    )
    assert base.keys() == b.keys()
    conv = next(k for k in base if k.endswith("cv1.conv.weight"))
    assert not torch.equal(base[conv], b[conv]) and not torch.equal(a[conv], b[conv])


def test_ranges_follow_the_data_then_stay_and_the_ema_goes_after_them(fit, watch):
    yolo, seen = watch
    fit(yolo, yolo_ext.DetectionTrainer, epochs=5, quant={**QUANT, "observe_epochs": 2})
    live, ema = zip(*seen)
    assert live[0] == ema[0], "both start with the calibrated ranges"
    assert live[1] != live[0] and live[2] != live[1]
    assert live[2] == live[3] == live[4] == live[5]
    gaps = [sum(abs(a - b) for k in e for s in e[k] for a, b in zip(e[k][s], m[k][s])) for m, e in seen]
    assert gaps[1] > 0
    assert gaps[5] < 1e-6, "validation has cut the EMA off from its ranges"


def test_observe_epochs_0_keeps_the_calibrated_ranges(fit, watch, tmp_path):
    yolo, seen = watch
    fit(yolo, yolo_ext.DetectionTrainer, quant={**QUANT, "observe_epochs": 0})
    assert seen[0] == seen[1] == seen[2]
    assert recorded(tmp_path / "run/weights/best.pt")["ranges"] == seen[0][0]


def test_second_run_starts_from_the_recorded_ranges(fit, tiny, tmp_path, monkeypatch):
    fit(tiny, yolo_ext.DetectionTrainer, "first", epochs=1, quant=QUANT)
    best = tmp_path / "first/weights/best.pt"
    monkeypatch.setattr("yolo_ext.quantization.qat.calibrate", None)  # a call would fail
    seen = {}
    yolo = YOLO(str(best))
    yolo.add_callback("on_train_start", lambda t: seen.update(get_ranges(t.model)))
    fit(yolo, yolo_ext.DetectionTrainer, "second", epochs=1, quant=QUANT)
    assert seen == recorded(best)["ranges"]


def test_another_profile_calibrates_anew(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, "first", epochs=1, quant=QUANT)
    fit(tmp_path / "first/weights/best.pt", yolo_ext.DetectionTrainer, "second", epochs=1,
        quant={**QUANT, "profile": "ort-x86-vnni"})  # fmt: skip
    assert recorded(tmp_path / "second/weights/best.pt")["profile"] == "ort-x86-vnni"


def test_pruning_comes_before_calibration(fit, tiny, tmp_path, monkeypatch):
    """Ranges must belong to the pruned model with re-estimated BatchNorm, which is what training starts from."""
    from yolo_ext.quantization import qat

    seen = {}
    calibrate = qat.calibrate

    def spy(model: nn.Module, *args):
        seen["at calibration"] = [b.clone() for n, b in model.named_buffers() if "running" in n]
        return calibrate(model, *args)

    monkeypatch.setattr(qat, "calibrate", spy)
    yolo = YOLO(str(tiny))
    yolo.add_callback(
        "on_train_start", lambda t: seen.update(start=[b.clone() for n, b in t.model.named_buffers() if "running" in n])
    )
    fit(yolo, yolo_ext.DetectionTrainer, epochs=1, prune={"speedup": 1.5}, distill={}, quant=QUANT)
    assert all(torch.equal(a, b) for a, b in zip(seen["at calibration"], seen["start"], strict=True))
    assert set(load_model(tmp_path / "run/weights/best.pt")[1][MANIFEST]) >= {"prune", "quant"}


def test_excluded_layers_stay_float(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, quant={**QUANT, "exclude": [r"model\.0\."]})
    found = recorded(tmp_path / "run/weights/best.pt")
    assert found["exclude"] == [r"model\.0\."] and not any(k.startswith("model.0.") for k in found["ranges"])
