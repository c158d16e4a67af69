# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning while training: at the start of an epoch, with optimizer state and EMA cut alike.

The channels are chosen on the EMA, which is what is validated and saved; the same plan then cuts the live weights,
their gradients and the optimizer's moments. Optimizer, scheduler and AMP scaler stay the objects that they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note, set_tripwire, size_mb
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.schedules import pruned_share
from yolo_ext.pruning.evidence import Probes
from yolo_ext.pruning.graph import Kept
from yolo_ext.pruning.prune import prune_with_plan
from yolo_ext.pruning.surgery import Slices, apply_plan, cut, parameter_slices

ENOUGH = 1.005  # a step that would gain less than this is left out


def step_config(cfg: PruneConfig, model: nn.Module, step: int, steps: int, probes: Probes) -> PruneConfig | None:
    """Return the options of one of `steps`, counted from 1, from those of the run; None when it has nothing to do."""
    dense = manifest(model).dense
    # A run that is on its way warns about a model that is not sparse enough, it does not stop.
    now, before = (pruned_share(step=k, steps=steps, kind=cfg.schedule) for k in (step, step - 1))
    ratios = {k: _relative(r, now, before) for k, r in cfg.ratios.items()}
    cfg = replace(cfg, ratios=ratios, at=[], every=None, start=None, end=None, steps=None, force=True)
    if cfg.speedup or cfg.params:
        name, size = ("speedup", "gflops") if cfg.speedup else ("params", "params")
        target = 1 - now * (1 - 1 / (cfg.speedup or cfg.params or 1.0))
        wanted = sizes(model, dense["imgsz"])[size] / (target * dense[size])
        changed: dict[str, Any] = {name: wanted}
        return replace(cfg, **changed) if wanted > ENOUGH else None
    if cfg.latency:
        left = [1 - p * (1 - 1 / cfg.latency) for p in (before, now)]
        return replace(cfg, latency=left[0] / left[1])
    if cfg.size_mb:
        wanted = dense["size_mb"] * (1 - now) + cfg.size_mb * now
        return replace(cfg, size_mb=wanted) if wanted * ENOUGH < size_mb(model) else None
    if cfg.max_drop and probes.score:
        room = cfg.max_drop - (dense["score"] - probes.score(model))
        return replace(cfg, max_drop=room) if room > 0 else None
    return replace(cfg, ratio=_relative(cfg.ratio, now, before)) if cfg.ratio else cfg


def _relative(ratio: float, now: float, before: float) -> float:
    """Return the share to remove of what is left so that `now * ratio` of all is gone after `before * ratio` was."""
    return 1 - (1 - now * ratio) / (1 - before * ratio)


def sizes(model: nn.Module, imgsz: int = 640) -> dict[str, float]:
    """Return `gflops` and `params` of the deployed model."""
    return {
        "gflops": stock.gflops(model, imgsz),
        "params": sum(p.numel() for p in stock.deployed(model).parameters()),
    }


def remember_dense(model: nn.Module, cfg: PruneConfig, probes: Probes, imgsz: int = 640) -> None:
    """Note in the manifest what the targets of all steps count from; a model pruned before is where this run starts."""
    found: dict[str, Any] = {**sizes(model, imgsz), "size_mb": size_mb(model), "imgsz": imgsz}
    if cfg.max_drop and probes.score:
        found["score"] = probes.score(model)
    note(model, dense=found)


def decide(
    model: nn.Module, cfg: PruneConfig, step: int, steps: int, epoch: int, probes: Probes, imgsz: int = 640
) -> tuple[Kept, dict[str, Any]] | None:
    """Return what a step removes, and the new record of the manifest, from a copy of the EMA; None for nothing."""
    narrowed = step_config(cfg, model, step, steps, probes)
    if narrowed is None:
        return None
    pruned, kept = prune_with_plan(model, narrowed, imgsz, probes)
    record = {**manifest(pruned).prune, "config": asdict(cfg)}
    record["steps"] = [*record.get("steps", []), {"epoch": epoch, **sizes(pruned, imgsz)}]
    return (kept, record) if kept else None


def cut_run(
    model: nn.Module, ema: Any, optimizer: torch.optim.Optimizer, kept: Kept, record: Mapping[str, Any]
) -> None:
    """Cut the live model, its `ModelEMA` and the optimizer by one plan in their numbering; manifests get `record`."""
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
