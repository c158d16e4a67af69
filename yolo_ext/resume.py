# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Exact resume: what the checkpoint of Ultralytics leaves out, in a file beside it while a run is unfinished.

Stock resume rounds the EMA to fp16, continues from it in place of the live weights, and starts every random generator
anew. On one device without dataloader workers, a run that was killed goes on here to the same numbers, bit by bit.
With workers, on several devices, or with Albumentations, the random part differs; weights and optimizer are exact.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext.checkpoint import atomic_write, finalize
from yolo_ext.quantization.fake_quant import quantized_layers
from yolo_ext.quantization.layers import ADDED

SIDECAR = "resume_epoch{}.pt"  # named by epoch: the one of the old last.pt must outlive the writing of the new one


@dataclass
class Cadence:
    """The rhythm of optimizer steps, which Ultralytics keeps in a local variable.

    Attributes:
        waiting: Batches since the last step, whose gradients have been accumulated.
        shift: What to add to `accumulate` until the first step of a resumed run, to make up for the lost variable.
    """

    waiting: int = 0
    shift: int = 0


def capture(trainer: Any) -> dict[str, Any]:
    """Return the state of training at the end of an epoch, in full precision and of plain types.

    Args:
        trainer: A trainer of ours after validation.

    Returns:
        A dict that `torch.load(weights_only=True)` reads. It refers to live tensors.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda, stopper = trainer.device.type == "cuda", trainer.stopper
    return {
        "model": unwrap_model(trainer.model).state_dict(),
        "ema": trainer.ema.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "adapters": trainer.distiller.adapters.state_dict() if trainer.distiller else {},
        "sparsity": trainer.sparsifier.state_dict() if trainer.sparsifier else {},
        "gradients": [p.grad for p in _parameters(trainer)],
        "waiting": trainer.cadence.waiting,
        "stopper": {"best_fitness": float(stopper.best_fitness), "best_epoch": stopper.best_epoch},
        "random": {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(trainer.device) if cuda else None,
            "orders": [(x.generator.get_state(), x.iterator is not None) for x in _loaders(trainer)],
            "buffer": list(getattr(trainer.train_loader.dataset, "buffer", ())),
        },
    }


def save(trainer: Any) -> None:
    """Write the state beside the checkpoint that is going to be written next."""
    buffer = io.BytesIO()
    torch.save(capture(trainer), buffer)
    atomic_write(_path(trainer, trainer.epoch), buffer.getvalue())


def clear(trainer: Any, keep: int | None = None) -> None:
    """Remove the states of this run's folder, but for the one of epoch `keep`, counted from 0."""
    for path in _folder(trainer).glob(SIDECAR.format("*")):
        if keep is None or path != _path(trainer, keep):
            path.unlink()


def restore(trainer: Any) -> dict[str, Any] | None:
    """Put back weights, optimizer and adapters, after Ultralytics has resumed from the checkpoint.

    Args:
        trainer: A trainer of ours before its first epoch. Nothing happens unless it resumes.

    Returns:
        The state, whose random part belongs to the start of the first epoch, or None when there is none.
    """
    if not trainer.start_epoch:
        return None
    if RANK in {-1, 0}:
        _forget_later_rows(trainer.csv, trainer.start_epoch)
    path = _path(trainer, trainer.start_epoch - 1)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    if state is None or not _belongs(state, trainer.ema.ema):
        LOGGER.warning(
            f"{colorstr('resume: ')}{path} is not there or not of this checkpoint: going on from fp16 weights, "
            "so figures will differ a little from those of a run that was never stopped"
        )
        return None
    unwrap_model(trainer.model).load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"])
    for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups):
        if "fused" in saved:
            saved["fused"] = group["fused"]  # the device of today picks the kernel
    trainer.optimizer.load_state_dict(state["optimizer"])
    vars(trainer.stopper).update(state["stopper"])
    if trainer.distiller:
        trainer.distiller.adapters.load_state_dict(state["adapters"])
    if trainer.sparsifier:
        trainer.sparsifier.load_state_dict(state["sparsity"])
    return state


