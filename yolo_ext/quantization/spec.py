# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""How one tensor is quantized, the plain data that say it of a whole model, and what each runtime executes.

A plan says which tensors of which layers are quantized and how; a state adds the calibrated ranges. Both are keyed by
layer path and site: `input`, `weight`, `output` (behind BatchNorm, before the activation) and `activation` (behind it)
of a layer, and of a bottleneck `residual` (what its first convolution and its addition both read) and `add` (the sum).
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, colorstr

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest

IMAGE = ((0.0, 1.0), (-1.0, 1.0))  # ranges of the layer that reads the image
SITES = ("input", "weight", "output", "activation", "residual", "add")


@dataclass(frozen=True)
class Spec:
    """How one tensor is quantized."""

    bits: int = 8
    symmetric: bool = False  # zero in the middle, in narrow range: a negative BatchNorm gain flips codes exactly
    per_channel: bool = False  # one scale for each output channel; weights only
    observer: str | None = None  # None for that of the run

    def __post_init__(self) -> None:
        """Refuse bits that cannot be simulated."""
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise UsageError(f"quant_bits={self.bits!r} is illegal. Legal: a whole number, 2 to 16.")

    @property
    def qmax(self) -> int:
        """Return the largest code."""
        return (1 << (self.bits - self.symmetric)) - 1

    @property
    def qmin(self) -> int:
        """Return the smallest code."""
        return -self.qmax if self.symmetric else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, without an observer that is not set."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Spec":
        """Return the spec of an entry of a state or a plan in JSON, whose other keys are left alone."""
        return cls(**{k: entry[k] for k in cls.__dataclass_fields__ if k in entry})


Plan = dict[str, dict[str, Spec]]
State = dict[str, dict[str, dict[str, Any]]]


def plan_of(state: State) -> Plan:
    """Return the plan that a state was made from."""
    return {path: {site: Spec.of(entry) for site, entry in sites.items()} for path, sites in state.items()}


@dataclass(frozen=True)
class Profile:
    """What one runtime needs of a quantized graph."""

    name: str
    summary: str  # one line for help and reports
    weight_bits: int = 8  # of the symmetric per-channel weights, stored as INT8 in narrow range
    activation_bits: int = 8
    symmetric: bool = False  # zero is the middle activation code; otherwise it has a code of its own anywhere
    signed: bool = False  # store activations as signed integers
    output: bool = True  # quantize convolution outputs too, before the activation
    functional: bool = False  # quantize what lies between the convolutions: activations, additions, concatenations
    residual: bool = False  # quantize what an addition reads beside its convolution
    float_stem: bool = True  # with 3 input channels the float kernel is the faster one, and its error is large
    stem_bits: int | None = None  # most bits of weights with which a conversion keeps the convolution on the image
    fuse_silu: bool = True  # write SiLU as one `com.microsoft.QuickGelu` node
    transpose_dfl: bool = True  # softmax of the box distances over the last axis, the fast one in ONNX Runtime
    int32_bias: bool = True  # write biases as INT32 with a scale; otherwise they stay float
    needs, paper = (), ""  # as a row of a table of methods has them

    @property
    def activation(self) -> Spec:
        """Return how activations are quantized."""
        return Spec(self.activation_bits, self.symmetric)


X86 = "ONNX Runtime on any x86-64 CPU: 7-bit weights cannot saturate"
VNNI = "ONNX Runtime on x86-64 with VNNI: 8-bit weights"
MORE = "; activations, sums and concatenations too"
FULL: dict[str, Any] = {"functional": True, "fuse_silu": False}
# TensorRT and OpenVINO fuse the activation into the convolution: a Q between the two would only cost accuracy.
BESIDE: dict[str, Any] = {
    "output": False, "residual": True, "fuse_silu": False, "transpose_dfl": False, "int32_bias": False
}  # fmt: skip
TRT: dict[str, Any] = {"symmetric": True, "signed": True, "float_stem": False, **BESIDE}
ROWS = (
    # Without VNNI, VPMADDUBSW sums two u8*s8 products in int16 and saturates unless weights stay within 7 bits.
    Profile("ort-x86", X86, weight_bits=7),
    Profile("ort-x86-vnni", VNNI),
    Profile("ort-x86-full", X86 + MORE, weight_bits=7, **FULL),
    Profile("ort-x86-full-vnni", VNNI + MORE, **FULL),
    Profile("ort-arm", "ONNX Runtime on ARM64: signed activations", signed=True),
    Profile("openvino", "OpenVINO on CPUs: Q/DQ before convolutions only", stem_bits=7, **BESIDE),
    Profile("tensorrt", "TensorRT 8.5 and later: symmetric, Q/DQ before convolutions only", **TRT),
)
PROFILES = {p.name: p for p in ROWS}


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU reports VNNI; False where that cannot be read, which is the safe side."""
    try:
        return re.search(r"\b(avx512_vnni|avx_vnni)\b", cpuinfo.read_text()) is not None
    except OSError:
        return False


def resolve_profile(name: str) -> Profile:
    """Return the profile of a name in `PROFILES`; `auto` picks one by the flags of this CPU.

    Raises: `UsageError`: If there is no such profile.
    """
    if name == "auto":
        name = "ort-x86-vnni" if has_vnni() else "ort-x86"
    if name not in PROFILES:
        legal = ["auto", *PROFILES]
        raise UsageError(f"Unknown quantization profile '{name}'.{suggest(name, legal)} Legal: {', '.join(legal)}.")
    return PROFILES[name]


def convert(state: State, source: Profile, target: Profile) -> State:
    """Return the state for another profile than that it was made for, or refuse what would compute something else.

    Scales and codes stay what they are: a symmetric range is an asymmetric one whose zero has the middle code. What the
    target does not execute is dropped, which means fewer roundings; what it could quantize besides stays float.
    """
    if source.name == target.name:
        return state
    if problems := _problems(state, source, target):
        remedy = f"Give data= to calibrate again for quant.profile={target.name}, or train for it."
        inexact = f"What was quantized for {source.name} is not exact for {target.name}"
        raise UsageError(f"{inexact}: {'; '.join(problems)}. {remedy}")
    converted, dropped = {}, 0
    for path, sites in state.items():
        # Without a quantized activation behind it, readers may rely on the output's codes.
        drop = {"output"} if not target.output and ("activation" in sites or not source.functional) else set()
        dropped += len(drop & set(sites))
        reads_image = tuple(sites.get("input", {}).get(end) for end in ("lo", "hi")) in IMAGE
        if not (reads_image and (target.stem_bits or 16) < sites.get("weight", {}).get("bits", 0)):
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
