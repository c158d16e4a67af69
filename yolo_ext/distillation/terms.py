# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a run distils, with weight, schedule, layers and options each; what of it is refused, and what it costs."""

import inspect
import time
import timeit
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.config import DistillConfig, listed, parse
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.registry import Need, Row, Table, suggest
from yolo_ext.distillation.losses import feature_losses, logit_losses
from yolo_ext.distillation.teacher import Guide
from yolo_ext.reporting.tables import align, cell

TIMING = ("schedule", "final", "start", "end", "warmup")
GIVEN = {"student", "teacher", "module", "random"}  # not for the user to set
AUTO = ["kl_binary", "ld"]  # logit losses for heads with equal bins; the best of benchmarks/distillation.py
MEMORY = 0.95  # of the running means, so that they follow the last 20 batches or so
TABLES: dict[str, Table] = {"logits": logit_losses, "features": feature_losses}
TOO_BIG = 20.0  # FLOPs of a teacher / FLOPs of its student
STEPS = 2  # that are timed, behind one to warm up
CLASSIFY = ("kl", "kl_binary", "l1")  # the others look at boxes or at objects


@dataclass(frozen=True)
class Term:
    """One loss of a stack."""

    kind: str  # ``logits`` or ``features``
    row: Row
    weight: float  # at schedule factor 1
    timing: dict[str, Any]  # arguments of `core.schedules.loss_factor`
    options: dict[str, Any]  # keyword arguments of the method
    layers: tuple[str, ...] = ()  # whose maps a feature loss compares; none for the inputs of the head

    def needs(self, what: Need) -> bool:
        """Tell whether the method needs this; your own feature loss gets equal widths."""
        own = what is Need.EQUAL_WIDTH and self.kind == "features" and ":" in self.row.name
        return own or what in self.row.needs


def terms(cfg: DistillConfig) -> list[Term]:
    """Return the losses of a run, checked; one without an option of its own takes the common one."""
    found = []
    for kind, weight in (("logits", cfg.logit_weight), ("features", cfg.feature_weight)):
        stack = getattr(cfg, kind) or []
        entries = AUTO if stack == "auto" else listed(stack)
        found += [_term(kind, {"name": e} if isinstance(e, str) else dict(e), weight, cfg) for e in entries]
    return found


def _term(kind: str, entry: dict[str, Any], weight: float, cfg: DistillConfig) -> Term:
    """Read one entry of a stack, whose options are checked against the signature of the method."""
    row = TABLES[kind][str(entry.pop("name"))]
    key = f"distill.{kind}: {row.name}"
    weight *= float(_number(key, "weight", entry.pop("weight", 1.0)))
    timing = {name: entry.pop(name, getattr(cfg, name)) for name in TIMING}
    with refused(f"{key}: {{e}}", UsageError):
        parse({"distill": timing})
    layers = listed(entry.pop("layers", cfg.layers)) if kind == "features" else []
    taken = inspect.signature(row.fn).parameters
    legal = set(list(taken)[2:]) - GIVEN  # the first two are student and teacher, however they are called
    known = not any(p.kind is p.VAR_KEYWORD for p in taken.values())
    for name, value in entry.items():
        if known and name not in legal:
            words = sorted({"name", "weight", *TIMING, *legal, *(["layers"] if kind == "features" else [])})
            raise UsageError(f"{key} has no option '{name}'.{suggest(name, words)} Legal: {', '.join(words)}.")
        if name == "temperature" and not _number(key, name, value) > 0:
            raise UsageError(f"{key}: 'temperature={value}' is out of range. Legal: above 0.")
    return Term(kind, row, weight, timing, entry, tuple(str(x) for x in layers))


