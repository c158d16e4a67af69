# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity training through a trainer: what it writes, what survives, and what it can be combined with."""

from __future__ import annotations

import json

import polars
import pytest
import torch
from torch import nn
from ultralytics import YOLO

import yolo_ext
from yolo_ext import cli, stock
from yolo_ext.checkpoint import manifest, save_model
from yolo_ext.core.errors import UsageError
from yolo_ext.stock.load import load_model

PULL = {"coefficient": 5.0, "warmup": 0}  # most scale factors are about 1, so they all go but for the protected ones
COLUMNS = ["sparsity/share", "sparsity/speedup", "sparsity/coefficient"]


def zeros(model: nn.Module) -> dict[str, int]:
    norms = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return {n: int((w == 0).sum()) for n, w in norms.items()}


@pytest.mark.slow
def test_zeros_are_exact_in_every_file(fit, tiny):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=2, sparsity=PULL)
    live = zeros(trainer.model)
    assert sum(live.values()) > 100
    for name in ("best.pt", "last.pt"):
        model = load_model(trainer.save_dir / "weights" / name)[0]
        assert zeros(model) == live  # stripped EMA in fp16
        found = manifest(model).sparsity
        assert found["method"] == "slim" and found["share"] > 0.3 and found["epochs"] == 2


@pytest.mark.slow
def test_it_can_be_watched(fit, tiny):
    yolo, seen = YOLO(str(tiny)), []
    yolo.add_callback("on_fit_epoch_end", lambda t: seen.append(set(t.metrics)))
    trainer = fit(yolo, yolo_ext.DetectionTrainer, epochs=3, sparsity={**PULL, "coefficient": 1.5}, plots=True)
    rows = polars.read_csv(trainer.csv)
    assert {*COLUMNS, "train/sparsity_loss"} <= set(rows.columns)
    share, penalty = rows["sparsity/share"].to_list(), rows["train/sparsity_loss"].to_list()
    assert share == sorted(share) and share[-1] > share[0] and penalty[-1] < penalty[0]
    assert set(COLUMNS) <= seen[0]  # TensorBoard and the others read these
    history = json.loads((trainer.save_dir / "sparsity.json").read_text())
    assert [r["epoch"] for r in (history["epochs"] if isinstance(history, dict) else history)] == [0, 1, 2]
    assert len(list(trainer.save_dir.glob("*.png"))) > 2


@pytest.mark.slow
def test_head_outputs_and_what_cannot_be_pruned_are_left_alone(fit, tiny):
    plain = fit(tiny, yolo_ext.DetectionTrainer, name="a", epochs=1, lr0=0.0, warmup_bias_lr=0.0)
    pulled = fit(tiny, yolo_ext.DetectionTrainer, name="b", epochs=1, lr0=0.0, warmup_bias_lr=0.0, sparsity=PULL)
    moved = {n for (n, a), b in zip(plain.model.named_parameters(), pulled.model.parameters()) if not torch.equal(a, b)}
    assert moved and all(n.endswith("bn.weight") for n in moved)


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_batch_and_accumulation_do_not_change_the_pull(fit, tiny, adaptive):
    """Without a learning rate only the pull moves the scales; how sensitive each one is, unlike batches see unlike."""
    pull = {**PULL, "coefficient": 0.2, "adaptive": adaptive}
    options = {"epochs": 2, "lr0": 0.0, "warmup_bias_lr": 0.0, "sparsity": pull}
    found = [
        fit(tiny, yolo_ext.DetectionTrainer, name=f"{b}-{n}", batch=b, nbs=n, **options).model.model[1].bn.weight
        for b, n in ((4, 4), (2, 2), (4, 8))
    ]
    for other in found[1:]:
        apart = (found[0] - other).abs()
        assert apart.median() < 0.02 if adaptive else apart.max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slim", "group_slim", "group_sl"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "MuSGD"])
