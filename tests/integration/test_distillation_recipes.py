# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Distillation in real trainings: each recipe to its end, the header of results.csv, and what is saved."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import polars
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel

import yolo_ext
from yolo_ext import cli, stock
from yolo_ext.checkpoint import MANIFEST, save_model
from yolo_ext.stock.load import load_model

KD = ["train/kd_cls_loss", "train/kd_box_loss", "train/kd_feat_loss"]
PRUNE = ["prune.images=4", "prune.recalibrate=4"]
# Recipe: (command, words that make it short, whether the student is pruned)
RECIPES = {
    "kd_train": ("distill", ["distill.teacher=wide", "epochs=2"], False),
    "kd_after_prune": ("train", ["epochs=2", *PRUNE], True),
    "prune2x_kd": ("train", ["epochs=2", *PRUNE], True),
    "kd_before_prune": ("train", ["distill.teacher=wide", "prune.at=[1]", "epochs=3", *PRUNE], True),
    "kd_while_pruning": ("train", ["prune.start=1", "prune.end=3", "prune.every=1", "epochs=4", *PRUNE], True),
    "kd_sparse": ("train", ["epochs=2"], False),
    "kd_qat": ("quantize", ["quant.epochs=2", "quant.calib=8", "quant.max_drop=1.0"], False),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_to_the_end(recipe, tiny, wide, shapes, tmp_path):
    command, words, pruned = RECIPES[recipe]
    common = f"model={tiny} data={shapes} imgsz=64 batch=4 workers=0 device=cpu plots=False".split()
    words = [w.replace("teacher=wide", f"teacher={wide}") for w in words]
    assert cli.main([command, f"recipe={recipe}", *common, *words, f"project={tmp_path}", "name=run"]) == 0
    folder = tmp_path / "run"
    table = polars.read_csv(next(f for f in (folder / "qat/results.csv", folder / "results.csv") if f.exists()))
    seen = [c for c in KD if c in table.columns]
    assert "train/kd_feat_loss" in seen and len(table) >= 2
    assert all(table[c].is_finite().all() for c in seen) and (table[seen[-1]] > 0).any()
    # With its ranges and BatchNorm fixed, a quantized model says what its float self says, but for rounding.
    assert recipe == "kd_qat" or (table[seen[0]] > 0).any()
    best = next(folder.rglob("best.pt"))
    model = load_model(best)[0]
    share = stock.gflops(model) / stock.gflops(load_model(tiny)[0])
    assert share == pytest.approx(0.5 if pruned else 1.0, rel=0.05)
    known = {"kd_sparse": {"sparsity"}, "kd_qat": {"quant"}}.get(recipe, {"prune"} if pruned else set())
    assert known <= set(getattr(model, MANIFEST, {}))  # a model that nothing was done to has none
    assert YOLO(str(best)).predict(torch.zeros(1, 3, 64, 64), verbose=False)


# What is written ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({"end": 1}, [False, True, True]),
        ({"start": 1}, [True, False, False]),
        ({"mosaic": "stop"}, [False, True, True]),
    ],
    ids=["end", "start", "close_mosaic"],
)
def test_the_header_stays_when_distillation_stops(fit, tiny, wide, options, silent):
    """Ultralytics writes the header once: a row with other names would shift its columns."""
    more = {"close_mosaic": 2} if "mosaic" in options else {}
    distill = {"teacher": str(wide), **options}
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=3, distill=distill, plots=True, **more)
    lines = trainer.csv.read_text().splitlines()
    assert len(lines) == 4 and len({line.count(",") for line in lines}) == 1
    table = polars.read_csv(trainer.csv)
    for name in KD:
        assert [v == 0 for v in table[name]] == silent


def test_a_distilled_student_is_saved_as_a_plain_one(fit, tiny, wide, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, "plain", epochs=1)
    stack = {"logits": "bckd", "features": ["mgd", {"name": "pkd", "layers": ["4"]}]}
    fit(tiny, yolo_ext.DetectionTrainer, "taught", epochs=1, distill={"teacher": str(wide), **stack})
    for file in ("best.pt", "last.pt"):
        (plain, one), (taught, two) = (load_model(tmp_path / n / "weights" / file) for n in ("plain", "taught"))
        assert list(plain.state_dict()) == list(taught.state_dict())
        assert [p.shape for p in plain.state_dict().values()] == [p.shape for p in taught.state_dict().values()]
        assert [n for n, _ in plain.named_modules()] == [n for n, _ in taught.named_modules()]
        assert set(vars(plain)) == set(vars(taught)) and not hasattr(taught, MANIFEST)
        assert set(one) == set(two) and not two.get(MANIFEST)
        assert not any(m._forward_hooks for m in taught.modules())
        assert not torch.equal(plain.state_dict()["model.0.conv.weight"], taught.state_dict()["model.0.conv.weight"])


# Classification ----------------------------------------------------------------------------------------------------
def folders(folder: Path) -> Path:
    """Write a classification set of dark and bright noise."""
    rng = np.random.default_rng(0)
    for split, name in [(s, n) for s in ("train", "val") for n in ("bright", "dark")]:
        (folder / split / name).mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 128, (64, 64, 3)) + 127 * (name == "bright")
            cv2.imwrite(str(folder / split / name / f"{i}.png"), image.astype(np.uint8))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["kl", "kl_binary"])
def test_classifiers_learn_from_a_teacher(fit, randomise, tmp_path, logits):
    files = []
    for scale in "ns":
        model = randomise(ClassificationModel(f"yolov8{scale}-cls.yaml", nc=2, verbose=False))
        model.names = {0: "bright", 1: "dark"}
        files.append(save_model(model, tmp_path / f"{scale}-cls.pt"))
    distill = {"teacher": str(files[1]), "features": None, "logits": logits}
    trainer = fit(files[0], yolo_ext.trainer_for("classify"), data=str(folders(tmp_path / "data")), distill=distill)
    table = polars.read_csv(trainer.csv)
    assert table[KD[0]].is_finite().all() and (table[KD[0]] > 0).all()
    assert YOLO(str(trainer.best)).predict(torch.zeros(1, 3, 64, 64), verbose=False)[0].probs is not None
