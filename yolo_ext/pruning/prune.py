# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Prune a model: plan for a target, see whether the model is ready for that, cut, prove, record."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from math import floor
from typing import Any, cast

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext.checkpoint import manifest, note, size_mb
from yolo_ext.core.config import TARGETS, PruneConfig, SparsityConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import Need
from yolo_ext.core.schedules import pruned_share
from yolo_ext.pruning import plan
from yolo_ext.pruning.criteria import AUTO, criteria, resolved
from yolo_ext.pruning.evidence import NO_PROBES, Probes, collect
from yolo_ext.pruning.graph import Graph, Kept, build_graph, custom_types
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.plan import Job, kept_of, near_zero, near_zero_share, spare_units
from yolo_ext.pruning.pruner import by_pruner
from yolo_ext.pruning.solve import binding, kept_whole, measure, sizes, solve, targets
from yolo_ext.pruning.surgery import ADVICE, apply_plan, verify
from yolo_ext.stock.accuracy import lost

ENOUGH = 1.005  # a step of a training run that would gain less than this is left out
WARN, REFUSE = 0.1, 0.5  # share of the removed channels that are still in use


def prune_model(model: nn.Module, cfg: PruneConfig, imgsz: int = 640, probes: Probes = NO_PROBES) -> nn.Module:
    """Prune a copy of a model to a target and prove that the surgery is exact.

    Args:
        model: Any YOLO model; it is not changed.
        cfg: Pruning options with a target.
        imgsz: Side in pixels of the images that FLOPs are counted for.
        probes: What data and the clock can tell, for the criteria and targets that need it.
    Returns: The pruned copy, whose manifest records the plan and per-layer reasons.
    Raises: `UsageError`: If the model is fused or quantized, nothing can be pruned or the target cannot be reached.
        CheckFailed: If the pruned model differs from the masked dense one.
    """
    return prune_with_plan(model, cfg, imgsz, probes)[0]


def prune_with_plan(
    model: nn.Module, cfg: PruneConfig, imgsz: int = 640, probes: Probes = NO_PROBES
) -> tuple[nn.Module, Kept]:
    """Do what `prune_model` does, and return the kept positions too, in the numbering of `model`."""
    check_prunable(model)
    cfg = resolved(cfg, probes.batches is not None)
    if not (_target(cfg) or cfg.ratios):
        raise UsageError(f"No pruning target. Give one of {', '.join(f'prune.{t}' for t in TARGETS)}, or prune.ratios.")
    try:
        graph, kept, pruned, gap = _verified(model, cfg, imgsz, probes)
    except CheckFailed as e:
        if not (whole := unprovable(model, cfg)):
            raise
        blame = f"This is up to the code of {', '.join(t.__name__ for t in whole)}: what runs through it stays whole."
        LOGGER.warning(f"{colorstr('prune: ')}{str(e).removesuffix(ADVICE).strip('. ')}. {blame}")
        graph, kept, pruned, gap = _verified(model, cfg, imgsz, probes, whole)
    plan.record(model, pruned, graph, kept, cfg, gap)
    return pruned, kept


def _verified(
    model: nn.Module, cfg: PruneConfig, imgsz: int, probes: Probes, whole: Collection[type[nn.Module]] = ()
) -> tuple[Graph, Kept, nn.Module, float]:
    """Return graph, plan, pruned copy and its gap; blocks that compare or divide by their own width show only here."""
    graph = build_graph(model, whole=whole)
    kept = make_plan(model, graph, cfg, probes, imgsz)
    pruned = apply_plan(deepcopy(model), kept)
    return graph, kept, pruned, verify(model, pruned, kept)


def unprovable(model: nn.Module, cfg: PruneConfig) -> list[type[nn.Module]]:
    """Return the types of the user's modules that have to stay whole for the proof to hold, none if that is no help."""
    trial = PruneConfig(method="random", scope="local", ratio=0.3, round_to=1, min_channels=1)
    trial = replace(trial, include=cfg.include, exclude=cfg.exclude)

    def holds(whole: Collection[type[nn.Module]]) -> bool:
        try:
            _verified(model, trial, 64, NO_PROBES, whole)
        except CheckFailed:
            return False
        except UsageError:  # nothing is left that can be pruned
            pass
        return True

    types = custom_types(model)
    whole = set(types) if holds(types) else set()
    for t in types:  # outer ones first, or an inner one that is to blame would look innocent within a whole one
        if t in whole and holds(whole - {t}):
            whole.remove(t)
    return [t for t in types if t in whole]


