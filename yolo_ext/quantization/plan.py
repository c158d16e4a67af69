# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What of a model is quantized and how: the rules of a profile, changed by the user's `config_list`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.quantization.flow import drop_needless
from yolo_ext.quantization.observers import observers
from yolo_ext.quantization.spec import SITES, Plan, Profile, Spec
from yolo_ext.reporting.tables import align

LAYERS: tuple[type, ...] = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
OF_LAYERS = SITES[:4]
KEYS = [
    "op_types", "op_names", "op_names_re", "exclude_op_names", "exclude_op_names_re", "exclude",
    "quant_types", "target_names", "quant_bits", "quant_dtype", "quant_scheme", "granularity", "observer",
]  # fmt: skip
TARGETS = {"_input_": "input", "_output_": "output", "inputs": "input", "outputs": "output"}  # names of NNI 3
SCHEMES = {"symmetric": True, "asymmetric": False, "affine": False}
EXCLUDED = "excluded by entry"
GRANULARITY = {"per_channel": True, "per_tensor": False, "default": False}
DFL = "DFL: the fixed integral over box distances is the most sensitive layer"
MERGED = "branch that is merged on fuse: quantized only in a fused model"
TYPES = {
    nn.ConvTranspose2d: "transposed convolution: ONNX Runtime has no INT8 kernel for it",
    nn.Linear: "linear layer: small share of the time, kept exact",
}
HEAD = "head output: large error for a small share of the time"
BARE = "bare convolution outside a Conv block"
STEM = "image input: faster and more accurate in float"


def make_plan(
    model: nn.Module, profile: Profile, exclude: Sequence[str] = (), config_list: Sequence[Mapping[str, Any]] = ()
) -> tuple[Plan, dict[str, str]]:
    """Say what of a model is quantized.

    Args:
        model: An Ultralytics model without fake quantizers, fused or not.
        profile: What the runtime executes.
        exclude: Regular expressions searched in layer paths; a match keeps the layer float.
        config_list: Changes in the style of NNI, later entries win. An entry picks layers by `op_types`, `op_names` or
            `op_names_re`, less `exclude_op_names(_re)`, and says `exclude: true`, or what of them is quantized
            (`quant_types`) and how (`quant_bits`, `quant_dtype`, `quant_scheme`, `granularity`, `observer`; one value,
            or one by quant type).

    Returns:
        The plan, and path -> reason of every convolution and linear layer that stays float.

    Raises:
        UsageError: If an expression or entry is illegal or matches nothing.
    """
    reasons, blocks = float_modules(model), quantizable_blocks(model)
    candidates = {f"{path}.conv": block for path, block in blocks.items() if f"{path}.conv" not in reasons}
    first = next((path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    if profile.float_stem and first in candidates:
        reasons[first] = STEM
    for pattern in exclude:
        for path in _search(pattern, {**candidates, **reasons}, "The exclude pattern"):
            if path in candidates:
                reasons[path] = f"excluded by '{pattern}'"
    plan = {path: _sites(profile, block) for path, block in candidates.items() if path not in reasons}
    layers = {path: m for path, m in model.named_modules() if type(m) in LAYERS}
    for number, entry in enumerate(config_list, 1):
        _apply(entry, number, plan, reasons, layers, candidates, profile)
    if profile.functional or profile.residual:
        for path in sums(model):
            if any(layer.startswith(f"{path}.") for layer in plan):
                plan[path] = {"add" if profile.functional else "residual": profile.activation}
        drop_needless(model, plan)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return {path: plan[path] for path in sorted(plan, key=order.__getitem__) if plan[path]}, reasons


def quantizable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> block for every Ultralytics block that runs as `act(conv(x))` once deployed."""
    return {path: m for path, m in model.named_modules() if stock.single_conv(m)}


def float_modules(model: nn.Module) -> dict[str, str]:
    """Return module path -> reason for every convolution and linear layer of a model, fused or not, that stays float.

    Quantized are the convolutions of Ultralytics `Conv` blocks (`DWConv`, attention projections and head stems among
    them). The box decode has no such layer and is never touched: one scale for boxes and scores would zero the scores.
    """
    merged = {
        f"{path}.{child}"
        for path, m in model.named_modules()
        if isinstance(m, stock.BRANCHED) and not stock.single_conv(m)
        for child, _ in m.named_modules()
    }
    quantized = {f"{path}.conv" for path in quantizable_blocks(model)} - merged
    dfl = {f"{path}.conv" for path, m in model.named_modules() if isinstance(m, stock.DFL)}
    head = stock.head_prefix(model) if isinstance(getattr(model, "model", None), nn.Sequential) else "\0"
    reasons = {}
    for path, m in model.named_modules():
        if path in quantized or not isinstance(m, LAYERS):
            continue
        kind = next((reason for cls, reason in TYPES.items() if isinstance(m, cls)), None)
        what = kind or (HEAD if path.startswith(head) else BARE)
        reasons[path] = DFL if path in dfl else MERGED if path in merged else what
    return reasons


def sums(model: nn.Module) -> list[str]:
    """Return the paths of the modules that return their input plus what they made of it, in one addition."""
    return [path for path, m in model.named_modules() if isinstance(m, stock.SUMS) and getattr(m, "add", False)]


def _sites(profile: Profile, block: Any) -> dict[str, Spec]:
    """Return what the profile quantizes of a layer, whose block is None where there is none around it."""
    sites = {"input": profile.activation, "weight": Spec(profile.weight_bits, symmetric=True, per_channel=True)}
    if profile.output:
        sites["output"] = profile.activation
    if profile.functional and block is not None and not isinstance(block.act, nn.Identity):
        sites["activation"] = profile.activation
    return sites


# Entries of a `config_list` ------------------------------------------------------------------------------------------
def _search(pattern: str, paths: Iterable[str], what: str) -> list[str]:
    """Return the paths that a regular expression is found in, at least one."""
    paths = list(paths)
    try:
        matches = [path for path in paths if re.search(pattern, path)]
    except re.error as e:
        raise UsageError(f"{what} '{pattern}' is not a regular expression: {e}.") from e
    if not matches:
        raise UsageError(f"{what} '{pattern}' matches none of the {len(paths)} layers, such as {paths[:2]}.")
    return matches


def _listed(value: Any) -> list[Any]:
    """Return what an entry gives once or several times as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple, set)) else [value]


