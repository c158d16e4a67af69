# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What distillation does around a training: preflight and batch size."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics.engine import trainer as engine
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import LOGGER

import yolo_ext
from yolo_ext.checkpoint import save_model
from yolo_ext.core.options import DistillConfig
from yolo_ext.distillation.teacher import Guide
from yolo_ext.distillation.terms import Facts
from yolo_ext.stock.load import load_model
from yolo_ext.training import distill

NONE = {"sparsity": None, "prune": None, "quant": None}
QUANT = {"mode": "qat", "calib": 4, "profile": "ort-x86"}


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """Return the lines that are logged at the levels of information and warning."""
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(LOGGER, level, lambda text, *args, level=level: lines.append(f"{level}: {text}"))
    monkeypatch.setattr(distill, "_known", {})
    return lines


def told(log: list[str], *words: str) -> list[str]:
    return [line for line in log if all(w in line for w in words)]


@pytest.mark.slow
def test_training_is_the_same_with_and_without_preflight(fit, tiny, wide, log):
    runs = [
        fit(tiny, yolo_ext.DetectionTrainer, name=str(on), epochs=1, distill={"teacher": str(wide), "preflight": on})
        for on in (False, True)
    ]
    states = [load_model(t.last)[0].state_dict() for t in runs]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    tables = told(log, "mAP50-95", "Parameters", "student", str(wide))
    assert len(tables) == 2 and len(told(log, "times as long")) == 1 and len(told(log, "val split (")) == 1
    assert tables[0].splitlines()[-1].endswith("-") and tables[1].splitlines()[-1][-1].isdigit()


@pytest.mark.parametrize(
    ("teacher", "scores", "resume", "doubted"),
    [("wide", (0.5, 0.6), False, False), ("wide", (0.5, 0.4), False, True), ("own", (0.5, 0.5), False, False),
     ("wide", (0.5, 0.4), "last.pt", False)],
    ids=["better", "worse", "the model itself", "resumed"],
)  # fmt: skip
def test_a_teacher_that_is_no_better_is_doubted(tmp_path, log, monkeypatch, teacher, scores, resume, doubted):
    facts = [Facts(n, 64, 1000, 1.0, s) for n, s in zip(("student", str(tmp_path / f"{teacher}.pt")), scores)]
    monkeypatch.setattr(distill.Distill, "_facts", lambda *_: facts)
    args = SimpleNamespace(task="detect", model=tmp_path / "x" / ".." / "own.pt", epochs=1)
    trainer = SimpleNamespace(resume=resume, device=torch.device("cpu"), args=args)
    technique = distill.Distill({**NONE, "distill": DistillConfig(preflight=False)}, args)
    technique.distiller = SimpleNamespace(begin=lambda _: None)
    technique.criterion(trainer, None)
    assert bool(told(log, "warning:", "no better than the student")) == doubted
    assert len(told(log, "Parameters", "mAP50-95")) == (not resume)


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(fit, tiny, wide, shapes, log):
    distill.remember(load_model(tiny)[0], shapes, 64, 0.123)
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, distill={"teacher": str(wide)})
    (table,) = told(log, "Parameters", "mAP50-95")
    assert "0.1230" in table.splitlines()[3], table
    assert len(distill._known) == 2  # and the teacher's


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"distill": {"teacher": "ema"}}, {"distill": {"teacher": "self"}, "quant": QUANT}],
    ids=["ema", "fake-quant"],
)
def test_any_student_is_measured(fit, tiny, log, options):
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, **options)
    (table,) = told(log, "Parameters", "mAP50-95")
    assert len(table.splitlines()) == 4 + ("ema" not in str(options))
    assert len(told(log, "times as long")) == 1


# Batch size --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["wide", "ema"])
def test_the_batch_size_is_looked_for_with_the_teacher(fit, tiny, wide, log, monkeypatch, teacher):
    asked, seen = [], {}
    ask = Guide.ask

    def check(model: Any, imgsz: int, **_: Any) -> int:
        copy = deepcopy(model).train()
        assert not any("teacher" in n for n, _ in copy.named_modules())
        seen["parameters"] = sum(p.numel() for p in copy.parameters())
        monkeypatch.setattr(Guide, "ask", lambda self, x: asked.append(tuple(x.shape)) or ask(self, x))
        for n in (1, 2):
            x = torch.rand(n, 3, imgsz, imgsz, requires_grad=True)
            copy(x)["scores"].sum().backward()
        monkeypatch.setattr(Guide, "ask", ask)
        return 4

    monkeypatch.setattr(engine, "check_train_batch_size", check)
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=1, batch=-1,
                  distill={"teacher": str(wide) if teacher == "wide" else "ema", "preflight": False})  # fmt: skip
    assert asked == [(1, 3, 64, 64), (2, 3, 64, 64)]
    assert seen["parameters"] == sum(p.numel() for p in load_model(tiny)[0].parameters())
    assert trainer.batch_size == 4 and not trainer.model._forward_hooks and not trainer.ema.ema._forward_hooks


# Classification ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_classifiers_are_compared_by_top_1(fit, tmp_path, log):
    import cv2
    import numpy as np

    names = {0: "bright", 1: "dark"}
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, name in names.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(4):
                image = rng.integers(0, 128, (64, 64, 3), dtype=np.uint8) + np.uint8(127 * (1 - i))
                cv2.imwrite(str(tmp_path / "data" / split / name / f"{n}.png"), image)
    torch.manual_seed(0)
    files = []
    for k in range(2):
        model = ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False)
        model.names = names if k == 0 else {0: "dark", 1: "bright"}
        files.append(save_model(model, tmp_path / f"{k}.pt"))
    fit(files[0], yolo_ext.ClassificationTrainer, epochs=1, data=str(tmp_path / "data"),
        distill={"teacher": str(files[1]), "features": None, "logits": "kl"})  # fmt: skip
    (table,) = told(log, "Parameters", "top-1")
    assert all(row.split("|")[-1].strip()[0].isdigit() for row in table.splitlines()[3:])
