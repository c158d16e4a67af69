# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What of a model is quantized and how: the rules of a profile, changed by the user's `config_list`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from yolo_ext import stock
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.options import listed
from yolo_ext.core.registry import suggest
from yolo_ext.quantization.observers import observers
from yolo_ext.quantization.spec import SITES, Plan, Profile, Spec
from yolo_ext.reporting.tables import align
from yolo_ext.stock.context import evaluating

LAYERS: tuple[type, ...] = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
OF_LAYERS = SITES[:4]
PICKS = ("op_types", "op_names", "op_names_re", "default")
SETTINGS = ("quant_dtype", "quant_bits", "quant_scheme", "granularity", "observer")
LEAVES = ("exclude_op_types", "exclude_op_names", "exclude_op_names_re")
KEYS = [*PICKS, *LEAVES, "exclude", "quant_types", "target_names", *SETTINGS]
TARGETS = {"_input_": "input", "_output_": "output", "inputs": "input", "outputs": "output"}  # names of NNI 3
WORDS = {
    "quant_scheme": {"symmetric": True, "asymmetric": False, "affine": False},
    "granularity": {"per_channel": True, "per_tensor": False, "default": False},
}
EXCLUDED = "excluded by entry"
UNLISTED = "not listed in quant.config_list"
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
    """Return what of a model, fused or not, is quantized, and path -> reason of each layer that stays float."""
    reasons, blocks = float_modules(model), quantizable_blocks(model)
    candidates = {f"{path}.conv": block for path, block in blocks.items() if f"{path}.conv" not in reasons}
    first = next((path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    if profile.float_stem and first in candidates:
        reasons[first] = STEM
    layers = {path: m for path, m in model.named_modules() if type(m) in LAYERS}
    for selector in exclude:
        found = _layers(model, selector, layers, "quant.exclude")
        reasons |= {path: f"excluded by '{selector}'" for path in found if path in candidates}
    usual = {path: _sites(profile, block) for path, block in candidates.items() if path not in reasons}
    # Only what is listed is quantized, unless each entry excludes or one is `default: all`.
    restricted = any(not (isinstance(entry, Mapping) and entry.get("exclude")) for entry in config_list)
    plan = {} if restricted else dict(usual)
    for number, entry in enumerate(config_list, 1):
        where = f"Entry {number} of quant.config_list"
        if not isinstance(entry, Mapping):
            raise UsageError(f"{where} is '{entry}'. Give a dict such as {{op_types: [Conv2d], quant_bits: 8}}.")
        with refused(f"{where}: {{e}}", UsageError):
            _apply(entry, number, plan, reasons, model, layers, candidates, profile)
    reasons |= {path: UNLISTED for path in usual if path not in plan and path not in reasons}
    if profile.functional or profile.residual:
        for path in sums(model):
            if any(layer.startswith(f"{path}.") for layer in plan):
                plan[path] = {"add" if profile.functional else "residual": profile.activation}
        drop_needless(model, plan)
    return {path: plan[path] for path, _ in model.named_modules() if plan.get(path)}, reasons


def quantizable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> block for every Ultralytics block that runs as `act(conv(x))` once deployed."""
    runs = (item for item in model.named_modules() if ".semseg." not in item[0])  # of YOLO26, which only trains
    return {path: m for path, m in runs if stock.single_conv(m)}


def float_modules(model: nn.Module) -> dict[str, str]:
    """Return path -> reason for each convolution and linear layer, of a model fused or not, that stays float."""
    blocks = ((p, m) for p, m in model.named_modules() if isinstance(m, stock.BRANCHED) and not stock.single_conv(m))
    merged = {f"{path}.{child}" for path, m in blocks for child, _ in m.named_modules()}
    quantized = {f"{path}.conv" for path in quantizable_blocks(model)} - merged
    special = dict.fromkeys(merged, MERGED)
    special |= {f"{path}.conv": DFL for path, m in model.named_modules() if isinstance(m, stock.DFL)}
    head = stock.head_prefix(model) if isinstance(getattr(model, "model", None), nn.Sequential) else "\0"
    reasons = {}
    for path, m in model.named_modules():
        if isinstance(m, LAYERS) and path not in quantized:
            usual = HEAD if path.startswith(head) else BARE
            kind = next((reason for cls, reason in TYPES.items() if isinstance(m, cls)), usual)
            reasons[path] = special.get(path, kind)
    return reasons


def sums(model: nn.Module) -> list[str]:
    """Return the paths of the modules that return their input plus what they made of it, in one addition."""
    return [path for path, m in model.named_modules() if isinstance(m, stock.SUMS) and getattr(m, "add", False)]


def _sites(profile: Profile, block: Any) -> dict[str, Spec]:
    """Return what the profile quantizes of a layer, whose block is None where there is none around it."""
    sites = {"input": profile.activation, "weight": Spec(profile.weight_bits, symmetric=True, per_channel=True)}
    activated = profile.functional and block is not None and not isinstance(block.act, nn.Identity)
    also = [site for site, wanted in (("output", profile.output), ("activation", activated)) if wanted]
    return sites | dict.fromkeys(also, profile.activation)


# Entries of a `config_list` ------------------------------------------------------------------------------------------
def _layers(model: nn.Module, selector: str, layers: Mapping[str, nn.Module], option: str) -> set[str]:
    """Return the paths of the layers that a selector means, at least one."""
    if not (found := stock.matches(model, selector, option) & layers.keys()):
        raise UsageError(f"'{option}={selector}' matches none of the {len(layers)} layers, such as {[*layers][:2]}.")
    return found


def listed_sites(entry: Mapping[str, Any], profile: Profile) -> tuple[list[str], bool]:
    """Return the sites that an entry lists, and whether the output is one because integer convolutions need it."""
    sites = [TARGETS.get(t, t) for t in listed(entry.get("quant_types", entry.get("target_names")) or ())]
    added = profile.output and {"input", "weight"} <= set(sites) and "output" not in sites
    return [*sites, "output"] if added else sites, added


def _apply(
    entry: Mapping[str, Any], number: int, plan: Plan, reasons: dict[str, str], model: nn.Module,
    layers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], profile: Profile,
) -> None:  # fmt: skip
    """Change plan and reasons as one entry of a `config_list` says."""
    if unknown := [key for key in entry if key not in KEYS]:
        raise UsageError(f"unknown key '{unknown[0]}'.{suggest(str(unknown[0]), KEYS)} Legal: {', '.join(KEYS)}.")
    chosen, named = _selected(entry, reasons, model, layers)
    if entry.get("exclude"):
        for path in chosen:
            plan.pop(path, None)
            reasons.setdefault(path, f"{EXCLUDED} {number} of quant.config_list")
        return
    wanted, added = listed_sites(entry, profile)
    if bad := [t for t in wanted if t not in OF_LAYERS]:
        raise UsageError(f"quant type '{bad[0]}' is unknown. Legal: {', '.join(OF_LAYERS)}.")
    if "activation" in wanted and not profile.functional:
        raise UsageError(f"profile '{profile.name}' runs activations in float. Give quant.profile=ort-x86-full.")
    for path in chosen:
        reason, block = reasons.get(path, ""), blocks.get(path)
        if reason in (DFL, MERGED) or (reason and not (path in named or reason.startswith(EXCLUDED))):
            continue  # a type or large block means the layers that the profile quantizes; others are named one by one
        if block is None and "activation" in wanted:
            raise UsageError(f"'{path}' has no activation behind it. Legal: {', '.join(SITES[:3])}.")
        usual = _sites(profile, block)
        sites = plan.get(path) or usual
        if wanted:
            listed = wanted[:-1] if added and not isinstance(layers[path], nn.Conv2d) else wanted
            sites = {site: sites.get(site) or usual.get(site, profile.activation) for site in listed}
        own = {site: _changed(spec, site, entry) for site, spec in sites.items() if site != "output" or not added}
        plan[path] = sites | own
        reasons.pop(path, None)


def _selected(
    entry: Mapping[str, Any], reasons: Mapping[str, str], model: nn.Module, layers: Mapping[str, nn.Module]
) -> tuple[list[str], set[str]]:
    """Return the layers that an entry picks, and those that it names by themselves or by the block of one layer."""
    if not set(PICKS) & set(entry):
        raise UsageError("it picks no layers. Give op_types, op_names or op_names_re.")
    if entry.get("default", "all") != "all":
        raise UsageError(f"default '{entry['default']}' is unknown. Legal: all, for what the profile quantizes.")
    picked, roots = set(layers), set[str]()
    if {"op_names", "op_names_re"} & set(entry):
        for name in _names(entry, "op_names"):
            found = _layers(model, name, layers, "op_names")
            stuck = {reasons[p] for p in found if reasons.get(p) == DFL or (reasons.get(p) == MERGED and p == name)}
            if stuck and not any(reasons.get(p) not in stuck for p in found):
                raise UsageError(f"'{name}' cannot be quantized ({stuck.pop()}).")
            roots.update(stock.select(model, name))
        picked = stock.within(model, roots)
    if "op_types" in entry:
        picked &= _of_types(listed(entry["op_types"] or ()), model, layers)
    for name in _names(entry, "exclude_op_names"):
        picked -= _layers(model, name, layers, "exclude_op_names")
    picked -= _of_types(listed(entry.get("exclude_op_types") or ()), model, layers)
    if not (chosen := [path for path in layers if path in picked]):
        raise UsageError(f"it picks no layer of this model: {dict(entry)}.")
    return chosen, {path for path in chosen if {path, path.removesuffix(".conv")} & roots}


def _names(entry: Mapping[str, Any], key: str) -> list[str]:
    """Return the selectors that an entry gives as names and, under `<key>_re`, as expressions found anywhere."""
    expressions = listed(entry.get(f"{key}_re") or ())
    return [*map(str, listed(entry.get(key) or ())), *(f"re:{e}" for e in expressions)]


def _of_types(kinds: Sequence[str], model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of the layers of these types, and of those in blocks of these types."""
    legal, there = [*(cls.__name__ for cls in LAYERS), "default"], {type(m).__name__ for m in model.modules()}
    if unknown := [kind for kind in kinds if kind not in {*legal, *there}]:
        more = "or the type of a block"
        raise UsageError(f"op type '{unknown[0]}' is unknown. Legal: {', '.join(legal)}, {more}.")
    roots = [path for path, m in model.named_modules() if type(m).__name__ in kinds]
    return set(layers) if "default" in kinds else stock.within(model, roots)


def _changed(spec: Spec, site: str, entry: Mapping[str, Any]) -> Spec:
    """Return the spec of a site with the settings of an entry."""
    weight, changes = site == "weight", dict[str, Any]()
    for key in SETTINGS:
        value = entry.get(key)
        if own := isinstance(value, Mapping):  # one by quant type
            each = {TARGETS.get(k, k): v for k, v in value.items()}
            if bad := [k for k in each if k not in OF_LAYERS]:
                raise UsageError(f"{key} of the unknown quant type '{bad[0]}'. Legal: {', '.join(OF_LAYERS)}.")
            value = each.get(site)
        if value is None:
            continue
        if legal := WORDS.get(key):
            if str(value) not in legal:
                near = suggest(str(value), list(legal))
                raise UsageError(f"{key} '{value}' is unknown.{near} Legal: {', '.join(legal)}.")
            value = legal[str(value)]
        if key == "quant_dtype":
            if not (match := re.fullmatch(r"u?int(\d+)", str(value))):
                raise UsageError(f"quant_dtype '{value}' is unknown. Legal: int8, uint8, int4 and so on.")
            changes["bits"] = int(match[1])
        elif key == "quant_bits":
            changes["bits"] = value
        elif key == "quant_scheme":
            if own and weight and not value:
                raise UsageError("weights are always symmetric (a negative BatchNorm gain would move others' codes).")
            changes["symmetric"] = value or weight
        elif key == "granularity":
            if own and value and not weight:
                raise UsageError("only weights can be per_channel; no runtime has activations of that kind.")
            changes["per_channel"] = value and weight
        elif not weight:
            changes["observer"] = observers[str(value)].name
    return replace(spec, **changes)


# Which tensors reach a layer quantized already: one forward pass in which they carry a mark ---------------------------
MARK = "_yolo_ext_quantized"  # on a tensor: path of the layer whose quantizer made its codes
PASS: set[Callable[..., Any]] = {  # operations whose results have codes of their argument
    torch.chunk, torch.split, torch.max_pool2d, torch.reshape, torch.flatten, torch.transpose, torch.permute,
    torch.Tensor.chunk, torch.Tensor.split, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.flatten,
    torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.contiguous, torch.Tensor.narrow,
    torch.Tensor.__getitem__, torch.Tensor.detach, F.max_pool2d, F.interpolate,
}  # fmt: skip
JOIN: set[Callable[..., Any]] = {torch.cat, torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


class _Marks(TorchFunctionMode):
    """Hands marks on through operations that keep codes, and notes whose codes a concatenation or sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in JOIN:
            operands = args[0] if func is torch.cat else args[:2]
            self.read |= {getattr(x, MARK) for x in operands if hasattr(x, MARK)}
        elif func in PASS and args and (mark := getattr(args[0], MARK, None)):
            moved = kwargs.get("mode", "nearest") == "nearest"  # another interpolation makes new values
            for y in (out if isinstance(out, (tuple, list)) else [out]) if moved else ():
                setattr(y, MARK, mark)
        return out


@torch.no_grad()
def drop_needless(model: nn.Module, plan: Plan) -> None:
    """Take from a plan, in place, inputs that arrive quantized as they should be, and what nothing quantized reads."""
    arrived, read = _trace(model, plan)
    direct = set()
    for path, mark in arrived.items():
        kind = next(site for site in ("add", "residual", "activation", "output") if site in plan[mark])
        if replace(plan[mark][kind], observer=None) == replace(plan[path]["input"], observer=None):
            del plan[path]["input"]  # one that asks for other codes makes them itself
            direct.add(mark)
    for path, sites in plan.items():
        for site, readers in (("activation", read | direct), ("add", read | direct), ("residual", direct)):
            if site in sites and path not in readers:
                del sites[site]


def _trace(model: nn.Module, plan: Plan) -> tuple[dict[str, str], set[str]]:
    """Return layer -> mark of what its input site gets, and the marks that concatenations and sums read."""
    handles: list[Any] = []
    arrived: dict[str, str] = {}

    def marked(path: str, x: torch.Tensor) -> torch.Tensor:
        y = x.view_as(x)  # others may read the tensor as it was
        setattr(y, MARK, path)
        return y

    def arrives(path: str, m: nn.Module, x: tuple[torch.Tensor, ...]) -> None:
        if mark := getattr(x[0], MARK, None):
            arrived[path] = mark

    functional = any({"activation", "add"} & set(sites) for sites in plan.values())
    for path, m in model.named_modules():
        last = "output" if isinstance(getattr(m, "act", None), nn.Identity) else "activation"
        if functional and last in plan.get(f"{path}.conv", {}):
            handles.append(m.register_forward_hook(lambda m, x, y, p=path: marked(f"{p}.conv", y)))
        if "add" in plan.get(path, {}):
            handles.append(m.register_forward_hook(lambda m, x, y, p=path: marked(p, y)))
        if "residual" in plan.get(path, {}):
            handles.append(m.register_forward_pre_hook(lambda m, x, p=path: (marked(p, x[0]),)))
        if "input" in plan.get(path, {}):
            handles.append(m.register_forward_pre_hook(partial(arrives, path)))
    side, like = 2 * stock.max_stride(model), next(model.parameters())
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    with evaluating(model, handles), _Marks() as marks:
        model(torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype))
    return arrived, marks.read


# Output --------------------------------------------------------------------------------------------------------------
def table(plan: Plan, reasons: Mapping[str, str]) -> str:
    """Return plan and reasons (path -> why a layer stays float) as text, without sites that are nowhere quantized."""

    def cell(spec: Spec | None) -> str:
        return f"{spec.bits}{'s' if spec.symmetric else 'u'}{'c' if spec.per_channel else ''}" if spec else "-"

    rows = [[path, *(cell(sites.get(s)) for s in SITES), ""] for path, sites in plan.items()]
    rows += [[path, *("-" for _ in SITES), reason] for path, reason in reasons.items()]
    columns = list(zip(["Layer", *SITES, "Float because"], *rows))
    header, *body = zip(*(c for c in columns if c[0] not in SITES or set(c[1:]) - {"-"}))
    legend = "Bits; s: zero in the middle, u: zero anywhere, c: a scale for each channel, -: float"
    return f"{align(body, header)}\n{legend}"
