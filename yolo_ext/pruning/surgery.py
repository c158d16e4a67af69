# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Apply a plan to a model and prove that the result is what the plan says."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import TARGETS, PruneConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.criteria import AUTO, criteria, resolved
from yolo_ext.pruning.graph import Graph, Kept, build_graph
from yolo_ext.pruning.probes import NO_PROBES, Probes
from yolo_ext.pruning.prune import plan
from yolo_ext.pruning.record import record

TOLERANCE = 1e-9  # of the masked-equivalence gate, in float64, relative to the largest output
ADVICE = "Nothing was written. Exclude the layers of custom modules with prune.exclude=[...]."


def parameter_slices(module: nn.Module, dims: dict[str, list[int]]) -> dict[str, list[tuple[int, list[int]]]]:
    """Say how the parameters of a layer shrink: what its weights, gradients and optimizer state have in common.

    Args:
        module: Conv, ConvTranspose, Linear or BatchNorm before surgery.
        dims: Its kept positions, by ``out`` and ``in``.

    Returns:
        Parameter name to (dimension, kept positions) pairs.
    """
    transposed, found = isinstance(module, nn.ConvTranspose2d), {}
    weight = []
    if "in" in dims and getattr(module, "groups", 1) == 1:  # depthwise: its input goes with its output
        weight.append((0 if transposed else 1, dims["in"]))
    if "out" in dims:
        weight.append((1 if transposed else 0, dims["out"]))
        found["bias"] = [(0, dims["out"])]
    return {name: s for name, s in {"weight": weight, **found}.items() if s and getattr(module, name) is not None}


def cut(tensor: torch.Tensor, slices: list[tuple[int, list[int]]]) -> torch.Tensor:
    """Return a copy of a tensor that holds only the kept positions."""
    tensor = tensor.detach()
    for dim, index in slices:
        tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
    return tensor.clone()


def _shrink(m: nn.Module, dims: dict[str, list[int]]) -> None:
    for name, slices in parameter_slices(m, dims).items():
        old = getattr(m, name)
        new = nn.Parameter(cut(old, slices), requires_grad=old.requires_grad)
        new.grad = None if old.grad is None else cut(old.grad, slices)
        setattr(m, name, new)
    depthwise, linear = getattr(m, "groups", 1) > 1, isinstance(m, nn.Linear)
    if "in" in dims and not depthwise:
        setattr(m, "in_features" if linear else "in_channels", len(dims["in"]))
    if "out" not in dims:
        return
    if isinstance(m, nn.BatchNorm2d):
        for name in ("running_mean", "running_var"):
            setattr(m, name, cut(getattr(m, name), [(0, dims["out"])]))
        m.num_features = len(dims["out"])
        return
    setattr(m, "out_features" if linear else "out_channels", len(dims["out"]))
    if depthwise:
        m.groups = m.in_channels = len(dims["out"])


def apply_plan(model: nn.Module, kept: Kept) -> nn.Module:
    """Cut a model in place so that only the kept channels remain; stock classes stay stock classes.

    Args:
        model: The dense model. Gradients that are there are cut as well.
        kept: Kept positions by module path and dimension.

    Returns:
        The same model.
    """
    modules = dict(model.named_modules())
    for path, dims in kept.items():
        _shrink(modules[path], dims)
    stock.refresh_widths(model, kept)
    return model


def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """Return a dense copy in which the channels that the plan removes are zero."""
    copy = deepcopy(model)
    modules = dict(copy.named_modules())
    for path, dims in kept.items():
        if "out" not in dims:
            continue
        m = modules[path]
        gone = torch.ones(m.weight.shape[1 if isinstance(m, nn.ConvTranspose2d) else 0], dtype=torch.bool)
        gone[dims["out"]] = False
        with torch.no_grad():
            (m.weight.transpose(0, 1) if isinstance(m, nn.ConvTranspose2d) else m.weight)[gone] = 0
            if m.bias is not None:
                m.bias[gone] = 0
    return copy


