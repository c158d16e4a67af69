# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Exact resume: what the checkpoint of Ultralytics leaves out, in a file beside it while a run is unfinished.

Stock resume rounds the EMA to fp16, continues from it in place of the live weights, and starts every random generator
anew. On one device without dataloader workers, a run that was killed goes on here to the same numbers, bit by bit.
With workers, on several devices, or with Albumentations, the random part differs; weights and optimizer are exact.
"""

import random
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import __version__
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext.checkpoint import as_bytes, atomic_write
from yolo_ext.stock.trainer import continue_order, order_of
from yolo_ext.training.technique import Technique, live

# Named by epoch, two of which take turns when an epoch is saved again: that of the old last.pt outlives its writing.
PARTS = {"model", "ema", "optimizer", "gradients", "waiting", "stopper", "random"}
SIDECAR, AGAIN = "resume_epoch{}.pt", "resume_epoch{}_again.pt"


class Trained(Exception):
    """The run that is resumed has its last epoch behind it."""


class Exact:
    """What a run needs to go on exactly, and the rhythm of its optimizer steps."""

    # Ultralytics keeps the batch of the last step in a local variable that a resume loses. `accumulate` makes up for it
    # until the first step, from where a batch is prepared, behind the warmup that may set it, to the end of the batch.

    def __init__(self) -> None:
        """Start a run that has not taken a step."""
        self.waiting = 0  # batches since the last step, whose gradients have been accumulated
        self._shift = 0  # to add to `accumulate`,
        self._due = 1  # which is this otherwise
        self._state: dict[str, Any] | None = None  # whose random part waits for the first epoch
        self._epoch = -1
        self._trained = False
        self.path: Path | None = None  # of the state that belongs to last.pt

    def before_epoch(self, trainer: Any) -> None:
        """Go on exactly in the first epoch of a resumed run, or raise `Trained` where none is left."""
        if self._trained:
            raise Trained
        if self._state:
            self._begin(trainer, self._state)
            self._state = None
        elif trainer.epoch == self._epoch:  # again, out of memory or after NaN: gradients are gone
            self.waiting = self._shift = 0
        self._epoch = trainer.epoch

    def before_batch(self) -> None:
        """Count a batch."""
        self.waiting += 1

    def prepare_batch(self, trainer: Any) -> None:
        """Correct how many batches are accumulated until the first step of a resumed run."""
        self._due = trainer.accumulate
        trainer.accumulate += self._shift

    def after_step(self, trainer: Any) -> None:
        """Note an optimizer step, behind which nothing needs correction any more."""
        self._take_back(trainer, self.waiting >= self._due)
        self.waiting = self._shift = 0

    def after_batch(self, trainer: Any) -> None:
        """Take back the correction where the batch saw no step."""
        self._take_back(trainer, self.waiting < self._due)

    def _take_back(self, trainer: Any, as_expected: bool) -> None:
        if self._shift:
            trainer.accumulate = self._due
            if not as_expected:
                self._shift = 0
                _warn(f"Ultralytics {__version__} accumulates gradients in a way that yolo_ext does not know")

    def save(self, trainer: Any) -> None:
        """Write the state of training in full precision beside the checkpoint that is going to be written next."""
        name, keys, *rest = np.random.get_state(legacy=True)
        cuda, stopper = trainer.device.type == "cuda", trainer.stopper
        found = {  # plain types, which `torch.load(weights_only=True)` reads
            "model": live(trainer).state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "gradients": [p.grad for p in _parameters(trainer)],
            "waiting": self.waiting,
            "trained": bool(trainer.stop),
            "stopper": {"best_fitness": float(stopper.best_fitness), "best_epoch": stopper.best_epoch},
            "random": {
                "python": random.getstate(),
                "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(trainer.device) if cuda else None,
                "orders": [order_of(trainer.train_loader), order_of(trainer.test_loader)],
                "buffer": list(getattr(trainer.train_loader.dataset, "buffer", ())),
            },
        }
        for technique in trainer.techniques:
            found.update(technique.state())
        self.path = next(p for p in _paths(trainer, trainer.epoch) if p != self.path)
        atomic_write(self.path, as_bytes(found))

    def restore(self, trainer: Any) -> None:
        """Put back weights, optimizer and what techniques hold, after Ultralytics has resumed from the checkpoint."""
        if not trainer.start_epoch:
            return
        self._trained = trainer.start_epoch >= trainer.epochs
        if RANK in {-1, 0}:
            _forget_later_rows(trainer.csv, trainer.start_epoch)
            if trainer.best_fitness == trainer.fitness:  # best.pt is written after last.pt, which may have been missed
                atomic_write(trainer.best, Path(trainer.args.resume).read_bytes())
        paths = _paths(trainer, trainer.start_epoch - 1)
        states = {p: s for p in paths if (s := _state(p, trainer.ema.ema, trainer.techniques))}
        if not states:
            _warn(f"{paths[0]} is not there, damaged or not of this checkpoint: going on from fp16 weights")
            return
        self.path, state = next(iter(states.items()))
        self._trained |= state.get("trained", False)
        live(trainer).load_state_dict(state["model"])
        trainer.ema.ema.load_state_dict(state["ema"])
        for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups):
            if "fused" in saved:
                saved["fused"] = group["fused"]  # the device of today picks the kernel
        trainer.optimizer.load_state_dict(state["optimizer"])
        vars(trainer.stopper).update(state["stopper"])
        for technique in trainer.techniques:
            technique.load_state(state)
        self._state = state

    def _begin(self, trainer: Any, state: dict[str, Any]) -> None:
        """Put back gradients, the rhythm of steps and everything random, at the very start of the first epoch."""
        for p, grad in zip(_parameters(trainer), state["gradients"]):
            p.grad = None if grad is None else grad.to(p.device)
        self.waiting = state["waiting"]
        self._shift = len(trainer.train_loader) * trainer.start_epoch - self.waiting
        if trainer.world_size > 1:
            return
        saved = state["random"]
        for i in saved["buffer"]:
            trainer.train_loader.dataset.load_image(i)
        # From this epoch on mosaic is closed, for which Ultralytics resets the loader: first, or again after a resume.
        closing, known = trainer.epochs - (trainer.args.close_mosaic or 0), True
        for loader, order in zip((trainer.train_loader, trainer.test_loader), saved["orders"]):
            resets = loader is trainer.train_loader and trainer.start_epoch >= closing
            if not loader.num_workers:  # classification shuffles both
                mid_run = order is not None and order[1] and not (resets and trainer.start_epoch == closing)
                known &= order is not None and continue_order(loader, order[0], mid_run, resets)
        if not known:
            _warn(f"The dataloader of Ultralytics {__version__} is one that yolo_ext does not know")
        name, keys, *rest = saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        random.setstate(saved["python"])
        torch.set_rng_state(saved["torch"])
        if saved["cuda"] is not None and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"], trainer.device)


def clear(folder: Path, keep: Path | None = None) -> None:
    """Remove the states in a folder of weights but the one to keep, and what a killed run left half written."""
    for path in [*folder.glob(SIDECAR.format("*")), *folder.glob(".*.pt*")]:
        if path != keep:
            path.unlink()


def _warn(why: str) -> None:
    LOGGER.warning(f"{colorstr('resume: ')}{why}, so figures will differ a little from those of an unbroken run")


def _paths(trainer: Any, epoch: int) -> list[Path]:
    return [trainer.wdir / name.format(epoch) for name in (SIDECAR, AGAIN)]


def _parameters(trainer: Any) -> list[torch.nn.Parameter]:
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def _state(path: Path, ema: torch.nn.Module, techniques: Iterable[Technique]) -> dict[str, Any]:
    """Return a state whose EMA, rounded to fp16 as in the checkpoint, is the one that was loaded from there."""
    with suppress(Exception):  # whatever a damaged or foreign file makes of torch.load, or a state lacks
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved, loaded = state["ema"], ema.state_dict()
        names = loaded.keys() - set().union(*(t.inexact(ema) for t in techniques))
        if saved.keys() == loaded.keys() and all(torch.equal(saved[k].half(), loaded[k].cpu().half()) for k in names):
            return state if state.keys() >= PARTS else {}
    return {}


def _forget_later_rows(csv: Path, epochs: int) -> None:
    """Drop damaged rows, and those of epochs behind the checkpoint: they are going to be repeated."""
    if not csv.exists():
        return
    head, *rows = csv.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
    whole = [row for row in rows if row.endswith("\n") and row.count(",") == head.count(",")]
    kept = [row for row in whole if (epoch := row.split(",")[0].strip()).isdecimal() and int(epoch) <= epochs]
    if not head.startswith("epoch"):
        csv.unlink()  # the next row begins it anew
    elif kept != rows:
        atomic_write(csv, "".join([head, *kept]))
