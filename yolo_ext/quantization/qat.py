# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""From a float model to a calibrated fake-quantized one and back, and what training with that does by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note
from yolo_ext.core.options import QuantConfig
from yolo_ext.data.calibration import calibration_images, letterbox_batches, list_hash
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.improve import adaround, correct_bias, reestimate_bn
from yolo_ext.quantization.layers import weight_rows
from yolo_ext.quantization.spec import plan_of, resolve_profile

MOMENTUM = 0.01  # of the moving average of ranges
BATCH = 16  # calibration images at once
MERGE_BATCHES = 4  # of them, on which merged branches get their BatchNorm statistics


def prepare(model: nn.Module, cfg: QuantConfig, data: dict[str, Any], imgsz: int) -> dict[str, str]:
    """Insert fake-quant into a model in place, with ranges from its manifest or else from calibration.

    Args:
        model: Float model of stock classes. Blocks of several branches are merged, and the improvements that `cfg` asks
            for change its weights.
        cfg: Quantization options.
        data: Checked dataset dict; calibration images come from its train split unless `cfg.source` is given.
        imgsz: Side of the square input in pixels.

    Returns:
        Paths of the layers that stay float, with the reason.

    Raises:
        UsageError: If there are no images, or an option matches nothing.
    """
    profile = resolve_profile(cfg.profile)
    fq.refuse_quantized(model)
    known = manifest(model).quant
    options = {"exclude": list(cfg.exclude), "config_list": list(cfg.config_list)}
    if known and known["profile"] == profile.name and known["options"] == options:
        replay(model, known)
        return known["float"]
    images = calibration_images(cfg.source or data, cfg.calib, cfg.seed)
    batches = partial(letterbox_batches, images, imgsz, BATCH, crop=stock.task_of(model) == "classify")
    fq.merge_branches(model, islice(batches(), MERGE_BATCHES))
    kept_float = fq.insert_fake_quant(model, profile, cfg.exclude, cfg.config_list)
    LOGGER.info(f"{colorstr('quantize: ')}calibrating {profile.name} on {len(images)} images of {imgsz} px")
    calibrate(model, batches(), cfg.observer, cfg.weight_observer, math.ceil(len(images) / BATCH))
    _improve(model, cfg, batches)
    fq.set_mode(model, "on")
    calibration = {
        "images": len(images), "hash": list_hash(images), "observer": cfg.observer, "seed": cfg.seed,
        "weights": cfg.weight_observer, "imgsz": imgsz,
    }  # fmt: skip
    note(model, quant={"profile": profile.name, "options": options, "float": kept_float, "calibration": calibration})
    return kept_float


def _improve(model: nn.Module, cfg: QuantConfig, batches: Callable[[], Iterable[torch.Tensor]]) -> None:
    """Do what the options ask for beyond ranges; where weights move, activations are measured once more."""
    if cfg.adaround:
        adaround(model, batches(), cfg.adaround)
    if cfg.bn:
        reestimate_bn(model, batches())
    if cfg.bias_correction:
        correct_bias(model, batches())
    if cfg.adaround or cfg.bn or cfg.bias_correction:
        calibrate(model, batches(), cfg.observer, None)  # another weight range would lose the roundings


def replay(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Insert what the entry `quant` of a manifest describes into the float model that carries it, exactly as it was."""
    fq.insert_plan(model, plan_of(record["state"]))
    fq.load_state(model, record["state"])
    fq.set_mode(model, "on")


def strip(model: nn.Module) -> nn.Module:
    """Remove fake-quant in place and write specs and ranges, in full precision, into the manifest."""
    state = fq.get_state(model)
    fq.strip_fake_quant(model)
    note(model, quant={**manifest(model).quant, "state": state})
    return model


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Replace the weights that are quantized, in place, by the values of their codes.

    Training leaves many weights close to the border between two codes (Nagel et al., "Overcoming Oscillations in
    Quantization-Aware Training", 2022), where rounding to fp16, in which checkpoints are kept, would move them across.
    """
    for _, layer, _ in fq.quantized_layers(model):
        if layer.weight_spec is None:
            continue
        before, weight = weight_rows(layer).abs().amax(1), layer.quantized_weight()
        layer.weight.copy_(weight)
        after = weight_rows(layer).abs().amax(1)
        layer.weight_ratio.mul_(torch.where(after > 0, before / after, 1.0))  # the scale stays


def observes(cfg: QuantConfig, epoch: int) -> bool:
    """Tell whether ranges follow the data in this epoch, counted from 0."""
    return epoch < cfg.observe_epochs


def set_epoch(model: nn.Module, epoch: int, cfg: QuantConfig) -> None:
    """Let ranges follow the data in the first `cfg.observe_epochs` epochs, counted from 0, and fix them afterwards."""
    fq.set_mode(model, "on", momentum=MOMENTUM if observes(cfg, epoch) else 0.0)
