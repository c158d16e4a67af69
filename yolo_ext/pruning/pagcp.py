# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Performance-aware global channel pruning: each layer goes as far as its share of a loss budget lets it.

Ye et al., TPAMI 2023, arXiv:2303.11923. Layers are visited one after the other, those whose FLOPs react most first and
with the largest budgets. Unlike the authors' code it finds ratios by bisection, recalibrates BatchNorm for each trial,
prunes a layer that never exceeds its budget to its floor, and can end at a FLOPs target. Trials run on pruned copies.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ultralytics.utils import LOGGER, TQDM, colorstr

from yolo_ext.core.config import TARGETS, PruneConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.pruning.evidence import task_losses
from yolo_ext.pruning.plan import Job
from yolo_ext.pruning.solve import measure
from yolo_ext.stock.context import recalibrate

Losses = Callable[[list[int]], dict[str, float]]  # kept units of each -> loss of each task
Flops = Callable[[list[int]], float]  # kept units of each -> FLOPs relative to the dense model
PROBE = 0.3  # share of a group that is removed to see how the FLOPs react


def pagcp(job: Job) -> list[int]:
    """Return the kept units of each so that no task loss exceeds its budgets, and note the rows of `search`."""
    cfg, graph, ties = job.cfg, job.graph, job.ties
    if job.probes.batches is None:
        raise UsageError("'prune.scope=pagcp' measures losses on train images. Give data=data.yaml.")
    if other := [t for t in TARGETS if t != "speedup" and getattr(cfg, t) is not None]:
        problem = f"spends prune.budget={cfg.budget:g} and cannot aim at 'prune.{other[0]}'"
        raise UsageError(f"'prune.scope=pagcp' {problem}. Give prune.speedup to end it early, or no target.")
    batches = list(job.probes.batches())
    figures = measure(job.model, graph, job.imgsz)
    dense = figures({})[0]

    def flops(units: list[int]) -> float:
        return figures(job.widths(units))[0] / dense

    def losses(units: list[int]) -> dict[str, float]:
        trial = job.pruned(units)
        if cfg.recalibrate:  # as the model that is delivered will be
            recalibrate(trial, (b["img"] for b in batches))
        return task_losses(trial, batches)

    allowed = [t.allowed if t.share is None else [t.round(t.units * (1 - t.share))] for t in ties]
    units, rows = search(allowed, losses, flops, cfg)
    for row, tied, kept in zip(rows, ties, units):
        row.update(name=tied.name, channels=tied.channels, ratio=1 - kept / tied.units)
        if tied.share is not None:
            row["outcome"] = "is set by prune.ratios"
    graph.notes = rows
    return units


def search(
    allowed: Sequence[Sequence[int]], losses: Losses, flops: Flops, cfg: PruneConfig
) -> tuple[list[int], list[dict[str, Any]]]:
    """Walk once over the groups, of which these numbers of units may stay, and return what stays and a row of each."""
    start = [a[0] for a in allowed]
    probes = [min(a[1:] or a, key=lambda u: abs(u - a[0] * (1 - PROBE))) for a in allowed]
    drops = [flops(start) - flops(_with(start, i, u)) for i, u in enumerate(probes)]
    rows: list[dict[str, Any]] = [
        {"ratio": 0.0, "budget": 0.0, "limit": "", "growth": 1.0, "flops_share": d, "trials": 0,
         "outcome": "has no FLOPs to save"} for d in drops
    ]  # fmt: skip
    order = sorted((i for i, d in enumerate(drops) if d > 0), key=lambda i: -drops[i])
    decay = budget_decay(cfg.budget, cfg.total_budget, len(order))
    order = order if decay <= 1 else order[::-1]  # the largest budgets go where most FLOPs are
    units, dense = list(start), losses(start)
    if not all(math.isfinite(v) for v in dense.values()):
        raise CheckFailed(f"The losses of the model before pruning are not finite: {dense}. Is it trained?")
    if not (base := {t: v for t, v in dense.items() if v > 0}):  # that a ratio can be taken of
        raise UsageError(f"All losses of the model are zero: {dense}. Give train images with objects.")
    bargains: dict[int, float] = {}  # accepted group -> loss increase per FLOP
    theta, done = cfg.budget, False
    for i in (bar := TQDM(order, desc="PAGCP")):
        if done:
            rows[i]["outcome"] = "was not needed for the target"
            continue
        level, found, row = _deepest(units, i, allowed[i], base, theta, losses)
        rows[i].update(row, budget=theta)
        if level:
            after = _with(units, i, allowed[i][level])
            bargains[i] = sum(found[t] - v for t, v in base.items()) / (flops(units) - flops(after))
            units = after
            base = {t: max(v, found[t]) for t, v in base.items()}
            rows[i].update(ratio=1 - units[i] / start[i], outcome="is pruned")
        theta *= decay
        best = _filtered(start, units, bargains, cfg.topk)
        bar.set_postfix(speedup=f"{1 / flops(best):.2f}")
        done = cfg.speedup is not None and 1 / flops(best) >= cfg.speedup
    return _finish(start, units, bargains, allowed, flops, cfg, rows), rows


