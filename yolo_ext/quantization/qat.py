# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization-aware training: PTQ is the starting point, ranges follow the data for a while, then stay."""

from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext.checkpoint import manifest
from yolo_ext.config import QuantConfig
from yolo_ext.data.calibration import calibration_images, letterbox_batches, list_hash
from yolo_ext.quantization.calibration import calibrate
from yolo_ext.quantization.fake_quant import get_ranges, insert_fake_quant, load_ranges, set_mode, strip_fake_quant
from yolo_ext.quantization.profiles import resolve_profile

MOMENTUM = 0.01  # of the moving average of ranges


def prepare(model: nn.Module, cfg: QuantConfig, data: dict[str, Any], imgsz: int) -> dict[str, str]:
    """Insert fake-quant into a model in place, with ranges from its manifest or else from calibration.

    Args:
        model: Float model of stock classes.
        cfg: Quantization options.
        data: Checked dataset dict; calibration images come from its train split unless `cfg.source` is given.
        imgsz: Side of the square input in pixels.

    Returns:
        Paths of the layers that stay float, with the reason.
    """
    profile = resolve_profile(cfg.profile)
    kept_float = insert_fake_quant(model, profile, tuple(cfg.exclude))
    known = manifest(model).get("quant")
    if known and known["profile"] == profile.name and known["exclude"] == list(cfg.exclude):
        load_ranges(model, known["ranges"])
        set_mode(model, "on")
        return kept_float
    images = calibration_images(cfg.source or data, cfg.calib)
    LOGGER.info(
        f"{colorstr('quantize: ')}calibrating {profile.name} on {len(images)} images ({list_hash(images)[:12]})"
    )
    calibrate(model, letterbox_batches(images, imgsz), cfg.observer)
    set_mode(model, "on")
    return kept_float


def strip(model: nn.Module, cfg: QuantConfig) -> nn.Module:
    """Remove fake-quant in place and write its ranges, in full precision, into the manifest."""
    ranges = get_ranges(model)
    strip_fake_quant(model)
    manifest(model)["quant"] = {
        "profile": resolve_profile(cfg.profile).name,
        "exclude": list(cfg.exclude),
        "ranges": ranges,
    }
    return model


def set_epoch(model: nn.Module, epoch: int, cfg: QuantConfig) -> None:
    """Let ranges follow the data in the first `cfg.observe_epochs` epochs, counted from 0, and fix them afterwards."""
    set_mode(model, "on", momentum=MOMENTUM if epoch < cfg.observe_epochs else 0.0)