def _apply(
    entry: Mapping[str, Any],
    number: int,
    plan: Plan,
    reasons: dict[str, str],
    layers: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module],
    profile: Profile,
) -> None:
    """Change plan and reasons as one entry of a `config_list` says."""
    where = f"Entry {number} of quant.config_list"
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is '{entry}'. Give a dict such as {{op_types: [Conv2d], quant_bits: 8}}.")
    for key in entry:
        if key not in KEYS:
            raise UsageError(f"{where} has the unknown key '{key}'.{suggest(str(key), KEYS)} Legal: {', '.join(KEYS)}.")
    chosen = _selected(entry, where, layers)
    if entry.get("exclude"):
        for path in chosen:
            plan.pop(path, None)
            reasons.setdefault(path, f"{EXCLUDED} {number} of quant.config_list")
        return
    wanted = [TARGETS.get(t, t) for t in _listed(entry.get("quant_types", entry.get("target_names")))]
    if bad := [t for t in wanted if t not in OF_LAYERS]:
        raise UsageError(f"{where}: quant type '{bad[0]}' is unknown. Legal: {', '.join(OF_LAYERS)}.")
    if "activation" in wanted and not profile.functional:
        raise UsageError(
            f"{where}: profile '{profile.name}' runs activations in float. Give quant.profile=ort-x86-full."
        )
    for path in chosen:
        reason, block = reasons.get(path, ""), blocks.get(path)
        if reason in (DFL, MERGED):
            if path in _named(entry.get("op_names"), where, layers):
                raise UsageError(f"{where}: '{path}' cannot be quantized ({reason}).")
            continue
        if reason and not ({"op_names", "op_names_re"} & set(entry) or reason.startswith(EXCLUDED)):
            continue  # a whole type means the layers that the profile quantizes; others are named one by one
        if block is None and "activation" in wanted:
            raise UsageError(f"{where}: '{path}' has no activation behind it. Legal: {', '.join(SITES[:3])}.")
        usual = _sites(profile, block)
        sites = plan.get(path) or usual
        if wanted:
            sites = {site: sites.get(site) or usual.get(site, profile.activation) for site in wanted}
        plan[path] = {site: _changed(spec, site, entry, where) for site, spec in sites.items()}
        reasons.pop(path, None)