def _number(key: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UsageError(f"{key}: '{name}={value}' is illegal: give a number of at least 0.")
    return value


def title(found: list[Term]) -> str:
    """Return a stack in words, such as ``bckd x 0.5 + cwd``."""
    return " + ".join(t.row.name + (f" x {t.weight:g}" if t.weight != 1 else "") for t in found)


class Balance(nn.Module):
    """A factor that keeps the distillation loss at a share of the task loss, by running means of both."""

    means: torch.Tensor  # a buffer, so that it is resumed with the adapters

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2))

    def forward(self, task: torch.Tensor, distillation: torch.Tensor, share: float) -> torch.Tensor:
        """Take in the losses per image of a batch, that without schedule and factor, and return the factor to apply."""
        now = torch.stack((task.detach(), distillation.detach())).to(self.means)
        if now.isfinite().all():
            first = self.means.sum() == 0
            self.means.copy_(torch.where(first, now, MEMORY * self.means + (1.0 - MEMORY) * now))
        return share * self.means[0] / self.means[1].clamp(min=1e-9)


def check(found: list[Term], guide: Guide, student: nn.Module, *, shrinks: bool) -> None:
    """Refuse losses that cannot work with this pair, with the reason and what to use instead."""
    if shrinks and guide.name == "ema":
        raise UsageError("'distill.teacher=ema' shrinks with a student that is pruned while it is trained. Give a .pt.")
    for term in found:
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
    if guide.imgsz and term.needs(Need.EQUAL_BINS):
        return f"'distill.imgsz={guide.imgsz}' gives the teacher another grid. Leave it out, or use 'bckd'."
    if term.needs(Need.SEVERAL_CLASSES) and len(guide.classes[0]) == 1:
        return "it compares classes with one another, and there is one class. Use 'kl_binary'."
    if term.needs(Need.EQUAL_BINS):
        ours, theirs = (stock.detection_head(m).reg_max for m in (student, guide.model))
        if ours != theirs or ours == 1:
            bins = f"the student has reg_max={ours}, '{guide.name}' reg_max={theirs} (1 is none)"
            return f"it compares distributions over equally many bins, and {bins}. Use 'bckd', which compares boxes."
    if shrinks and term.needs(Need.MODULE) and guide.kept is not None:
        return "its network has the width of the student, which is going to be pruned. Use 'cwd' or 'pkd'."
    if guide.name == "ema" and inner:
        return f"the running average teaches with the inputs of its head only, not with layers {list(term.layers)}."
    if shrinks and inner:
        return f"layers {list(term.layers)} lose channels while the student is pruned. Use 'neck', or prune first."
    return None


@dataclass(frozen=True)
class Facts:
    """What is known of a teacher or of the student before training."""

    name: str  # ``student``, or the file of a teacher
    imgsz: int  # side in pixels of the images as it sees them
    params: int  # as deployed
    gflops: float  # as deployed, at this size
    accuracy: float | None = None  # mAP50-95, or top-1 of a classifier, on the val split from 0 to 1 where measured


def table(models: list[Facts], metric: str) -> str:
    """Return the facts as an aligned table; `metric` is the title of the accuracy."""
    rows = [[f.name, f.imgsz, f"{f.params:,}", f"{f.gflops:.2f}", cell(f.accuracy, ".4f")] for f in models]
    return align(rows, ["", "Pixels", "Parameters", "GFLOPs", metric])


def doubts(student: Facts, teacher: Facts, metric: str) -> list[str]:
    """Return in sentences why a teacher may not help (Cho & Hariharan, 2019, ICCV; Mirzadeh et al., 2020, AAAI)."""
    found = []
    if teacher.accuracy is not None and student.accuracy is not None and teacher.accuracy <= student.accuracy:
        worth = f"{metric} {teacher.accuracy:.4f} against {student.accuracy:.4f} on the val split"
        advice = "Train it on these data first, give a better one, or leave it out"
        found.append(f"'{teacher.name}' is no better than the student: {worth}. {advice}")
    if teacher.gflops > TOO_BIG * student.gflops:
        text = f"'{teacher.name}' has {teacher.gflops / student.gflops:.0f} times the FLOPs of the student. "
        found.append(f"{text}Beyond {TOO_BIG:g} times, one of middle size usually teaches more (Mirzadeh et al., 2020)")
    return found


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return min(timeit.repeat(run, timer=clock, repeat=1 + STEPS, number=1)[1:])


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
