# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning in a training run, before it, between epochs and after steps, and the probes that its plans look with."""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest, note, save_model, set_tripwire
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import prune_epochs, pruned_share
from yolo_ext.data.check import calibration_images, letterbox_batches
from yolo_ext.pruning import masks
from yolo_ext.pruning.evidence import Probes
from yolo_ext.pruning.graph import Kept
from yolo_ext.pruning.plan import read_sensitivity
from yolo_ext.pruning.prune import check_plan, decide, prune_with_plan, remember_dense
from yolo_ext.pruning.surgery import apply_plan, cut_run
from yolo_ext.reporting.tables import ABSENT, comparison_rows, judged, loss
from yolo_ext.stock.accuracy import accuracy, lost
from yolo_ext.stock.context import quiet, recalibrate, replaced
from yolo_ext.stock.load import labelled_dataset
from yolo_ext.stock.model import METRIC
from yolo_ext.stock.trainer import agreed, forget_best
from yolo_ext.training.technique import Technique, input_size, live

PREFIX = "prune: "
ROUNDS, SECONDS = 60, 20.0  # of one latency comparison
NOTES_MB = 0.02  # that a training keeps beside the weights


class Prune(Technique):
    """Channels or weights go, before the first epoch or between epochs; a masked model keeps its masks in any case."""

    key = "prune"

    def __init__(self, configs: dict[str, Any], args: Any) -> None:
        super().__init__(configs, args)
        self.epochs = prune_epochs(cfg=self.cfg, epochs=args.epochs)  # that start with a pruning
        self.ready = not configs["sparsity"]  # or the run makes the model sparse first
        self.masks: Any = None  # what stays zero, by layer

    @classmethod
    def settle(cls, configs: dict[str, Any], args: Any) -> None:
        """Refuse what cannot be combined with surgery while training, and epochs outside of the run."""
        cfg = configs["prune"]
        if not prune_epochs(cfg=cfg, epochs=args.epochs) or cfg.kind != "structured":
            return
        if configs["quant"]:
            clash = "Pruning while training and QAT are both on: ranges belong to the channels that are there"
            order = "Prune first, then train with quant.*; `yolo-ext compress` does both in this order."
            raise UsageError(f"{clash}. {order}")
        if compiled := getattr(args, "compile", False):
            raise UsageError(f"'compile={compiled}': pruning while training changes the model. Leave compile out.")

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
            if not self.epochs:
                return self._pruned(trainer, model)
            record = {k: v for k, v in manifest(model).prune.items() if k != "steps"}  # those of an earlier run
            note(model, dense=None, **({"prune": record} if record else {"parent": fingerprint(model)}))
        elif not self.epochs:
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
        size = input_size(trainer, model)
        info = {**trainer.data, "single_cls": trainer.args.single_cls} if trainer.data else {}
        return make_probes(info, size, self.cfg, trainer.args.task, model)

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
        done = {s["epoch"] for s in manifest(trainer.ema.ema).prune.get("steps", [])}  # of a run that resumes
        if trainer.epoch not in done and self._cut(trainer, step) and trainer.epoch > 0 and RANK in {-1, 0}:
            with replaced(trainer, save_period=-1, epoch=trainer.epoch - 1):  # the epoch before, no numbered copy
                trainer.save_model()

    def _cut(self, trainer: Any, step: int) -> bool:
        """Prune everything that the run holds by one plan, and tell whether channels were removed."""
        model, ema, cfg, steps = live(trainer), trainer.ema.ema, self.cfg, len(self.epochs)
        probes, size = self._probes(trainer, ema), input_size(trainer, ema)
        if not manifest(ema).dense:
            remember_dense(ema, cfg, probes, size)
            note(model, dense=manifest(ema).dense)
        chosen = agreed(lambda: decide(_copy_of_ema(trainer), cfg, step, steps, trainer.epoch, probes, size))
        said = f"{colorstr(PREFIX)}step {step}/{steps}"
        if chosen is None:
            LOGGER.info(f"{said}: nothing to remove yet")
            return False
        kept, record = chosen
        cut_run(model, trainer.ema, trainer.optimizer, kept, record)
        self.start(trainer)  # the masks of the shapes that are left
        stock.rewrap(trainer)
        if probes.images and cfg.recalibrate:
            for m in (model, ema):
                recalibrate(m, probes.images())
        forget_best(trainer)
        last, dense = record["steps"][-1], manifest(ema).dense
        left = f"{int(last['params']):,} parameters, {100 * last['gflops'] / dense['gflops']:.1f} % of the FLOPs"
        LOGGER.info(f"{said} before epoch {trainer.epoch + 1}: {left}")
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


def _copy_of_ema(trainer: Any) -> nn.Module:
    """Return a copy of the EMA in which the layers that the user froze are frozen, and no others."""
    model = deepcopy(trainer.ema.ema).float()
    for p, own in zip(model.parameters(), live(trainer).parameters()):
        p.requires_grad_(own.requires_grad)
    return model