def _selected(entry: Mapping[str, Any], where: str, layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the layers that an entry picks."""
    types = {cls.__name__: cls for cls in LAYERS}
    picked: set[str] = set()
    for kind in _listed(entry.get("op_types")):
        if kind not in {**types, "default": None}:
            raise UsageError(f"{where}: op type '{kind}' is unknown. Legal: {', '.join(types)}, default.")
        picked |= {p for p, m in layers.items() if kind == "default" or type(m) is types[kind]}
    picked |= _named(entry.get("op_names"), where, layers)
    for pattern in _listed(entry.get("op_names_re")):
        picked |= set(_search(pattern, layers, f"{where}: pattern"))
    if not {"op_types", "op_names", "op_names_re"} & set(entry):
        raise UsageError(f"{where} picks no layers. Give op_types, op_names or op_names_re.")
    picked -= _named(entry.get("exclude_op_names"), where, layers)
    for pattern in _listed(entry.get("exclude_op_names_re")):
        picked -= set(_search(pattern, layers, f"{where}: pattern"))
    if not picked:
        raise UsageError(f"{where} picks no layer of this model: {dict(entry)}.")
    return [path for path in layers if path in picked]


def _named(names: Any, where: str, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of layers that are given by their own name or that of their block."""
    found = set()
    for name in _listed(names):
        path = name if name in layers else f"{name}.conv"
        if path not in layers:
            raise UsageError(f"{where}: there is no layer '{name}'.{suggest(str(name), list(layers))}")
        found.add(path)
    return found


def _changed(spec: Spec, site: str, entry: Mapping[str, Any], where: str) -> Spec:
    """Return the spec of a site with the settings of an entry."""

    def value(key: str) -> Any:
        given = entry.get(key)
        if not isinstance(given, Mapping):
            return given
        each = {TARGETS.get(k, k): v for k, v in given.items()}
        if bad := [k for k in each if k not in OF_LAYERS]:
            raise UsageError(f"{where}: {key} of the unknown quant type '{bad[0]}'. Legal: {', '.join(OF_LAYERS)}.")
        return each.get(site)

    weight = site == "weight"
    changes: dict[str, Any] = {}
    if (dtype := value("quant_dtype")) is not None:
        if not (match := re.fullmatch(r"u?int(\d+)", str(dtype))):
            raise UsageError(f"{where}: quant_dtype '{dtype}' is unknown. Legal: int8, uint8, int4 and so on.")
        changes["bits"] = int(match[1])
    if (bits := value("quant_bits")) is not None:
        changes["bits"] = bits
    if (scheme := value("quant_scheme")) is not None:
        symmetric = _choice(scheme, SCHEMES, "quant_scheme", where)
        if weight and not symmetric and isinstance(entry["quant_scheme"], Mapping):
            raise UsageError(
                f"{where}: weights are always symmetric (a negative BatchNorm gain would move the codes of others)."
            )
        changes["symmetric"] = symmetric or weight
    if (granularity := value("granularity")) is not None:
        per_channel = _choice(granularity, GRANULARITY, "granularity", where)
        if not weight and per_channel and isinstance(entry["granularity"], Mapping):
            raise UsageError(f"{where}: only weights can be per_channel; no runtime has activations of that kind.")
        changes["per_channel"] = per_channel and weight
    try:
        if not weight and (observer := value("observer")) is not None:
            changes["observer"] = observers[str(observer)].name
        return replace(spec, **changes)
    except UsageError as e:
        raise UsageError(f"{where}: {e}") from e


def _choice(value: Any, legal: Mapping[str, bool], key: str, where: str) -> bool:
    """Return what a word of an entry means."""
    if str(value) not in legal:
        near = suggest(str(value), list(legal))
        raise UsageError(f"{where}: {key} '{value}' is unknown.{near} Legal: {', '.join(legal)}.")
    return legal[str(value)]


# Output --------------------------------------------------------------------------------------------------------------
def rows(plan: Plan, reasons: Mapping[str, str]) -> list[list[str]]:
    """Return the resolved table: layer, and for each site bits and scheme, or why the layer stays float."""

    def cell(spec: Spec | None) -> str:
        if spec is None:
            return "-"
        return f"{spec.bits}{'s' if spec.symmetric else 'u'}{'c' if spec.per_channel else ''}"

    table = [[path, *(cell(sites.get(s)) for s in SITES), ""] for path, sites in plan.items()]
    return table + [[path, *("-" for _ in SITES), reason] for path, reason in reasons.items()]


def table(plan: Plan, reasons: Mapping[str, str]) -> str:
    """Return plan and reasons (path -> why a layer stays float) as text, without sites that are nowhere quantized."""
    columns = list(zip(["Layer", *SITES, "Float because"], *rows(plan, reasons)))
    shown = [c for c in columns if c[0] not in SITES or set(c[1:]) - {"-"}]
    header, *body = zip(*shown)
    legend = "Bits; s: zero in the middle, u: zero anywhere, c: a scale for each channel, -: float"
    return f"{align(body, header)}\n{legend}"
