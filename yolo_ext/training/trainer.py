# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Trainers: one thin mixin in front of each stock Ultralytics trainer, and the same by callback for any other."""

from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, YAML, colorstr

from yolo_ext import runs, stock
from yolo_ext.checkpoint import TRIPWIRE, atomic_write, finalize, hand_on, is_pruned, note, whole
from yolo_ext.core.config import EXT_DEFAULTS, as_plain, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.lock import hold
from yolo_ext.core.log import log_to, logged, resumes
from yolo_ext.core.options import lasting
from yolo_ext.stock import trainer as engine
from yolo_ext.stock.context import brief, cfg2dict, replaced
from yolo_ext.stock.safety import safely
from yolo_ext.training.distill import Distill
from yolo_ext.training.prune import Prune
from yolo_ext.training.quant import Quant
from yolo_ext.training.resume import SIDECAR, Exact, Trained, clear
from yolo_ext.training.sparse import Sparse
from yolo_ext.training.technique import Technique, live

OWN = {  # keys beside the techniques: whether final checkpoints keep the state of the optimizer, the user's layers, and
    "save_optimizer": False, "modules": None,
    "max_drop": None, "contract": None, "confidence": None, "base_accuracy": None,  # what a result is held to
    "inputs": None,  # what a run began with, by name
}  # fmt: skip
OURS = ("kd_", "sparsity_")  # how names of our losses begin
BEHIND: Any = object  # for type checkers: the trainer of Ultralytics that is behind the mixin
TECHNIQUES: tuple[type[Technique], ...] = (Prune, Sparse, Distill, Quant)  # in the order in which they act


def techniques_of(configs: dict[str, Any], args: Any) -> tuple[Technique, ...]:
    """Return the techniques of a run as they act one behind the other; set what follows from them."""
    for cls in reversed(TECHNIQUES):  # QAT may bring a teacher
        if configs[cls.key]:
            cls.settle(configs, args)
    return tuple(cls(configs, args) for cls in TECHNIQUES if configs[cls.key] or cls is Prune)


