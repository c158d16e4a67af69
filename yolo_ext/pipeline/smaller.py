# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The model that pruning has to beat: the same family, narrower, of the same FLOPs, trained from scratch."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import make_divisible

from yolo_ext import stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.errors import UsageError

STEP = 8 / 1024  # between two multiples of this no layer of up to 1024 channels changes
# Positions of channel counts that Ultralytics does not multiply by the width.
UNSCALED = {"RepNCSPELAN4": (1, 2), "ELAN1": (1, 2), "SPPELAN": (1,), "CBLinear": (0,),
            "HGStem": (0, 1), "HGBlock": (0, 1)}  # fmt: skip


def smaller_yaml(model: nn.Module, target: float, imgsz: int) -> dict[str, Any]:
    """Return the YAML of the same family and depth whose GFLOPs at `imgsz` pixels are nearest to `target`.

    When every width has more, it is the narrowest that works; when the full width has fewer, that one.
    """
    full: dict[str, Any] = dict(deepcopy(manifest(model).yaml or model.yaml))
    full["nc"] = len(model.names)  # of a classifier the YAML may be out of date
    widest = _width(full)
    widths = [*(k * STEP for k in range(1, int(widest / STEP) + 1) if k * STEP < widest), widest]
    found: dict[float, float] = {}

    def measure(width: float) -> float:
        found[width] = stock.gflops(_build(model, _scaled(full, width)), imgsz)
        return found[width]

    try:
        measure(widest)
    except Exception as e:  # whatever the modules of a custom YAML raise
        raise UsageError(f"Ultralytics cannot build the YAML of this model ({type(e).__name__}: {e}).") from e
    low, high = -1, len(widths) - 1
    while high - low > 1:
        middle = (low + high) // 2
        try:
            low, high = (middle, high) if measure(widths[middle]) < target else (low, middle)
        except Exception:  # the heads of an attention block do not divide every width
            del widths[middle]
            high -= 1
    return _scaled(full, min(found, key=lambda w: abs(found[w] - target)))


def smaller(model: nn.Module, target: float, imgsz: int) -> tuple[str, nn.Module]:
    """Build the model of `smaller_yaml` with random weights; return its name, such as ``yolov8n width 0.17``, too."""
    yaml = smaller_yaml(model, target, imgsz)
    return f"{Path(str(yaml.get('yaml_file', 'model'))).stem} width {_width(yaml):.2f}", _build(model, yaml)


def _scale(yaml: dict[str, Any]) -> str:
    return yaml.get("scale") or next(iter(yaml["scales"]))


def _width(yaml: dict[str, Any]) -> float:
    return float(yaml["scales"][_scale(yaml)][1] if yaml.get("scales") else yaml.get("width_multiple", 1.0))


def _scaled(full: dict[str, Any], width: float) -> dict[str, Any]:
    """Return a copy of a model dict with another width multiple."""
    yaml, share, most = deepcopy(full), width / _width(full), float("inf")
    if yaml.get("scales"):
        depth, _, most = yaml["scales"][_scale(yaml)]
        yaml["scales"] = {_scale(yaml): [depth, width, most]}
    else:
        yaml["width_multiple"] = width
    for _, _, module, args in yaml["backbone"] + yaml["head"]:
        for i in UNSCALED.get(module, ()):
            args[i] = _narrow(args[i], share)
        if module == "A2C2f" and share < 1:  # wants whole heads of 32 channels in half of its width
            wanted = max(64, int(min(args[0], most) * width / 64) * 64)
            args[0] = (wanted - 4) / width  # Ultralytics multiplies by the width and rounds up to 8
        if module == "TorchVision":
            args[2] = None  # its name of pretrained weights would be a download
    return yaml


def _narrow(channels: int | list[int], share: float) -> int | list[int]:
    if isinstance(channels, list):
        return [make_divisible(c * share, 8) for c in channels]
    return make_divisible(channels * share, 8)


def _build(model: nn.Module, yaml: dict[str, Any]) -> nn.Module:
    """Build a model of the same class without a trace in the log or in the global random generator."""
    level = LOGGER.level
    LOGGER.setLevel("ERROR")
    try:
        with torch.random.fork_rng(devices=[]):
            built = type(model)(deepcopy(yaml), ch=stock.input_channels(model), verbose=False)
    finally:
        LOGGER.setLevel(level)
    built.names = deepcopy(model.names)
    return built
