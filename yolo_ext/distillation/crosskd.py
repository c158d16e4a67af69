# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The cross head: hidden features of the student's Detect head go through the last layers of the teacher's head.

Built from the paper: Wang et al., 2024, CrossKD, arXiv:2306.11369, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from yolo_ext.core.errors import UsageError

STACKS = {"boxes": "cv2", "scores": "cv3"}


def head_stacks(head: nn.Module, split: int, branch: str = "") -> dict[str, list[nn.Sequential]]:
    """Return the layers of a Detect head by output (``boxes``, ``scores``) and level.

    Args:
        head: Detect head, or one derived from it.
        split: Layers that stay with the student: ``stack[split - 1]`` gives the hidden features.
        branch: ``one2one`` for that branch of an end-to-end head.

    Raises:
        UsageError: If no layer would be left on one of the sides, or the head has no such branch.
    """
    prefix = "one2one_" if branch == "one2one" else ""
    found = {key: list(getattr(head, prefix + name, None) or []) for key, name in STACKS.items()}
    if not all(found.values()):
        raise UsageError(f"The head '{type(head).__name__}' has no branch '{branch or 'one2many'}' for 'crosskd'.")
    depth = min(len(stack) for stacks in found.values() for stack in stacks)
    if not 1 <= split < depth:
        raise UsageError(f"'crosskd' cannot split the head after layer {split}. Legal: 1 to {depth - 1}.")
    return found


def _hidden_width(stack: nn.Sequential, split: int) -> int:
    return next(m for m in stack[split].modules() if isinstance(m, nn.Conv2d)).in_channels


def cross_adapters(student: nn.Module, teacher: nn.Module, split: int, branches: tuple[str, str] = ("", "")) -> Any:
    """Return one 1x1 convolution per output and level where hidden widths differ, and the identity elsewhere.

    Args:
        student: Head of the student, possibly pruned.
        teacher: Head of the teacher.
        split: Layers that stay with the student.
        branches: Branch of the student and of the teacher.

    Returns:
        ``nn.ModuleDict`` of ``nn.ModuleList`` with the keys ``boxes`` and ``scores``.

    Raises:
        UsageError: If the heads have another number of levels.
    """
    ours, theirs = (head_stacks(h, split, b) for h, b in zip((student, teacher), branches))
    levels = [len(stacks["boxes"]) for stacks in (ours, theirs)]
    if levels[0] != levels[1]:
        raise UsageError(f"'crosskd' needs equally many levels; the student has {levels[0]}, the teacher {levels[1]}.")

    def adapter(a: nn.Sequential, b: nn.Sequential) -> nn.Module:
        widths = _hidden_width(a, split), _hidden_width(b, split)
        return nn.Identity() if widths[0] == widths[1] else nn.Conv2d(*widths, 1)

    return nn.ModuleDict({k: nn.ModuleList(adapter(a, b) for a, b in zip(ours[k], theirs[k])) for k in STACKS})


def cross_head(
    teacher_head: nn.Module, student_features: Mapping[str, Sequence[torch.Tensor]], split: int,
    branch: str = "", adapters: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the student's hidden features through the rest of the teacher's head.

    The teacher's parameters are frozen and its layers in eval mode, yet gradients must flow: never under ``no_grad``.

    Args:
        teacher_head: Head of the teacher.
        student_features: For ``boxes`` and ``scores`` one (B, C, H, W) map per level, the output of layer `split`.
        split: Layers that stay with the student.
        branch: Branch of the teacher.
        adapters: Result of `cross_adapters`; None where all widths are equal.

    Returns:
        Raw output as Detect gives it, for `logits.decode` with the teacher's `reg_max`.

    Raises:
        UsageError: If the split is illegal.
    """
    raw: dict[str, Any] = {"feats": list(student_features["boxes"])}
    for key, stacks in head_stacks(teacher_head, split, branch).items():
        outputs = []
        for level, (stack, x) in enumerate(zip(stacks, student_features[key])):
            tail, weight = stack[split:], next(stack.parameters())
            if adapters is not None:
                adapter = adapters[key][level]
                x = adapter(x.to(next(adapter.parameters(), x).dtype))
            outputs.append(tail(x.to(weight.dtype)).flatten(2))
        raw[key] = torch.cat(outputs, -1)
    return raw
