# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Apply a plan to a model, or to all that a run holds of it, and prove that the result is what the plan says."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import note, set_tripwire
from yolo_ext.core.errors import CheckFailed
from yolo_ext.pruning.depgraph import cut_channels, depthwise, pruning_function, width
from yolo_ext.pruning.graph import Kept
from yolo_ext.pruning.labels import weight_dim

Slices = list[tuple[int, list[int]]]  # (dimension, kept positions) of one tensor
TOLERANCE = 1e-9  # of the masked-equivalence gate, in float64, relative to the largest output
ADVICE = "Exclude the layers of custom modules with prune.exclude=[...]."


def parameter_slices(module: nn.Module, dims: dict[str, list[int]]) -> dict[str, Slices]:
    """Return how the parameters of a layer shrink, by name: weights, gradients and optimizer state alike."""
    found: dict[str, Slices] = {"weight": [], "bias": []}
    if "in" in dims and getattr(module, "groups", 1) == 1:  # depthwise: its input goes with its output
        found["weight"].append((weight_dim(module, "in"), dims["in"]))
    if "out" in dims:
        found["weight"].append((weight_dim(module, "out"), dims["out"]))
        found["bias"].append((0, dims["out"]))
    return {name: s for name, s in found.items() if s and getattr(module, name) is not None}


def cut(tensor: torch.Tensor, slices: Slices) -> torch.Tensor:
    """Return a copy of a tensor that holds only the kept positions."""
    tensor = tensor.detach()
    for dim, index in slices:
        tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
    return tensor.clone()


def cut_layer(m: nn.Module, dims: dict[str, list[int]]) -> None:
    """Cut a layer or norm in place to the kept positions of its `out` and `in` channels."""
    both = depthwise(m)  # asked before anything is cut: one channel alone is depthwise no more
    for dim, keep in dims.items():
        if not (both and dim == "in"):
            gone = sorted(set(range(width(m, dim))) - set(keep))
            cut_channels(m, pruning_function(m, dim), gone)


def apply_plan(model: nn.Module, kept: Kept) -> nn.Module:
    """Cut a model, with its gradients, in place to the kept channels; stock classes stay stock classes."""
    modules = dict(model.named_modules())
    for path, dims in kept.items():
        cut_layer(modules[path], dims)
    stock.refresh_widths(model, kept)
    return model


@torch.no_grad()
def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """Return a dense copy in which the channels that the plan removes are zero."""
    copy = deepcopy(model)
    for path, dims in kept.items():
        if "out" in dims:
            m = copy.get_submodule(path)
            weight = m.weight.transpose(0, weight_dim(m, "out"))
            gone = torch.ones(len(weight), dtype=torch.bool)
            gone[dims["out"]] = False
            for t in (weight, m.bias) if m.bias is not None else (weight,):
                t[gone] = 0
    return copy


@torch.no_grad()
def equivalence_gap(dense: nn.Module, pruned: nn.Module, kept: Kept, imgsz: int = 64) -> float:
    """Return the largest difference of raw outputs in float64, relative to the largest output; inf or NaN if none."""
    shape, seed = (1, stock.input_channels(dense), imgsz, imgsz), torch.Generator().manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64, generator=seed)

    def outputs(model: nn.Module) -> list[torch.Tensor]:  # raw ones of the head, before decoding and top-k
        out = model.cpu().double().eval()(x)
        return list(stock.returned_tensors(out[1] if isinstance(out, (tuple, list)) and len(out) == 2 else out))

    a = outputs(masked(dense, kept))
    try:
        b = outputs(deepcopy(pruned))
    except Exception as e:  # whatever a user's block raises
        raise CheckFailed(f"The pruned model does not run: {type(e).__name__}: {str(e)[:200]} {ADVICE}") from e
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    # max() of tensors, because that of Python drops a NaN
    return float(torch.stack([(s - t).abs().max() / s.abs().max().clamp(min=1.0) for s, t in zip(a, b)]).max())


def check_trainable(model: nn.Module, imgsz: int = 64) -> None:
    """Run one forward and backward pass in train mode on a copy, and refuse gradients that are not finite."""
    copy = deepcopy(model).float().cpu().train()
    copy.requires_grad_(True)
    try:
        out = copy(torch.rand(2, stock.input_channels(model), imgsz, imgsz))
        sum(t.float().mean() for t in stock.returned_tensors(out)).backward()  # type: ignore[union-attr]
    except Exception as e:  # whatever a user's block raises
        raise CheckFailed(f"The pruned model cannot be trained: {e}") from e
    if any(p.grad is not None and not p.grad.isfinite().all() for p in copy.parameters()):
        raise CheckFailed("The pruned model has gradients that are not finite.")


def verify(dense: nn.Module, pruned: nn.Module, kept: Kept) -> float:
    """Prove that a pruned model equals the masked dense one and can be trained; return the gap of their outputs."""
    size = stock.probe_size(dense)
    gap = equivalence_gap(dense, pruned, kept, size)
    if not gap <= TOLERANCE:
        differ = f"pruned and masked outputs differ by {gap:.1e} (limit {TOLERANCE:.0e})"
        raise CheckFailed(f"Pruning is not exact on this model: {differ}. {ADVICE}")
    check_trainable(pruned, size)
    return gap


def cut_run(
    model: nn.Module, ema: Any, optimizer: torch.optim.Optimizer, kept: Kept, record: Mapping[str, Any]
) -> None:
    """Cut the live model, its `ModelEMA` and the optimizer, all in place, by one plan; manifests get `record`."""
    modules, old = dict(model.named_modules()), dict(model.named_parameters())
    slices = {f"{path}.{name}": s for path, dims in kept.items()
              for name, s in parameter_slices(modules[path], dims).items()}  # fmt: skip
    channels_last = any(p.ndim == 4 and not p.is_contiguous() for p in old.values())
    for m in (model, ema.ema):
        apply_plan(m, kept)
        note(m, prune=deepcopy(record))
        set_tripwire(m)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    new = dict(model.named_parameters())
    follow(optimizer, [(old[n], new[n], s) for n, s in slices.items()])
    stock.restart_ema(ema)


def follow(optimizer: torch.optim.Optimizer, cuts: Iterable[tuple[nn.Parameter, nn.Parameter, Slices]]) -> None:
    """Make an optimizer go on with (old parameter, new parameter, `surgery.Slices`) triples, moments cut likewise."""
    swap = {old: (new, slices) for old, new, slices in cuts}
    for group in optimizer.param_groups:
        group["params"] = [swap[p][0] if p in swap else p for p in group["params"]]
    for old, (new, slices) in swap.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                k: cut(v, slices) if isinstance(v, torch.Tensor) and v.shape == old.shape else v
                for k, v in optimizer.state.pop(old).items()
            }
