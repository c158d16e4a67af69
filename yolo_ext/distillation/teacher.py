# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The teacher: a frozen, fused model outside the student that returns raw head outputs without decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest
from yolo_ext.core.config import DistillConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.grids import regrid
from yolo_ext.distillation.logits import HeadOutput, decode
from yolo_ext.distillation.pairs import class_map, level_map, pick_levels
from yolo_ext.stock.load import load_model


def load_teacher(
    path: str, student: nn.Module, device: torch.device, half: bool | None = False
) -> tuple[nn.Module, str]:
    """Load a teacher and check that it can teach this student.

    Args:
        path: Teacher ``.pt``.
        student: The student, already pruned.
        device: Where to put the teacher, in channels_last.
        half: Whether in bfloat16 on a CPU as well, None where the processor computes in it; on a GPU it is in float16.

    Returns:
        The frozen teacher, whose head returns raw outputs, and the fingerprint of its weights.

    Raises:
        UsageError: If tasks or heads do not match.
    """
    teacher, _ = load_model(path)
    parent = fingerprint(teacher)
    tasks = [stock.task_of(m) for m in (teacher, student)]
    if tasks[0] != tasks[1]:
        raise UsageError(
            f"Teacher '{path}' is a '{tasks[0]}' model, the student is '{tasks[1]}'. Give one of the same task."
        )
    heads = [stock.detection_head(m) for m in (teacher, student)]
    if tasks[0] != "classify" and not all(hasattr(h, "reg_max") for h in heads):
        raise UsageError(
            f"Distillation needs a Detect-type head or a classifier; these are {[type(h).__name__ for h in heads]}."
        )
    teacher = stock.fuse_blocks(teacher).requires_grad_(False).to(device, memory_format=torch.channels_last)
    cuda = device.type == "cuda"
    if cuda or (stock.native_bf16() if half is None else half):
        teacher = teacher.to(torch.float16 if cuda else torch.bfloat16)
    return stock.raw_outputs(teacher), parent


def kept_channels(student: nn.Module, parent: str) -> list[list[int]] | None:
    """Return, for each level, which channels of its dense self a student still feeds to its head.

    Args:
        student: The student.
        parent: Fingerprint of the teacher.

    Returns:
        Kept channels by level, or None when the teacher is not the model that the student was pruned from.
    """
    record = manifest(student).get("prune") or {"parent": manifest(student).get("parent"), "kept": {}}
    if record["parent"] != parent or stock.task_of(student) == "classify":
        return None
    levels = []
    for path in stock.level_inputs(student):
        width = dict(student.named_modules())[path].in_channels
        levels.append(record["kept"].get(path, {}).get("in", list(range(width))))
    return levels


