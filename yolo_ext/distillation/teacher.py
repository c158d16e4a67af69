# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The teacher: a frozen, fused model outside the student, and what of it corresponds to what of the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from yolo_ext.distillation.logits import HeadOutput, decode, regrid
from yolo_ext.stock.load import load_model


# Teachers ------------------------------------------------------------------------------------------------------------
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
        """Decode one branch on shared levels and classes, numbered as in the student (side 0) or in the teacher (1)."""
        classes, head = self.classes[side], stock.detection_head(model)
        if not self.levels:
            scores = raw["scores"][:, classes].unsqueeze(-1)
            return HeadOutput(scores, scores.new_zeros(len(scores), 1, 4), scores.new_zeros(1, 2))
        levels = [pair[side] for pair in self.levels]
        raw = _pick_levels(raw, levels)
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


def _pick_levels(raw: dict[str, Any], levels: list[int]) -> dict[str, Any]:
    """Return the raw output of one branch with these levels only, in this order."""
    if levels == list(range(len(raw["feats"]))):
        return raw
    sizes = [f.shape[-2] * f.shape[-1] for f in raw["feats"]]
    parts = {k: raw[k].split(sizes, -1) for k in ("boxes", "scores")}
    picked = {k: torch.cat([v[i] for i in levels], -1) for k, v in parts.items()}
    return {**picked, "feats": [raw["feats"][i] for i in levels]}


def teachers(cfg: DistillConfig) -> list[str]:
    """Return the teachers of a run by name, in the order of the user."""
    return [cfg.teacher] if isinstance(cfg.teacher, str) else cfg.teacher


def make_guides(cfg: DistillConfig, student: nn.Module, device: torch.device, *, compiled: bool = False) -> list[Guide]:
    """Load the teachers of a run and match each with the student, as `make_guide` does."""
    how: dict[str, Any] = {"imgsz": cfg.imgsz, "half": cfg.half, "classes": bool(cfg.logits), "compiled": compiled}
    return [make_guide(name, student, device, **how) for name in teachers(cfg)]


def make_guide(
    name: str, student: nn.Module, device: torch.device, *, imgsz: int | None = None, compiled: bool = False,
    half: bool | None = False, classes: bool = True,
) -> Guide:  # fmt: skip
    """Load a teacher, or take the student for `ema` until `get` is set, and match levels and, if compared, classes."""
    if name == "ema":
        teacher, kept, get = student, None, lambda: student
    else:
        teacher, parent = load_teacher(name, student, device, half)
        kept, get = kept_channels(student, parent), lambda: teacher
        if compiled:
            teacher.compile()
    levels = [] if stock.task_of(student) == "classify" else _level_map(student, teacher, name)
    shared = class_map(teacher, student.names, name) if classes else ([], [])
    return Guide(name, get, kept, shared, levels, imgsz, compiled)


def load_teacher(
    path: str, student: nn.Module, device: torch.device, half: bool | None = False
) -> tuple[nn.Module, str]:
    """Load the teacher of a student, frozen and fused; return it with the fingerprint of its weights."""
    teacher, _ = load_model(path)
    parent = fingerprint(teacher)
    ours, theirs = stock.task_of(student), stock.task_of(teacher)
    if theirs != ours:
        raise UsageError(f"Teacher '{path}' is a '{theirs}' model, the student is '{ours}'. Give one of the same task.")
    heads = [stock.detection_head(m) for m in (teacher, student)]
    if ours != "classify" and not all(hasattr(h, "reg_max") for h in heads):
        raise UsageError(
            f"Distillation needs a Detect-type head or a classifier; these are {[type(h).__name__ for h in heads]}."
        )
    teacher = stock.fuse_blocks(teacher).requires_grad_(False).to(device, memory_format=torch.channels_last)
    cuda = device.type == "cuda"  # float16 there; on a CPU bfloat16, by default where the processor computes in it
    if cuda or (stock.native_bf16() if half is None else half):
        teacher = teacher.to(torch.float16 if cuda else torch.bfloat16)
    return stock.raw_outputs(teacher), parent


# Levels and classes --------------------------------------------------------------------------------------------------
def kept_channels(student: nn.Module, parent: str) -> list[list[int]] | None:
    """Return by level the channels of its dense self that a student feeds to its head; None unless that is `parent`."""
    record = manifest(student).prune or {"parent": manifest(student).parent, "kept": {}}
    if record["parent"] != parent or stock.task_of(student) == "classify":
        return None
    levels = []
    for path in stock.level_inputs(student):
        width = dict(student.named_modules())[path].in_channels
        levels.append(record["kept"].get(path, {}).get("in", list(range(width))))
    return levels


def _level_map(student: nn.Module, teacher: nn.Module, name: str) -> list[tuple[int, int]]:
    """Return (level of the student, level of the teacher) for each stride that both heads have."""
    ours, theirs = ([int(s) for s in stock.detection_head(m).stride] for m in (student, teacher))
    found = [(i, theirs.index(s)) for i, s in enumerate(ours) if s in theirs]
    if not found:
        raise UsageError(f"Teacher '{name}' has strides {theirs}, the student {ours}. Give one with a common stride.")
    return found


def class_map(teacher: nn.Module, names: Mapping[int, str], path: str) -> tuple[list[int], list[int]]:
    """Return the classes that these names and a teacher share: indices in the names, indices of the teacher."""
    theirs = {str(n).strip().lower(): i for i, n in teacher.names.items()}
    shared = [(i, theirs[key]) for i, n in names.items() if (key := str(n).strip().lower()) in theirs]
    if not shared:
        raise UsageError(
            f"Teacher '{path}' knows none of the classes {list(names.values())[:5]}; it knows "
            f"{list(teacher.names.values())[:10]}. Give a teacher that was trained on the same classes."
        )
    return [i for i, _ in shared], [j for _, j in shared]


def with_classes(teacher: nn.Module, names: Mapping[int, str], path: str) -> nn.Module:
    """Bring the outputs of a model to the classes of a data set, in place; classes it does not know get no score."""
    head = stock.detection_head(teacher)
    ours, theirs = class_map(teacher, names, path)
    if ours == theirs == list(range(len(teacher.names))) and len(names) == len(ours):
        return teacher
    branches = [b for k in ("cv3", "one2one_cv3") for b in getattr(head, k, None) or ()]
    for last in [b[-1] for b in branches] or [head.linear]:
        weight, bias = last.weight.data, last.bias.data
        last.weight = nn.Parameter(weight.new_zeros(len(names), *weight.shape[1:]))
        last.bias = nn.Parameter(bias.new_full((len(names),), -30.0))
        last.weight.data[ours], last.bias.data[ours] = weight[theirs], bias[theirs]
        setattr(last, "out_channels" if isinstance(last, nn.Conv2d) else "out_features", len(names))
    if branches:
        head.no, head.nc = head.no + len(names) - head.nc, len(names)
    teacher.names = dict(names)
    return teacher
