# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from yolo_ext.config import PruneConfig
from yolo_ext.distillation.pairs import class_map
from yolo_ext.distillation.teacher import kept_channels, load_teacher, make_guide
from yolo_ext.errors import UsageError
from yolo_ext.pruning.surgery import prune_model

CPU = torch.device("cpu")


def test_teacher_is_frozen_fused_in_eval_and_returns_raw_outputs(build, saved):
    student = build("yolov8n.yaml")
    teacher, parent = load_teacher(str(saved("yolov8n.yaml")), student, CPU)
    assert len(parent) == 64
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not [n for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in teacher.modules() if m is not teacher.model[-1])
    x = torch.rand(2, 3, 64, 64)
    raw = teacher(x)
    plain = student.eval()(x)[1]  # the same weights, rounded to fp16 by the file
    assert raw.keys() == plain.keys()
    assert (raw["scores"] - plain["scores"]).abs().max() < 0.05 * plain["scores"].abs().max()
    again = teacher(torch.cat([x, torch.rand(1, 3, 64, 64)]))
    assert torch.allclose(again["scores"][:2], raw["scores"], atol=1e-4), "depends on the rest of the batch"


@pytest.mark.parametrize(
    ("teacher", "change", "words"),
    [
        ("yolov8n-seg.yaml", None, ["'segment' model", "'detect'"]),
        ("yolov8n.yaml", {0: "cat", 1: "dog", 2: "cow"}, ["classes ['cat', 'dog', 'cow']", "['a', 'b', 'c']"]),
    ],
    ids=["task", "other classes"],
)
def test_what_does_not_match_is_refused_in_one_message(build, saved, teacher, change, words):
    student = build("yolov8n.yaml")
    student.names = change or student.names
    with pytest.raises(UsageError) as e:
        make_guide(str(saved(teacher)), student, CPU)
    message = str(e.value)
    assert all(w in message for w in words), message
    assert "\n" not in message and message.endswith(".")


def test_a_missing_teacher_is_named(build, tmp_path):
    with pytest.raises(UsageError, match=r"gone\.pt.*does not exist"):
        load_teacher(str(tmp_path / "gone.pt"), build("yolov8n.yaml"), CPU)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"], ([0, 1, 2], [0, 1, 2])),
        (["c", "a", "b"], ["a", "b", "c"], ([0, 1, 2], [1, 2, 0])),
        (["x", "Cat ", "y", "dog"], ["dog", "cat"], ([0, 1], [3, 1])),
        (["b", "a"], ["a", "new", "b"], ([0, 2], [1, 0])),
    ],
    ids=["same", "order", "subset, case and spaces", "shared only"],
)
def test_classes_are_matched_by_name(teacher, student, expected):
    models = [SimpleNamespace(names=dict(enumerate(n))) for n in (teacher, student)]
    assert class_map(*models, "t.pt") == expected


def test_kept_channels_tell_which_neck_channels_are_left(build):
    dense = build("yolov8n.yaml")
    pruned = prune_model(dense, PruneConfig(ratio=0.3))
    parent = pruned.yolo_ext["prune"]["parent"]
    kept = kept_channels(pruned, parent)
    assert kept_channels(pruned, "someone else") is None
    assert kept_channels(dense, parent) is None
    for level, (branch, index) in enumerate(zip(pruned.model[-1].cv2, kept)):
        conv, before = branch[0].conv, dense.model[-1].cv2[level][0].conv
        assert len(index) == conv.in_channels < before.in_channels
        rows = (
            pruned.yolo_ext["prune"]["kept"]
            .get(f"model.22.cv2.{level}.0.conv", {})
            .get("out", range(before.out_channels))
        )
        assert torch.equal(conv.weight, before.weight[list(rows)][:, index])