def begin(trainer: Any, state: dict[str, Any]) -> None:
    """Put back gradients, the cadence of steps and everything random, at the very start of the first epoch.

    Args:
        trainer: The trainer that resumes.
        state: What `restore` returned.
    """
    for p, grad in zip(_parameters(trainer), state["gradients"]):
        p.grad = None if grad is None else grad.to(p.device)
    waiting = state["waiting"]
    trainer.cadence = Cadence(waiting, len(trainer.train_loader) * trainer.start_epoch - waiting)
    if trainer.world_size > 1:
        return
    saved, train = state["random"], trainer.train_loader
    for i in saved["buffer"]:
        train.dataset.load_image(i)
    # From this epoch on mosaic is closed, for which Ultralytics resets the loader: first, or again after a resume.
    closing = trainer.epochs - trainer.args.close_mosaic if trainer.args.close_mosaic else trainer.epochs
    for loader, (order, begun) in zip(_loaders(trainer), saved["orders"]):  # stock classification shuffles both
        resets = loader is train and trainer.start_epoch >= closing
        if not loader.num_workers:
            _continue_order(loader, order, begun and not (resets and trainer.start_epoch == closing), resets)
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(saved["python"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], trainer.device)


def stepped(trainer: Any) -> None:
    """Note an optimizer step, behind which `accumulate` needs no correction any more."""
    trainer.accumulate -= trainer.cadence.shift
    trainer.cadence = Cadence()


@contextmanager
def whole_final_files() -> Iterator[None]:
    """Have Ultralytics strip final checkpoints beside the old ones, which are then replaced as a whole."""
    from yolo_ext.stock.context import quiet

    stock = engine.strip_optimizer

    def strip(f: Path, s: str = "", updates: dict | None = None) -> dict:
        part, result = Path(str(f)).with_name(f".{Path(f).name}"), Path(s or str(f))
        with quiet():  # it would name the file beside
            stripped = stock(f, part, updates)
        if stripped:
            finalize(part)
            part.replace(result)
            LOGGER.info(f"Optimizer stripped from {f}, {result.stat().st_size / 1e6:.1f}MB")
        return stripped

    engine.strip_optimizer = strip
    try:
        yield
    finally:
        engine.strip_optimizer = stock


def _folder(trainer: Any) -> Path:
    return Path(str(trainer.wdir))


def _path(trainer: Any, epoch: int) -> Path:
    return _folder(trainer) / SIDECAR.format(epoch)


def _parameters(trainer: Any) -> list[torch.nn.Parameter]:
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def _loaders(trainer: Any) -> tuple[Any, Any]:
    return trainer.train_loader, trainer.test_loader


def _belongs(state: dict[str, Any], ema: torch.nn.Module) -> bool:
    """Tell whether the state's EMA, rounded to fp16 as in the checkpoint, is the one that was loaded from there."""
    saved, loaded = state["ema"], ema.state_dict()
    other = {f"{path}.weight" for path, *_ in quantized_layers(ema)}  # rounded to codes; ranges are in the manifest
    names = [k for k in loaded if k not in other and not k.endswith(ADDED)]
    return saved.keys() == loaded.keys() and all(torch.equal(saved[k].half(), loaded[k].cpu().half()) for k in names)


def _forget_later_rows(csv: Path, epochs: int) -> None:
    """Drop the rows of epochs that ended after the checkpoint was written: they are going to be repeated."""
    if csv.exists():
        head, *rows = csv.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= epochs]
        if kept != rows:
            atomic_write(csv, "".join([head, *kept]))


def _continue_order(loader: Any, order: torch.Tensor, mid_run: bool, resets: bool) -> None:
    """Make the loader's next iterator go on with the order of images.

    Args:
        loader: Dataloader without workers.
        order: State of its generator.
        mid_run: Whether the uninterrupted run keeps its iterator, which has then ended an epoch, or makes a new one.
        resets: Whether the training loop may reset the loader before it is used; that depends on the version.
    """
    make = loader._get_iterator

    def once() -> Any:
        loader._get_iterator = make
        loader.generator.set_state(order)
        iterator = make()
        if mid_run:
            for _ in range(len(loader)):  # the sampler draws its next order only behind the end of the last one
                next(iterator._sampler_iter)
            loader.generator.set_state(order)
        return iterator

    loader.iterator = once()
    if resets:
        loader._get_iterator = once
