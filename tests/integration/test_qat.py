# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization-aware training through the trainer."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_exact_resume import check, keep_state  # noqa: F401  fixtures
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, YAML

import yolo_ext
from yolo_ext.checkpoint import MANIFEST, save_model
from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.fake_quant import get_state, insert_plan, load_state, quantizers
from yolo_ext.quantization.layers import QuantConv2d, RangeQuantizer
from yolo_ext.quantization.spec import plan_of
from yolo_ext.stock.load import load_model
from yolo_ext.training import quant

QUANT = {"mode": "qat", "calib": 8, "profile": "ort-x86"}
FEW = {"images": 4, "recalibrate": 4}  # of pruning


def recorded(path: Path) -> dict:
    return load_model(path)[1][MANIFEST]["quant"]


def ranges(model: nn.Module) -> dict:
    return {(path, site): (float(q.lo), float(q.hi)) for path, site, q, _ in quantizers(model)}


@pytest.fixture
def log(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(LOGGER, "info", lambda text, *args: lines.append(str(text)))
    return lines


@pytest.fixture
def watch(tiny):
    """Return a model and what its training saw: ranges of model and EMA at the start and after each epoch."""
    seen: list[tuple[dict, dict]] = []
    yolo = YOLO(str(tiny))
    for event in ("on_train_start", "on_model_save"):
        yolo.add_callback(event, lambda t: seen.append((ranges(t.model), ranges(t.ema.ema))))
    return yolo, seen


# What a run leaves --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_run_ends_with_ranges_and_stock_classes(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, quant=QUANT)
    for name in ("best.pt", "last.pt"):
        model, ckpt = load_model(tmp_path / "run/weights" / name)
        assert not any(isinstance(m, (QuantConv2d, RangeQuantizer)) for m in model.modules())
        found = ckpt[MANIFEST]["quant"]
        assert found["profile"] == "ort-x86" and found["options"] == {"exclude": [], "config_list": []}
        insert_plan(model, plan_of(found["state"]))
        load_state(model, found["state"])
        assert get_state(model) == found["state"]
        assert all(v["hi"] > v["lo"] for r in found["state"].values() for s, v in r.items() if s != "weight")


@pytest.mark.slow
def test_checkpoint_holds_the_codes_that_were_validated(fit, tiny, tmp_path):
    """Rounding to fp16 must not move weights to other codes."""
    kept = {}
    yolo = YOLO(str(tiny))
    yolo.add_callback(
        "on_model_save",
        lambda t: kept.update({n: m.quantized_weight() for n, m in t.ema.ema.named_modules() if hasattr(m, "fold")}),
    )
    few = {**QUANT, "config_list": [{"op_types": ["Conv2d"], "quant_bits": {"weight": 3}}]}
    fit(yolo, yolo_ext.DetectionTrainer, quant=few)
    model = quant.quantized(tmp_path / "run/weights/last.pt")
    for name, weight in kept.items():
        torch.testing.assert_close(model.get_submodule(name).quantized_weight(), weight, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
def test_excluded_layers_stay_float(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, quant={**QUANT, "exclude": ["model.1"]})
    found = recorded(tmp_path / "run/weights/best.pt")
    assert found["options"]["exclude"] == ["model.1"]
    assert not any(k.startswith("model.1.") for k in found["state"])


@pytest.mark.slow
def test_a_float_run_forgets_ranges_that_it_moves_away_from(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, "first", epochs=1, quant=QUANT)
    fit(tmp_path / "first/weights/best.pt", yolo_ext.DetectionTrainer, "second", epochs=1)
    assert "quant" not in load_model(tmp_path / "second/weights/best.pt")[1][MANIFEST]


# Ranges and BatchNorm by epoch --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_ranges_follow_the_data_then_stay_and_the_ema_goes_after_them(fit, watch):
    yolo, seen = watch
    fit(yolo, yolo_ext.DetectionTrainer, epochs=5, quant={**QUANT, "observe_epochs": 2})
    live, ema = zip(*seen)
    assert live[0] == ema[0], "both start with the calibrated ranges"
    assert live[1] != live[0] and live[2] != live[1]
    assert live[2] == live[3] == live[4] == live[5]
    gaps = [sum(abs(a - b) for k in e for a, b in zip(e[k], m[k])) for m, e in seen]
    assert gaps[1] > 0
    assert gaps[5] < 1e-6, "validation has cut the EMA off from its ranges"


@pytest.mark.slow
def test_observe_epochs_0_keeps_the_calibrated_ranges(fit, watch, tmp_path):
    yolo, seen = watch
    fit(yolo, yolo_ext.DetectionTrainer, quant={**QUANT, "observe_epochs": 0})
    assert seen[0] == seen[1] == seen[2]
    state = recorded(tmp_path / "run/weights/best.pt")["state"]
    assert {(p, s): (v["lo"], v["hi"]) for p, r in state.items() for s, v in r.items() if "lo" in v} == seen[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "moved"), [(0.0, [False, False]), (0.5, [True, False]), (1.0, [True, True])])
def test_statistics_of_batch_norm_stay_from_an_epoch_on(fit, tiny, share, moved):
    means = []
    yolo = YOLO(str(tiny))
    for event in ("on_train_start", "on_model_save"):
        yolo.add_callback(event, lambda t: means.append(t.model.model[1].bn.running_mean.clone()))
    fit(yolo, yolo_ext.DetectionTrainer, quant={**QUANT, "freeze_bn": share})
    assert [not torch.equal(a, b) for a, b in pairwise(means)] == moved


# Validation ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_start_is_reported_once_and_kept(fit, tiny, tmp_path, log):
    fit(tiny, yolo_ext.DetectionTrainer, quant=QUANT)
    assert len([line for line in log if "PTQ start: mAP50-95 0." in line and "(float 0." in line]) == 1
    found = recorded(tmp_path / "run/weights/best.pt")
    assert 0 <= found["ptq"] <= 1 and 0 <= found["base"] <= 1


@pytest.mark.slow
def test_training_is_the_same_with_and_without_the_report(fit, tiny, monkeypatch):
    last = [fit(tiny, yolo_ext.DetectionTrainer, "with", epochs=1, quant=QUANT).last]
    monkeypatch.setattr(quant.Quant, "start", lambda self, trainer: None)
    last.append(fit(tiny, yolo_ext.DetectionTrainer, "without", epochs=1, quant=QUANT).last)
    a, b = (load_model(p)[0].state_dict() for p in last)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_every_validation_is_of_the_quantized_model(fit, tiny, monkeypatch):
    """The one of each epoch, by which best.pt is chosen, and the last one of best.pt."""
    from ultralytics.models.yolo.detect import DetectionValidator

    seen, init = [], DetectionValidator.init_metrics

    def spy(self, model):
        inner = getattr(getattr(model, "backend", None), "model", model)
        quantized = [q for *_, q, _ in quantizers(inner)]
        seen.append(bool(quantized) and all(q.ready and q.mode == "on" for q in quantized))
        return init(self, model)

    monkeypatch.setattr(quant.Quant, "start", lambda self, trainer: None)
    monkeypatch.setattr(DetectionValidator, "init_metrics", spy)
    trainer = fit(tiny, yolo_ext.DetectionTrainer, quant=QUANT)
    assert seen == [True, True, True]
    assert type(trainer.validator) is DetectionValidator


# Starting points ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_second_run_starts_from_the_recorded_ranges(fit, tiny, tmp_path, monkeypatch):
    fit(tiny, yolo_ext.DetectionTrainer, "first", epochs=1, quant=QUANT)
    best = tmp_path / "first/weights/best.pt"
    monkeypatch.setattr("yolo_ext.quantization.qat.calibrate", None)  # a call would fail
    seen = {}
    yolo = YOLO(str(best))
    yolo.add_callback("on_train_start", lambda t: seen.update(get_state(t.model)))
    fit(yolo, yolo_ext.DetectionTrainer, "second", epochs=1, quant=QUANT)
    assert seen == recorded(best)["state"]


@pytest.mark.slow
def test_another_profile_calibrates_anew(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, "first", epochs=1, quant=QUANT)
    fit(tmp_path / "first/weights/best.pt", yolo_ext.DetectionTrainer, "second", epochs=1,
        quant={**QUANT, "profile": "ort-x86-vnni"})  # fmt: skip
    assert recorded(tmp_path / "second/weights/best.pt")["profile"] == "ort-x86-vnni"


@pytest.mark.slow
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
    fit(yolo, yolo_ext.DetectionTrainer, epochs=1, prune={"speedup": 1.5, **FEW}, distill={},
        quant=QUANT)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(seen["at calibration"], seen["start"], strict=True))
    assert set(load_model(tmp_path / "run/weights/best.pt")[1][MANIFEST]) >= {"prune", "quant"}


