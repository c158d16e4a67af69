# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Apply a plan to a model and prove that the result is what the plan says."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.errors import CheckFailed
from yolo_ext.pruning.graph import Kept
from yolo_ext.pruning.labels import weight_dim

Slices = list[tuple[int, list[int]]]  # (dimension, kept positions) of one tensor
TOLERANCE = 1e-9  # of the masked-equivalence gate, in float64, relative to the largest output
ADVICE = "Nothing was written. Exclude the layers of custom modules with prune.exclude=[...]."


def parameter_slices(module: nn.Module, dims: dict[str, list[int]]) -> dict[str, Slices]:
    """Return how the parameters of a layer shrink, by name: weights, gradients and optimizer state alike."""
    weight, found = [], {}
    if "in" in dims and getattr(module, "groups", 1) == 1:  # depthwise: its input goes with its output
        weight.append((weight_dim(module, "in"), dims["in"]))
    if "out" in dims:
        weight.append((weight_dim(module, "out"), dims["out"]))
        found["bias"] = [(0, dims["out"])]
    return {name: s for name, s in {"weight": weight, **found}.items() if s and getattr(module, name) is not None}


def cut(tensor: torch.Tensor, slices: Slices) -> torch.Tensor:
    """Return a copy of a tensor that holds only the kept positions."""
    tensor = tensor.detach()
    for dim, index in slices:
        tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
    return tensor.clone()


def cut_layer(m: nn.Module, dims: dict[str, list[int]]) -> None:
    """Cut a layer or norm in place to the kept positions of its `out` and `in` channels."""
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
        cut_layer(modules[path], dims)
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
        dim = weight_dim(m, "out")
        gone = torch.ones(m.weight.shape[dim], dtype=torch.bool)
        gone[dims["out"]] = False
        with torch.no_grad():
            m.weight.transpose(0, dim)[gone] = 0
            if m.bias is not None:
                m.bias[gone] = 0
    return copy


def equivalence_gap(dense: nn.Module, pruned: nn.Module, kept: Kept, imgsz: int = 64) -> float:
    """Return the largest difference of raw outputs in float64, relative to the largest output; inf or NaN if none."""
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
