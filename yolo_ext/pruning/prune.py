# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Prune a model: plan for a target, see whether the model is ready for that, cut, prove, record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import floor
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import TARGETS, PruneConfig, SparsityConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.criteria import AUTO, criteria, resolved
from yolo_ext.pruning.evidence import NO_PROBES, Evidence, Probes, collect
from yolo_ext.pruning.graph import Graph, Kept, build_graph
from yolo_ext.pruning.groups import TiedGroups, tied_groups
from yolo_ext.pruning.pagcp import pagcp
from yolo_ext.pruning.plan import (
    Job,
    by_rank,
    by_sensitivity,
    kept_of,
    near_zero,
    near_zero_share,
    read_sensitivity,
    record,
    scopes,
    spare_units,
)
from yolo_ext.pruning.solve import measure, solve, targets
from yolo_ext.pruning.surgery import apply_plan, verify

WARN, REFUSE = 0.1, 0.5  # share of the removed channels that are still in use


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
    """Do what `prune_model` does, and return the kept positions too, in the numbering of `model`."""
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
    kept = make_plan(model, graph, cfg, probes, imgsz)
    pruned = apply_plan(deepcopy(model), kept)
    return graph, kept, pruned, verify(model, pruned, kept)


# Plan ----------------------------------------------------------------------------------------------------------------
def make_plan(
    model: nn.Module, graph: Graph, cfg: PruneConfig, probes: Probes = NO_PROBES, imgsz: int = 640, ready: bool = True
) -> Kept:
    """Choose the channels that stay so that the target is met.

    Args:
        model: The model; it is not changed.
        graph: Its couplings from `build_graph`, used once: groups that `cfg` keeps whole become frozen in it.
        cfg: Pruning options; with `ratios` and without a target, all other layers stay whole.
        probes: What data and the clock can tell, for the criteria, targets and scopes that need it.
        imgsz: Side of the image in pixels that FLOPs are counted for; the share of attention grows with it.
        ready: Check that sparsity training made room for this plan; False for a trial before that training.

    Returns:
        Kept positions for every layer that loses channels: plain data that can be stored and replayed.

    Raises:
        UsageError: If nothing can be pruned, the floors do not allow the target, data are missing, or the criterion
            needs sparsity training that was not enough.
    """
    cfg = resolved(cfg, probes.batches is not None)
    ties = tied_groups(model, graph, cfg, _evidence(model, cfg, probes))
    if not ties:
        reasons = Counter(g.frozen for g in graph.groups).most_common(3)
        raise UsageError(
            "Nothing can be pruned: every group is frozen, excluded or at its floor "
            f"({', '.join(f'{n} x {reason!r}' for reason, n in reasons)}). See `yolo-ext help prune`."
        )
    job = Job(model, graph, ties, cfg, probes, imgsz)
    units = _units(job)
    if ready:
        check_readiness(job, units)
    return kept_of(graph, ties, units)


def _evidence(model: nn.Module, cfg: PruneConfig, probes: Probes) -> Evidence | None:
    """Measure what a data-driven criterion needs; without data the criterion itself says so."""
    if Need.DATA not in criteria[cfg.method].needs or probes.batches is None:
        return None
    return collect(model, cfg.method, probes.batches())


def _units(job: Job) -> list[int]:
    """Return the kept units of each that meet the target."""
    cfg, free = job.cfg, [t for t in job.ties if t.share is None]
    name = next((t for t in TARGETS if getattr(cfg, t) is not None), None)
    if cfg.scope == "pagcp":
        return pagcp(job)
    if name is None:
        return _settled(job.ties, [t.units for t in free])
    if cfg.sensitivity:
        spread = by_sensitivity(free, read_sensitivity(cfg.sensitivity))
    else:
        spread = by_rank(free, scopes[cfg.scope].fn(free, job.model))
    return solve(name, targets[name].fn(job), lambda share: _settled(job.ties, spread(share)), job.ties, cfg)


def _settled(ties: Sequence[TiedGroups], units: Sequence[int]) -> list[int]:
    """Return the kept units of all from those of the free ones."""
    rest = iter(units)
    return [next(rest) if t.share is None else t.round(t.units * (1 - t.share)) for t in ties]


# Checks --------------------------------------------------------------------------------------------------------------
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
    make_plan(model, build_graph(model), cheap, imgsz=imgsz, ready=ready)