# Supervision --------------------------------------------------------------------------------------------------------
@pytest.fixture
def unlabelled(shapes, tmp_path) -> Path:
    """Return a data set whose train images have no label files."""
    folder = tmp_path / "unlabelled"
    shutil.copytree(shapes.parent, folder, ignore=shutil.ignore_patterns("*.cache"))
    shutil.rmtree(folder / "labels" / "train")
    found = {**YAML.load(folder / shapes.name), "path": str(folder)}
    YAML.save(folder / shapes.name, found)
    return folder / shapes.name


@pytest.mark.slow
def test_features_of_the_float_self_teach_without_labels(fit, tiny, tmp_path, unlabelled):
    quant = {**QUANT, "supervision": "features"}
    trainer = fit(tiny, yolo_ext.DetectionTrainer, data=str(unlabelled), plots=True, quant=quant)
    assert trainer.compression["distill"].teacher == str(tiny.resolve())
    assert float(trainer.tloss["kd_feat_loss"]) > 0
    base, found = (load_model(p)[0].state_dict() for p in (tiny, tmp_path / "run/weights/last.pt"))
    assert not torch.equal(base["model.2.cv1.conv.weight"], found["model.2.cv1.conv.weight"])


@pytest.mark.slow
def test_features_teach_what_labels_do_not_change(fit, tiny, unlabelled, shapes):
    """With and without labels such a run ends in the same weights."""
    last = [
        fit(tiny, yolo_ext.DetectionTrainer, name, epochs=1, data=str(data), mosaic=0.0, optimizer="SGD",
            quant={**QUANT, "supervision": "features", "source": str(shapes.parent / "images" / "train")}).last
        for name, data in (("labels", shapes), ("none", unlabelled))
    ]  # fmt: skip
    a, b = (load_model(p)[0].state_dict() for p in last)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_labels_that_weigh_something_are_refused(fit, tiny):
    with pytest.raises(UsageError, match=r"distill\.alpha=1"):
        fit(tiny, yolo_ext.DetectionTrainer, distill={"teacher": "self"}, quant={**QUANT, "supervision": "features"})


