# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Compression for stock Ultralytics YOLO: prune, distill, quantize, export, verify and measure.

Each command of `yolo-ext` is a function of the same name with the same keys, and returns a `Result`.
"""

# fmt: off
# isort: off
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported on its first use: torch and Ultralytics take seconds
    from yolo_ext.commands.compare import compare
    from yolo_ext.commands.compress import compress, demo, distill, prune, quantize, train
    from yolo_ext.commands.data import convert, split
    from yolo_ext.commands.deploy import export, verify
    from yolo_ext.commands.help import (
        checks, list_criteria, list_losses, list_observers, list_penalties, list_profiles, list_schedules,
    )
    from yolo_ext.commands.label import label, predict
    from yolo_ext.commands.measure import analyze, bench, sensitivity
    from yolo_ext.core.config import DistillConfig, PruneConfig, QuantConfig, SparsityConfig
    from yolo_ext.core.errors import CheckFailed, UsageError, YoloExtError
    from yolo_ext.pruning.pruner import on_yolo, save_pruned
    from yolo_ext.reporting.result import Result
    from yolo_ext.training.trainer import (
        ClassificationTrainer, CompressionMixin, DetectionTrainer, OBBTrainer, PoseTrainer, SegmentationTrainer,
        attach, trainer_for,
    )

__version__ = "0.1.0"
__all__ = [
    "CheckFailed", "ClassificationTrainer", "CompressionMixin", "DetectionTrainer", "DistillConfig", "OBBTrainer",
    "PoseTrainer", "PruneConfig", "QuantConfig", "Result", "SegmentationTrainer", "SparsityConfig", "UsageError",
    "YoloExtError", "__version__", "analyze", "attach", "bench", "checks", "compare", "compress", "convert", "demo",
    "distill", "export", "label", "list_criteria", "list_losses", "list_observers", "list_penalties", "list_profiles",
    "list_schedules", "on_yolo", "predict", "prune", "quantize", "save_pruned", "sensitivity", "split", "train",
    "trainer_for", "verify",
]
_HOMES = ("core.errors", "core.config", "commands.compress", "commands.deploy", "commands.measure", "commands.data",
          "commands.help", "commands.label", "commands.compare", "reporting.result", "pruning.pruner",
          "training.trainer")  # the lightest first


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'yolo_ext' has no attribute '{name}'")
    homes = (importlib.import_module(f"yolo_ext.{home}") for home in _HOMES)
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
