# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Trainers: one thin mixin in front of each stock Ultralytics trainer."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.cfg import cfg2dict
from ultralytics.models.yolo import classify, detect, obb, pose, segment
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, YAML, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext import distill_loop, prune_loop, quant_loop, resume, sparse_loop, stock
from yolo_ext.checkpoint import TRIPWIRE, atomic_write, hand_on, is_pruned
from yolo_ext.core.config import EXT_DEFAULTS, as_plain, parse, stored
from yolo_ext.core.errors import UsageError
from yolo_ext.stock.trainer import LoggedLoss


class _AtomicPath(type(Path())):  # type: ignore[misc]
    """A path whose `write_bytes` leaves a whole file or the old one."""

    def write_bytes(self, data: Any) -> int:
        atomic_write(Path(str(self)), bytes(data))
        return len(data)


class CompressionMixin:
    """Sparsity training, pruning, distillation and quantization-aware training for any Ultralytics trainer.

    Options come as four more keys, each a dict or a config dataclass: `sparsity`, `prune`, `distill`, `quant`.

    Example:
        >>> from ultralytics import YOLO
        >>> import yolo_ext
        >>> YOLO("best.pt").train(trainer=yolo_ext.DetectionTrainer, data="data.yaml", prune={"speedup": 2})
    """

    # Set by the Ultralytics trainer behind this mixin.
    accumulate: int
    args: Any
    best_fitness: float | None
    data: dict[str, Any]
    device: torch.device
    ema: Any
    epoch: int
    epochs: int
    loss_names: tuple[str, ...]
    masks: Any
    metrics: dict[str, Any]
    model: Any
    prune_epochs: list[int]
    resume: bool
    save_dir: Path
    scaler: Any
    wdir: Path

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None) -> None:
        """Enlarge the base config by our keys, which Ultralytics then carries through args.yaml, DDP and resume.

        Raises:
            UsageError: If an option is unknown or illegal.
        """
        stock.check_version()
        overrides = dict(overrides or {})
        given = as_plain(parse({k: overrides.pop(k) for k in EXT_DEFAULTS if k in overrides}))
        overrides.update({k: v for k, v in given.items() if v is not None})
        super().__init__({**EXT_DEFAULTS, **cfg2dict(cfg)}, overrides, _callbacks)  # type: ignore[call-arg]
        self.setup_compression({k: getattr(self.args, k, None) for k in EXT_DEFAULTS})

    def setup_compression(self, options: dict[str, Any]) -> None:
        """Take the options of a run; called once, by the constructor or by `attach`.

        Args:
            options: `sparsity`, `prune`, `distill` and `quant`, dicts, dataclasses or None.
        """
        configs = self.compression = parse(stored(options) if self.resume else options)
        quant_loop.setup(self)
        refuse_two_distillations(configs["distill"], getattr(self.args, "distill_model", None))
        if configs["distill"] and configs["distill"].teacher == "self":
            configs["distill"] = replace(configs["distill"], teacher=self_teacher(str(self.args.model)))
        vars(self.args).update(as_plain(configs))
        self.distiller: Any = None
        self.sparsifier: Any = None
        self.cadence = resume.Cadence()
        prune_loop.setup(self)
        self._resumed: dict[str, Any] | None = None
        self._epoch = -1
        if RANK in {-1, 0}:
            YAML.save(self.save_dir / "args.yaml", vars(self.args))
        self.wdir = _AtomicPath(self.wdir)
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"

    # Model ----------------------------------------------------------------------------------------------------------
    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Return the student: a pruned model keeps its widths; pruning and fake-quant are put in as asked."""
        if weights is not None and is_pruned(weights):
            model = self._keep(weights)
        elif isinstance(cfg, dict) and cfg["backbone"][0][2] == TRIPWIRE:
            raise UsageError(
                f"'pretrained=False' would build '{self.args.model}' anew and without its pruned widths. "
                "Leave it out, or train the YAML of the dense model."
            )
        else:
            model = super().get_model(cfg, weights, verbose)  # type: ignore[misc]
            if weights is not None:
                hand_on(weights, model)
        if self.compression["prune"] and not self.resume:
            model = prune_loop.before_training(self, model, weights)
        quant_loop.insert(self, model)
        return model

    def _keep(self, weights: nn.Module) -> nn.Module:
        head, classes = stock.detection_head(weights), self.data["nc"]
        have = getattr(head, "nc", None) or head.linear.out_features
        if have != classes:
            raise UsageError(
                f"The pruned model knows {have} classes, '{self.args.data}' has {classes}. "
                "Train the dense model on these data first, then prune it."
            )
        model = deepcopy(weights).float().requires_grad_(True)
        model.criterion = None
        if RANK in {-1, 0}:
            n = sum(p.numel() for p in model.parameters())
            LOGGER.info(f"{colorstr('prune: ')}keeping the pruned widths ({n:,} parameters)")
        return model.train()

    def _stripped(self, model: nn.Module) -> nn.Module:
        return quant_loop.stripped(model)

    # Life cycle -----------------------------------------------------------------------------------------------------
    def run_callbacks(self, event: str) -> None:
        """Hook our work into the life cycle, then run the user's callbacks."""
        if hasattr(self, "compression"):
            if event == "on_pretrain_routine_end":
                self._before_training()
            elif event == "on_train_epoch_start":
                self._before_epoch()
            elif event == "on_train_batch_start":
                self.cadence.waiting += 1
            elif event == "on_train_batch_end":
                self.accumulate -= self.cadence.shift
        super().run_callbacks(event)  # type: ignore[misc]

    def _before_training(self) -> None:
        model = unwrap_model(self.model)
        if self.distiller is not None or self.sparsifier is not None:
            model.criterion = getattr(model, "criterion", None) or model.init_criterion()
        if self.distiller is not None:
            from yolo_ext.distillation.criterion import DistillationLoss

            self.distiller.begin(self)
            distill_loop.preflight(self)
            model.criterion = DistillationLoss(model.criterion, self.distiller)
        if self.sparsifier is not None:
            model.criterion = LoggedLoss(model.criterion, lambda: sparse_loop.items(self))
        self._resumed = resume.restore(self)
        prune_loop.capture_masks(self)
        if self.compression["quant"]:
            quant_loop.report_start(self)

    def _before_epoch(self) -> None:
        if self._resumed:
            resume.begin(self, self._resumed)
            self._resumed = None
        elif self.epoch == self._epoch:  # started again, out of memory or after NaN: gradients have been dropped
            self.cadence = resume.Cadence()
        self._epoch = self.epoch
        prune_loop.before_epoch(self)
        if self.sparsifier is not None:
            sparse_loop.before_epoch(self)
        if self.distiller is not None:
            self.distiller.set_epoch(self.epoch, self.epochs, self.args.close_mosaic)
        if self.compression["quant"]:
            quant_loop.before_epoch(self)

    def _model_train(self) -> None:
        """Put the model into training mode, but for BatchNorm that QAT has frozen."""
        super()._model_train()  # type: ignore[misc]
        if self.compression["quant"]:
            quant_loop.train_mode(self)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the stock optimizer and our groups of parameters, which the scheduler needs this early."""
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        if self.compression["sparsity"]:
            sparse_loop.attach(self, unwrap_model(model), optimizer)
        if self.compression["distill"]:
            distill_loop.attach(self, unwrap_model(model), optimizer)
        return optimizer

    def build_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Build the stock dataset, where QAT by features takes one without labels too."""
        with quant_loop.unlabelled(self):
            return super().build_dataset(*args, **kwargs)  # type: ignore[misc]

    def auto_batch(self, *args: Any, **kwargs: Any) -> int:
        """Find the batch size that fits into memory together with the teachers."""
        with distill_loop.teachers_along(self):
            return super().auto_batch(*args, **kwargs)  # type: ignore[misc]

    def preprocess_batch(self, batch: dict) -> dict:
        """Correct, after warmup may have set it, how many batches a resumed run accumulates until its first step."""
        self.accumulate += self.cadence.shift
        return super().preprocess_batch(batch)  # type: ignore[misc]

    def optimizer_step(self) -> None:
        """Clip the adapters apart from the student and keep them equal across ranks, then step as usual."""
        if self.distiller is not None:
            self.distiller.sync()
            if adapters := list(self.distiller.adapters.parameters()):
                torch.nn.utils.clip_grad_norm_(adapters, max_norm=10.0 * self.scaler.get_scale())
        if self.compression["quant"]:
            quant_loop.before_step(self)
        super().optimizer_step()  # type: ignore[misc]
        prune_loop.after_step(self)
        if self.sparsifier is not None:
            sparse_loop.after_step(self)
        resume.stepped(self)

    # Checkpoints ----------------------------------------------------------------------------------------------------
    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)  # type: ignore[misc]
        if self.compression["quant"]:
            quant_loop.reload(self, ckpt)

    def get_validator(self) -> Any:
        """Build the validator from arguments without our keys, which its own check would refuse."""
        own = self.args
        self.args = type(own)(**{k: v for k, v in vars(own).items() if k not in EXT_DEFAULTS})
        try:
            return super().get_validator()  # type: ignore[misc]
        finally:
            self.args = own

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the row of an epoch, with what sparsity training has reached."""
        if self.sparsifier is not None:
            found = sparse_loop.after_epoch(self)
            self.metrics = {**self.metrics, **found}
            metrics = {**metrics, **found}
        super().save_metrics(metrics)  # type: ignore[misc]

    def save_model(self) -> bool:
        """Save checkpoints of stock classes only, and beside them what an exact resume needs."""
        resume.save(self)
        live = self.ema.ema
        if self.compression["quant"]:
            self.ema.ema = quant_loop.stripped(live)
        try:
            saved = super().save_model()  # type: ignore[misc]
        finally:
            self.ema.ema = live
        resume.clear(self, keep=self.epoch)
        return saved

    def progress_string(self) -> str:
        """Return the header of the progress bar, in whose 11 columns our loss names need their short form."""
        full = self.loss_names
        self.loss_names = tuple(n.removesuffix("_loss") if n.startswith(("kd_", "sparsity_")) else n for n in full)
        try:
            return super().progress_string()  # type: ignore[misc]
        finally:
            self.loss_names = full

    def final_eval(self) -> None:
        """Strip and validate as usual, and repeat the manifest at the top of the final checkpoints."""
        with resume.whole_final_files(), quant_loop.quantized_validation(self):
            super().final_eval()  # type: ignore[misc]
        if RANK in {-1, 0}:
            resume.clear(self)


def refuse_two_distillations(ours: Any, theirs: Any) -> None:
    """Refuse `distill` beside `distill_model` of Ultralytics.

    Raises:
        UsageError: If both are given.
    """
    if ours and theirs:
        raise UsageError(
            f"'distill_model={theirs}' of Ultralytics and 'distill.*' of yolo_ext are both set. "
            "Keep one of them; only distill.* works with a pruned student."
        )


def self_teacher(model: str) -> str:
    """Return the teacher that `distill.teacher=self` means: the model as it is before this run.

    Args:
        model: What is going to be trained.

    Raises:
        UsageError: If it has no trained weights.
    """
    if not model.endswith(".pt"):
        raise UsageError(
            f"'distill.teacher=self' needs a trained model, but 'model={model}' has no weights. "
            "Give model=best.pt, or distill.teacher=bigger.pt."
        )
    return str(Path(model).resolve()) if Path(model).exists() else model


class DetectionTrainer(CompressionMixin, detect.DetectionTrainer):
    """Detection with compression."""


class SegmentationTrainer(CompressionMixin, segment.SegmentationTrainer):
    """Instance segmentation with compression."""


class PoseTrainer(CompressionMixin, pose.PoseTrainer):
    """Pose estimation with compression."""


class OBBTrainer(CompressionMixin, obb.OBBTrainer):
    """Oriented boxes with compression."""


class ClassificationTrainer(CompressionMixin, classify.ClassificationTrainer):
    """Classification with compression."""


TRAINERS: dict[str, type] = {
    "detect": DetectionTrainer,
    "segment": SegmentationTrainer,
    "pose": PoseTrainer,
    "obb": OBBTrainer,
    "classify": ClassificationTrainer,
}


def trainer_for(task: str) -> type:
    """Return the trainer of a task.

    Args:
        task: An Ultralytics task name.

    Raises:
        UsageError: If there is none for it.
    """
    if task not in TRAINERS:
        raise UsageError(f"There is no compression trainer for task '{task}'. Legal: {', '.join(TRAINERS)}.")
    return TRAINERS[task]
