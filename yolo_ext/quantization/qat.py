# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""From a float model to a calibrated fake-quantized one and back, and from what Ultralytics' own training quantized."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, colorstr

from yolo_ext.checkpoint import manifest, note
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import QuantConfig
from yolo_ext.data.check import calibration_images, letterbox_batches, list_hash
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.adaround import adaround
from yolo_ext.quantization.calibrate import calibrate, calibrate_rest, known
from yolo_ext.quantization.layers import channel_rows, weight_rows
from yolo_ext.quantization.plan import listed_sites, make_plan
from yolo_ext.quantization.spec import PROFILES, Profile, Spec, State, convert, plan_of, resolve_profile
from yolo_ext.stock import seen_by, task_of
from yolo_ext.stock.load import raw_checkpoint

MOMENTUM = 0.01  # of the moving average of ranges while training updates them
BATCH = 16  # calibration images at once
MERGE_BATCHES = 4  # of them, on which merged branches get their BatchNorm statistics
INPUT, WEIGHT = "input_quantizer", "weight_quantizer"  # of ModelOpt


def prepare(model: nn.Module, cfg: QuantConfig, data: dict[str, Any], imgsz: int) -> dict[str, str]:
    """Insert fake-quant into a float model in place, with ranges from its manifest or else from calibration.

    Branches are merged, and AdaRound, if `cfg` asks for it, changes weights. Calibration images come from the train
    split of a checked dataset dict, unless `cfg.source` is given. Returned is path -> reason of the layers left float.
    """
    profile = resolve_profile(cfg.profile)
    fq.refuse_quantized(model)
    before = manifest(model).quant
    options = {"exclude": list(cfg.exclude), "config_list": list(cfg.config_list)}
    if before and before["profile"] == profile.name and before["options"] == options:
        fq.insert_state(model, before["state"])
        return dict(before["float"])
    images = calibration_images(cfg.source or data, cfg.calib, cfg.seed)
    batches = partial(letterbox_batches, images, imgsz, BATCH, **seen_by(model))
    fq.merge_branches(model, islice(batches(), MERGE_BATCHES))
    kept_float = fq.insert_fake_quant(model, profile, cfg.exclude, cfg.config_list)
    if any(listed_sites(entry, profile)[1] for entry in cfg.config_list):
        needed = "outputs too, without which ONNX Runtime has no integer convolutions"
        LOGGER.info(f"{colorstr('quantize: ')}quantizing beside the listed inputs and weights the {needed}")
    LOGGER.info(f"{colorstr('quantize: ')}calibrating {profile.name} on {len(images)} images of {imgsz} px")
    calibrate(model, batches(), cfg.observer, cfg.weight_observer, math.ceil(len(images) / BATCH))
    if cfg.adaround:
        adaround(model, batches(), cfg.adaround)
        calibrate(model, batches(), cfg.observer, None)  # another weight range would lose the roundings
    calibration = {
        "images": len(images), "hash": list_hash(images), "observer": cfg.observer, "seed": cfg.seed,
        "weights": cfg.weight_observer, "imgsz": imgsz,
    }  # fmt: skip
    note(model, quant={"profile": profile.name, "options": options, "float": kept_float, "calibration": calibration})
    return kept_float


def strip(model: nn.Module) -> nn.Module:
    """Remove fake-quant in place and write specs and ranges, in full precision, into the manifest."""
    note(model, quant={**manifest(model).quant, "state": fq.get_state(model)})
    return fq.strip_fake_quant(model)


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Replace the weights that are quantized, in place, by the values of their codes."""
    # Training leaves many close to a border between codes (Nagel et al., 2022), which fp16 would move across.
    for _, layer, _ in fq.quantized_layers(model):
        if layer.weight_spec is None:
            continue
        before, weight = weight_rows(layer).abs().amax(1), layer.quantized_weight()
        layer.weight.copy_(weight)
        after = weight_rows(layer).abs().amax(1)
        layer.weight_ratio.mul_(torch.where(after > 0, before / after, 1.0))  # the scale stays


# Its checkpoints hold a stock model and ranges of layer inputs and weights: 8 bits, symmetric, weights per channel, as
# `tensorrt` executes them; ONNX Runtime needs the ranges of the outputs besides.
def is_modelopt(ckpt: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint dict comes from Ultralytics' quantization-aware training."""
    return bool(isinstance(ckpt.get("modelopt"), Mapping) and ckpt["modelopt"].get("ranges"))


