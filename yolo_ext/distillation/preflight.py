# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before training: what cannot be distilled is refused, what corresponds to what and what it costs is said."""

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
from yolo_ext.distillation.terms import AUTO, Term, title
from yolo_ext.reporting.tables import ABSENT, align

TOO_BIG = 20.0  # FLOPs of a teacher / FLOPs of its student
STEPS = 2  # that are timed, behind one to warm up
CLASSIFY = ("kl", "kl_binary", "l1", "l2")  # the others look at boxes or at objects


@dataclass(frozen=True)
class Facts:
    """What is known of a teacher or of the student before training.

    Attributes:
        name: ``student``, or the file of a teacher.
        imgsz: Side in pixels of the images as it sees them.
        params: Parameters as deployed.
        gflops: GFLOPs as deployed, at this size.
        accuracy: mAP50-95, or top-1 of a classifier, on the val split from 0 to 1; None where it was not measured.
    """

    name: str
    imgsz: int
    params: int
    gflops: float
    accuracy: float | None = None


def table(student: Facts, teachers: list[Facts], metric: str) -> str:
    """Return the facts as an aligned table; `metric` is the title of the accuracy."""
    rows = [
        [f.name, f.imgsz, f"{f.params:,}", f"{f.gflops:.2f}", ABSENT if f.accuracy is None else f"{f.accuracy:.4f}"]
        for f in (student, *teachers)
    ]
    return align(rows, ["", "Pixels", "Parameters", "GFLOPs", metric])


def doubts(student: Facts, teacher: Facts, metric: str) -> list[str]:
    """Return in sentences why a teacher may not help: no better than the student, or far larger.

    After Cho and Hariharan, 2019, ICCV, and Mirzadeh et al., 2020, AAAI.
    """
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
    heads = [stock.detection_head(m) for m in (student, guide.model)]
    if not guide.levels and term.kind == "logits" and term.row.name not in CLASSIFY and ":" not in term.row.name:
        return f"a classifier has no boxes. Legal for 'distill.logits': {', '.join(CLASSIFY)}."
    if guide.compiled and set(term.layers) - {"neck"}:
        return "it reads layers inside of a model, which 'distill.compile' hides. Leave one of them out."
    if guide.imgsz and term.needs(Need.EQUAL_BINS):
        return f"'distill.imgsz={guide.imgsz}' gives the teacher another grid. Leave it out, or use 'bckd'."
    if term.needs(Need.SEVERAL_CLASSES) and len(guide.classes[0]) == 1:
        return "it compares classes with one another, and there is one class. Use 'kl_binary'."
    if term.needs(Need.EQUAL_BINS) and (heads[0].reg_max != heads[1].reg_max or heads[0].reg_max == 1):
        return (
            f"it compares distributions over equally many bins, and the student has reg_max={heads[0].reg_max}, "
            f"'{guide.name}' reg_max={heads[1].reg_max} (1 is none). Use 'bckd', which compares boxes."
        )
    if shrinks and term.needs(Need.MODULE) and guide.kept is not None:
        return "its network has the width of the student, which is going to be pruned. Use 'cwd' or 'pkd'."
    if guide.name == "ema" and set(term.layers) - {"neck"}:
        return f"the running average teaches with the inputs of its head only, not with layers {list(term.layers)}."
    if shrinks and set(term.layers) - {"neck"}:
        return f"layers {list(term.layers)} lose channels while the student is pruned. Use 'neck', or prune first."
    return None


def summary(distiller: Any) -> str:
    """Return what is distilled from whom, and how both sides correspond, as text for the log."""
    cfg, lines = distiller.cfg, []
    for g, guide in enumerate(distiller.guides):
        n, known = len(guide.classes[0]), len(distiller.student.names)
        classes = "" if n in (known, 0) else f", {n} of {known} classes shared"
        strides = stock.detection_head(distiller.student).stride.tolist() if guide.levels else []
        shared = [int(strides[i]) for i, _ in guide.levels]
        partly = "" if len(shared) == len(strides) else f", strides {shared} only"
        found = dict.fromkeys(s for term in distiller.sites[g] for s in term)
        maps = ", ".join(
            f"{'P' if isinstance(s.student, int) else ''}{_name(s.student, strides)} {s.widths[0]}->{s.widths[1]}"
            for s in found
        )
        how = "kept channels compared directly" if guide.kept is not None else "1x1 adapters where widths differ"
        how = how if any(key[0] == g for key in distiller.aligns) else "compared as they are"
        lines.append(f"teacher {guide.name}{classes}{partly}" + (f"; channels {maps}, {how}" if maps else ""))
    seen = f", which sees {cfg.imgsz} px" if cfg.imgsz else ""
    every = f", every {cfg.every} batches" if cfg.every > 1 else ""
    balance = f", kept at {cfg.share:g} of the task loss" if cfg.balance == "auto" else ""
    return "; ".join([title(distiller.terms), *lines]) + f"{seen}; {cfg.schedule} schedule{every}{balance}"


def _name(key: int | str, strides: list[float]) -> str:
    """Return the pyramid level of a level of the head, or the path of a layer."""
    return str(int(strides[key]).bit_length() - 1) if isinstance(key, int) else key


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
    held = sum(t.numel() * t.element_size() for t in guide.model.state_dict().values())
    cuda, device = images.device.type == "cuda", images.device
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    took = _seconds(lambda: guide.ask(images), device)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return took, (held + peak) / 1e6


def noise(shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """Return noise of a shape as images."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
