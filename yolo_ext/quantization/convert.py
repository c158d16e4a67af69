# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Give what was quantized for one runtime, or by Ultralytics' own training, to another that then computes the same.

A checkpoint of Ultralytics' own quantization-aware training (ModelOpt, which need not be installed) holds a stock model
and, beside it, the ranges of the inputs and weights of its layers: 8 bits, symmetric, weights per channel. That is what
the `tensorrt` profile executes; ONNX Runtime needs the ranges of the outputs besides, which `complete` measures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, colorstr

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.calibrate import calibrate_rest, known
from yolo_ext.quantization.fake_quant import insert_plan, load_state, set_mode
from yolo_ext.quantization.plan import make_plan
from yolo_ext.quantization.spec import PROFILES, Profile, Spec, State, plan_of
from yolo_ext.stock import task_of
from yolo_ext.stock.load import raw_checkpoint

IMAGE = ((0.0, 1.0), (-1.0, 1.0))  # ranges of the layer that reads the image
SOURCE = "tensorrt"  # the profile whose rules ModelOpt trains by
INPUT, WEIGHT = "input_quantizer", "weight_quantizer"


# Between profiles ----------------------------------------------------------------------------------------------------
def convert(state: State, source: Profile, target: Profile) -> State:
    """Return the state for another profile than that it was made for, or refuse what would compute something else.

    Scales and codes stay what they are: ranges need no change between signed and unsigned storage, a symmetric range is
    an asymmetric one whose zero has the middle code, and weights keep their bits where the target can run them. What
    the target does not execute is dropped, which means fewer roundings. What it could quantize besides stays float.
    """
    if source.name == target.name:
        return state
    if problems := _problems(state, source, target):
        raise UsageError(
            f"What was quantized for {source.name} is not exact for {target.name}: {'; '.join(problems)}. "
            f"Give data= to calibrate again for quant.profile={target.name}, or train for it."
        )
    converted, dropped = {}, 0
    for path, sites in state.items():
        # Without a quantized activation behind it, readers may rely on the output's codes.
        drop = {"output"} if not target.output and ("activation" in sites or not source.functional) else set()
        dropped += len(drop & set(sites))
        if not _reads_image_too_wide(sites, target):
            converted[path] = {site: dict(entry) for site, entry in sites.items() if site not in drop}
    stem = len(state) - len(converted)
    if dropped or stem:
        said = [f"{dropped} roundings before activations are dropped"] if dropped else []
        said += [f"the layer that reads the image stays float (its weights have over {target.stem_bits} bits)"] * stem
        LOGGER.info(f"{colorstr('quantize: ')}{source.name} -> {target.name}: {', '.join(said)}; the rest is exact")
    return converted


def _problems(state: State, source: Profile, target: Profile) -> list[str]:
    """Return what keeps a state from being exact for the target, as parts of a sentence."""
    problems = []
    if target.output and not source.output:
        problems.append("no range for the sites 'output' (before the activations)")
    if target.functional and not source.functional:
        problems.append("no range for the sites 'activation' and 'add'")
    ranges = {f"{p} ({s})": entry for p, sites in state.items() for s, entry in sites.items() if s != "weight"}
    asymmetric = [name for name, entry in ranges.items() if not entry.get("symmetric")]
    if target.symmetric and asymmetric:
        problems.append(f"{len(asymmetric)} asymmetric ranges, such as that of {asymmetric[0]}")
    wide = [p for p, sites in state.items() if target.weight_bits < sites.get("weight", {}).get("bits", 0) <= 8]
    if wide:  # wider ones run in float and cannot saturate
        problems.append(f"{len(wide)} layers with weights of over {target.weight_bits} bits, such as {wide[0]}")
    return problems


def _reads_image_too_wide(sites: dict[str, dict], target: Profile) -> bool:
    """Tell whether a layer reads the image with weights of more bits than the target is to keep there."""
    reads_image = tuple(sites.get("input", {}).get(end) for end in ("lo", "hi")) in IMAGE
    return reads_image and (target.stem_bits or 16) < sites.get("weight", {}).get("bits", 0)


# From ModelOpt -------------------------------------------------------------------------------------------------------
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
    """Return the ranges of a ModelOpt checkpoint as a state of the `tensorrt` profile; transposed layers stay float.

    ModelOpt also has the code -128, for weights beyond a range that training left behind; here they end at -127. Blocks
    of several branches must be merged already: what replaces them gets the input range of the branches and new weight
    ranges, because theirs do not add up.
    """
    if not is_modelopt(ckpt):
        raise UsageError("This checkpoint holds no ModelOpt ranges. Give one trained with quantize=8.")
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
        state[path] = {
            "input": {**Spec(symmetric=True).as_dict(), "lo": -limit, "hi": limit},
            "weight": Spec(symmetric=True, per_channel=True).as_dict(),
        }
        if not merged:
            state[path]["weight"]["ratio"] = _ratio(path, layer, ranges[path][WEIGHT])
    if not state:
        raise UsageError(
            "None of the layers that ModelOpt quantized is in this model. Give the model of the checkpoint."
        )
    return state


def complete(model: nn.Module, state: State, profile: Profile, batches: Iterable[torch.Tensor]) -> State:
    """Insert what `import_state` returned into its model, calibrate what the profile quantizes besides, return all.

    Layers that the profile keeps float are left out, and 8-bit weights become narrower where it needs that. The images
    (B, C, H, W), 0 to 1, are not read where nothing is missing.
    """
    if not profile.output:
        done = convert(state, PROFILES[SOURCE], profile)
        insert_plan(model, plan_of(done))
    else:
        others = [path for path in make_plan(model, profile)[0] if path not in state and path.endswith(".conv")]
        plan, _ = make_plan(model, profile, [f"^{re.escape(path)}$" for path in others])
        given = known(plan, state)
        for path, sites in given.items():
            if "weight" in sites:
                sites["weight"] = {**sites["weight"], "bits": plan[path]["weight"].bits}
            plan[path] |= plan_of({path: sites})[path]
        done = calibrate_rest(model, plan, given, batches)
    load_state(model, done)
    set_mode(model, "on")
    return done


def _enabled(settings: Mapping[str, Mapping[str, Any]], path: str) -> bool:
    """Tell whether both quantizers of a layer are on, and refuse those of other formats."""
    found = [settings.get(f"{path}.{quantizer}", {}) for quantizer in (INPUT, WEIGHT)]
    if any(s.get("_disabled") for s in found):
        return False
    for s in found:
        if s.get("_num_bits", 8) != 8 or s.get("_unsigned"):
            raise UsageError(f"'{path}' was trained with {s.get('_num_bits')} bits. Legal: signed 8-bit integers.")
    return True


def _ratio(path: str, layer: Any, limits: torch.Tensor) -> list[float]:
    """Return the largest value of each channel's range over its largest weight; 1 for a channel of zeros."""
    largest = layer.weight.detach().float().flatten(1).abs().amax(1)
    if limits.numel() not in (1, len(largest)):
        raise UsageError(
            f"'{path}' has {len(largest)} channels, its ranges {limits.numel()}. Give the model they are of."
        )
    ratio = torch.where(largest > 0, limits.flatten() / largest, torch.ones_like(largest))
    return ratio.tolist()
