# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity training in a training run: around each optimizer step, and after each epoch."""

from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext.checkpoint import fingerprint, is_pruned, note
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import PruneConfig
from yolo_ext.core.schedules import prune_epochs
from yolo_ext.sparsity import monitor
from yolo_ext.sparsity.sparsifier import Sparsifier
from yolo_ext.stock.trainer import LoggedLoss, forget_best
from yolo_ext.training.technique import Technique, input_size, live


class Sparse(Technique):
    """Channels that the loss does not defend are pulled to zero."""

    key = "sparsity"

    def __init__(self, configs: dict[str, Any], args: Any) -> None:
        """Look up what is going to be pruned, as its options `include` and `exclude` say, and when."""
        super().__init__(configs, args)
        self.epochs, self.pruned_at = args.epochs, prune_epochs(cfg=configs["prune"], epochs=args.epochs)
        self.prune = configs["prune"] or PruneConfig(ratio=0.5, method=self.cfg.method)
        self.sparsifier: Any = None  # what is pulled and how far, from the first optimizer on

    @classmethod
    def settle(cls, configs: dict[str, Any], args: Any) -> None:
        """Refuse a controller that would have nothing to go by, and a pull on channels that hold the codes of QAT."""
        if configs["quant"]:
            clash = "Sparsity training and QAT are both on: ranges are made for a model that nothing pulls to zero"
            raise UsageError(f"{clash}. Make it sparse first, then train with quant.*.")
        if configs["sparsity"].auto and not args.val:
            steers = "'sparsity.auto=True' steers by the accuracy after each epoch, which 'val=False' leaves out"
            raise UsageError(f"{steers}. Give one of them only.")

    def check(self, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
        """Refuse a model of which nothing can become sparse, and a schedule outside of the run."""
        Sparsifier(model, self.cfg, self.prune, self.epochs, self.pruned_at)

    def build(self, trainer: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the sparsifier, put its pulls around the steps of the optimizer, and switch off weight decay for it."""
        if self.sparsifier is None:
            if not trainer.resume and not is_pruned(model):
                note(model, parent=fingerprint(model))  # channels keep their meaning: its own teacher stays comparable
            self.sparsifier = Sparsifier(model, self.cfg, self.prune, trainer.epochs, self.pruned_at)
            if RANK in {-1, 0}:
                pull = f"{self.cfg.method}, pull {self.sparsifier.coefficient:g} over the run"
                LOGGER.info(f"{colorstr('sparsity: ')}{pull}, {len(self.sparsifier.groups)} groups that can be pruned")
        penalised = self.sparsifier.penalised()
        chosen = {p for n, p in model.named_parameters() if n in penalised}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if p in chosen]
            if moved and group.get("weight_decay"):
                group["params"] = [p for p in group["params"] if p not in chosen]
                optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0, "param_group": "sparse"})
        # Hooks of the optimizer see gradients behind unscaling and clipping, and are not run when AMP skips a step.
        optimizer.register_step_post_hook(  # behind so many of the batches of an epoch
            lambda *_: self.sparsifier.shrink(live(trainer), trainer.exact.waiting / len(trainer.train_loader))
        )

    def criterion(self, trainer: Any, base: Any) -> Any:
        """Log the penalty beside the losses."""
        return LoggedLoss(base, items=lambda: {"sparsity_loss": self.sparsifier.penalty(live(trainer)).detach()})

    def before_epoch(self, trainer: Any) -> None:
        """Set the pull of an epoch; while there is one, best.pt is the newest: fitness prefers the least sparse."""
        self.sparsifier.set_epoch(trainer.epoch)
        self.sparsifier.keep_up(live(trainer), len(trainer.train_loader))
        if self.sparsifier.pull > 0:
            forget_best(trainer)

    def after_surgery(self, trainer: Any, kept: dict[str, dict[str, list[int]]]) -> None:
        """Find the groups anew."""
        self.sparsifier.rebuild(live(trainer))

    def after_step(self, trainer: Any) -> None:
        """Make zeros of the live model zeros of the EMA, where they would only fade."""
        self.sparsifier.follow(live(trainer), trainer.ema.ema)

    def columns(self, trainer: Any) -> dict[str, float]:
        """Look at the model, steer the pull, write history and pictures, and return what has been reached."""
        sparsifier, ema, cfg = self.sparsifier, trainer.ema.ema, self.cfg
        record = monitor.observe(
            ema, cfg, self.prune, epoch=trainer.epoch, coefficient=sparsifier.coefficient,
            penalty=float(sparsifier.penalty(ema)), imgsz=input_size(trainer, ema), pull=sparsifier.pull,
        )  # fmt: skip
        record["fitness"] = float(trainer.fitness or 0.0)
        if sparsifier.controller:  # of `sparsity.auto`
            sparsifier.controller.update(record["share"], record["fitness"])
        held = record["collapsed"] = sparsifier.protected
        summary = {"method": cfg.method, "coefficient": sparsifier.coefficient, "epochs": trainer.epoch + 1,
                   "threshold": cfg.threshold, "share": record["share"], "speedup": record["speedup"],
                   "held": bool(held)}  # fmt: skip
        for model in (live(trainer), ema):
            note(model, sparsity=summary)
        history = monitor.noted(trainer.save_dir, record)
        for picture in monitor.plot(history, trainer.save_dir):
            trainer.on_plot(picture)
        if trainer.epoch + 1 == trainer.epochs:
            told = monitor.conclusion(history["epochs"], held, cfg.max_drop)
            LOGGER.info(f"{colorstr('sparsity: ')}{told}")
        return {f"sparsity/{k}": record[k] for k in ("share", "speedup", "coefficient", "pull")}

    def state(self) -> dict[str, Any]:
        """Return the state of the sparsifier."""
        return {"sparsity": self.sparsifier.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put the state of the sparsifier back."""
        self.sparsifier.load_state_dict(state["sparsity"])
