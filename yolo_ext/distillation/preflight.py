# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before training: what cannot be distilled is refused, and what it costs is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.config import DistillConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.distillation.teacher import Guide
from yolo_ext.distillation.terms import AUTO, Term
from yolo_ext.reporting.tables import ABSENT, align

TOO_BIG = 20.0  # FLOPs of a teacher / FLOPs of its student
STEPS = 2  # that are timed, behind one to warm up
CLASSIFY = ("kl", "kl_binary", "l1", "l2")  # the others look at boxes or at objects


@dataclass(frozen=True)
class Facts:
    """What is known of a teacher or of the student before training."""

    name: str  # ``student``, or the file of a teacher
    imgsz: int  # side in pixels of the images as it sees them
    params: int  # as deployed
    gflops: float  # as deployed, at this size
    accuracy: float | None = None  # mAP50-95, or top-1 of a classifier, on the val split from 0 to 1 where measured


def table(student: Facts, teachers: list[Facts], metric: str) -> str:
    """Return the facts as an aligned table; `metric` is the title of the accuracy."""
    rows = [
        [f.name, f.imgsz, f"{f.params:,}", f"{f.gflops:.2f}", ABSENT if f.accuracy is None else f"{f.accuracy:.4f}"]
        for f in (student, *teachers)
    ]
    return align(rows, ["", "Pixels", "Parameters", "GFLOPs", metric])


def doubts(student: Facts, teacher: Facts, metric: str) -> list[str]:
    """Return in sentences why a teacher may not help (Cho & Hariharan, 2019, ICCV; Mirzadeh et al., 2020, AAAI)."""
    found = []
    if teacher.accuracy is not None and student.accuracy is not None and teacher.accuracy <= student.accuracy:
        found.append(
            f"'{teacher.name}' is no better than the student: {metric} {teacher.accuracy:.4f} against "
            f"{student.accuracy:.4f} on the val split. Train it on these data first, give a better one, or leave it out"
        )
    if teacher.gflops > TOO_BIG * student.gflops:
        found.append(
            f"'{teacher.name}' has {teacher.gflops / student.gflops:.0f} times the FLOPs of the student. Beyond "
            f"{TOO_BIG:g} times, a teacher of middle size usually teaches more (Mirzadeh et al., 2020, AAAI)"
        )
    return found


def check(terms: list[Term], guide: Guide, student: nn.Module, *, shrinks: bool) -> None:
    """Refuse losses that cannot work with this pair, with the reason and what to use instead."""
    if shrinks and guide.name == "ema":
        raise UsageError("'distill.teacher=ema' shrinks with a student that is pruned while it is trained. Give a .pt.")
    for term in terms:
        if problem := _problem(term, guide, student, shrinks):
            raise UsageError(f"The loss '{term.row.name}' cannot be used here: {problem}")


def with_logits(cfg: DistillConfig, student: nn.Module, guides: list[Guide]) -> DistillConfig:
    """Return the options with the logit losses that `auto` means for a student and its teachers."""
    if cfg.logits != "auto":
        return cfg
    if any(not g.levels for g in guides):
        return replace(cfg, logits="kl")
    bins = {stock.detection_head(m).reg_max for m in (student, *(g.model for g in guides))}
    equal = len(bins) == 1 and bins != {1} and not cfg.imgsz
    return replace(cfg, logits=AUTO if equal else "bckd")


def _problem(term: Term, guide: Guide, student: nn.Module, shrinks: bool) -> str | None:
    """Return why a loss cannot work with this pair."""
    inner = set(term.layers) - {"neck"}
    if not guide.levels and term.kind == "logits" and term.row.name not in CLASSIFY and ":" not in term.row.name:
        return f"a classifier has no boxes. Legal for 'distill.logits': {', '.join(CLASSIFY)}."
    if guide.compiled and inner:
        return "it reads layers inside of a model, which 'distill.compile' hides. Leave one of them out."
    if guide.imgsz and term.needs(Need.EQUAL_BINS):
        return f"'distill.imgsz={guide.imgsz}' gives the teacher another grid. Leave it out, or use 'bckd'."
    if term.needs(Need.SEVERAL_CLASSES) and len(guide.classes[0]) == 1:
        return "it compares classes with one another, and there is one class. Use 'kl_binary'."
    if term.needs(Need.EQUAL_BINS):
        ours, theirs = (stock.detection_head(m).reg_max for m in (student, guide.model))
        if ours != theirs or ours == 1:
            return (
                f"it compares distributions over equally many bins, and the student has reg_max={ours}, "
                f"'{guide.name}' reg_max={theirs} (1 is none). Use 'bckd', which compares boxes."
            )
    if shrinks and term.needs(Need.MODULE) and guide.kept is not None:
        return "its network has the width of the student, which is going to be pruned. Use 'cwd' or 'pkd'."
    if guide.name == "ema" and inner:
        return f"the running average teaches with the inputs of its head only, not with layers {list(term.layers)}."
    if shrinks and inner:
        return f"layers {list(term.layers)} lose channels while the student is pruned. Use 'neck', or prune first."
    return None


# Cost of a step -------------------------------------------------------------------------------------------------------
def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest time of a few calls, in seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(1 + STEPS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def student_seconds(student: nn.Module, images: torch.Tensor, amp: bool | torch.dtype) -> float:
    """Return the seconds of a forward and backward pass of a copy of the student, in the precision of `amp`."""
    copy, device = deepcopy(student).train(), images.device.type
    dtype = amp if isinstance(amp, torch.dtype) else torch.float16 if device == "cuda" else torch.bfloat16

    def step() -> None:
        with torch.autocast(device, dtype, enabled=bool(amp)):
            found = list(stock.returned_tensors(copy(images)))
        torch.stack([x.float().sum() for x in found]).sum().backward()

    return _seconds(step, images.device)


def teacher_cost(guide: Guide, images: torch.Tensor) -> tuple[float, float]:
    """Return the seconds a teacher takes for (B, C, H, W) images, and the MB it holds (on a GPU while it runs)."""
    held, device = sum(t.nbytes for t in guide.model.state_dict().values()), images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held -= torch.cuda.memory_allocated(device)
    took = _seconds(lambda: guide.ask(images), device)
    if device.type == "cuda":
        held += torch.cuda.max_memory_allocated(device)
    return took, held / 1e6


def noise(shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """Return (B, C, H, W) noise as images, the same in each run."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