def load_modelopt(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the float32 stock model in a checkpoint of Ultralytics' QAT, and the checkpoint for `import_state`."""
    ckpt = raw_checkpoint(path)
    model = ckpt.get("ema") or ckpt.get("model")
    if not is_modelopt(ckpt) or not isinstance(model, nn.Module):
        raise UsageError(f"'{path}' is no checkpoint of Ultralytics' quantization-aware training (quantize=8).")
    model = getattr(model, "student_model", model).float().eval().requires_grad_(True)
    model.args = {**DEFAULT_CFG_DICT, **ckpt.get("train_args", {})}
    model.task = getattr(model, "task", None) or task_of(model)
    return model, ckpt


def import_state(ckpt: Mapping[str, Any], model: nn.Module) -> State:
    """Return the ranges of a ModelOpt checkpoint as a state of the `tensorrt` profile; transposed layers stay float."""
    # ModelOpt also has the code -128; here weights end at -127. Merged branches get the input range of the branches and
    # new weight ranges, because theirs do not add up.
    ranges: dict[str, dict[str, torch.Tensor]] = {}  # layer -> quantizer -> largest absolute values
    for key, value in ckpt["modelopt"]["ranges"].items():
        path, _, quantizer = key.removesuffix("._amax").rpartition(".")
        if key.endswith("._amax"):
            ranges.setdefault(path, {})[quantizer] = value.float()
    steps = ckpt["modelopt"].get("modelopt", {}).get("modelopt_state_dict", [])
    settings = steps[-1][1].get("metadata", {}).get("quantizer_state", {}) if steps else {}
    layers = {path: m for path, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    state: State = {}
    for path, layer in layers.items():
        block = f"{path.rpartition('.')[0]}." if path.endswith(".conv") else "\0"
        merged = [p for p in ranges if p.startswith(block) and p not in layers]
        sources = [p for p in (*merged, path) if INPUT in ranges.get(p, {}) and _enabled(settings, p)]
        if not sources:
            continue
        limit = max(float(ranges[p][INPUT].max()) for p in sources)
        weight = Spec(symmetric=True, per_channel=True).as_dict()
        state[path] = {"input": {**Spec(symmetric=True).as_dict(), "lo": -limit, "hi": limit}, "weight": weight}
        if not merged:
            largest = channel_rows(layer).abs().amax(1)
            ratio = torch.where(largest > 0, ranges[path][WEIGHT].flatten() / largest, 1.0)
            state[path]["weight"]["ratio"] = ratio.tolist()
    if not state:
        raise UsageError("None of the layers that ModelOpt quantized is in this model. Give that of the checkpoint.")
    return state


def complete(model: nn.Module, state: State, profile: Profile, batches: Iterable[torch.Tensor]) -> State:
    """Insert what `import_state` returned as the profile wants it, and calibrate on images where that lacks a range."""
    if not profile.output:
        done = convert(state, PROFILES["tensorrt"], profile)  # by whose rules ModelOpt trains
        fq.insert_state(model, done)
        return done
    others = [path for path in make_plan(model, profile)[0] if path not in state and path.endswith(".conv")]
    plan, _ = make_plan(model, profile, others)
    given = known(plan, state)
    for path, sites in given.items():
        if "weight" in sites:
            sites["weight"] = {**sites["weight"], "bits": plan[path]["weight"].bits}
        plan[path] |= plan_of({path: sites})[path]
    done = calibrate_rest(model, plan, given, batches)
    fq.load_state(model, done)
    return done


def _enabled(settings: Mapping[str, Mapping[str, Any]], path: str) -> bool:
    """Tell whether both quantizers of a layer are on, and refuse those of other formats."""
    found = [settings.get(f"{path}.{quantizer}", {}) for quantizer in (INPUT, WEIGHT)]
    if any(s.get("_disabled") for s in found):
        return False
    if wrong := [s for s in found if s.get("_num_bits", 8) != 8 or s.get("_unsigned")]:
        raise UsageError(f"'{path}' was trained with {wrong[0].get('_num_bits')} bits. Legal: signed 8-bit integers.")
    return True
