# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Readiness: has sparsity training emptied the channels that a plan removes, and which target is realistic?

A channel is *near zero* when its score by a criterion that needs "sparsity" is at most `sparsity.threshold` of the
largest score of its group. All other channels are *in use*: to remove one costs accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import TARGETS, PruneConfig, SparsityConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.bundles import Bundle, widths_of
from yolo_ext.pruning.criteria import criteria
from yolo_ext.pruning.graph import Graph
from yolo_ext.pruning.targets import measure

WARN, REFUSE = 0.1, 0.5  # share of the removed channels that are still in use


def near_zero(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Tell which channels of a group are near zero.

    Args:
        scores: (n,) scores of one group.
        threshold: Share of the largest score.

    Returns:
        (n,) booleans; all True in a group whose scores are all zero.
    """
    return scores <= threshold * scores.max()


def spare_units(made: Sequence[Bundle], threshold: float) -> list[int]:
    """Return the kept units of each bundle when channels near zero go and, after rounding and floors, no others.

    Args:
        made: Bundles, scored by a criterion that needs "sparsity".
        threshold: Share of the largest score of a group.
    """
    units = []
    for b in made:
        pairs = zip(b.groups, b.values)
        gone = min(int(near_zero(v, threshold).sum()) // (g.size // b.units) for g, v in pairs)
        units.append(min(a for a in b.allowed if a >= b.units - gone))
    return units


def near_zero_share(made: Sequence[Bundle], threshold: float) -> float:
    """Return the share, 0..1, of all channels of these bundles that are near zero."""
    masks = [near_zero(v, threshold) for b in made for v in b.values]
    return float(torch.cat(masks).float().mean()) if masks else 0.0


def readiness(
    model: nn.Module, graph: Graph, cfg: PruneConfig, made: Sequence[Bundle], units: Sequence[int], imgsz: int = 640
) -> dict[str, Any]:
    """Compare a plan with what sparsity training left behind.

    Args:
        model: The model to prune; its manifest says how it was trained.
        graph: Its couplings.
        cfg: Pruning options, with a criterion that needs "sparsity".
        made: Bundles scored by it.
        units: Units of each that the plan keeps.
        imgsz: Side of the image in pixels that FLOPs are counted for.

    Returns:
        `method`; `trained`, the penalty that the model was trained with, or None; `threshold`; `channels` that could
        go and the `share` of them that is near zero; `speedup`, FLOPs before / after if only those went; `removed`,
        channels that the plan removes, and the share of these that is still `in_use`.
    """
    trained = manifest(model).get("sparsity") or {}
    threshold = trained.get("threshold") or SparsityConfig().threshold
    figures = measure(model, graph, imgsz)
    removed = in_use = 0
    for b, kept in zip(made, units):
        for g, v in zip(b.groups, b.values):
            goes = g.size - kept * (g.size // b.units)
            removed += goes
            in_use += max(0, goes - int(near_zero(v, threshold).sum()))  # the lowest scores go first
    return {
        "method": cfg.method,
        "trained": trained.get("method"),
        "threshold": threshold,
        "channels": sum(g.size for b in made for g in b.groups),
        "share": near_zero_share(made, threshold),
        "speedup": figures({})[0] / figures(widths_of(graph, list(made), spare_units(made, threshold)))[0],
        "removed": removed,
        "in_use": in_use / max(removed, 1),
    }


def check_readiness(
    model: nn.Module, graph: Graph, cfg: PruneConfig, made: Sequence[Bundle], units: Sequence[int], imgsz: int = 640
) -> None:
    """Say how ready a model is for a plan by a criterion that needs "sparsity"; warn or refuse when it is not.

    Args:
        model: The model to prune.
        graph: Its couplings.
        cfg: Pruning options; `force` turns a refusal into a warning.
        made: Scored bundles.
        units: Units of each that the plan keeps.
        imgsz: Side of the image in pixels that FLOPs are counted for.

    Raises:
        UsageError: If more than half of the channels that the plan removes are still in use.
    """
    if Need.SPARSITY not in criteria[cfg.method].needs:
        return
    found = readiness(model, graph, cfg, made, units, imgsz)
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