# Probes ---------------------------------------------------------------------------------------------------------------
def make_probes(
    info: dict[str, Any], imgsz: int, cfg: PruneConfig, task: str, base: nn.Module | None = None, batch: int = 16
) -> Probes:
    """Make what a pruning plan may ask for of checked data, without any only `speed`; labels are read as by `base`."""
    speed = partial(_speed, imgsz=imgsz, runtime=cfg.runtime)
    if not info:
        return Probes(speed=speed)

    device = torch.device("cpu") if base is None else next(base.parameters()).device
    read = partial(labelled_batches, info, imgsz, seed=cfg.seed, task=task, base=base, batch=batch)

    @cache  # they stay on that device
    def labelled() -> list[dict[str, Any]]:
        return [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in read(cfg.images)]

    def images() -> Iterator[torch.Tensor]:
        n = cfg.recalibrate or cfg.images
        if task == "classify":  # seen cropped, not letterboxed
            return (b["img"] for b in read(n))
        chosen = calibration_images(info["train"], None, cfg.seed, at_most=n)  # those of the val split too
        return letterbox_batches(chosen, imgsz, batch, channels=info.get("channels", 3))

    data = Path(info["train"]).parent if task == "classify" else info.get("yaml_file")
    worth = partial(accuracy, data=data, imgsz=imgsz, batch=batch, device=device)
    return Probes(batches=labelled, images=images, accuracy=worth, speed=speed)


def labelled_batches(
    info: dict[str, Any], imgsz: int, n: int, seed: int, task: str, base: nn.Module | None = None, batch: int = 16
) -> Iterator[dict[str, Any]]:
    """Yield up to `n` labelled train images, (B, C, imgsz, imgsz) in 0..1, as the criterion of `base` takes them."""
    chosen = {p.resolve() for p in calibration_images(info["train"], None, seed, at_most=n)}
    args = getattr(base, "args", None) or {}
    given = args if isinstance(args, dict) else vars(args)
    stride = stock.max_stride(base) if base is not None else 32
    dataset, files = labelled_dataset(info, task, imgsz, batch, stride, given)
    places = [i for i, file in enumerate(files) if file.resolve() in chosen]
    if not places:
        raise UsageError(f"None of the {len(chosen)} chosen train images has usable labels. Mend the train split.")
    for found in DataLoader(Subset(dataset, places), batch, collate_fn=getattr(dataset, "collate_fn", None)):
        image = found["img"]
        yield {**found, "img": image.float() if image.is_floating_point() else image.float() / 255}


def budget_checks(
    cfg: PruneConfig | None, before: Mapping[str, Any], after: Mapping[str, Any],
    speed: Mapping[str, Any] | None = None, max_drop: float | None = None, confidence: float | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Return how a result holds budgets: of its pruning, and the accuracy in total (by `changes` with `confidence`)."""
    checks, row = [], judged(comparison_rows(before, after))
    if max_drop and row and row.before != ABSENT:
        bounds = [-c["low"] for c in changes if confidence and c["name"] in METRIC]
        most, how = (max(bounds), f"at most, confidence {confidence:g}; ") if bounds else (loss(row), "")
        checks.append((f"Accuracy lost in total ({how}max_drop)", most, max_drop, most <= max_drop + 1e-6))
    if cfg and cfg.max_drop and (drop := lost(before, after)) is not None:
        checks.append(("Accuracy lost by pruning (prune.max_drop)", drop, cfg.max_drop, drop <= cfg.max_drop + 1e-6))
    if cfg and cfg.size_mb and (size := after.get("size_mb")):
        checks.append(("MB of the .pt (prune.size_mb)", size, cfg.size_mb, size <= 1.01 * cfg.size_mb + NOTES_MB))
    if cfg and cfg.latency and cfg.runtime == "ort" and speed:
        enough = speed["p90"] >= 0.95 * cfg.latency  # as near as the trials have come
        checks.append(("Speed-up in ONNX Runtime (prune.latency)", speed["ratio"], cfg.latency, enough))
    return [dict(zip(("name", "value", "limit", "passed"), c)) for c in checks]


def _speed(dense: nn.Module, pruned: nn.Module, imgsz: int, runtime: str) -> float:
    """Return the latency ratio of two models in a runtime, on one thread, taking turns."""
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.deployment.latency import bench, speedup

    write, suffix = (partial(export_onnx, imgsz=imgsz), ".onnx") if runtime == "ort" else (save_model, ".pt")
    with tempfile.TemporaryDirectory() as folder, quiet():
        models = (("dense", dense), ("pruned", pruned))
        files = {name: write(model, Path(folder) / f"{name}{suffix}") for name, model in models}
        found = bench(files, imgsz, rounds=ROUNDS, seconds=SECONDS)
    return speedup(found["dense"], found["pruned"])["ratio"]