@pytest.mark.slow
def test_float_self_and_labels_teach_together(fit, tiny):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, distill={"teacher": "self"}, quant=QUANT)
    assert {"box_loss", "kd_feat_loss", "kd_cls_loss"} <= set(trainer.tloss)
    assert float(trainer.tloss["kd_feat_loss"]) > 0
    assert not list(quantizers(trainer.technique("distill").distiller.guides[0].model))


# Resume and recovery ------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"observe_epochs": 3},
        {"supervision": "features", "freeze_bn": 0.75},
        {"profile": "ort-x86-full"},
    ],
    ids=["fixed", "features", "full"],
)
def test_killed_qat_resumes_exactly(check, tiny, options):  # noqa: F811
    check(tiny, quant={**QUANT, **options})


@pytest.mark.slow
def test_recovery_from_nan_takes_ranges_from_the_checkpoint(fit, tiny):
    yolo = YOLO(str(tiny))

    def poison(trainer):
        if trainer.epoch == 1 and not getattr(trainer, "poisoned", False):
            trainer.poisoned = True
            for p in trainer.model.parameters():
                p.data.fill_(torch.nan)
            trainer.loss = trainer.loss * torch.nan

    yolo.add_callback("on_train_epoch_end", poison)
    trainer = fit(yolo, yolo_ext.DetectionTrainer, quant={**QUANT, "observe_epochs": 1})
    assert trainer.poisoned
    for model in (trainer.model, trainer.ema.ema):
        assert all(v.isfinite().all() for v in model.state_dict().values())


# Chains -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def int8(tmp_path):
    """Return a function that writes the INT8 file of a checkpoint, and the images on which it is compared."""
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.quantization.qdq import write_qdq
    from yolo_ext.quantization.spec import resolve_profile

    def write(weights: Path, profile: str = "ort-x86") -> dict:
        fp32 = export_onnx(weights, tmp_path / "fp32.onnx", 64)
        found = write_qdq(fp32, tmp_path / "int8.onnx", recorded(weights)["state"], resolve_profile(profile))
        return {**found, "file": tmp_path / "int8.onnx"}

    return write


def assert_parity(weights: Path, file: Path) -> None:
    """Compare what was trained with its file, run as it is written: they differ by far less than both from float."""
    from yolo_ext.deployment.runtime import session

    torch.manual_seed(0)
    x = (torch.rand(1, 3, 64, 64) * 255).round() / 255
    with torch.no_grad():
        quantized, full = (m.eval()(x)[0] for m in (quant.quantized(weights), load_model(weights)[0]))
    run = session(file, 1, simulate=True)
    got = torch.from_numpy(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0])
    for part, floor in ((slice(0, 4), 0.05), (slice(4, None), 0.002)):  # boxes in pixels, scores
        error = (quantized - full)[:, part].abs().mean()
        assert error > 0
        assert (got - quantized)[:, part].abs().mean() < 0.2 * error + floor  # codes that rounding flips


@pytest.mark.slow
def test_pruned_student_goes_through_qat_to_int8(fit, tiny, tmp_path, int8):
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, prune={"speedup": 1.5, **FEW}, quant=QUANT)
    best = tmp_path / "run/weights/best.pt"
    written = int8(best)
    assert set(written["quantized"]) == set(recorded(best)["state"])
    assert_parity(best, written["file"])


@pytest.mark.slow
def test_merged_branches_go_through_qat_and_resume_to_int8(fit, tmp_path, randomise, int8):
    class Stopped(Exception):
        pass

    def stop(trainer):
        raise Stopped

    torch.manual_seed(0)
    model = randomise(DetectionModel("yolov9t.yaml", nc=3, verbose=False))
    yolo = YOLO(str(save_model(model, tmp_path / "yolov9t.pt")))
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        fit(yolo, yolo_ext.DetectionTrainer, quant=QUANT)
    last = tmp_path / "run/weights/last.pt"
    YOLO(str(last)).train(trainer=yolo_ext.DetectionTrainer, resume=True)
    best = tmp_path / "run/weights/best.pt"
    assert load_model(best)[1][MANIFEST]["merged"]
    assert_parity(best, int8(best)["file"])