def equivalence_gap(dense: nn.Module, pruned: nn.Module, kept: Kept, imgsz: int = 64) -> float:
    """Compare the pruned model with the masked dense one in float64.

    Args:
        dense: Model before surgery.
        pruned: Model after surgery.
        kept: The plan that led from one to the other.
        imgsz: Side of the random square image in pixels.

    Returns:
        Largest absolute difference of any raw output, relative to the largest output (at least 1); infinite or NaN
        when the outputs differ in shape or are not numbers.

    Raises:
        CheckFailed: If the pruned model does not run.
    """
    reference = masked(dense, kept).double().cpu().eval()
    other = deepcopy(pruned).double().cpu().eval()
    x = torch.rand(
        1, stock.input_channels(dense), imgsz, imgsz, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        a = list(stock.returned_tensors(_raw(reference(x))))
        try:
            b = list(stock.returned_tensors(_raw(other(x))))
        except Exception as e:  # whatever a user's block raises
            raise CheckFailed(f"The pruned model does not run: {type(e).__name__}: {str(e)[:200]} {ADVICE}") from e
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    # max() of tensors, because that of Python drops a NaN
    return float(torch.stack([(s - t).abs().max() / s.abs().max().clamp(min=1.0) for s, t in zip(a, b)]).max())


def _raw(out: Any) -> Any:
    """Return the raw head outputs of an eval forward pass, before decoding and top-k."""
    return out[1] if isinstance(out, (tuple, list)) and len(out) == 2 else out


def check_trainable(model: nn.Module, imgsz: int = 64) -> None:
    """Run one forward and backward pass in train mode on a copy.

    Raises:
        CheckFailed: If it fails or leaves a gradient that is not finite.
    """
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
    """Prove that a pruned model is what its plan says: equal to the masked dense model, and able to train.

    Args:
        dense: Model before surgery.
        pruned: Model after surgery.
        kept: The plan that led from one to the other.

    Returns:
        Largest difference of any raw output in float64, relative to the largest output.

    Raises:
        CheckFailed: If the outputs differ by more than `TOLERANCE`, or training steps fail.
    """
    size = stock.probe_size(dense)
    gap = equivalence_gap(dense, pruned, kept, size)
    if not gap <= TOLERANCE:
        raise CheckFailed(
            f"Pruning is not exact on this model: pruned and masked outputs differ by {gap:.1e} "
            f"(limit {TOLERANCE:.0e}). {ADVICE}"
        )
    check_trainable(pruned, size)
    return gap


def prune_model(model: nn.Module, cfg: PruneConfig, imgsz: int = 640, probes: Probes = NO_PROBES) -> nn.Module:
    """Prune a copy of a model to a target and prove that the surgery is exact.

    Args:
        model: Any YOLO model; it is not changed.
        cfg: Pruning options with a target.
        imgsz: Side in pixels of the images that FLOPs are counted for.
        probes: What data and the clock can tell, for the criteria and targets that need it.

    Returns:
        The pruned copy, whose manifest records the plan and per-layer reasons.

    Raises:
        UsageError: If the model is fused or quantized, nothing can be pruned or the target cannot be reached.
        CheckFailed: If the pruned model differs from the masked dense one.
    """
    return prune_with_plan(model, cfg, imgsz, probes)[0]


def prune_with_plan(
    model: nn.Module, cfg: PruneConfig, imgsz: int = 640, probes: Probes = NO_PROBES
) -> tuple[nn.Module, Kept]:
    """Do what `prune_model` does and return the plan too, in the numbering of `model`."""
    check_prunable(model)
    cfg = resolved(cfg, probes.batches is not None)
    if not (any(getattr(cfg, t) is not None for t in TARGETS) or cfg.ratios or cfg.scope == "pagcp"):
        raise UsageError(f"No pruning target. Give one of {', '.join(f'prune.{t}' for t in TARGETS)}, or prune.ratios.")
    try:
        graph, kept, pruned, gap = _verified(model, cfg, imgsz, probes, custom=True)
    except CheckFailed as e:
        LOGGER.warning(f"{colorstr('prune: ')}{e} Leaving all custom modules whole.")
        graph, kept, pruned, gap = _verified(model, cfg, imgsz, probes, custom=False)
    record(model, pruned, graph, kept, cfg, gap)
    return pruned, kept


def _verified(
    model: nn.Module, cfg: PruneConfig, imgsz: int, probes: Probes, *, custom: bool
) -> tuple[Graph, Kept, nn.Module, float]:
    """Return graph, plan, pruned copy and its gap; blocks that compare or divide by their own width show only here."""
    graph = build_graph(model, custom=custom)
    kept = plan(model, graph, cfg, probes, imgsz)
    pruned = apply_plan(deepcopy(model), kept)
    return graph, kept, pruned, verify(model, pruned, kept)


def check_plan(model: nn.Module, cfg: PruneConfig, imgsz: int = 640, *, ready: bool = True) -> None:
    """Find out without data or a clock whether pruning options fit a model.

    Args:
        model: The model; it is not changed.
        cfg: Pruning options. Targets that have to be measured, and criteria that need data, are taken as within reach.
        imgsz: Side in pixels of the images that FLOPs are counted for.
        ready: Whether a sparsity criterion must find the model sparse already.

    Raises:
        UsageError: If the model cannot be pruned, an option does not fit it or the target cannot be reached.
    """
    check_prunable(model)
    if cfg.kind != "structured":
        return
    analytic = bool(cfg.speedup or cfg.params or cfg.ratio or cfg.ratios)
    cheap = replace(cfg, scope="global" if cfg.scope == "pagcp" else cfg.scope)
    if cfg.method == AUTO or Need.DATA in criteria[cfg.method].needs:
        cheap = replace(cheap, method="l2")
    if not analytic:
        cheap = replace(cheap, sensitivity=None, latency=None, size_mb=None, max_drop=None, ratio=0.1)
    plan(model, build_graph(model), cheap, imgsz=imgsz, ready=ready)


def check_prunable(model: nn.Module) -> None:
    """Refuse models whose structure must not change any more.

    Raises:
        UsageError: If the model is fused, or fake-quant has been put in.
    """
    if getattr(model, "is_fused", lambda: False)():
        raise UsageError("The model is fused (BatchNorm folded into the convs). Prune the unfused .pt.")
    if manifest(model).get("quant") or any(type(m).__module__.startswith("yolo_ext") for m in model.modules()):
        raise UsageError(
            "The model is quantized: its ranges belong to the channels that it has. Prune the float .pt, then quantize."
        )