def _deepest(
    units: list[int], i: int, allowed: Sequence[int], base: dict[str, float], theta: float, losses: Losses
) -> tuple[int, dict[str, float], dict[str, Any]]:
    """Return by bisection the deepest level of one within the budget, its losses, and what to report."""
    low, high, found, trials = 0, len(allowed) - 1, base, 0
    row: dict[str, Any] = {"limit": "", "growth": 1.0, "outcome": "is left whole: the first step exceeds its budget"}
    while low < high:
        middle = (low + high + 1) // 2 if trials else high  # many layers can go to their floor
        trial = losses(_with(units, i, allowed[middle]))
        trials += 1
        growth = {t: trial[t] / v for t, v in base.items()}
        worst = max(growth, key=lambda t: math.inf if math.isnan(growth[t]) else growth[t])
        if growth[worst] <= 1 + theta:
            low, found, row["growth"] = middle, trial, growth[worst]
        else:
            high, row["limit"] = middle - 1, worst
    return low, found, {**row, "trials": trials}


def budget_decay(first: float, total: float, n: int) -> float:
    """Solve prod_{i<n} (1 + first * decay^i) = total for the factor between the budgets of successive layers."""
    if n < 2:
        return 1.0
    if total <= 1 + first:
        spent_by = f"is spent by the first layer, prune.budget={first:g}"
        raise UsageError(f"'prune.total_budget={total:g}' {spent_by}. Legal: above {1 + first:g}.")

    def spent(decay: float) -> float:  # log of the product of all budgets
        return sum(math.log1p(first * decay**i) for i in range(n))

    low, high = 0.0, 1.0
    while spent(high) < math.log(total):
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) < math.log(total) else (low, middle)
    return (low + high) / 2


def _finish(
    start: list[int], units: list[int], bargains: dict[int, float], allowed: Sequence[Sequence[int]],
    flops: Flops, cfg: PruneConfig, rows: list[dict[str, Any]],
) -> list[int]:  # fmt: skip
    """Give back those whose FLOPs were bought dearly and what exceeds the target, and say how far it got."""
    best = _filtered(start, units, bargains, cfg.topk)
    if cfg.speedup is not None and bargains:
        last = next(reversed(bargains))
        spare = [u for u in allowed[last] if u >= best[last] and 1 / flops(_with(best, last, u)) >= cfg.speedup]
        best = _with(best, last, max(spare, default=best[last]))
    for i in bargains:
        rows[i]["ratio"] = 1 - best[i] / start[i]
        if best[i] == start[i]:
            rows[i]["outcome"] = "is left whole: its FLOPs cost too much loss"
    if best == start:
        within = f"prune.budget={cfg.budget:g} and prune.total_budget={cfg.total_budget:g}"
        raise UsageError(f"Nothing can be pruned within {within}. Raise them, prune.topk or prune.images.")
    reached = 1 / flops(best)
    LOGGER.info(f"{colorstr('pagcp: ')}FLOPs / {reached:.2f}, {sum(b < s for b, s in zip(best, start))} layers pruned")
    if cfg.speedup is not None and reached > 1.01 * cfg.speedup:
        why = "the last group shrinks in steps of this size"
        LOGGER.warning(f"{colorstr('pagcp: ')}speedup is {reached:.4g} instead of {cfg.speedup:g}: {why}.")
    if cfg.speedup is not None and reached < 0.99 * cfg.speedup:
        more = f"total_budget={cfg.total_budget:g}, prune.budget={cfg.budget:g} or prune.topk={cfg.topk:g}"
        end = f"The budgets end at {reached:.2f} of prune.speedup={cfg.speedup:g}"
        LOGGER.warning(f"{end}. Raise prune.{more} to go further.")
    return best


def _filtered(start: list[int], units: list[int], bargains: dict[int, float], topk: float) -> list[int]:
    """Return the units with all but the best share of the accepted ones given back."""
    kept = sorted(bargains, key=lambda i: bargains[i])[: math.ceil(topk * len(bargains))]
    return [u if i in kept else s for i, (s, u) in enumerate(zip(start, units))]


def _with(units: list[int], i: int, value: int) -> list[int]:
    """Return the units with one of them changed."""
    return [*units[:i], value, *units[i + 1 :]]
