# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.nn.tasks import ClassificationModel

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.teacher import class_map, kept_channels, load_teacher, make_guide, with_classes
from yolo_ext.pruning.prune import prune_model

CPU = torch.device("cpu")


def test_teacher_is_frozen_fused_and_in_eval(build, saved):
    student = build("yolov8n.yaml")
    teacher, parent = load_teacher(str(saved("yolov8n.yaml")), student, CPU)
    assert len(parent) == 64
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not [n for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in teacher.modules())
    x = torch.rand(2, 3, 64, 64)
    raw = teacher(x)[1]
    plain = student.eval()(x)[1]  # the same weights, rounded to fp16 by the file
    assert raw.keys() == plain.keys()
    assert (raw["scores"] - plain["scores"]).abs().max() < 0.05 * plain["scores"].abs().max()
    again = teacher(torch.cat([x, torch.rand(1, 3, 64, 64)]))[1]
    assert torch.allclose(again["scores"][:2], raw["scores"], atol=1e-4), "depends on the rest of the batch"


@pytest.mark.parametrize(
    ("teacher", "change", "words"),
    [
        ("yolov8n-seg.yaml", None, ["has the task segment, the student detect"]),
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
    model = SimpleNamespace(names=dict(enumerate(teacher)))
    assert class_map(model, dict(enumerate(student)), "t.pt") == expected


@pytest.mark.slow
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


# Classes of the data -----------------------------------------------------------------------------------------------
def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the scores of each branch, (B, nc, A) or (B, nc, 1)."""
    model.eval()
    model.model[-1].training = True
    with torch.no_grad():
        raw = model(x)
    if isinstance(raw, torch.Tensor):
        return [raw.unsqueeze(-1)]
    return [b["scores"] for b in ([raw] if "scores" in raw else raw.values())]


@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo26n.yaml", "yolov8n-cls.yaml"])
def test_a_teacher_with_other_classes_is_measured_on_those_of_the_data(build, yaml):
    model = ClassificationModel(yaml, nc=3, verbose=False) if "cls" in yaml else build(yaml)
    model.names = {0: "a", 1: "b", 2: "c"}
    x = torch.rand(1, 3, 64, 64)
    before = outputs(model, x)
    assert with_classes(model, {0: "a", 1: "b", 2: "c"}, "t.pt") is model
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, x)))
    after = outputs(with_classes(model, {0: "C", 1: "new", 2: "a", 3: "b"}, "t.pt"), x)
    for a, b in zip(before, after):
        assert b.shape[1] == 4 and torch.allclose(b[:, [2, 3, 0]], a, atol=1e-5) and (b[:, 1] <= -29.9).all()
    if yaml == "yolov8n.yaml":
        assert model.eval()(x)[0].shape[1] == 4 + 4  # decodes with four classes


# Images of another size --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("images", "imgsz", "size"),
    [((64, 96), None, (64, 96)), ((64, 96), 96, (64, 96)), ((64, 96), 192, (128, 192)), ((640, 480), 320, (320, 256)),
     ((320, 32), 64, (64, 32))],
    ids=["as they are", "the same", "larger", "rounded to the stride", "at least one cell"],
)  # fmt: skip
def test_the_teacher_sees_images_at_its_size(build, saved, images, imgsz, size):
    guide = make_guide(str(saved("yolov8n.yaml")), build("yolov8n.yaml", 3), CPU, imgsz=imgsz)
    assert guide.size(torch.zeros(1, 3, *images)) == size


@pytest.mark.slow
@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo26n.yaml"])
def test_outputs_come_back_on_the_grid_of_the_student(build, saved, yaml):
    student, x = build(yaml, 3), torch.rand(2, 3, 64, 96)
    same, plain, larger = (make_guide(str(saved(yaml)), student, CPU, imgsz=s) for s in (96, None, 192))
    raw = [g.ask(x) for g in (same, plain, larger)]
    for name in ("",) if "scores" in raw[0] else ("one2many", "one2one"):
        a, b, c = (r[name] if name else r for r in raw)
        assert all(torch.equal(a[k], b[k]) for k in ("scores", "boxes")), "another path at the same size"
        assert [f.shape for f in c["feats"]] == [f.shape for f in a["feats"]] and c["scores"].shape == a["scores"].shape
        seen = plain.ask(F.interpolate(x, (128, 192), mode="bilinear", antialias=True))
        direct = plain.output(seen[name] if name else seen, plain.model, 1)
        back = larger.output(c, larger.model, 1)
        # the mean of four cells of the larger grid is the cell between them, for scores and for corners
        mean = lambda t: F.avg_pool2d(t[..., : 16 * 24].unflatten(-1, (16, 24)), 2).flatten(2)  # noqa: E731
        assert torch.allclose(back.scores[..., : 8 * 12], mean(direct.scores), atol=1e-5)
        far = (direct.anchors + direct.ltrb[..., 2:]).transpose(1, 2)
        near = (back.anchors + back.ltrb[..., 2:]).transpose(1, 2)
        assert torch.allclose(near[..., : 8 * 12] * 2, mean(far), atol=1e-3)


# Precision -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("half", [False, True])
def test_precision_of_the_teacher(saved, build, half):
    """Half precision on a CPU only when asked; its outputs stay close to the full ones."""
    student, file = build("yolov8n.yaml"), str(saved("yolov8n.yaml"))
    full, guide = make_guide(file, student, CPU, half=False), make_guide(file, student, CPU, half=half)
    assert next(guide.model.parameters()).dtype == (torch.bfloat16 if half else torch.float32)
    images = torch.rand(2, 3, 64, 64)
    wanted, found = (g.ask(images)["scores"].float().sigmoid() for g in (full, guide))
    torch.testing.assert_close(found, wanted, atol=2e-2 if half else 0.0, rtol=0)


@pytest.mark.parametrize("native", [False, True])
def test_a_processor_with_bfloat16_is_used_unless_asked_otherwise(saved, build, monkeypatch, native):
    from yolo_ext import stock
    from yolo_ext.distillation.teacher import load_teacher

    monkeypatch.setattr(stock, "native_bf16", lambda: native)
    file, student = saved("yolov8n.yaml"), build("yolov8n.yaml")
    types = [next(load_teacher(file, student, CPU, half)[0].parameters()).dtype for half in (None, False, True)]
    assert types == [torch.bfloat16 if native else torch.float32, torch.float32, torch.bfloat16]