# Plan ----------------------------------------------------------------------------------------------------------------
def make_plan(
    model: nn.Module, graph: Graph, cfg: PruneConfig, probes: Probes = NO_PROBES, imgsz: int = 640, ready: bool = True
) -> Kept:
    """Choose the channels that stay so that the target is met; groups that `cfg` keeps whole become frozen in `graph`.

    `ready` checks that sparsity training made room for the plan.
    """
    if manifest(model).masks.get("kind") == "2:4":
        raise UsageError("The weights have a 2:4 pattern, which channels that go would break. Prune first.")
    if cfg.pruner:
        return by_pruner(model, graph, cfg, imgsz)
    cfg = resolved(cfg, probes.batches is not None)
    batches = probes.batches if Need.DATA in criteria[cfg.method].needs else None
    ties = tied_groups(model, graph, cfg, collect(model, cfg.method, batches()) if batches else None)
    if not ties:
        floors = ", ".join(binding(model, graph, cfg))
        remedy = f"Loosen {floors}, or see" if floors else "See"
        why = f"of the FLOPs, {kept_whole(model, graph)}"
        raise UsageError(f"Nothing can be pruned: {why}. {remedy} `yolo-ext analyze`.")
    job = Job(model, graph, ties, cfg, probes, imgsz)
    units = _units(job)
    if ready:
        check_readiness(job, units)
    return kept_of(graph, ties, units)


def _units(job: Job) -> list[int]:
    """Return the kept units of each that meet the target."""
    cfg, free = job.cfg, [t for t in job.ties if t.share is None]

    def settled(units: Sequence[int]) -> list[int]:  # those of all, from those of the free ones
        rest = iter(units)
        return [next(rest) if t.share is None else t.round(t.units * (1 - t.share)) for t in job.ties]

    if (name := _target(cfg)) is None:
        return settled([t.units for t in free])
    if cfg.sensitivity:
        spread = plan.by_sensitivity(free, plan.read_sensitivity(cfg.sensitivity))
    else:
        spread = plan.by_rank(free, plan.scopes[cfg.scope].fn(free, job.model))
    return solve(name, targets[name].fn(job), lambda share: settled(spread(share)), job)


def _target(cfg: PruneConfig) -> str | None:
    """Return the name of the target, None without."""
    return next((t for t in TARGETS if getattr(cfg, t) is not None), None)


# Checks --------------------------------------------------------------------------------------------------------------
def check_plan(model: nn.Module, cfg: PruneConfig, imgsz: int = 640, *, ready: bool = True) -> None:
    """Refuse options that do not fit a model, as far as that shows without data; `ready`: it must be sparse already."""
    check_prunable(model)
    if cfg.kind != "structured":
        return
    weighs = cfg.method != AUTO and Need.DATA not in criteria[cfg.method].needs
    cheap = cfg if weighs else replace(cfg, method="l2")
    if cfg.pruner or not (cfg.speedup or cfg.params or cfg.ratio or cfg.ratios):  # others have to be measured
        others = dict.fromkeys(["sensitivity", *TARGETS])
        cheap = replace(cheap, **{**others, "ratio": 0.1})  # type: ignore[arg-type]
    make_plan(model, build_graph(model), cheap, imgsz=imgsz, ready=ready)


def check_prunable(model: nn.Module) -> None:
    """Refuse models whose structure must not change any more."""
    if getattr(model, "is_fused", lambda: False)():
        raise UsageError("The model is fused (BatchNorm folded into the convs). Prune the unfused .pt.")
    if manifest(model).quant or any(type(m).__module__.startswith("yolo_ext") for m in model.modules()):
        why = "its ranges belong to the channels that it has"
        raise UsageError(f"The model is quantized: {why}. Prune the float .pt, then quantize.")


