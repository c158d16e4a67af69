# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the other modules of this package take for granted in Ultralytics, checked once when a run starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import ultralytics
from ultralytics import cfg
from ultralytics.data import augment, build_yolo_dataset
from ultralytics.data import utils as data_utils
from ultralytics.data.dataset import ClassificationDataset
from ultralytics.engine import exporter
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv, Detect
from ultralytics.utils import checks, torch_utils

from yolo_ext.core.errors import UsageError
from yolo_ext.stock.model import SUPPORTED

# Each with the number of its positional arguments and the names of the others that ours pass on; methods count `self`.
CALLS: list[tuple[Callable[..., Any], int, tuple[str, ...]]] = [
    (tasks.load_checkpoint, 1, ()),
    (tasks.torch_safe_load, 1, ()),
    (tasks.yaml_model_load, 1, ()),
    (tasks.BaseModel.fuse, 1, ("verbose",)),
    (torch_utils.get_flops, 2, ()),
    (torch_utils.fuse_conv_and_bn, 2, ()),
    (cfg.get_cfg, 0, ("overrides",)),
    (cfg.cfg2dict, 1, ()),
    (cfg.get_save_dir, 1, ()),
    (cfg.merge_equals_args, 1, ()),
    (cfg.parse_key_value_pair, 1, ()),
    (cfg.entrypoint, 0, ()),
    (augment.LetterBox, 1, ("auto",)),
    (augment.CenterCrop, 1, ()),
    (data_utils.check_det_dataset, 1, ("autodownload",)),
    (data_utils.check_cls_dataset, 1, ()),
    (data_utils.img2label_paths, 1, ()),
    (build_yolo_dataset, 4, ("mode", "rect", "stride")),
    (ClassificationDataset, 0, ("root", "args", "augment", "prefix")),
    (BaseValidator, 0, ("dataloader", "save_dir", "args")),
    (BaseValidator.__call__, 1, ("model",)),
    (exporter.Exporter, 0, ("overrides",)),
    (exporter.NMSModel, 2, ()),
    (exporter.export_formats, 0, ()),
]
ATTRIBUTES: list[tuple[Any, tuple[str, ...]]] = [
    (Detect, ("shape", "export", "xyxy", "end2end")),  # cached anchors; what a head returns
    (tasks.DetectionModel, ("end2end",)),
    (Conv, ("forward", "forward_fuse")),
    (checks, ("AUTOINSTALL",)),
]


def check_stock() -> None:
    """Refuse an Ultralytics outside the tested range, or one that lacks what this package builds on.

    Raises:
        UsageError: With the command that installs a supported version.
    """
    low, high = SUPPORTED
    version = ultralytics.__version__
    mend = f"Run: pip install 'ultralytics>={low},<{high}'"
    if not checks.check_version(version, f">={low},<{high}"):
        raise UsageError(f"Ultralytics {version} is not supported. Legal: >={low},<{high}. {mend}")
    if missing := lacking():
        raise UsageError(
            f"Ultralytics {version} lacks what yolo_ext builds on, or has changed it: {', '.join(missing)}. {mend} "
            f"in a version that yolo_ext was tested with, or update yolo_ext."
        )


@cache
def lacking() -> list[str]:
    """Return what this Ultralytics lacks: functions that cannot be called as ours do, and attributes."""
    calls = [f"{f.__module__}.{f.__qualname__}()" for f, n, names in CALLS if not callable_with(f, n, names)]
    return calls + [f"{owner.__name__}.{a}" for owner, names in ATTRIBUTES for a in names if not hasattr(owner, a)]


def callable_with(function: Any, n: int, names: tuple[str, ...] = ()) -> bool:
    """Tell whether something can be called with `n` positional arguments and arguments of these names."""
    try:
        inspect.signature(function).bind(*range(n), **dict.fromkeys(names))
    except (TypeError, ValueError):
        return False
    return True