class CompressionMixin(BEHIND):
    """Sparsity training, pruning, distillation and quantization-aware training for any Ultralytics trainer.

    Options come as four more keys, each a dict or a config dataclass: `sparsity`, `prune`, `distill`, `quant`. With
    ``save_optimizer=True`` best.pt and last.pt keep the state of the optimizer.

    Example:
        >>> from ultralytics import YOLO
        >>> import yolo_ext
        >>> YOLO("best.pt").train(trainer=yolo_ext.DetectionTrainer, data="data.yaml", prune={"speedup": 2})
    """

    args: Any
    metrics: dict[str, Any]

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None) -> None:
        """Enlarge the base config by our keys, which Ultralytics then carries through args.yaml, DDP and resume."""
        overrides = dict(overrides or {})
        given = as_plain(parse({k: overrides.pop(k) for k in EXT_DEFAULTS if k in overrides}))
        overrides.update({k: v for k, v in given.items() if v is not None})
        # A run that goes on may say less or more than before, which Ultralytics would warn of.
        verbose = overrides.pop("verbose", None) if overrides.get("resume") else overrides.get("verbose")
        stock.register_layers(overrides.get("modules"))
        with logged(), engine.choosing(hold), brief(verbose), safely():
            super().__init__({**EXT_DEFAULTS, **OWN, **cfg2dict(cfg)}, overrides, _callbacks)
        self.args.verbose = self.args.verbose if verbose is None else verbose
        self.setup_compression({k: getattr(self.args, k, None) for k in EXT_DEFAULTS})

    def setup_compression(self, options: dict[str, Any]) -> None:
        """Take the options of a run by key; called once, by the constructor or by `attach`."""
        engine.check_trainer(super())
        self.compression = parse(lasting(options) if self.resume else options)
        self.techniques = techniques_of(self.compression, self.args)
        self.exact = Exact()
        vars(self.args).update(as_plain(self.compression))
        if RANK in {-1, 0}:
            with whole(self.save_dir / "args.yaml") as part:
                YAML.save(part, vars(self.args))

    def technique(self, key: str) -> Any:
        """Return the technique of a key of options, None where it is off."""
        return next((t for t in self.techniques if t.key == key), None)

    # Model ----------------------------------------------------------------------------------------------------------
    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Return the student: a pruned model keeps its widths; pruning and fake-quant are put in as asked."""
        if weights is not None:
            stock.refuse_untrainable(weights)
        if weights is not None and is_pruned(weights):
            stock.check_fit(weights, self.data, (self.args.model, self.args.data))  # pruned, it cannot be built anew
            model = deepcopy(weights).float().requires_grad_(True).train()
            model.criterion = None
            if RANK in {-1, 0}:
                n = sum(p.numel() for p in model.parameters())
                LOGGER.info(f"{colorstr('prune: ')}keeping the pruned widths ({n:,} parameters)")
        elif isinstance(cfg, dict) and cfg["backbone"][0][2] == TRIPWIRE:
            lost = f"'pretrained=False' would build '{self.args.model}' anew and without its pruned widths"
            raise UsageError(f"{lost}. Leave it out, or train the YAML of the dense model.")
        else:
            with brief(self.args.verbose):
                model = super().get_model(cfg, weights, verbose)
            if weights is not None:
                hand_on(weights, model)
        if not self.compression["quant"] or (self.compression["prune"] and not self.resume):
            note(model, quant=None)  # the model moves away from the ranges of an earlier run
        for t in self.techniques:
            model = t.put_in(self, model, weights)
        return model

    def as_stock(self, model: nn.Module) -> nn.Module:
        """Return a model in training, or a copy of it, as one of stock classes."""
        for t in self.techniques:
            model = t.as_stock(model)
        return model

    def train(self) -> Any:
        """Train as usual, with a log in the run folder."""
        with logged(), engine.plain_labels(), brief(self.args.verbose), safely():
            if RANK in {-1, 0}:
                log_to(self.save_dir)
                resumes("train", self.save_dir, f"weights/{SIDECAR.format('*')}")
            return super().train()

    def _do_train(self) -> None:
        """Train as usual; of a run that was stopped behind its last epoch only the end is left to do."""
        try:
            super()._do_train()
        except Trained:
            LOGGER.info(f"{colorstr('resume: ')}the last epoch is done already: only the final files are written")
            self.epoch -= 1
            self.final_eval()
            if RANK in {-1, 0}:
                if self.args.plots:
                    self.plot_metrics()
                super().run_callbacks("on_train_end")

    # Life cycle -----------------------------------------------------------------------------------------------------
    def run_callbacks(self, event: str) -> None:
        """Hook our work into the life cycle, then run the user's callbacks."""
        if hasattr(self, "exact"):  # that is, not while the trainer is still being made
            if event == "on_pretrain_routine_end":
                self._start()
            elif event == "on_train_epoch_start":
                self.exact.before_epoch(self)
                for t in self.techniques:
                    t.before_epoch(self)
            elif event == "on_train_batch_start":
                self.exact.before_batch()
            elif event == "on_train_batch_end":
                self.exact.after_batch(self)
        super().run_callbacks(event)

    def _start(self) -> None:
        model: Any = live(self)
        for t in reversed(self.techniques):
            if type(t).criterion is not Technique.criterion:
                model.criterion = getattr(model, "criterion", None) or model.init_criterion()
                model.criterion = t.criterion(self, model.criterion)
        images = {"train": engine.files_of(self.train_loader), "val": engine.files_of(self.test_loader)}
        now = runs.inputs(as_plain(self.compression), images, self.data["names"])
        if self.resume:
            runs.refuse_others(self.save_dir, getattr(self.args, "inputs", None), now)
        self.args.inputs = now
        self.exact.restore(self)
        for t in self.techniques:
            t.start(self)

    def _model_train(self) -> None:
        """Put the model into training mode, but for what techniques hold."""
        super()._model_train()
        for t in self.techniques:
            t.train_mode(self)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build the stock optimizer and our groups of parameters, which the scheduler needs this early."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        for t in self.techniques:
            t.build(self, live(self), optimizer)
        return optimizer

    def build_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Build the stock dataset, where training needs no labels one without any too."""
        with engine.labels_optional(any(not t.needs_labels for t in self.techniques)), safely():
            return super().build_dataset(*args, **kwargs)

    def auto_batch(self, *args: Any, **kwargs: Any) -> int:
        """Find the batch size that fits into memory together with what techniques bring."""
        with ExitStack() as held:
            for t in self.techniques:
                held.enter_context(t.batch_search(self))
            return super().auto_batch(*args, **kwargs)

    def preprocess_batch(self, batch: dict) -> dict:
        """Prepare a batch, behind the warmup that may have set `accumulate`."""
        self.exact.prepare_batch(self)
        return super().preprocess_batch(batch)

    def optimizer_step(self) -> None:
        """Step as usual, with the techniques around it."""
        for t in self.techniques:
            t.before_step(self)
        super().optimizer_step()
        for t in self.techniques:
            t.after_step(self)
        self.exact.after_step(self)

    # Checkpoints ----------------------------------------------------------------------------------------------------
    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume as usual, and from behind the last epoch too."""
        epochs = max(self.epochs, (ckpt or {}).get("epoch", -1) + 2)
        with replaced(self, epochs=epochs):
            super().resume_training(ckpt)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        super()._load_checkpoint_state(ckpt)
        self.fitness = (ckpt.get("train_metrics") or {}).get("fitness")
        for t in self.techniques:
            t.reload(self, ckpt)

    def get_validator(self) -> Any:
        """Build the validator from arguments without our keys, which its own check would refuse."""
        own = {k: v for k, v in vars(self.args).items() if k not in {*EXT_DEFAULTS, *OWN}}
        with replaced(self, args=type(self.args)(**own)):
            return super().get_validator()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the row of an epoch, with what techniques have to show."""
        found = {k: v for t in self.techniques for k, v in t.columns(self).items()}
        self.metrics = {**self.metrics, **found}
        row = {**metrics, **found}
        if self.csv.exists():  # perhaps begun by a version with columns for what validation does not compute
            columns = self.csv.read_text(encoding="utf-8").partition("\n")[0].split(",")[2:]
            row = {k: row.get(k, 0) for k in columns}
        super().save_metrics(row)

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """Name losses as usual, but not ours in validation, which does not compute them: no column is all zero."""
        own = tuple(f"val/{start}" for start in OURS)
        found = super().label_loss_items(loss_items, prefix)
        kept = [k for k in found if not k.startswith(own)]
        return {k: found[k] for k in kept} if isinstance(found, dict) else kept

    def save_model(self) -> bool:
        """Save checkpoints of stock classes only, and beside them what an exact resume needs."""
        self.exact.save(self)
        with replaced(self.ema, ema=self.as_stock(self.ema.ema)), replaced(Path, write_bytes=atomic_write):
            saved = super().save_model()
        clear(self.wdir, keep=self.exact.path)
        return saved

    def progress_string(self) -> str:
        """Return the header of the progress bar, in whose 11 columns our loss names need their short form."""
        short = tuple(n.removesuffix("_loss") if n.startswith(OURS) else n for n in self.loss_names)
        with replaced(self, loss_names=short):
            return super().progress_string()

    def final_eval(self) -> None:
        """Strip and validate as usual, and repeat the manifest at the top of the final checkpoints."""

        def final(path: Path) -> Any:
            return next((found for t in self.techniques if (found := t.final(path)) is not path), path)

        reading = engine.Reading(self.validator, read=final)
        kept = getattr(self.args, "save_optimizer", False)  # without it after `attach`
        with engine.whole_final_files(finalize, kept), replaced(self, validator=reading), safely():
            super().final_eval()
        if RANK in {-1, 0}:
            clear(self.wdir)


class DetectionTrainer(CompressionMixin, engine.tasks.detect.DetectionTrainer):
    """Detection with compression."""


class SegmentationTrainer(CompressionMixin, engine.tasks.segment.SegmentationTrainer):
    """Instance segmentation with compression."""


class PoseTrainer(CompressionMixin, engine.tasks.pose.PoseTrainer):
    """Pose estimation with compression."""


class OBBTrainer(CompressionMixin, engine.tasks.obb.OBBTrainer):
    """Oriented boxes with compression."""


class ClassificationTrainer(CompressionMixin, engine.tasks.classify.ClassificationTrainer):
    """Classification with compression."""


TRAINERS: dict[str, type] = {
    "detect": DetectionTrainer, "segment": SegmentationTrainer, "pose": PoseTrainer, "obb": OBBTrainer,
    "classify": ClassificationTrainer,
}  # fmt: skip
STOCK = {cls.__bases__[1]: cls for cls in TRAINERS.values()}


def trainer_for(task: str) -> type:
    """Return the trainer of an Ultralytics task, such as ``detect``; raise `UsageError` where there is none."""
    if task not in TRAINERS:
        raise UsageError(f"There is no compression trainer for task '{task}'. Legal: {', '.join(TRAINERS)}.")
    return TRAINERS[task]


def attach(model: Any, **options: Any) -> Any:
    """Attach compression to an Ultralytics model; its next ``model.train(...)`` compresses, and later ones do not.

    A later one is a plain training, which keeps the widths of a model that has been pruned.

    Args:
        model: An `ultralytics.YOLO`.
        options: `sparsity`, `prune`, `distill` and `quant`, each a dict or a config dataclass. A run that is resumed
            goes on with the options that it was started with.
    Returns: The same model.
    Raises: `UsageError`: If an option is unknown or illegal, or, when training starts, on several GPUs.

    Example:
        >>> model = YOLO("best.pt")
        >>> yolo_ext.attach(model, prune={"speedup": 2}, distill={"teacher": "self"})
        >>> model.train(data="data.yaml", epochs=30)
    """
    stock.check_stock()
    parse(options)

    def on_pretrain_routine_start(trainer: Any) -> None:
        if isinstance(trainer, CompressionMixin) or not (options or trainer.resume or is_pruned(model.model)):
            return  # our trainer has options of its own, and a plain model needs none of ours
        if trainer.world_size > 1:
            other = "On several GPUs use model.train(trainer=yolo_ext.trainer_for(task))."
            raise UsageError(f"attach() works on one device. {other}")
        engine.extend(trainer, CompressionMixin, STOCK)
        saved = {k: getattr(trainer.args, k, None) for k in EXT_DEFAULTS} if trainer.resume else options
        trainer.setup_compression({**EXT_DEFAULTS, **saved})
        trainer.add_callback("on_pretrain_routine_end", lambda _: options.clear())  # from here on the model is another

    model.add_callback("on_pretrain_routine_start", on_pretrain_routine_start)
    return model
