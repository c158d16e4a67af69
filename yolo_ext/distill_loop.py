# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What distillation does to a training run: teachers and adapters, the batch size, and the preflight."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext import runs, stock
from yolo_ext.checkpoint import fingerprint
from yolo_ext.distillation import costs
from yolo_ext.distillation.criterion import Distiller
from yolo_ext.distillation.pairs import with_classes
from yolo_ext.distillation.preflight import Facts, doubts, table
from yolo_ext.distillation.teacher import make_guides, teachers
from yolo_ext.stock.load import load_model

_known: dict[tuple[str, str, int], float] = {}  # accuracy by weights, data and size, within this process
PREFIX = "distill: "


def remember(weights: nn.Module, data: Any, imgsz: int, accuracy: float) -> None:
    """Note an accuracy that has been measured already, so that the preflight need not do it again."""
    _known[fingerprint(weights), str(Path(data).resolve()), imgsz] = accuracy


def attach(trainer: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the teachers of a run, and give their adapters a parameter group.

    Out of memory, Ultralytics may come here once more with a new optimizer: teachers and adapters stay.

    Args:
        trainer: The trainer.
        model: The live model, not wrapped.
        optimizer: Its new optimizer.

    Raises:
        UsageError: If a teacher does not fit.
    """
    cfg = trainer.compression["distill"]
    if trainer.distiller is None:
        trainer.distiller = Distiller(model, cfg, trainer.device, shrinks=bool(trainer.prune_epochs))
        LOGGER.info(f"{colorstr(PREFIX)}{trainer.distiller.summary()}")
    if adapters := list(trainer.distiller.adapters.parameters()):
        like = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        like.update(weight_decay=0.0, param_group="distill")
        like["lr"] = min(g["lr"] for g in optimizer.param_groups)  # MuSGD triples it for parts of the head
        optimizer.add_param_group({"params": adapters, **like})


@contextmanager
def teachers_along(trainer: Any) -> Iterator[None]:
    """Have the model run its teachers too, for as long as Ultralytics looks for the batch size that fits."""
    cfg = trainer.compression["distill"]
    if not cfg:
        yield
        return
    student = deepcopy(unwrap_model(trainer.model)).eval()
    guides = make_guides(cfg, student, trainer.device)
    held: list[Any] = []

    def ask(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        with torch.autocast(trainer.device.type, enabled=False):
            held[:] = [guide.ask(args[0].detach()) for guide in guides]  # held until the backward pass is through

    hook = trainer.model.register_forward_hook(ask)
    try:
        yield
    finally:
        hook.remove()


# Preflight ----------------------------------------------------------------------------------------------------------
def preflight(trainer: Any) -> None:
    """Say what teachers and student are worth and cost, and warn of teachers that will hardly help.

    Args:
        trainer: The trainer before its first epoch. A run that is resumed has seen all this.
    """
    if trainer.resume:
        return
    with costs.undisturbed(trainer.device):
        found = _facts(trainer)
        if RANK not in {-1, 0}:
            return
        metric = "top-1" if trainer.args.task == "classify" else "mAP50-95"
        student, *teachers = found
        LOGGER.info("\n" + table(student, teachers, metric))
        for teacher in teachers:
            if _same_file(teacher.name, trainer.args.model):
                teacher = replace(teacher, accuracy=None)  # teaches what the student is going to lose
            for doubt in doubts(student, teacher, metric):
                LOGGER.warning(f"{colorstr(PREFIX)}{doubt}.")
        if trainer.compression["distill"].preflight:
            LOGGER.info(f"{colorstr(PREFIX)}{_step(trainer)}")


def _facts(trainer: Any) -> list[Facts]:
    """Return what is known of the student and of each teacher that is not its running average."""
    cfg, size = trainer.compression["distill"], trainer.args.imgsz
    live = unwrap_model(trainer.model)
    student = trainer._stripped(live) if trainer.compression["quant"] else deepcopy(live)
    models, other = {"student": (student, size)}, set()
    for name in teachers(cfg):
        if name == "ema":
            continue
        teacher = load_model(name)[0]
        if cfg.logits or {*teacher.names.values()} & {*live.names.values()}:
            teacher = with_classes(teacher, live.names, name)
        else:  # whose features teach all the same, but whose boxes have no meaning here
            other.add(name)
        models[name] = (teacher, cfg.imgsz or size)
    if cfg.preflight and RANK in {-1, 0}:
        LOGGER.info(f"{colorstr(PREFIX)}measuring on the val split (distill.preflight=False leaves it out)")
    found = []
    for name, (model, imgsz) in models.items():
        figures = runs.model_figures(model, None, imgsz)
        score = _accuracy(trainer, model, imgsz) if cfg.preflight and name not in other else None
        found.append(Facts(name, imgsz, figures["params"], figures["gflops"], score))
    return found


def _same_file(a: Any, b: Any) -> bool:
    return Path(str(a)).resolve() == Path(str(b)).resolve()


def _accuracy(trainer: Any, model: nn.Module, imgsz: int) -> float | None:
    """Return mAP50-95, or top-1 of a classifier, on the val split; on several GPUs all take part, and one knows."""
    from yolo_ext.stock.context import quiet
    from yolo_ext.stock.load import float_model

    key = (fingerprint(model), str(Path(trainer.args.data).resolve()), imgsz)
    if key not in _known:
        with tempfile.TemporaryDirectory() as folder, quiet():
            args = {**vars(trainer.validator.args), "imgsz": imgsz, "rect": False, "plots": False, "verbose": False,
                    "cache": False, "compile": False, "save_dir": folder}  # fmt: skip
            found = type(trainer.validator)(args=args, save_dir=Path(folder))(model=float_model(model))
        name = "accuracy_top1" if trainer.args.task == "classify" else "mAP50-95(B)"
        _known[key] = float(found[f"metrics/{name}"])
    return _known[key]


def _step(trainer: Any) -> str:
    """Return in words how long a step takes with and without teachers, and what memory they hold."""
    model, guides = unwrap_model(trainer.model), trainer.distiller.guides
    batch, size = max(trainer.batch_size // max(trainer.world_size, 1), 1), trainer.args.imgsz
    images = costs.sample((batch, stock.input_channels(model), size, size), trainer.device)
    amp = torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp
    plain = costs.student_seconds(model, images, amp)
    parts = [costs.teacher_cost(guide, images) for guide in guides]
    taught, every = sum(p[0] for p in parts), trainer.compression["distill"].every
    memory = "weights and activations" if trainer.device.type == "cuda" else "weights"
    return (
        f"{batch} images at {size} px: student {1e3 * plain:.0f} ms without its loss, teachers {1e3 * taught:.0f} ms"
        f"{f' in each {every}th batch' if every > 1 else ''}, so a step takes about "
        f"{1 + taught / every / plain:.2f} times as long; teachers hold {sum(p[1] for p in parts):.0f} MB ({memory})"
    )
