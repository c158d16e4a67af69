# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch

from yolo_ext.core.config import parse
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.criterion import Distiller
from yolo_ext.distillation.preflight import Facts, doubts, noise, student_seconds, table, teacher_cost
from yolo_ext.distillation.teacher import make_guide

CPU = torch.device("cpu")


def facts(name: str, gflops: float, accuracy: float | None) -> Facts:
    return Facts(name, 64, 1000, gflops, accuracy)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ((1.0, 0.5), (3.0, 0.6), []),
        ((1.0, 0.5), (3.0, 0.5), ["no better", "0.5000 against 0.5000"]),
        ((1.0, 0.5), (20.0, 0.4), ["0.4000 against 0.5000"]),
        ((1.0, 0.5), (21.0, 0.6), ["21 times the FLOPs", "middle size", "Mirzadeh"]),
        ((1.0, None), (3.0, None), []),
        ((1.0, None), (40.0, None), ["40 times"]),
        ((1.0, 0.0), (3.0, 0.1), []),
    ],
    ids=["better", "equal", "worse", "far too big", "not measured", "big, not measured", "untrained student"],
)
def test_doubts_about_a_teacher(student, teacher, words):
    found = doubts(facts("student", *student), facts("t.pt", *teacher), "mAP50-95")
    assert len(found) == bool(words) and all(w in found[0] for w in words)
    assert all("'t.pt'" in f for f in found)


def test_both_doubts_are_said():
    assert len(doubts(facts("student", 1.0, 0.5), facts("t.pt", 21.0, 0.5), "top-1")) == 2


def test_what_was_not_measured_is_absent_from_the_table():
    lines = table(facts("student", 0.5, 0.25), [facts("t.pt", 3.0, None)], "top-1").splitlines()
    assert [c.strip() for c in lines[0].split("|")] == ["", "Pixels", "Parameters", "GFLOPs", "top-1"]
    assert [c.strip() for c in lines[2].split("|")] == ["student", "64", "1,000", "0.50", "0.2500"]
    assert lines[3].endswith("-") and len(lines) == 4


# Refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"imgsz": 96, "logits": "ld"}, ["'ld'", "distill.imgsz=96", "bckd"]),
        ({"compile": True, "layers": ["4"]}, ["'cwd'", "distill.compile"]),
        ({"compile": True, "features": [{"name": "pkd", "layers": ["backbone"]}]}, ["'pkd'", "distill.compile"]),
    ],
    ids=["ld", "layer", "backbone"],
)
def test_what_another_grid_or_a_compiled_teacher_cannot_do(build, saved, options, words):
    cfg = parse({"distill": {"teacher": str(saved("yolov8n.yaml")), **options}})["distill"]
    with pytest.raises(UsageError) as e:
        Distiller(build("yolov8n.yaml", 3), cfg, CPU)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("teacher", "options"),
    [("yolov8n", {}), ("yolov8n", {"layers": ["4", "neck", "backbone"]}), ("yolo26n", {}), ("yolov8n-p2", {})],
    ids=["neck", "layers", "end to end", "other levels"],
)
def test_a_teacher_that_sees_another_size_teaches(build, saved, teacher, options):
    student = build("yolov8n.yaml", 3).requires_grad_(True).train()
    cfg = parse({"distill": {"teacher": str(saved(f"{teacher}.yaml")), "imgsz": 128, **options}})["distill"]
    distiller = Distiller(student, cfg, CPU)
    assert "128 px" in distiller.summary()
    batch = {"img": torch.rand(2, 3, 64, 96)}
    found = distiller.losses(student(batch["img"]), batch, {"": 1.0})
    sum(found.values()).backward()
    assert all(v.isfinite() and v > 0 for v in found.values()) and distiller.skipped == 0


# Costs -------------------------------------------------------------------------------------------------------------


def test_timing_a_step_leaves_the_student_as_it_is(build):
    student = build("yolov8n.yaml").requires_grad_(True).train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    took = student_seconds(student, noise((2, 3, 64, 64), CPU), amp=False)
    assert took > 0 and student.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_costs_grow_with_the_teacher(build, saved):
    student, images = build("yolov8n.yaml", 3), noise((2, 3, 160, 160), CPU)
    guides = [make_guide(str(saved(f"{t}.yaml")), student, CPU) for t in ("yolov8n", "yolov8s")]
    small, large = (min(teacher_cost(guide, images) for _ in range(3)) for guide in guides)
    assert 0 < small[0] < large[0]  # the fastest of three: another process may take the cores meanwhile
    assert small[1] == pytest.approx(12.0, abs=0.2) and large[1] == pytest.approx(44.5, abs=0.5)  # 4 bytes a weight
