# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Fake quantization by class swap: a stock model that computes what its INT8 graph will compute.

A quantized layer keeps its identity, Parameters and state-dict keys. The `act` of its block is wrapped by the quantizer
of the convolution's output, which is behind the unfused BatchNorm, where the folded convolution ends.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import note, set_tripwire
from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.layers import STOCK, SWAPS, QuantAct, QuantLayer, RangeQuantizer, channel_axis
from yolo_ext.quantization.plan import make_plan
from yolo_ext.quantization.spec import SITES, Plan, Profile, Spec, State, plan_of
from yolo_ext.stock.context import evaluating

# Before SiLU, codes below SiLU(-6) = -0.015 cost more than they bring; behind it, there is no smaller value.
SILU_LOWER = {"output": -6.0, "activation": -0.27846456}


@torch.no_grad()
def merge_branches(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[str]:
    """Turn blocks of several branches in place into the `Conv` blocks that they become on export; return the paths."""
    # Such a block ends in a BatchNorm that has statistics from images and undoes itself, for training.
    paths = stock.branched(model)
    if not paths:
        return []
    modules = dict(model.named_modules())
    fresh = [modules[path] for path in paths if stock.merge_block(modules[path])]
    for block in fresh:
        block.conv.requires_grad_(True)
        block.bn = nn.BatchNorm2d(block.conv.out_channels, eps=1e-3, momentum=0.03).to(block.conv.weight)
        block.bn.running_var.fill_(1 - block.bn.eps)  # it changes nothing, in Ultralytics' settings
    for path in paths:
        modules[path].train(model.training)
    _measure(model, fresh, batches)
    note(model, merged=paths)
    set_tripwire(model)
    return paths


def _measure(model: nn.Module, blocks: list[Any], batches: Iterable[torch.Tensor]) -> None:
    """Give the BatchNorms of blocks the statistics of what they see, and undo that in their affine parameters."""
    seen: dict[Any, list[Any]] = {b.bn: [0, 0] for b in blocks}  # sums of values and squares (2, channels), and number

    def see(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].cpu().double()  # which not every GPU has
        seen[norm][0] += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        seen[norm][1] += x.numel() // x.shape[1]

    with evaluating(model, [b.bn.register_forward_pre_hook(see) for b in blocks]):
        for images in batches if blocks else ():
            model(images.to(next(model.parameters()).device))
    for norm, (sums, n) in seen.items():
        if n < 2:
            continue
        mean, square = sums / n
        var = ((square - mean**2) * n / (n - 1)).clamp_min(1e-6)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_((norm.running_var.cpu().double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)


def _quantize_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (module.residual_quantizer(args[0]), *args[1:])


def _quantize_sum(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return module.add_quantizer(out)  # type: ignore[no-any-return]


def insert_fake_quant(
    model: nn.Module, profile: Profile, exclude: Sequence[str] = (), config_list: Sequence[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Insert fake quantizers in place for what the profile runs in INT8; return path -> reason of what stays float."""
    refuse_quantized(model)
    if broken := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise UsageError(f"'{broken[0]}' holds NaN or infinite values: a broken model. Give an earlier checkpoint.")
    plan, reasons = make_plan(model, profile, exclude, config_list)
    if not plan:
        left = f"nothing left to quantize for profile '{profile.name}': all {len(reasons)} layers stay float"
        raise UsageError(f"There is {left}. Leave out some of quant.exclude or quant.config_list.")
    insert_plan(model, plan)
    return reasons


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that carries fake quantizers."""
    if any(isinstance(m, (QuantLayer, QuantAct)) for m in model.modules()):
        raise UsageError("This model carries fake quantizers already. Strip them first.")


def insert_plan(model: nn.Module, plan: Plan) -> None:
    """Insert uncalibrated fake quantizers in place where a plan, made for this model, has them."""
    modules = dict(model.named_modules())
    if missing := [path for path in plan if path not in modules]:
        lacking = f"{len(missing)} quantized layers, such as '{missing[0]}', are not in this model"
        raise UsageError(f"{lacking}. Quantize the model that the ranges were made for.")
    first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
    for path, sites in plan.items():
        layer, block = modules[path], modules.get(path.rpartition(".")[0])
        device = next(layer.parameters()).device
        made = {s: RangeQuantizer(spec).to(device).train(layer.training) for s, spec in sites.items() if s != "weight"}
        if "residual" in made:
            layer.residual_quantizer = made["residual"]
            layer.register_forward_pre_hook(_quantize_input)
        if "add" in made:
            layer.add_quantizer = made["add"]
            layer.register_forward_hook(_quantize_sum)
        if type(layer) in SWAPS:
            if layer is first and "input" in made:  # images are k / 255, which this range represents without any error
                made["input"].set_range(0.0, 1.0)
                made["input"].fixed = True
            _swap(layer, sites.get("weight"), made, block)


def insert_state(model: nn.Module, state: State) -> None:
    """Insert fake quantizers in place with the specs and ranges of a state, made for this model."""
    insert_plan(model, plan_of(state))
    load_state(model, state)


def _swap(layer: Any, weight: Spec | None, made: dict[str, RangeQuantizer], block: Any) -> None:
    """Make a layer a quantized one, and wrap the activation of the block around it where there is one."""
    layer.__class__ = SWAPS[type(layer)]
    layer.input_quantizer, layer.weight_spec, layer.mode = made.get("input"), weight, "on"
    in_block = getattr(block, "conv", None) is layer
    layer.fold = (block,) if in_block else ()
    layer.output_quantizer = None if in_block else made.get("output")
    channels = layer.weight.shape[channel_axis(layer)] if weight is None or weight.per_channel else 1
    layer.register_buffer("weight_ratio", torch.ones(channels, device=layer.weight.device))
    if in_block and {"output", "activation"} & set(made):
        for site in SILU_LOWER.keys() & made.keys() if isinstance(block.act, nn.SiLU) else ():
            made[site].lower = SILU_LOWER[site]
        block.act = QuantAct(block.act, made.get("output"), made.get("activation")).train(block.training)


def strip_fake_quant(model: nn.Module) -> nn.Module:
    """Remove all fake quantizers in place and return the model, which then holds the stock classes it had before."""
    for module in list(model.modules()):
        act = getattr(module, "act", None)
        if isinstance(act, QuantAct):
            module.act = act.act
        if type(module) in STOCK:
            for name in ("input_quantizer", "output_quantizer", "weight_spec", "weight_ratio", "fold", "mode"):
                delattr(module, name)
            module.__class__ = STOCK[type(module)]
        for name in {"residual_quantizer", "add_quantizer"} & set(module._modules):
            delattr(module, name)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if hook in (_quantize_input, _quantize_sum)]:
                    del hooks[key]
    return model


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, layer and, where it is the convolution of one, the Ultralytics block of every quantized layer."""
    blocks = {id(m.conv): m for m in model.modules() if isinstance(getattr(m, "conv", None), QuantLayer)}
    for path, m in model.named_modules():
        if isinstance(m, QuantLayer):
            yield path, m, blocks.get(id(m))


def quantizers(model: nn.Module) -> Iterator[tuple[str, str, RangeQuantizer, Any]]:
    """Yield layer path, site, quantizer and the block's activation (or None) for every quantizer of activations."""
    blocks = {path: block for path, _, block in quantized_layers(model)}
    for path, m in model.named_modules():
        act = getattr(blocks.get(path), "act", None)
        wrapped = act if isinstance(act, QuantAct) else None
        behind = wrapped or (m if isinstance(m, QuantLayer) else None)
        owners = {"input": m, "output": behind, "activation": wrapped, "residual": m, "add": m}
        for site, owner in owners.items():
            if isinstance(q := getattr(owner, f"{site}_quantizer", None), RangeQuantizer):
                yield path, site, q, wrapped.act if wrapped else act


def set_mode(model: nn.Module, mode: str, momentum: float | None = None) -> None:
    """Switch quantization on, or to float, and set how much of a range is that of the current batch while training."""
    for _, layer, _ in quantized_layers(model):
        layer.mode = mode
    for *_, q, _ in quantizers(model):
        q.mode = mode
        q.momentum = q.momentum if momentum is None else momentum


@torch.no_grad()
def get_state(model: nn.Module) -> State:
    """Return specs and, once calibrated, `lo` and `hi` of activations and `ratio` of weights (unless all are 1)."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for path, layer, _ in quantized_layers(model):
        if spec := layer.weight_spec:
            ratio = layer.weight_ratio
            entries[path, "weight"] = spec.as_dict() | ({} if (ratio == 1).all() else {"ratio": ratio.tolist()})
    for path, site, q, _ in quantizers(model):
        entries[path, site] = q.spec.as_dict() | ({"lo": float(q.lo), "hi": float(q.hi)} if q.ready else {})
    paths = {path for path, _ in entries}
    ordered = [path for path, _ in model.named_modules() if path in paths]
    return {path: {site: entries[path, site] for site in SITES if (path, site) in entries} for path in ordered}


@torch.no_grad()
def load_state(model: nn.Module, state: State) -> None:
    """Set the ranges returned by `get_state` of a model with the same plan."""
    sites: dict[tuple[str, str], Any] = {(path, site): q for path, site, q, _ in quantizers(model)}
    sites |= {(path, "weight"): layer for path, layer, _ in quantized_layers(model) if layer.weight_spec}
    unknown = sorted({path for path, r in state.items() for site in r if (path, site) not in sites})
    if unknown:
        remedy = "Insert fake quantizers with the same profile and exclude list, and fuse both models or neither."
        lost = f"{len(unknown)} layers, such as '{unknown[0]}', have no quantizer in this model"
        raise UsageError(f"Ranges of {lost}. {remedy}")
    for path, r in state.items():
        for site, entry in r.items():
            target, ratio = sites[path, site], entry.get("ratio")
            if site == "weight":
                target.weight_ratio.copy_(torch.tensor(ratio) if ratio else torch.ones_like(target.weight_ratio))
            elif "lo" in entry:
                target.set_range(entry["lo"], entry["hi"])
