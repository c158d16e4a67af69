# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Apply a plan to a model, prove that the result is what the plan says, and recalibrate BatchNorm."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from yolo_ext import compat
from yolo_ext.checkpoint import fingerprint, manifest, set_tripwire
from yolo_ext.config import PruneConfig
from yolo_ext.errors import CheckFailed, UsageError
from yolo_ext.pruning.graph import Graph, build_graph
from yolo_ext.pruning.targets import Kept, plan

TOLERANCE = 1e-9  # of the masked-equivalence gate, in float64, relative to the largest output
ADVICE = "Nothing was written. Exclude the layers of custom modules with prune.exclude=[...]."


def _take(tensor: torch.Tensor, dim: int, index: list[int]) -> torch.Tensor:
    return tensor.detach().index_select(dim, torch.tensor(index, device=tensor.device)).clone()


def _parameter(old: nn.Parameter, dim: int, index: list[int]) -> nn.Parameter:
    return nn.Parameter(_take(old, dim, index), requires_grad=old.requires_grad)


def _slice_out(m: nn.Module, index: list[int]) -> None:
    if isinstance(m, nn.BatchNorm2d):
        for name in ("running_mean", "running_var"):
            setattr(m, name, _take(getattr(m, name), 0, index))
        m.num_features = len(index)
    else:
        depthwise = getattr(m, "groups", 1) > 1
        setattr(m, "out_features" if isinstance(m, nn.Linear) else "out_channels", len(index))
        if depthwise:
            m.groups = m.in_channels = len(index)
    m.weight = _parameter(m.weight, 1 if isinstance(m, nn.ConvTranspose2d) else 0, index)
    if m.bias is not None:
        m.bias = _parameter(m.bias, 0, index)


def _slice_in(m: nn.Module, index: list[int]) -> None:
    if getattr(m, "groups", 1) > 1:
        return  # depthwise: its input goes with its output
    m.weight = _parameter(m.weight, 0 if isinstance(m, nn.ConvTranspose2d) else 1, index)
    setattr(m, "in_features" if isinstance(m, nn.Linear) else "in_channels", len(index))


def apply_plan(model: nn.Module, kept: Kept) -> nn.Module:
    """Cut a model in place so that only the kept channels remain; stock classes stay stock classes.

    Args:
        model: The dense model.
        kept: Kept positions by module path and dimension.

    Returns:
        The same model.
    """
    modules = dict(model.named_modules())
    for path, dims in kept.items():
        if "in" in dims:
            _slice_in(modules[path], dims["in"])
        if "out" in dims:
            _slice_out(modules[path], dims["out"])
    compat.refresh_widths(model)
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
        1, compat.input_channels(dense), imgsz, imgsz, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        a = list(compat.returned_tensors(_raw(reference(x))))
        try:
            b = list(compat.returned_tensors(_raw(other(x))))
        except RuntimeError as e:
            raise CheckFailed(f"The pruned model does not run: {str(e).splitlines()[0]} {ADVICE}") from e
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
        out = copy(torch.rand(2, compat.input_channels(model), imgsz, imgsz))
        sum(t.float().mean() for t in compat.returned_tensors(out)).backward()  # type: ignore[union-attr]
    except RuntimeError as e:
        raise CheckFailed(f"The pruned model cannot be trained: {e}") from e
    if any(p.grad is not None and not p.grad.isfinite().all() for p in copy.parameters()):
        raise CheckFailed("The pruned model has gradients that are not finite.")


def prune_model(model: nn.Module, cfg: PruneConfig, imgsz: int = 64) -> nn.Module:
    """Prune a copy of a model to a target and prove that the surgery is exact.

    Args:
        model: Any YOLO model; it is not changed.
        cfg: Pruning options with a target.
        imgsz: Side in pixels of the images for tracing and for the gate.

    Returns:
        The pruned copy, whose manifest records the plan and per-layer reasons.

    Raises:
        UsageError: If no target is given, the model is fused or the target cannot be reached.
        CheckFailed: If the pruned model differs from the masked dense one.
    """
    if cfg.speedup is None and cfg.ratio is None:
        raise UsageError(
            "No pruning target. Give prune.speedup=2 (FLOPs ratio) or prune.ratio=0.3 (share of channels)."
        )
    if getattr(model, "is_fused", lambda: False)():
        raise UsageError("The model is fused (BatchNorm folded into the convs). Prune the unfused .pt.")
    graph = build_graph(model, imgsz)
    kept = plan(model, graph, cfg)
    pruned = apply_plan(deepcopy(model), kept)
    size = max(64, 2 * compat.max_stride(model))
    gap = equivalence_gap(model, pruned, kept, size)
    if not gap <= TOLERANCE:
        raise CheckFailed(
            f"Pruning is not exact on this model: pruned and masked outputs differ by {gap:.1e} "
            f"(limit {TOLERANCE:.0e}). {ADVICE}"
        )
    check_trainable(pruned, size)
    _record(model, pruned, graph, kept, cfg, gap)
    return pruned


def _record(dense: nn.Module, pruned: nn.Module, graph: Graph, kept: Kept, cfg: PruneConfig, gap: float) -> None:
    """Write what was done into the manifest; indices always count in the numbering of the first dense model."""
    previous = deepcopy(manifest(dense).get("prune"))
    shapes = previous["shapes"] if previous else {p: list(s) for p, s in graph.shapes.items()}
    total: Kept = deepcopy(previous["kept"]) if previous else {}
    for path, dims in kept.items():
        for dim, index in dims.items():
            old = total.setdefault(path, {}).get(dim)
            total[path][dim] = [old[i] for i in index] if old is not None else list(index)
    manifest(pruned)["prune"] = {
        "config": asdict(cfg),
        "kept": total,
        "shapes": shapes,
        "parent": previous["parent"] if previous else fingerprint(dense),
        "frozen": {m.module: g.frozen for g in graph.groups if g.frozen for m in g.members if m.dim == "out"},
        "gap": gap,
    }
    set_tripwire(pruned)


def layer_report(model: nn.Module) -> list[dict[str, Any]]:
    """Return channels before and after for every layer of a pruned model, with the reason where nothing changed.

    Returns:
        Rows ``{"name", "before", "after", "reason"}`` in the order of the model.
    """
    record = manifest(model).get("prune") or {"shapes": {}, "frozen": {}}
    modules = dict(model.named_modules())
    rows = []
    for path in sorted(record["shapes"], key=compat.natural_key):
        before = record["shapes"][path][0]
        after = getattr(modules[path], "out_channels", None) or getattr(modules[path], "out_features", before)
        reason = record["frozen"].get(path, "") if after == before else ""
        rows.append({"name": path, "before": before, "after": after, "reason": reason})
    return rows


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Re-estimate BatchNorm statistics from images (Li et al., EagleEye, 2020, arXiv:2007.02491).

    Args:
        model: Model on any device; its running means and variances are replaced.
        batches: Image batches (B, C, H, W) in 0..1.

    Returns:
        Number of images used.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta, training, seen = [m.momentum for m in norms], model.training, 0
    device = next(model.parameters()).device
    model.train()
    try:
        for x in batches:
            if not seen:  # not before: without any image the old statistics stay
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None  # cumulative average over all batches
            model(x.to(device))
            seen += len(x)
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        model.train(training)
    return seen
