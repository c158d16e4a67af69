# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What each runtime executes in INT8, as data, and which convolutions of a model can run that way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from ultralytics.nn.modules import DFL, Conv, RepConv
from ultralytics.nn.modules.block import CIB, SPPF, Bottleneck, RepVGGDW
from ultralytics.nn.modules.conv import Conv2

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest


@dataclass(frozen=True)
class Profile:
    """What one runtime needs of a quantized graph.

    Attributes:
        name: Name of the row.
        summary: One line for help and reports.
        weight_bits: Bits of the symmetric per-channel weights, stored as INT8 in narrow range.
        activation_bits: Bits of the per-tensor activations.
        symmetric: Zero is the middle activation code; otherwise it has a code of its own anywhere.
        signed: Store activations as signed integers.
        output: Quantize convolution outputs too, before the activation.
        functional: Quantize what lies between the convolutions too: activations, additions, concatenations.
        residual: Quantize what an addition reads beside its convolution.
        float_stem: Keep the convolution that reads the image float: with 3 input channels its float kernel is the
            faster one, and its error is one of the largest.
        stem_bits: Most bits of weights with which a conversion keeps the convolution that reads the image; None is any.
        fuse_silu: Write SiLU as one `com.microsoft.QuickGelu` node.
        transpose_dfl: Take the softmax of the box distances over the last axis, which is the fast one in ONNX Runtime.
        int32_bias: Write biases as INT32 with a scale; otherwise they stay float.
    """

    name: str
    summary: str
    weight_bits: int = 8
    activation_bits: int = 8
    symmetric: bool = False
    signed: bool = False
    output: bool = True
    functional: bool = False
    residual: bool = False
    float_stem: bool = True
    stem_bits: int | None = None
    fuse_silu: bool = True
    transpose_dfl: bool = True
    int32_bias: bool = True


X86 = "ONNX Runtime on any x86-64 CPU: 7-bit weights cannot saturate"
VNNI = "ONNX Runtime on x86-64 with VNNI: 8-bit weights"
FULL = {"functional": True, "fuse_silu": False}
# TensorRT and OpenVINO fuse the activation into the convolution: a Q between the two would only cost accuracy.
BESIDE = {"output": False, "residual": True, "fuse_silu": False, "transpose_dfl": False, "int32_bias": False}
PROFILES = {
    p.name: p
    for p in (
        # Without VNNI, VPMADDUBSW sums two u8*s8 products in int16 and saturates unless weights stay within 7 bits.
        Profile("ort-x86", X86, weight_bits=7),
        Profile("ort-x86-vnni", VNNI),
        Profile("ort-x86-full", f"{X86}; activations, sums and concatenations too", weight_bits=7, **FULL),
        Profile("ort-x86-full-vnni", f"{VNNI}; activations, sums and concatenations too", **FULL),
        Profile("ort-arm", "ONNX Runtime on ARM64: signed activations", signed=True),
        Profile("openvino", "OpenVINO on CPUs: Q/DQ before convolutions only", stem_bits=7, **BESIDE),
        Profile(
            "tensorrt",
            "TensorRT 8.5 and later: symmetric, Q/DQ before convolutions only",
            symmetric=True,
            signed=True,
            float_stem=False,
            **BESIDE,
        ),
    )
}


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU reports VNNI; False where that cannot be read, which is the safe side."""
    try:
        return re.search(r"\b(avx512_vnni|avx_vnni)\b", cpuinfo.read_text()) is not None
    except OSError:
        return False


def resolve_profile(name: str) -> Profile:
    """Return the profile called `name`; `auto` picks one by the flags of this CPU.

    Args:
        name: `auto` or a key of `PROFILES`.

    Returns:
        The profile.

    Raises:
        UsageError: If there is no such profile.
    """
    if name == "auto":
        name = "ort-x86-vnni" if has_vnni() else "ort-x86"
    if name not in PROFILES:
        legal = ["auto", *PROFILES]
        raise UsageError(f"Unknown quantization profile '{name}'.{suggest(name, legal)} Legal: {', '.join(legal)}.")
    return PROFILES[name]


def quantizable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> block for every Ultralytics block that runs as `act(conv(x))` once deployed.

    Blocks that merge several branches (Conv2, RepConv, RepVGGDW) are of that form only after `model.fuse()`.
    """
    return {path: m for path, m in model.named_modules() if _is_single_conv(m)}


def _is_single_conv(m: nn.Module) -> bool:
    if not isinstance(m, (Conv, RepConv, RepVGGDW)) or not isinstance(getattr(m, "conv", None), nn.Conv2d):
        return False
    return not any(hasattr(m, branch) for branch in ("conv1", "conv2", "cv2"))


def _merged_paths(model: nn.Module) -> set[str]:
    return {
        f"{path}.{child}"
        for path, m in model.named_modules()
        if isinstance(m, (Conv2, RepConv, RepVGGDW)) and not _is_single_conv(m)
        for child, _ in m.named_modules()
    }


def float_modules(model: nn.Module) -> dict[str, str]:
    """Return module path -> reason for every convolution and linear layer that stays float.

    Quantized are the convolutions of Ultralytics `Conv` blocks (`DWConv`, attention projections and head stems among
    them). The box decode has no such layer and is never touched: one scale for boxes and scores would zero the scores.

    Args:
        model: A detection, segmentation, pose, OBB or classification model, fused or not.

    Returns:
        Path -> reason, in the order of the modules.
    """
    quantized = {f"{path}.conv" for path in quantizable_blocks(model)}
    merged = _merged_paths(model)
    quantized -= merged
    dfl = {f"{path}.conv" for path, m in model.named_modules() if isinstance(m, DFL)}
    layers = getattr(model, "model", None)
    head = f"model.{len(layers) - 1}." if isinstance(layers, nn.Sequential) else "\0"
    reasons = {}
    for path, m in model.named_modules():
        if path in quantized or not isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            continue
        if path in dfl:
            reasons[path] = "DFL: the fixed integral over box distances is the most sensitive layer"
        elif path in merged:
            reasons[path] = "branch that is merged on fuse: quantized only in a fused model"
        elif isinstance(m, nn.ConvTranspose2d):
            reasons[path] = "transposed convolution: ONNX Runtime has no INT8 kernel for it"
        elif isinstance(m, nn.Linear):
            reasons[path] = "linear layer: small share of the time, kept exact"
        elif path.startswith(head):
            reasons[path] = "head output: large error for a small share of the time"
        else:
            reasons[path] = "bare convolution outside a Conv block"
    return reasons


def sums(model: nn.Module) -> list[str]:
    """Return the paths of the modules that return their input plus what they made of it, in one addition."""
    return [
        path for path, m in model.named_modules() if isinstance(m, (Bottleneck, CIB, SPPF)) and getattr(m, "add", False)
    ]
