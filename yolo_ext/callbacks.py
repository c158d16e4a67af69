# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The same techniques by callbacks, for a workflow that stays as it is."""

from __future__ import annotations

from typing import Any

from yolo_ext import stock
from yolo_ext.core.config import EXT_DEFAULTS, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.trainers import TRAINERS, CompressionMixin


def attach(model: Any, **options: Any) -> Any:
    """Attach compression to an Ultralytics model; its next ``model.train(...)`` compresses.

    Args:
        model: An `ultralytics.YOLO`.
        options: `sparsity`, `prune`, `distill` and `quant`, each a dict or a config dataclass. A run that is resumed
            goes on with the options that it was started with.

    Returns:
        The same model.

    Raises:
        UsageError: If an option is unknown or illegal, or, when training starts, on several GPUs.

    Example:
        >>> model = YOLO("best.pt")
        >>> yolo_ext.attach(model, prune={"speedup": 2}, distill={"teacher": "self"})
        >>> model.train(data="data.yaml", epochs=30)
    """
    stock.check_version()
    parse(options)

    def on_pretrain_routine_start(trainer: Any) -> None:
        if isinstance(trainer, CompressionMixin):
            return  # our trainer already has its own options
        if trainer.world_size > 1:
            raise UsageError(
                "attach() works on one device. On several GPUs use model.train(trainer=yolo_ext.trainer_for(task))."
            )
        stock = type(trainer)
        ours = next((t for t in TRAINERS.values() if t.__mro__[2] is stock), None)
        # This event fires while the stock trainer is being made, before it has a model: the right moment to extend it.
        trainer.__class__ = ours or type(f"Compression{stock.__name__}", (CompressionMixin, stock), {})
        saved = {k: getattr(trainer.args, k, None) for k in EXT_DEFAULTS} if trainer.resume else options
        trainer.setup_compression({**EXT_DEFAULTS, **saved})

    model.add_callback("on_pretrain_routine_start", on_pretrain_routine_start)
    return model
