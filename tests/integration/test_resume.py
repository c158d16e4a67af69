# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A run that was stopped goes on with the same model, teacher, ranges and adapters."""

from __future__ import annotations

from pathlib import Path

import polars
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import cli
from yolo_ext.checkpoint import MANIFEST
from yolo_ext.quantization.fake_quant import get_state
from yolo_ext.stock.load import load_model
from yolo_ext.training.resume import SIDECAR

PRUNE, QUANT = {"speedup": 1.5}, {"mode": "qat", "calib": 4, "profile": "ort-x86"}


class Stopped(Exception):
    """What kills a run in these tests."""


def stop_after(yolo: YOLO, epoch: int) -> YOLO:
    """Make training die after this epoch, counted from 0, once its checkpoint has been written."""

    def stop(trainer):
        if trainer.epoch == epoch:
            raise Stopped

    yolo.add_callback("on_model_save", stop)
    return yolo


@pytest.fixture
def stopped(fit, tiny, tmp_path):
    """Return a function that starts a run of 3 epochs, kills it after 2, and returns its last.pt."""

    def run(way: str = "trainer", **options) -> Path:
        yolo = stop_after(YOLO(str(tiny)), 1)
        trainer = yolo_ext.DetectionTrainer
        if way == "attach":
            yolo_ext.attach(yolo, **options)
            trainer, options = None, {}
        with pytest.raises(Stopped):
            fit(yolo, trainer, epochs=3, **options)
        return tmp_path / "run/weights/last.pt"

    return run


def widths(path: Path) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in load_model(path)[0].state_dict().items()}


def go_on(last: Path, way: str, **options) -> None:
    if way == "cli":
        assert cli.main(["train", f"resume={last.parents[1]}"]) == 0
    elif way == "attach":
        yolo_ext.attach(YOLO(str(last)), **options).train(resume=True)
    else:
        YOLO(str(last)).train(trainer=yolo_ext.DetectionTrainer, resume=True)


COMBINATIONS = {
    "prune": {"prune": PRUNE},
    "self": {"prune": PRUNE, "distill": {"teacher": "self"}},
    "wide": {"prune": PRUNE, "distill": {"teacher": "wide"}},
    "quant": {"quant": QUANT},
    "all": {"prune": PRUNE, "distill": {"teacher": "self"}, "quant": QUANT},
}


FAST = {("trainer", what) for what in COMBINATIONS} | {("attach", "self"), ("cli", "all")}
CASES = [
    pytest.param(way, what, id=f"{way}-{what}", marks=() if (way, what) in FAST else pytest.mark.slow)
    for way in ("trainer", "attach", "cli")
    for what in COMBINATIONS
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "what"), CASES)
def test_resume_finishes_with_the_same_widths(stopped, wide, tiny, what, way):
    options = {**COMBINATIONS[what]}
    if what == "wide":
        options["distill"] = {"teacher": str(wide)}
    last = stopped("attach" if way == "attach" else "trainer", **options)
    before, ckpt = load_model(last)
    assert ckpt["epoch"] == 1
    shapes = widths(last)
    go_on(last, way, **options)

    assert widths(last) == shapes == widths(last.with_name("best.pt"))
    after, ckpt = load_model(last)
    assert ckpt["epoch"] == -1 and ckpt["optimizer"] is None
    table = polars.read_csv(last.parents[1] / "results.csv")
    assert table["epoch"].to_list() == [1, 2, 3]
    assert ("train/kd_feat_loss" in table.columns) == bool({"distill", "quant"} & set(options))  # QAT learns features
    saved = YAML.load(last.parents[1] / "args.yaml")
    if what in ("self", "all"):
        assert Path(saved["distill"]["teacher"]) == tiny.resolve(), "self is the model before pruning, not last.pt"
    if "prune" in options:
        assert getattr(after, MANIFEST)["prune"] == getattr(before, MANIFEST)["prune"], "pruned a second time"
    assert not list(last.parent.glob(SIDECAR.format("*")))


@pytest.mark.slow
def test_adapters_come_back(stopped, wide):
    last = stopped(distill={"teacher": str(wide)})
    saved = torch.load(last.with_name(SIDECAR.format(1)), weights_only=True)["adapters"]
    seen = {}
    yolo = YOLO(str(last))
    yolo.add_callback(
        "on_train_start",
        lambda t: seen.update(
            adapters={k: v.clone() for k, v in t.technique("distill").distiller.adapters.state_dict().items()},
            groups=[g["param_group"] for g in t.optimizer.param_groups],
            moments=[len(t.optimizer.state[p]) for p in t.technique("distill").distiller.adapters.parameters()],
        ),
    )
    yolo.train(trainer=yolo_ext.DetectionTrainer, resume=True)
    assert saved and all(torch.equal(saved[k], seen["adapters"][k]) for k in saved)
    assert seen["groups"][-1] == "distill"
    assert all(seen["moments"])


@pytest.mark.slow
def test_ranges_come_back_in_full_precision_without_calibration(stopped, monkeypatch):
    last = stopped(quant=QUANT)
    ranges = load_model(last)[0].yolo_ext["quant"]["state"]
    monkeypatch.setattr("yolo_ext.quantization.qat.calibrate", None)  # a call would fail
    seen = {}
    yolo = YOLO(str(last))
    yolo.add_callback("on_train_start", lambda t: seen.update(get_state(t.ema.ema)))
    yolo.train(trainer=yolo_ext.DetectionTrainer, resume=True)
    ends = [
        {p: {s: (v["lo"], v["hi"]) for s, v in r.items() if "lo" in v} for p, r in x.items()} for x in (seen, ranges)
    ]
    assert ends[0] == ends[1] and any(ends[0].values())


def test_stock_resume_of_our_run_fails_loudly(stopped):
    last = stopped(prune=PRUNE)
    with pytest.raises(KeyError, match="PRUNED"):
        YOLO(str(last)).train(resume=True)


@pytest.mark.slow
def test_nan_recovery_with_all_techniques(fit, tiny):
    """A NaN in epoch 2 makes Ultralytics load last.pt into the running model."""
    yolo, done = YOLO(str(tiny)), []

    def poison(trainer):
        if trainer.epoch == 1 and not done:
            done.append(True)
            trainer.loss = trainer.loss * float("nan")

    yolo.add_callback("on_train_epoch_end", poison)
    trainer = fit(yolo, yolo_ext.DetectionTrainer, epochs=2, prune=PRUNE, distill={}, quant=QUANT)
    assert done and trainer.nan_recovery_attempts == 0 and trainer.epoch == 1
    assert all(torch.isfinite(v).all() for v in load_model(trainer.best)[0].state_dict().values())
