# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning in a training run: before it, between epochs, and the zeros of masks after each optimizer step."""

import logging
from copy import deepcopy
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest, note, set_tripwire
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import prune_epochs, pruned_share
from yolo_ext.pruning import during, masks
from yolo_ext.pruning.evidence import Probes
from yolo_ext.pruning.graph import Kept
from yolo_ext.pruning.plan import read_sensitivity
from yolo_ext.pruning.prune import check_plan, prune_with_plan
from yolo_ext.pruning.surgery import apply_plan
from yolo_ext.stock.context import quiet, recalibrate
from yolo_ext.stock.trainer import agreed, as_of_last_epoch, forget_best
from yolo_ext.training.probes import make_probes
from yolo_ext.training.technique import Technique, input_size, live

PREFIX = "prune: "


def pruning_epochs(configs: dict[str, Any], args: Any) -> list[int]:
    """Return the epochs that start with a pruning, counted from 0."""
    return prune_epochs(cfg=configs["prune"], epochs=args.epochs) if configs["prune"] else []


class Prune(Technique):
    """Channels or weights go, before the first epoch or between epochs; a masked model keeps its masks in any case.

    Attributes:
        epochs: Epochs that start with a pruning.
        masks: What stays zero, by layer, None where nothing is masked.
    """

    key = "prune"

    def __init__(self, configs: dict[str, Any], args: Any) -> None:
        """Work out at which epochs to prune."""
        super().__init__(configs, args)
        self.epochs = pruning_epochs(configs, args)
        self.ready = not configs["sparsity"]  # or the run makes the model sparse first
        self.masks: Any = None

    @classmethod
    def settle(cls, configs: dict[str, Any], args: Any) -> None:
        """Refuse what cannot be combined with surgery while training, and epochs outside of the run."""
        cfg = configs["prune"]
        if not pruning_epochs(configs, args) or cfg.kind != "structured":
            return
        if configs["quant"]:
            raise UsageError(
                "Pruning while training and QAT are both on: ranges belong to the channels that are there. Prune "
                "first, then train with quant.*; `yolo-ext compress` does both in this order."
            )
        if compiled := getattr(args, "compile", False):
            raise UsageError(
                f"'compile={compiled}' is set, but pruning while training changes the model. Leave it out."
            )

    def check(self, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
        """Refuse a target that is out of reach without having to be measured."""
        if not self.cfg:
            return
        with quiet(logging.ERROR):  # the pruning itself will say the same once more
            check_plan(model, self.cfg, imgsz, ready=self.ready)
        if self.cfg.sensitivity:
            read_sensitivity(self.cfg.sensitivity)
        if self.cfg.kind != "structured":
            masks.zero_weights(model, self.cfg, 0.0)

    # Before the first epoch -----------------------------------------------------------------------------------------
    def put_in(self, trainer: Any, model: nn.Module, weights: nn.Module | None) -> nn.Module:
        """Prune the student before the first epoch, or prepare it for being pruned later."""
        if not self.cfg or trainer.resume:
            return model
        if weights is None:
            LOGGER.warning(f"{colorstr(PREFIX)}the model has no trained weights, so magnitudes say nothing")
        stock.freeze(model, trainer.args.freeze)
        if self.cfg.kind == "structured":
            return _prepared(model) if self.epochs else self._pruned(trainer, model)
        if not self.epochs:
            masks.zero_weights(model, self.cfg, self.cfg.ratio)
        return model

    def _pruned(self, trainer: Any, model: nn.Module) -> nn.Module:
        """Return a pruned copy on the CPU, from where other processes receive it by pickle."""
        model = model.eval().to(trainer.device)
        probes, size = self._probes(trainer, model), input_size(trainer, model)

        def decide() -> tuple[Kept, dict[str, Any]]:
            found, kept = prune_with_plan(model, self.cfg, size, probes)
            return kept, dict(manifest(found).prune)

        kept, record = agreed(decide)
        pruned = apply_plan(deepcopy(model), kept)
        note(pruned, prune=record)
        set_tripwire(pruned)
        pruned.train()
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
        head = type(stock.detection_head(model)).__name__
        LOGGER.info(f"{colorstr(PREFIX)}{before:,} -> {after:,} parameters ({head} outputs unchanged)")
        if self.cfg.recalibrate and probes.images:
            n = recalibrate(pruned, probes.images())
            LOGGER.info(f"{colorstr(PREFIX)}BatchNorm re-estimated on {n} train images")
        return pruned.cpu()

    def _probes(self, trainer: Any, model: nn.Module) -> Probes:
        """Return the ways in which pruning may look at data and clock during this run."""
        size, task = input_size(trainer, model), trainer.args.task
        return make_probes(trainer.data, size, self.cfg, task, device=trainer.device)

    def start(self, trainer: Any) -> None:
        """Take the zeros of a masked model for its masks."""
        if manifest(live(trainer)).masks:
            self.masks = masks.capture(live(trainer))

    # While training -------------------------------------------------------------------------------------------------
    def before_epoch(self, trainer: Any) -> None:
        """Prune if this epoch is one that prunes, then write last.pt anew: recovery from NaN needs its shapes."""
        if trainer.epoch not in self.epochs:
            return
        step = self.epochs.index(trainer.epoch) + 1
        if self.cfg.kind != "structured":
            self._mask(trainer, pruned_share(step=step, steps=len(self.epochs), kind=self.cfg.schedule))
            return
        done = manifest(trainer.ema.ema).prune.get("steps", [])
        if trainer.epoch in [s["epoch"] for s in done]:
            return  # a run that resumes, or repeats this epoch
        if self._cut(trainer, step) and trainer.epoch > 0 and RANK in {-1, 0}:
            with as_of_last_epoch(trainer):
                trainer.save_model()

    def _cut(self, trainer: Any, step: int) -> bool:
        """Prune everything that the run holds by one plan, and tell whether channels were removed."""
        model, ema, cfg, steps = live(trainer), trainer.ema.ema, self.cfg, len(self.epochs)
        probes, size = self._probes(trainer, ema), input_size(trainer, ema)
        if not manifest(ema).dense:
            during.remember_dense(ema, cfg, probes, size)
            note(model, dense=manifest(ema).dense)
        chosen = agreed(lambda: during.decide(_copy_of_ema(trainer), cfg, step, steps, trainer.epoch, probes, size))
        said = f"{colorstr(PREFIX)}step {step}/{steps}"
        if chosen is None:
            LOGGER.info(f"{said}: nothing to remove yet")
            return False
        kept, record = chosen
        during.cut_run(model, trainer.ema, trainer.optimizer, kept, record)
        stock.rewrap(trainer)
        if probes.images and cfg.recalibrate:
            for m in (model, ema):
                recalibrate(m, probes.images())
        forget_best(trainer)
        last, dense = record["steps"][-1], manifest(ema).dense
        LOGGER.info(
            f"{said} before epoch {trainer.epoch + 1}: {int(last['params']):,} parameters, "
            f"{100 * last['gflops'] / dense['gflops']:.1f} % of the FLOPs"
        )
        for technique in trainer.techniques:
            technique.after_surgery(trainer, kept)
        return True

    def _mask(self, trainer: Any, part: float) -> None:
        """Zero more weights of the live model and the EMA, the same ones."""
        chosen, ema = _copy_of_ema(trainer), trainer.ema.ema
        masks.zero_weights(chosen, self.cfg, part * (self.cfg.ratio or 0.5))
        self.masks = masks.capture(chosen)
        for model in (live(trainer), ema):
            masks.apply(self.masks, model)
            set_tripwire(model)
        forget_best(trainer)  # which has fewer zeros
        zeros = 100 * masks.sparsity(ema)["masked"]
        LOGGER.info(f"{colorstr(PREFIX)}before epoch {trainer.epoch + 1}: {zeros:.1f} % of the weights are zero")

    def after_step(self, trainer: Any) -> None:
        """Zero the masked weights again, in the live model and in the EMA."""
        if self.masks is not None:
            masks.apply(self.masks, live(trainer), trainer.optimizer)
            masks.apply(self.masks, trainer.ema.ema)


def _prepared(model: nn.Module) -> nn.Module:
    """Note what a later pruning step has to know about the model that the run starts with."""
    if record := manifest(model).prune:
        note(model, prune={k: v for k, v in record.items() if k != "steps"}, dense=None)  # those of an earlier run
    else:
        note(model, parent=fingerprint(model), dense=None)
    return model


def _copy_of_ema(trainer: Any) -> nn.Module:
    """Return a copy of the EMA in which the layers that the user froze are frozen, and no others."""
    model = deepcopy(trainer.ema.ema).float()
    for p, own in zip(model.parameters(), live(trainer).parameters()):
        p.requires_grad_(own.requires_grad)
    return model