def check_prunable(model: nn.Module) -> None:
    """Refuse models whose structure must not change any more.

    Raises:
        UsageError: If the model is fused, or fake-quant has been put in.
    """
    if getattr(model, "is_fused", lambda: False)():
        raise UsageError("The model is fused (BatchNorm folded into the convs). Prune the unfused .pt.")
    if manifest(model).quant or any(type(m).__module__.startswith("yolo_ext") for m in model.modules()):
        raise UsageError(
            "The model is quantized: its ranges belong to the channels that it has. Prune the float .pt, then quantize."
        )


# Readiness: has sparsity training emptied the channels that a plan removes, and which target is realistic? -----------
def readiness(job: Job, units: Sequence[int]) -> dict[str, Any]:
    """Compare a plan that keeps these units with what sparsity training left behind.

    Returns:
        `method`; `trained`, the penalty that the model was trained with, or None; `threshold`; `channels` that could
        go and the `share` of them that is near zero; `speedup`, FLOPs before / after if only those went; `removed`,
        channels that the plan removes, and the share of these that is still `in_use`: not near zero.
    """
    trained = manifest(job.model).sparsity
    threshold = trained.get("threshold") or SparsityConfig().threshold
    figures = measure(job.model, job.graph, job.imgsz)
    removed = in_use = 0
    for t, kept in zip(job.ties, units):
        for g, v in zip(t.groups, t.values):
            goes = g.size - kept * (g.size // t.units)
            removed += goes
            in_use += max(0, goes - int(near_zero(v, threshold).sum()))  # the lowest scores go first
    return {
        "method": job.cfg.method,
        "trained": trained.get("method"),
        "threshold": threshold,
        "channels": sum(t.channels for t in job.ties),
        "share": near_zero_share(job.ties, threshold),
        "speedup": figures({})[0] / figures(job.widths(spare_units(job.ties, threshold)))[0],
        "removed": removed,
        "in_use": in_use / max(removed, 1),
    }


def check_readiness(job: Job, units: Sequence[int]) -> None:
    """Say how ready a model is for a plan by a criterion that needs sparsity training; warn or refuse when it is not.

    Raises:
        UsageError: If more than half of the channels that the plan removes are still in use, unless `force` is set.
    """
    cfg = job.cfg
    if Need.SPARSITY not in criteria[cfg.method].needs:
        return
    found = readiness(job, units)
    LOGGER.info(
        f"{colorstr('prune: ')}{cfg.method}: {found['share']:.1%} of {found['channels']:,} channels are near zero "
        f"(at most {found['threshold']:g} of the largest in their group), enough for a speed-up of "
        f"{found['speedup']:.2f}; {found['in_use']:.1%} of the {found['removed']:,} that go are still in use"
    )
    if found["in_use"] <= WARN:
        return
    problem, remedy = _advice(cfg, found)
    if found["in_use"] > REFUSE and not cfg.force:
        raise UsageError(f"{problem} {remedy}, or prune all the same with prune.force=True.")
    LOGGER.warning(f"{colorstr('prune: ')}{problem} {remedy}.")


def _advice(cfg: PruneConfig, found: dict[str, Any]) -> tuple[str, str]:
    """Return what is wrong with a plan, and what to do about it."""
    name = next((t for t in TARGETS if getattr(cfg, t) is not None), "scope" if cfg.scope == "pagcp" else "ratios")
    method, trained = found["method"], found["trained"]
    how = {method: f"with sparsity.method={method}", None: f"without sparsity.method={method}"}
    training = how.get(trained, f"with sparsity.method={trained}, not {method}")
    problem = (
        f"'prune.{name}={getattr(cfg, name)}' by '{method}' removes {found['removed']:,} channels, of which "
        f"{found['in_use']:.0%} are still in use. The model was trained {training}: "
        f"{found['share']:.0%} of its channels are near zero."
    )
    longer = ", for more epochs or with a larger sparsity.coefficient" if trained == method else ""
    remedy = f"Train with sparsity.method={method} first{longer}"
    realistic = floor(found["speedup"] * 100) / 100
    if realistic > 1.01:
        remedy += f", lower the target to prune.speedup={realistic:g}"
    return problem, f"{remedy}, take prune.method=taylor or lamp"