# Readiness: has sparsity training emptied the channels that a plan removes, and which target is realistic? -----------
def readiness(job: Job, units: Sequence[int]) -> dict[str, Any]:
    """Compare a plan that keeps these units with the channels near zero that sparsity training, by `trained`, left."""
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
        "method": job.cfg.method, "trained": trained.get("method"), "threshold": threshold,
        "held": trained.get("held"),
        "channels": sum(t.channels for t in job.ties), "share": near_zero_share(job.ties, threshold),
        "speedup": figures({})[0] / figures(job.widths(spare_units(job.ties, threshold)))[0],
        "removed": removed, "in_use": in_use / max(removed, 1),
    }  # fmt: skip


def check_readiness(job: Job, units: Sequence[int]) -> None:
    """Say how ready a model is for a plan whose criterion needs sparsity training; warn or refuse when it is not."""
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
    method, trained = cfg.method, found["trained"]
    name = _target(cfg) or "ratios"
    how = {method: f"with sparsity.method={method}", None: f"without sparsity.method={method}"}
    trained_how = how.get(trained, f"with sparsity.method={trained}, not {method}")
    problem = (
        f"'prune.{name}={getattr(cfg, name)}' by '{method}' removes {found['removed']:,} channels, of which "
        f"{found['in_use']:.0%} are still in use. The model was trained {trained_how}: "
        f"{found['share']:.0%} of its channels are near zero."
    )
    realistic = floor(found["speedup"] * 100) / 100
    ways = [] if trained == method else [f"train with sparsity.method={method} first"]
    if trained == method and not found["held"]:  # or the pull has taken all that it could
        ways.append("train for more epochs or with a larger sparsity.coefficient")
    ways += [f"lower the target to prune.speedup={realistic:g}"] if realistic > 1.01 else []
    remedy = ", ".join([*ways, "take prune.method=taylor or lamp"])
    remedy = remedy[0].upper() + remedy[1:]
    if found["in_use"] > REFUSE and not cfg.force:
        raise UsageError(f"{problem} {remedy}, or prune all the same with prune.force=True.")
    LOGGER.warning(f"{colorstr('prune: ')}{problem} {remedy}.")


# While training: chosen on the EMA, which is what is validated and saved ---------------------------------------------
def step_config(cfg: PruneConfig, model: nn.Module, step: int, steps: int, probes: Probes) -> PruneConfig | None:
    """Return the options of one of `steps`, counted from 1, from those of the run; None when it has nothing to do."""
    dense = manifest(model).dense
    # A run that is on its way warns about a model that is not sparse enough, it does not stop.
    now, before = (pruned_share(step=k, steps=steps, kind=cfg.schedule) for k in (step, step - 1))

    def left(ratio: float) -> float:  # share to remove of what the steps before have left
        return 1 - (1 - now * ratio) / (1 - before * ratio)

    ratios = {k: left(r) for k, r in cfg.ratios.items()}
    cfg = replace(cfg, ratios=ratios, at=[], every=None, start=None, end=None, steps=None, force=True)
    if cfg.speedup or cfg.params:
        name, size = ("speedup", "gflops") if cfg.speedup else ("params", "params")
        target = 1 - now * (1 - 1 / (cfg.speedup or cfg.params or 1.0))
        wanted = sizes(model, dense["imgsz"])[size] / (target * dense[size])
        return replace(cfg, **{name: wanted}) if wanted > ENOUGH else None
    if cfg.latency:
        was, wanted = (1 - p * (1 - 1 / cfg.latency) for p in (before, now))
        return replace(cfg, latency=was / wanted) if was > wanted else None
    if cfg.size_mb:
        wanted = dense["size_mb"] * (1 - now) + cfg.size_mb * now
        return replace(cfg, size_mb=wanted) if wanted * ENOUGH < size_mb(model) else None
    if cfg.ratio:
        return replace(cfg, ratio=left(cfg.ratio))
    if cfg.max_drop and probes.accuracy:
        room = cfg.max_drop - cast(float, lost(dense, probes.accuracy(model)))
        return replace(cfg, max_drop=room) if room > 0 else None
    return cfg


def remember_dense(model: nn.Module, cfg: PruneConfig, probes: Probes, imgsz: int = 640) -> None:
    """Note in the manifest what the targets of all steps count from; a model pruned before is where this run starts."""
    found: dict[str, Any] = {**sizes(model, imgsz), "size_mb": size_mb(model), "imgsz": imgsz}
    if cfg.max_drop and probes.accuracy:
        found |= probes.accuracy(model)
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
