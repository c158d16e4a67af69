# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.crosskd import cross_adapters, cross_head, head_stacks
from yolo_ext.distillation.logits import crosskd, decode


@pytest.fixture(scope="module")
def teachers(build):
    """Return a function that gives the frozen, fused teacher that a run would load, made once."""
    made: dict[str, nn.Module] = {}

    def make(yaml: str) -> nn.Module:
        if yaml not in made:
            made[yaml] = stock.raw_outputs(stock.fuse_blocks(build(yaml, 1)).requires_grad_(False))
        return made[yaml]

    return make


def hidden(model: nn.Module, split: int, branch: str, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Return what the student's head computes up to `split`, taken from a run by hooks."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for key, stacks in head_stacks(model.model[-1], split, branch).items():
        found[key] = []
        keep = partial(lambda outputs, m, i, o: outputs.append(o), found[key])
        hooks += [stack[split - 1].register_forward_hook(keep) for stack in stacks]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


FAMILIES = [("yolov8n.yaml", ""), ("yolov5n.yaml", ""), ("yolov10n.yaml", "one2one"), ("yolo26n.yaml", "one2many"),
            ("yolo26n.yaml", "one2one")]  # fmt: skip


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("yaml", "branch"), FAMILIES, ids=lambda v: str(v).removesuffix(".yaml"))
def test_on_its_own_features_the_head_says_what_it_always_says(teachers, yaml, branch, split):
    model, x = teachers(yaml), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        raw = stock.branches(model(x))
        expected = raw.get(branch) or raw[""]
        got = cross_head(model.model[-1], hidden(model, split, branch, x), split, branch)
    assert set(got) == {"boxes", "scores", "feats"}
    assert all(torch.allclose(got[k], expected[k], rtol=1e-4, atol=1e-4) for k in ("boxes", "scores"))
    detect = model.model[-1]
    parts = [decode(r, detect.stride, detect.reg_max) for r in (got, expected)]
    assert torch.allclose(parts[0].anchors, parts[1].anchors)  # the maps give the grid
    assert all(p < 1e-4 for p in crosskd(parts[1], parts[1], cross=parts[0]))


PAIRS = [("yolov8n.yaml", "yolov8s.yaml", ("", "")), ("yolo26n.yaml", "yolov8n.yaml", ("one2many", "")),
         ("yolov8n.yaml", "yolo26n.yaml", ("", "one2one"))]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("student", "teacher", "branches"), PAIRS, ids=lambda v: str(v).removesuffix(".yaml"))
def test_gradients_reach_student_and_adapters_but_not_the_teacher(build, teachers, student, teacher, branches, dtype):
    model, theirs = build(student, 3).requires_grad_(True).train(), teachers(teacher)
    adapters = cross_adapters(model.model[-1], theirs.model[-1], 2, branches)
    x, detect = torch.rand(2, 3, 64, 64), theirs.model[-1]
    features = {k: [f.to(dtype) for f in v] for k, v in hidden(model, 2, branches[0], x).items()}
    raw = cross_head(detect, features, 2, branches[1], adapters)
    with torch.no_grad():
        out = stock.branches(theirs(x))
    taught = decode(out[branches[1]], detect.stride, detect.reg_max)
    sum(crosskd(taught, taught, cross=decode(raw, detect.stride, detect.reg_max))).backward()
    ours = model.model[-1]
    for stacks in head_stacks(ours, 2, branches[0]).values():
        for stack in stacks:
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stack[:2].parameters())
            assert all(p.grad is None for p in stack[2:].parameters())  # the student's last layer has no part in it
    assert list(adapters.parameters()) and all(p.grad.isfinite().all() for p in adapters.parameters())
    assert all(p.grad is None for p in theirs.parameters())


@pytest.mark.parametrize("split", [1, 2])
def test_adapters_only_where_hidden_widths_differ(teachers, split):
    heads = [teachers(y).model[-1] for y in ("yolov8n.yaml", "yolov8s.yaml")]
    adapters = cross_adapters(*heads, split)
    assert all(isinstance(a, nn.Identity) for a in adapters["boxes"])  # 64 in all of v8
    assert [(a.in_channels, a.out_channels) for a in adapters["scores"]] == [(64, 128)] * 3
    assert not list(cross_adapters(heads[0], heads[0], split).parameters())


@pytest.mark.parametrize("split", [0, 3, -1])
def test_a_split_that_leaves_nothing_on_one_side_is_refused(teachers, split):
    with pytest.raises(UsageError, match=f"after layer {split}. Legal: 1 to 2"):
        head_stacks(teachers("yolov8n.yaml").model[-1], split)


def test_a_head_without_this_branch_is_refused(teachers):
    with pytest.raises(UsageError, match="no branch 'one2one'"):
        head_stacks(teachers("yolov8n.yaml").model[-1], 1, "one2one")
    with pytest.raises(UsageError, match="no branch"):
        head_stacks(nn.Linear(2, 2), 1)


def test_another_number_of_levels_is_refused(teachers):
    heads = [teachers(y).model[-1] for y in ("yolov8n.yaml", "yolov8n-p2.yaml")]
    with pytest.raises(UsageError, match="student has 3, the teacher 4"):
        cross_adapters(*heads, 1)