def test_every_penalty_with_every_optimizer(fit, tiny, method, optimizer):
    options = {"method": method, "coefficient": 8.0, "warmup": 0}
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=2, optimizer=optimizer, sparsity=options)
    found = manifest(load_model(trainer.save_dir / "weights" / "last.pt")[0]).sparsity
    assert found["share"] > 0.1
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.slow
def test_weight_decay_is_off_where_the_penalty_pulls(fit, tiny):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=1, sparsity={"method": "group_sl"}, weight_decay=0.05)
    decays = {n: g["weight_decay"] for g in trainer.optimizer.param_groups
              for n, p in trainer.model.named_parameters() if any(p is q for q in g["params"])}  # fmt: skip
    assert set(decays) == {n for n, _ in trainer.model.named_parameters()}
    assert decays["model.2.cv1.conv.weight"] == 0 < decays["model.0.conv.weight"]  # the stem is at its floor


# Together with others ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_sparsify_prune_and_fine_tune_in_one_training_with_its_own_teacher(fit, tiny):
    trainer = fit(
        tiny, yolo_ext.DetectionTrainer, epochs=4, sparsity={**PULL, "end": 2}, distill={"teacher": "self"},
        prune={"speedup": 1.5, "at": [2], "images": 4, "recalibrate": 4},
    )  # fmt: skip
    model = load_model(trainer.save_dir / "weights" / "best.pt")[0]
    assert manifest(model).prune["config"]["method"] == "slim"  # the criterion that goes with the penalty
    assert stock.gflops(load_model(tiny)[0]) / stock.gflops(model) == pytest.approx(1.5, rel=0.05)
    assert trainer.technique("distill").distiller.guides[0].kept and trainer.technique("sparsity").sparsifier.pull == 0


@pytest.mark.slow
def test_pull_goes_on_after_surgery(fit, tiny):
    trainer = fit(
        tiny, yolo_ext.DetectionTrainer, epochs=4, sparsity={**PULL, "coefficient": 2.0, "end": 4},
        prune={"speedup": 1.3, "at": [2], "images": 4, "recalibrate": 4, "force": True},
    )  # fmt: skip
    assert sum(zeros(trainer.model).values()) > 10


@pytest.mark.slow
def test_pipeline(tiny, shapes, tmp_path):
    words = f"prune model={tiny} data={shapes} imgsz=64 batch=4 workers=0 device=cpu epochs=1 plots=False".split()
    more = ["sparsity.epochs=2", "sparsity.coefficient=5", "prune.speedup=1.5", f"project={tmp_path}", "name=run"]
    assert cli.main([*words, *more]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["stages"]) == ["base", "sparsify", "prune", "finetune"]
    model = load_model(tmp_path / "run/weights/best.pt")[0]
    assert manifest(model).prune["config"]["method"] == "slim"
    assert "sparsity" in (tmp_path / "run/report.html").read_text().lower()


# Wrong input ---------------------------------------------------------------------------------------------------------
def without_norms(tiny, tmp_path):
    model = load_model(tiny)[0]
    for m in list(model.modules()):
        if hasattr(m, "bn"):
            m.bn = nn.Identity()
    return save_model(model, tmp_path / "bare.pt")


def fused(tiny, tmp_path):
    return save_model(load_model(tiny)[0].fuse(verbose=False), tmp_path / "fused.pt")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda t, d: t, "sparsity.coefficient=-1", "sparsity.coefficient=-1"),
        (lambda t, d: t, "sparsity.start=3 sparsity.end=2", "sparsity.end=2"),
        (lambda t, d: t, "sparsity.start=5 epochs=3", "sparsity.start=5"),
        (lambda t, d: t, "sparsity.method=slimm", "Did you mean 'slim'"),
        (lambda t, d: t, "sparsity.mode=gradient", "shrink after each step"),
        (without_norms, "sparsity.method=slim", "BatchNorm"),
        (fused, "sparsity.method=slim", "fused"),
    ],
    ids=["negative", "ends before it starts", "starts after the end", "unknown", "mode", "no BatchNorm", "fused"],
)
def test_refused(tiny, shapes, tmp_path, capsys, make, options, message):
    words = f"train model={make(tiny, tmp_path)} data={shapes} imgsz=64 epochs=4 batch=4 workers=0 device=cpu".split()
    assert cli.main([*words, *options.split(), f"project={tmp_path}", "name=run"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_error_type(fit, tiny):
    with pytest.raises(UsageError):
        fit(YOLO(str(tiny)), yolo_ext.DetectionTrainer, sparsity={"method": "nothing"})
