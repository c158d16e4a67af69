# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Distillation in a training run: teachers and adapters, the batch size, and a look at all of them beforehand."""

from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext import runs, stock
from yolo_ext.checkpoint import fingerprint
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import listed
from yolo_ext.core.schedules import prune_epochs
from yolo_ext.distillation.criterion import DistillationLoss, Distiller
from yolo_ext.distillation.teacher import make_guides, with_classes
from yolo_ext.distillation.terms import Facts, doubts, student_seconds, table, teacher_cost
from yolo_ext.pruning.surgery import follow
from yolo_ext.stock.accuracy import accuracy, score
from yolo_ext.stock.context import undisturbed
from yolo_ext.stock.load import load_model
from yolo_ext.stock.trainer import along
from yolo_ext.training.technique import Technique, live

PREFIX = "distill: "
_known: dict[tuple[str, str, int], float] = {}  # accuracy by weights, data and size, within this process


def remember(weights: nn.Module, data: Any, imgsz: int, accuracy: float | None) -> None:
    """Note an accuracy that has been measured already, so that the preflight need not do it again."""
    if accuracy is not None:
        _known[fingerprint(weights), str(Path(data).resolve()), imgsz] = accuracy


class Distill(Technique):
    """Teachers are asked along with the student, whose loss grows by what they say."""

    key = "distill"

    def __init__(self, configs: dict[str, Any], args: Any) -> None:
        super().__init__(configs, args)
        self.shrinks = bool(prune_epochs(cfg=configs["prune"], epochs=args.epochs))
        self.alone = not any(configs[key] for key in ("prune", "sparsity", "quant"))  # nothing else changes the student
        self.distiller: Any = None  # teachers and adapters, from the first optimizer on

    @classmethod
    def settle(cls, configs: dict[str, Any], args: Any) -> None:
        """Refuse a second distillation, by Ultralytics itself; `self` means the file of the model before this run."""
        cfg, model = configs["distill"], str(args.model)
        if theirs := getattr(args, "distill_model", None):
            both = f"'distill_model={theirs}' of Ultralytics and 'distill.*' of yolo_ext are both set"
            raise UsageError(f"{both}. Keep one of them; only distill.* works with a pruned student.")
        if cfg.teacher == "self":
            if not model.endswith(".pt"):
                lacks = f"'distill.teacher=self' needs a trained model, but 'model={model}' has no weights"
                raise UsageError(f"{lacks}. Give model=best.pt, or distill.teacher=bigger.pt.")
            configs["distill"] = replace(cfg, teacher=str(Path(model).resolve()) if Path(model).exists() else model)

    def check(self, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
        """Refuse teachers that do not fit, and losses that do not work with them."""
        model.names = info["names"]
        Distiller(model, self.cfg, torch.device("cpu"), shrinks=self.shrinks)

    def batch_search(self, trainer: Any) -> AbstractContextManager[Any]:
        """Run the teachers along."""
        guides = make_guides(self.cfg, deepcopy(live(trainer)).eval(), trainer.device)

        def ask(images: torch.Tensor) -> list[Any]:
            with torch.autocast(trainer.device.type, enabled=False):
                return [guide.ask(images) for guide in guides]

        return along(trainer.model, ask)

    def build(self, trainer: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the teachers, and give their adapters a parameter group."""
        if self.distiller is None:
            self.distiller = Distiller(model, self.cfg, trainer.device, shrinks=self.shrinks)
            LOGGER.info(f"{colorstr(PREFIX)}{self.distiller.summary()}")
        if adapters := list(self.distiller.adapters.parameters()):
            like = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            like.update(weight_decay=0.0, param_group="distill")
            like["lr"] = min(g["lr"] for g in optimizer.param_groups)  # MuSGD triples it for parts of the head
            optimizer.add_param_group({"params": adapters, **like})

    def criterion(self, trainer: Any, base: Any) -> Any:
        """Say what is going to teach, and add the losses of the distiller."""
        self.distiller.begin(trainer)
        if not trainer.resume:  # which has seen all this
            with undisturbed(trainer.device):
                self._preflight(trainer)
        return DistillationLoss(base, distiller=self.distiller)

    def before_epoch(self, trainer: Any) -> None:
        """Set the weights of this epoch."""
        self.distiller.set_epoch(trainer.epoch, trainer.epochs, trainer.args.close_mosaic)

    def after_surgery(self, trainer: Any, kept: dict[str, dict[str, list[int]]]) -> None:
        """Cut the student's side of the adapters."""
        cut_adapters(self.distiller, live(trainer), trainer.optimizer, kept)

    def before_step(self, trainer: Any) -> None:
        """Clip the adapters apart from the student, and keep them equal on all devices."""
        self.distiller.sync()
        if adapters := list(self.distiller.adapters.parameters()):
            nn.utils.clip_grad_norm_(adapters, max_norm=10.0 * trainer.scaler.get_scale())

    def state(self) -> dict[str, Any]:
        """Return the weights of the adapters."""
        return {"adapters": self.distiller.adapters.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put the weights of the adapters back."""
        self.distiller.adapters.load_state_dict(state["adapters"])

    def _preflight(self, trainer: Any) -> None:
        """Say what teachers and student are worth and cost, and warn of teachers that will hardly help."""
        facts = student, *found = self._facts(trainer)
        if RANK not in {-1, 0}:
            return
        metric = stock.metric(trainer.args.task)
        LOGGER.info("\n" + table(facts, metric))
        for teacher in found:
            if Path(teacher.name).resolve() == Path(str(trainer.args.model)).resolve():
                teacher = replace(teacher, accuracy=None)  # teaches what the student is going to lose
                if self.alone:
                    same = "the teacher is the model itself, which nothing prunes or quantizes: it has nothing to teach"
                    LOGGER.warning(f"{colorstr(PREFIX)}{same}. Give distill.teacher=bigger.pt.")
            for doubt in doubts(student, teacher, metric):
                LOGGER.warning(f"{colorstr(PREFIX)}{doubt}.")
        if not self.cfg.preflight:
            return
        model, guides, every = live(trainer), self.distiller.guides, self.cfg.every
        batch, size = max(trainer.batch_size // max(trainer.world_size, 1), 1), trainer.args.imgsz
        images = torch.rand(batch, stock.input_channels(model), size, size, device=trainer.device)
        plain = student_seconds(model, images, torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp)
        taught, held = map(sum, zip(*(teacher_cost(guide, images) for guide in guides)))
        LOGGER.info(
            f"{colorstr(PREFIX)}{batch} images at {size} px: student {1e3 * plain:.0f} ms without its loss, teachers "
            f"{1e3 * taught:.0f} ms{f' in each {every}th batch' if every > 1 else ''}, so a step takes about "
            f"{1 + taught / every / plain:.2f} times as long; teachers hold {held:.0f} MB "
            f"({'weights and activations' if trainer.device.type == 'cuda' else 'weights'})"
        )

    def _facts(self, trainer: Any) -> list[Facts]:
        """Return what is known of the student and of each teacher that is not its running average."""
        cfg, size, names = self.cfg, trainer.args.imgsz, live(trainer).names
        models, other = {"student": (trainer.as_stock(deepcopy(live(trainer))), size)}, set()
        for name in listed(cfg.teacher):
            if name == "ema":
                continue
            teacher = load_model(name)[0]
            if cfg.logits or {*teacher.names.values()} & {*names.values()}:
                teacher = with_classes(teacher, names, name)
            else:  # whose features teach all the same, but whose boxes have no meaning here
                other.add(name)
            models[name] = (teacher, cfg.imgsz or size)
        if cfg.preflight and RANK in {-1, 0}:
            LOGGER.info(f"{colorstr(PREFIX)}measuring on the val split (distill.preflight=False leaves it out)")
        found = []
        for name, (model, imgsz) in models.items():
            figures = runs.model_figures(model, None, imgsz)
            worth = None
            if cfg.preflight and name not in other:
                key = (fingerprint(model), str(Path(trainer.args.data).resolve()), imgsz)
                if key not in _known:  # on several GPUs all take part, and one knows
                    measured = accuracy(model, like=trainer.validator, imgsz=imgsz, rect=False, cache=False)
                    remember(model, trainer.args.data, imgsz, score(measured))
                worth = _known.get(key)
            found.append(Facts(name, imgsz, figures["params"], figures["gflops"], worth))
        return found


def cut_adapters(distiller: Any, model: nn.Module, optimizer: Any, kept: dict[str, dict[str, list[int]]]) -> None:
    """Cut the adapters of a pruned student, and their moments in the optimizer, to the channels that are left."""
    paths = stock.level_inputs(model)
    for adapter, level in zip(distiller.adapters, distiller.levels):
        index = kept.get(paths[level], {}).get("in")
        if index is not None:
            old = getattr(adapter.conv, "weight", None)
            adapter.shrink(index)
            if old is not None:
                follow(optimizer, [(old, adapter.conv.weight, [(1, index)])])