@dataclass
class Guide:
    """One teacher of a run, and how its outputs correspond to those of the student.

    Attributes:
        name: Its file, or ``ema``.
        get: Returns the model; the student's own average is another object after a resume.
        kept: Channels by level that a pruned student of this teacher still has; None for other teachers.
        classes: Indices of the shared classes, of the student and of the teacher.
        levels: Shared levels, of the student and of the teacher; empty for classifiers.
        imgsz: Longer side in pixels of the images as the teacher sees them, None for that of the batch.
        compiled: Whether it was asked to be compiled.
    """

    name: str
    get: Callable[[], nn.Module]
    kept: list[list[int]] | None
    classes: tuple[list[int], list[int]]
    levels: list[tuple[int, int]]
    imgsz: int | None = None
    compiled: bool = False

    @property
    def model(self) -> nn.Module:
        """The teacher."""
        return self.get()

    @torch.no_grad()
    def ask(self, images: torch.Tensor) -> Any:
        """Return the raw output of the teacher on (B, C, H, W) images, on the grid of a student that sees them."""
        model = self.model
        head, size = stock.detection_head(model), self.size(images)
        seen = images
        if size != images.shape[2:]:
            seen = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        mode, head.training = head.training, True  # the average of the student decodes where it is validated
        try:
            raw = _run(model, seen.to(next(model.parameters()).dtype))
        finally:
            head.training = mode
        if size == images.shape[2:] or not self.levels:
            return raw
        grids = [(-(-images.shape[2] // s), -(-images.shape[3] // s)) for s in head.stride.int().tolist()]
        found = {k: regrid(v, head.stride, grids) for k, v in stock.branches(raw).items()}
        return found.get("", found)

    def size(self, images: torch.Tensor) -> tuple[int, int]:
        """Return height and width at which the teacher sees (B, C, H, W) images: multiples of its largest stride."""
        h, w = images.shape[2:]
        if self.imgsz is None:
            return h, w
        stride = stock.max_stride(self.model)
        scaled = [max(round(x * self.imgsz / max(h, w) / stride), 1) * stride for x in (h, w)]
        return scaled[0], scaled[1]

    def output(self, raw: dict[str, Any], model: nn.Module, side: int) -> HeadOutput:
        """Decode one branch on shared levels and classes.

        Args:
            raw: Raw output of the branch; ``scores`` alone for a classifier.
            model: Whose output it is, or whose head made it.
            side: 0 for an output with the levels and classes of the student, 1 for the teacher's.
        """
        classes, head = self.classes[side], stock.detection_head(model)
        if not self.levels:
            scores = raw["scores"][:, classes].unsqueeze(-1)
            return HeadOutput(scores, scores.new_zeros(len(scores), 1, 4), scores.new_zeros(1, 2))
        levels = [pair[side] for pair in self.levels]
        raw = pick_levels(raw, levels)
        same = classes in ([], list(range(raw["scores"].shape[1])))  # none where only features are compared
        index = None if same else torch.tensor(classes, device=raw["scores"].device)
        return decode(raw, head.stride[levels], raw["boxes"].shape[1] // 4, index)


def _run(model: nn.Module, images: torch.Tensor) -> Any:
    """Run a teacher, from now on without compiling it where that fails."""
    try:
        return model(images)
    except Exception as error:
        if model._compiled_call_impl is None or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        model._compiled_call_impl = None
        reason = str(error).strip().splitlines()[0]
        LOGGER.warning(f"{colorstr('distill: ')}the teacher cannot be compiled and runs as it is ({reason})")
        return model(images)


def make_guide(
    name: str,
    student: nn.Module,
    device: torch.device,
    *,
    imgsz: int | None = None,
    compiled: bool = False,
    half: bool | None = False,
    classes: bool = True,
) -> Guide:
    """Load a teacher and match it with the student.

    Args:
        name: Teacher ``.pt``, or ``ema``, whose model has to be set as `get` before it is asked.
        student: The student, already pruned.
        device: Device of the student.
        imgsz: Longer side in pixels of the images as the teacher sees them, None for that of the batch.
        compiled: Compile a teacher that is a file when it is first asked.
        half: As for `load_teacher`.
        classes: Whether losses compare classes; features do not, and then the names may differ.

    Raises:
        UsageError: If they have no task, class or stride in common.
    """
    if name == "ema":
        teacher, kept, get = student, None, lambda: student
    else:
        teacher, parent = load_teacher(name, student, device, half)
        kept, get = kept_channels(student, parent), lambda: teacher
        if compiled:
            teacher.compile()
    classify = stock.task_of(student) == "classify"
    levels = [] if classify else level_map(student, teacher, name)
    shared = class_map(teacher, student, name) if classes else ([], [])
    return Guide(name, get, kept, shared, levels, imgsz, compiled)


def teachers(cfg: DistillConfig) -> list[str]:
    """Return the teachers of a run by name, in the order of the user."""
    return [cfg.teacher] if isinstance(cfg.teacher, str) else cfg.teacher


def make_guides(cfg: DistillConfig, student: nn.Module, device: torch.device, *, compiled: bool = False) -> list[Guide]:
    """Load the teachers of a run and match each with the student, as `make_guide` does."""
    how: dict[str, Any] = {"imgsz": cfg.imgsz, "half": cfg.half, "classes": bool(cfg.logits), "compiled": compiled}
    return [make_guide(name, student, device, **how) for name in teachers(cfg)]
