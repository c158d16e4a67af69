# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a technique may do to a training run: the hooks that the trainer calls on each of them, in one order."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from yolo_ext import stock


class Technique:
    """One technique in one training run: its hooks, called in the order below; it holds what it needs between them."""

    key: ClassVar[str]  # of its options
    needs_labels = True  # of the train split

    def __init__(self, configs: dict[str, Any], args: Any) -> None:
        """Take settled options by key, and the arguments of Ultralytics."""
        self.cfg = configs[self.key]  # None where it is off

    # Before there is a trainer ------------------------------------------------------------------------------------
    @classmethod
    def settle(cls, configs: dict[str, Any], args: Any) -> None:
        """Refuse options that contradict each other; set in `configs` and `args` what follows from the others."""

    def check(self, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
        """Refuse what model (which may be changed), checked dataset dict and image size (pixels) do not allow."""

    # Before the first epoch ---------------------------------------------------------------------------------------
    def put_in(self, trainer: Any, model: nn.Module, weights: nn.Module | None) -> nn.Module:
        """Return the student on the CPU as it is to be trained; `weights` are what it was made from, if anything."""
        return model

    def batch_search(self, trainer: Any) -> AbstractContextManager[Any]:
        """Hold what a training step holds besides, for as long as Ultralytics looks for the batch size that fits."""
        return nullcontext()

    def build(self, trainer: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make what is trained along, and give it its part of the optimizer: of a second one after out of memory."""

    def criterion(self, trainer: Any, base: Any) -> Any:
        """Return a criterion around `base`; the last technique comes first, and so innermost."""
        return base

    def start(self, trainer: Any) -> None:
        """Look at the run once more, resumed or not, before its first epoch."""

    # While training -----------------------------------------------------------------------------------------------
    def before_epoch(self, trainer: Any) -> None:
        """Do what is due before an epoch; one that is started again comes here again."""

    def train_mode(self, trainer: Any) -> None:
        """Change modes of modules after the model has been put into training mode."""

    def after_surgery(self, trainer: Any, kept: dict[str, dict[str, list[int]]]) -> None:
        """Follow the student, of which only these channels are left by layer and dimension."""

    def before_step(self, trainer: Any) -> None:
        """Do what is due between the backward pass and the optimizer step, with gradients still scaled."""

    def after_step(self, trainer: Any) -> None:
        """Do what is due after the optimizer step and the update of the EMA."""

    def columns(self, trainer: Any) -> dict[str, float]:
        """Return what results.csv and the loggers are to show of an epoch that has been validated."""
        return {}

    # Checkpoints --------------------------------------------------------------------------------------------------
    def as_stock(self, model: nn.Module) -> nn.Module:
        """Return a model of stock classes for a checkpoint; a model that is one already comes back itself."""
        return model

    def inexact(self, ema: nn.Module) -> set[str]:
        """Return names of tensors that a checkpoint holds in another way than rounded to fp16."""
        return set()

    def state(self) -> dict[str, Any]:
        """Return by name what an exact resume needs: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; the dict holds more."""

    def reload(self, trainer: Any, ckpt: dict[str, Any]) -> None:
        """Set what goes with a checkpoint, to resume or after NaN; Ultralytics has loaded its tensors."""

    def final(self, path: Path) -> Path | nn.Module:
        """Return what the final validation of a checkpoint is to measure."""
        return path


def live(trainer: Any) -> nn.Module:
    """Return the model that is trained, not wrapped."""
    return unwrap_model(trainer.model)


def input_size(trainer: Any, model: nn.Module) -> int:
    """Return the image size in pixels as `_setup_train` is going to round it."""
    return stock.image_size(model, {}, trainer.args.imgsz, rounded=True)
