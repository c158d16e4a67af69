# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The teacher: a frozen, fused model outside the student that returns raw head outputs without decoding."""

from __future__ import annotations

import torch
from torch import nn

from yolo_ext import compat
from yolo_ext.checkpoint import fingerprint, load_model, manifest
from yolo_ext.errors import UsageError


def load_teacher(path: str, student: nn.Module, device: torch.device) -> tuple[nn.Module, str]:
    """Load a teacher and check that it can teach this student.

    Args:
        path: Teacher ``.pt``.
        student: The student, already pruned.
        device: Where to put the teacher.

    Returns:
        The frozen teacher, whose head returns raw outputs, and the fingerprint of its weights.

    Raises:
        UsageError: If tasks, strides or class names do not match.
    """
    teacher, _ = load_model(path)
    parent = fingerprint(teacher)
    tasks = [compat.task_of(m) for m in (teacher, student)]
    if tasks[0] != tasks[1]:
        raise UsageError(
            f"Teacher '{path}' is a '{tasks[0]}' model, the student is '{tasks[1]}'. Give one of the same task."
        )
    heads = [compat.detection_head(m) for m in (teacher, student)]
    if not all(hasattr(h, "reg_max") for h in heads):
        raise UsageError("Distillation needs a Detect-type head on teacher and student; classify models have none.")
    strides = [[int(s) for s in h.stride] for h in heads]
    if strides[0] != strides[1]:
        raise UsageError(
            f"Teacher '{path}' has strides {strides[0]}, the student {strides[1]}. Give one with the same."
        )
    class_map(teacher, student, path)
    teacher = compat.fuse_blocks(teacher).to(device).requires_grad_(False)
    return compat.raw_outputs(teacher), parent


def class_map(teacher: nn.Module, student: nn.Module, path: str) -> list[int]:
    """Return for each class of the student the index of the teacher's class of the same name.

    Raises:
        UsageError: If the teacher lacks a class.
    """
    key = lambda name: str(name).strip().lower()  # noqa: E731
    theirs = {key(n): i for i, n in teacher.names.items()}
    missing = [n for n in student.names.values() if key(n) not in theirs]
    if missing:
        raise UsageError(
            f"Teacher '{path}' does not know the classes {missing[:5]}; it knows {list(teacher.names.values())[:10]}. "
            "Give a teacher that was trained on the same classes."
        )
    return [theirs[key(n)] for n in student.names.values()]


def kept_channels(student: nn.Module, parent: str) -> list[list[int]] | None:
    """Return, for each level, which channels of its dense self a student still feeds to its head.

    Args:
        student: The student.
        parent: Fingerprint of the teacher.

    Returns:
        Kept channels by level, or None when the teacher is not the model that the student was pruned from.
    """
    record = manifest(student).get("prune") or {"parent": manifest(student).get("parent"), "kept": {}}
    if record["parent"] != parent:
        return None
    levels = []
    for path in compat.level_inputs(student):
        width = dict(student.named_modules())[path].in_channels
        levels.append(record["kept"].get(path, {}).get("in", list(range(width))))
    return levels
