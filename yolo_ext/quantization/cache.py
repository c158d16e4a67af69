# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ranges of earlier calibrations, so that the same model, plan and images are not calibrated twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, USER_CONFIG_DIR

from yolo_ext import __version__
from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.data.calibration import list_hash
from yolo_ext.quantization.layers import ADDED
from yolo_ext.quantization.spec import Plan, State, plan_of

FOLDER = Path(USER_CONFIG_DIR) / "yolo_ext" / "calibration"
KEPT = 50  # newest files


def key(model: nn.Module, plan: Plan, images: Iterable[Path], imgsz: int, cfg: Any) -> str:
    """Return the key of a calibration: a hash of all that its ranges depend on.

    Args:
        model: The model, with or without fake quantizers.
        plan: What is quantized and how.
        images: Calibration images.
        imgsz: Side of the square input in pixels.
        cfg: Quantization options, a `QuantConfig`.

    Returns:
        A SHA-256 in hex; empty if the weights are changed along the way, which ranges alone cannot bring back.
    """
    if cfg.bn or cfg.bias_correction or cfg.adaround:
        return ""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.endswith(ADDED):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    specs = {path: {site: spec.as_dict() for site, spec in sites.items()} for path, sites in plan.items()}
    rest = [__version__, specs, list_hash(list(images)), imgsz, cfg.observer, cfg.weight_observer]
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def cached(key: str) -> State | None:
    """Return the specs and ranges of an earlier calibration, or None if there are none that can be read.

    Args:
        key: What `key` returned.
    """
    try:
        state: State = json.loads(_file(key).read_text(encoding="utf-8"))
        return state if plan_of(state) else None
    except (OSError, ValueError, TypeError, AttributeError, UsageError):  # a broken file is as good as none
        return None


def remember(key: str, state: State) -> None:
    """Keep the specs and ranges of a calibration and forget the oldest ones; without a place to write, do nothing.

    Args:
        key: What `key` returned; nothing is kept for an empty one.
        state: What `calibrate` returned.
    """
    if not key:
        return
    try:
        atomic_write(_file(key), json.dumps(state))
        for old in sorted(FOLDER.glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)[KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as e:
        LOGGER.warning(f"Cannot keep the calibration for another time: {e}")


def _file(key: str) -> Path:
    return FOLDER / f"{key}.json"
