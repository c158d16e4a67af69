# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch

from yolo_ext.core.config import DistillConfig, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import loss_factor
from yolo_ext.distillation.criterion import Distiller
from yolo_ext.distillation.teacher import make_guide
from yolo_ext.distillation.terms import Facts, doubts, student_seconds, table, teacher_cost, terms, title

CPU = torch.device("cpu")


def read(**options):
    return terms(parse({"distill": options})["distill"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("kl_binary", 1.0, {}), ("ld", 1.0, {}), ("cwd", 1.0, {})]),
        ({"logits": ["bckd", "ld"], "features": None}, [("bckd", 1.0, {}), ("ld", 1.0, {})]),
        ({"logits": None, "feature_weight": 2.0, "features": [{"name": "cwd", "weight": 0.5, "temperature": 3}]},
         [("cwd", 1.0, {"temperature": 3})]),
        ({"logits": [{"name": "l1", "norm": "mean"}], "features": None}, [("l1", 1.0, {"norm": "mean"})]),
    ],
    ids=["defaults", "names", "weights multiply", "own option"],
)  # fmt: skip
def test_stacks_are_read(options, expected):
    assert [(t.row.name, t.weight, t.options) for t in read(**options)] == expected


def test_layers_and_timing_of_a_loss_go_before_the_common_ones():
    stack = [{"name": "cwd", "layers": ["backbone", 15], "schedule": "constant", "end": 5}, "pkd"]
    first, second = read(logits=None, features=stack, layers=["neck"], start=2)
    assert first.layers == ("backbone", "15") and second.layers == ("neck",)
    assert first.timing == {"schedule": "constant", "final": 0.1, "start": 2, "end": 5, "warmup": 0}
    assert second.timing["schedule"] == "cosine" and title([first, second]) == "cwd + pkd"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": ["cdw"]}, ["Unknown feature loss 'cdw'", "'cwd'"]),
        ({"features": [{"nam": "cwd"}]}, ["distill.features", "name: cwd"]),
        ({"features": 3}, ["distill.features=3"]),
        ({"features": [{"name": "cwd", "tau": 2}]}, ["no option 'tau'", "temperature"]),
        ({"features": [{"name": "mgd", "module": 2}]}, ["no option 'module'"]),
        ({"logits": [{"name": "bckd", "layers": [4]}]}, ["no option 'layers'"]),
        ({"features": [{"name": "cwd", "weight": -1}]}, ["weight=-1"]),
        ({"features": [{"name": "cwd", "temperature": 0}]}, ["temperature=0"]),
        ({"features": [{"name": "cwd", "schedule": "cosin"}]}, ["=cosin'", "'cosine'"]),
        ({"features": [{"name": "cwd", "start": 3, "end": 2}]}, ["end=2", "start=3"]),
        ({"temperature": 2.0}, ["temperature=2.0' is gone", "{name: cwd, temperature: 2}"]),
        ({"start": 3, "end": 3}, ["distill.end=3"]),
        ({"features": None, "layers": ["neck"]}, ["distill.layers"]),
        ({"teacher": ["a.pt", "self"]}, ["distill.teacher"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_is_illegal_is_refused_in_one_message(options, words):
    with pytest.raises(UsageError) as e:
        read(**options)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_plain_options_are_read_as_the_same():
    from yolo_ext.core.config import as_plain

    given = {"distill": {"logits": ["bckd", {"name": "ld", "weight": 0.5}], "teacher": ["a.pt", "b.pt"], "layers": [4]}}
    once = parse(given)
    assert parse(as_plain(once)) == once and isinstance(once["distill"], DistillConfig)


@pytest.mark.parametrize(
    ("epoch", "timing", "expected"),
    [
        (0, {}, 1.0),
        (9, {}, 0.2),
        (12, {}, 0.2),
        (1, {"start": 2}, 0.0),
        (2, {"start": 2}, 1.0),
        (5, {"end": 5}, 0.0),
        (4, {"end": 5}, 0.2),
        (0, {"warmup": 3, "schedule": "constant"}, 0.25),
        (3, {"warmup": 3, "schedule": "constant"}, 1.0),
    ],
)
def test_factor_of_an_epoch(epoch, timing, expected):
    plan = {"schedule": "linear", "final": 0.2, "start": 0, "end": None, "warmup": 0, **timing}
    assert loss_factor(epoch=epoch, epochs=10, **plan) == pytest.approx(expected)


# What teachers are worth -------------------------------------------------------------------------------------------
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
    lines = table([facts("student", 0.5, 0.25), facts("t.pt", 3.0, None)], "top-1").splitlines()
    assert [c.strip() for c in lines[0].split("|")] == ["", "Pixels", "Parameters", "GFLOPs", "top-1"]
    assert [c.strip() for c in lines[2].split("|")] == ["student", "64", "1,000", "0.50", "0.2500"]
    assert lines[3].endswith("-") and len(lines) == 4


# Refusals ----------------------------------------------------------------------------------------------------------
def test_a_loss_over_bins_is_refused_on_another_grid(build, saved):
    cfg = parse({"distill": {"teacher": str(saved("yolov8n.yaml")), "imgsz": 96, "logits": "ld"}})["distill"]
    with pytest.raises(UsageError) as e:
        Distiller(build("yolov8n.yaml", 3), cfg, CPU)
    assert all(w in str(e.value) for w in ["'ld'", "distill.imgsz=96", "bckd"]) and "\n" not in str(e.value)


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
    took = student_seconds(student, torch.rand(2, 3, 64, 64), amp=False)
    assert took > 0 and student.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())


def test_costs_grow_with_the_teacher(build, saved):
    student, images = build("yolov8n.yaml", 3), torch.rand(2, 3, 160, 160)
    guides = [make_guide(str(saved(f"{t}.yaml")), student, CPU) for t in ("yolov8n", "yolov8s")]
    small, large = (min(teacher_cost(guide, images) for _ in range(3)) for guide in guides)
    assert 0 < small[0] < large[0]  # the fastest of three: another process may take the cores meanwhile
    assert small[1] == pytest.approx(12.0, abs=0.2) and large[1] == pytest.approx(44.5, abs=0.5)  # 4 bytes a weight
