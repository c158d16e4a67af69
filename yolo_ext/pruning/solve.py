# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Targets and their solver: kept units whose figure meets a goal, found on plans and copies only."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import size_mb
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table
from yolo_ext.pruning.graph import Graph
from yolo_ext.pruning.groups import FLOORED, TiedGroups, allowed
from yolo_ext.pruning.plan import Job, Steps, Widths, kept_of, record
from yolo_ext.stock.accuracy import lost, score
from yolo_ext.stock.context import recalibrate

targets = Table("pruning target")  # row: Job -> Target
FREE: dict[str, Any] = {"min_channels": 1, "round_to": 1, "max_ratio": 1 - 1e-9}  # hold nothing back
NORM_FLOPS = 8.0  # of each output of a BatchNorm that stays, as Ultralytics counts them
ROUNDS = 3  # of a search by formula, each followed by a measurement


@dataclass(frozen=True)
class Target:
    """One figure that the plan must reach."""

    figure: Callable[[list[int]], float]  # from the kept units of each
    goal: float
    tolerance: float = 0.01  # relative to the goal, beyond which the user is told; the search ends at half of it
    rises: bool = True  # with the share of channels that go
    trials: int = 24  # at most, of the bisection
    slow: bool = False  # each figure takes a copy of the model, so that the user wants to see it happen
    noisy: bool = False  # it is a measurement, so that single channels do not show in it
    cap: bool = False  # the goal must not be passed, however near the figure comes
    settle: Callable[[list[int]], float] | None = None  # the true figure, which a figure by formula then goes through

    def miss(self, value: float) -> float:
        """Return how far a figure is from the goal, relative to it."""
        return abs(value - self.goal) / (self.goal or 1.0)

    def passed(self, value: float) -> bool:
        """Tell whether a figure lies beyond the goal."""
        return value > self.goal if self.rises else value < self.goal


def measure(model: nn.Module, graph: Graph, imgsz: int = 640) -> partial[tuple[float, float]]:
    """Return a function from kept widths to (FLOPs, parameters) of the deployed model, which builds nothing.

    FLOPs are 2 x MACs for a square image of side `imgsz` in pixels, as Ultralytics counts them; convolutions grow with
    the image, attention with its square, a classifier not at all. Widths of `{}` stand for the whole model.
    """
    modules, deployed = dict(model.named_modules()), stock.deployed_layers(model)
    layers = uses_of_weights(model, graph, deployed)
    folded = {p for p in graph.norms if p not in deployed}
    biased = {p for p in layers if modules[p].bias is not None or f"{p.rpartition('.')[0]}.bn" in folded}
    norms = {p: n for p, (n, _) in graph.convs.items() if p in graph.norms and p in deployed}
    stem, (positions, _) = next(iter(graph.convs.items()))  # layers are listed in the order of their first call
    area = imgsz**2 / (positions * getattr(modules[stem], "stride", (1,))[0] ** 2)  # over that of the traced image
    work = {p: n * (area if graph.convs[p][0] > 1 else 1) for p, n in layers.items()}
    depth = {p: getattr(modules[p], "groups", 1) for p in layers}
    values = {f"{p}.proj.conv" for p, m in modules.items() if isinstance(m, stock.ATTENTION)} & set(layers)

    def counted(widths: Widths, other: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
        flops = params = 0.0
        for path in layers:
            (n_out, n_in), (_, kernel) = graph.shapes[path], graph.convs[path]
            out, inp = widths.get((path, "out"), n_out), widths.get((path, "in"), n_in)
            weights = out * kernel * (1 if depth[path] == n_out else inp / depth[path])
            flops += 2.0 * work[path] * (weights + work[path] * inp * (path in values))  # attention x values
            params += weights + out * (path in biased)
        for path, positions in norms.items():
            out = widths.get((path, "out"), graph.norms[path])
            flops += NORM_FLOPS * out * positions * (area if positions > 1 else 1)
            params += 2 * out
        return flops + other[0], params + other[1]

    (flops, params), dense = counted({}), sizes(model, imgsz)
    return partial(counted, other=(dense["gflops"] * 1e9 - flops, dense["params"] - params))


def sizes(model: nn.Module, imgsz: int = 640) -> dict[str, float]:
    """Return `gflops` and `params` of the deployed model."""
    params = sum(p.numel() for p in stock.deployed(model).parameters())
    return {"gflops": stock.gflops(model, imgsz), "params": params}


def uses_of_weights(model: nn.Module, graph: Graph, deployed: Collection[str]) -> dict[str, float]:
    """Return how often each weight of the layers that are `deployed` is used for an image of the traced size."""
    modules, found = dict(model.named_modules()), {}
    for path, (positions, _) in graph.convs.items():
        if path in deployed and path in graph.shapes:
            stride = modules[path].stride if isinstance(modules[path], nn.ConvTranspose2d) else (1, 1)
            found[path] = positions / (stride[0] * stride[1])
    return found


def layer_flops(model: nn.Module, graph: Graph, deployed: Collection[str] = ()) -> dict[str, float]:
    """Return the FLOPs (2 x MACs) of each layer with weights after deployment, for one image of the traced size."""
    found = {}
    for path, uses in uses_of_weights(model, graph, deployed or stock.deployed_layers(model)).items():
        (n_out, n_in), (_, kernel) = graph.shapes[path], graph.convs[path]
        found[path] = 2.0 * kernel * n_out * n_in / getattr(model.get_submodule(path), "groups", 1) * uses
    return found


def _analytic(job: Job, which: int, goal: float) -> Target:
    """Aim at before / after of FLOPs (0) or parameters (1), counted by formula and set right by measuring a copy."""
    figures = measure(job.model, job.graph, job.imgsz)
    before, aside = figures({})[which], [0.0]

    def figure(units: list[int]) -> float:
        return before / (figures(job.widths(units))[which] + aside[0])

    def settle(units: list[int]) -> float:
        found = sizes(job.pruned(units), job.imgsz)
        aside[0] = (found["gflops"] * 1e9, found["params"])[which] - figures(job.widths(units))[which]
        return figure(units)

    constant = figures.keywords["other"][which] / before  # what the formula does not know; with little it is exact
    return Target(figure, goal, settle=settle if abs(constant) * goal > Target.tolerance / 10 else None)


def group_shares(graph: Graph, costs: Mapping[str, float], whole: float) -> list[float]:
    """Return the share, 0..1, that each group of the graph has in `whole`, from the `costs` of the layers by path."""
    return [
        sum(costs.get(m.module, 0.0) * m.index.numel() / graph.shapes[m.module][0]
            for m in g.members if m.dim == "out" and m.module in graph.shapes) / whole
        for g in graph.groups
    ]  # fmt: skip


@targets.row("speedup", "FLOPs before / FLOPs after")
def speedup(job: Job) -> Target:
    """Aim at a FLOPs ratio of the deployed model."""
    return _analytic(job, 0, job.cfg.speedup or 1.0)


@targets.row("params", "Parameters before / parameters after")
def params(job: Job) -> Target:
    """Aim at a parameter ratio of the deployed model."""
    return _analytic(job, 1, job.cfg.params or 1.0)


@targets.row("ratio", "Share of channels to remove")
def ratio(job: Job) -> Target:
    """Aim at a share of the channels of all groups that have no share of their own."""
    weight = [0 if t.share is not None else t.channels / t.units for t in job.ties]
    total = sum(w * t.units for w, t in zip(weight, job.ties)) or 1.0

    def removed(units: list[int]) -> float:
        return sum(w * (t.units - u) for w, t, u in zip(weight, job.ties, units)) / total

    return Target(removed, job.cfg.ratio or 0.0)


@targets.row("size_mb", "Size of the .pt in MB")
def size(job: Job) -> Target:
    """Aim at the size of the fp16 checkpoint, whose manifest grows with the plan that it holds."""

    def megabytes(units: list[int]) -> float:
        copy = job.pruned(units)
        record(job.model, copy, job.graph, kept_of(job.graph, job.ties, units), job.cfg, gap=0.0)
        return size_mb(copy)

    return Target(megabytes, job.cfg.size_mb or 0.0, rises=False, trials=16, slow=True)


@targets.row("latency", "Measured latency before / after")
def latency(job: Job) -> Target:
    """Aim at a latency ratio, measured for each trial."""
    if (speed := job.probes.speed) is None:
        raise UsageError("'prune.latency' is measured on this machine, which needs data=... or imgsz=... to run with.")
    whole = [t.units for t in job.ties]
    figure = lambda units: 1.0 if units == whole else speed(job.model, job.pruned(units))  # noqa: E731
    return Target(figure, job.cfg.latency or 1.0, tolerance=0.05, trials=8, slow=True, noisy=True)


@targets.row("max_drop", "Largest loss of any metric of the task right after pruning", needs=[Need.DATA])
def max_drop(job: Job) -> Target:
    """Prune as far as no metric, recalibrated as asked for, drops by more; EagleEye, 2020, arXiv:2007.02491."""
    accuracy, images, allowed = job.probes.accuracy, job.probes.images, job.cfg.max_drop or 0.0
    if accuracy is None or images is None:
        raise UsageError("'prune.max_drop' measures mAP, which needs data. Give data=data.yaml, or another target.")
    whole, base = [t.units for t in job.ties], accuracy(job.model)
    if (worth := score(base) or 0.0) <= allowed:
        has = f"{stock.metric(stock.task_of(job.model))} {worth:.4f}"
        why = f"the model itself has {has} on these data. Train it first, or give a smaller drop."
        raise UsageError(f"'prune.max_drop={allowed:g}' says nothing: {why}")

    def drop(units: list[int]) -> float:
        if units == whole:
            return 0.0
        trial = job.pruned(units)
        if job.cfg.recalibrate:
            recalibrate(trial, images())
        return cast(float, lost(base, accuracy(trial)))

    return Target(drop, allowed, trials=7, slow=True, noisy=True, cap=True)


def solve(name: str, target: Target, steps: Steps, job: Job) -> list[int]:
    """Return the kept units of each whose figure is nearest to the goal (within it, if it is a cap)."""
    whole, seen = [t.units for t in job.ties], dict[tuple[int, ...], float]()
    figure = partial(_figure, name, target, sum(whole), seen)
    least, most = steps(0.0), steps(1.0)
    if target.settle and not target.passed(figure(most)):
        target.settle(most)
        seen.clear()
    if not target.passed(figure(most)):
        if not target.cap and target.miss(figure(most)) > target.tolerance:
            raise UsageError(_unreachable(name, target, most, job, figure))
        return most
    if target.passed(figure(least)) and target.miss(figure(least)) > target.tolerance:
        now = f"{name} is {figure(least):.4g}{' with prune.ratios alone' * bool(job.cfg.ratios)}"
        passed = f"'prune.{name}={target.goal:g}' is passed before anything is pruned for it"
        raise UsageError(f"{passed}: {now}. Leave one of them out or change it.")
    for _ in range(ROUNDS):
        found = _nearest(target, steps, job.ties, figure)
        if target.settle is None or target.miss(target.settle(found)) <= target.tolerance / 2:
            break
        seen.update({units: target.figure([*units]) for units in seen})
    if target.cap and found == whole:
        mildest = f"the mildest of {len(seen)} trials loses {min(f for f in seen.values() if f > target.goal):.4f}"
        remedy = f"Raise prune.{name}, or prune to another target and fine-tune."
        raise UsageError(f"'prune.{name}={target.goal:g}' cannot be met: {mildest}. {remedy}")
    if not target.cap and target.miss(figure(found)) > target.tolerance:
        _tell_miss(name, target, figure(found), seen.values(), job.cfg)
    return found


def _tell_miss(name: str, target: Target, reached: float, seen: Collection[float], cfg: PruneConfig) -> None:
    """Say how far a figure is from the goal, why, and what the nearest plans on both sides of it have."""
    why = "the measurements spread" if target.noisy else f"prune.round_to={cfg.round_to} leaves nothing nearer"
    below, above = [v for v in seen if v <= target.goal], [v for v in seen if v > target.goal]
    sides = " and ".join(f"{v:.4g}" for v in (*sorted(below)[-1:], *sorted(above)[:1]))
    told = f"{name} is {reached:.4g} instead of {target.goal:g}: {why} (the plans on both sides have {sides})"
    LOGGER.warning(f"{colorstr('prune: ')}{told}")


def _nearest(
    target: Target, steps: Steps, ties: Sequence[TiedGroups], figure: Callable[[list[int]], float]
) -> list[int]:
    """Return the kept units of each whose figure is nearest to a goal that lies within reach."""
    low, high = 0.0, 1.0

    def miss(units: list[int]) -> float:
        return target.miss(figure(units))

    for _ in range(target.trials):
        found = min(steps(low), steps(high), key=miss)
        if not target.cap and miss(found) <= target.tolerance / 2:
            return found
        middle = (low + high) / 2
        low, high = (low, middle) if target.passed(figure(steps(middle))) else (middle, high)
    if target.cap:
        return steps(low)
    found = min(steps(low), steps(high), key=miss)
    return found if target.noisy else _polish(steps(low), steps(high), target, ties, miss)


def _figure(name: str, target: Target, whole: int, seen: dict[tuple[int, ...], float], units: list[int]) -> float:
    """Return the figure of these units, measured once; `whole` is the number of all units."""
    if (key := tuple(units)) not in seen:
        seen[key] = target.figure(units)
        if target.slow:
            done = f"trial {len(seen)}: {sum(units) / whole:.1%} of the channels"
            LOGGER.info(f"{colorstr('prune: ')}{done}, {name} {seen[key]:.4g} (target {target.goal:g})")
    return seen[key]


def _unreachable(name: str, target: Target, most: list[int], job: Job, figure: Callable[[list[int]], float]) -> str:
    """Return what to say when the figure cannot get to the goal: how far it gets, and what holds it back."""
    cfg, reached, loose = job.cfg, figure(most), replace(job.cfg, **FREE)
    bound = f"most {reached - 0.005:.2f}" if target.rises else f"least {reached + 0.005:.2f}"
    start, way = f"'prune.{name}={target.goal:g}' cannot be reached:", "Lower" if target.rises else "Raise"
    free = [u if t.share is not None else allowed(job.model, job.graph, t.groups, loose)[-1]
            for t, u in zip(job.ties, most)]  # fmt: skip
    floors = ", ".join(binding(job.model, job.graph, cfg))
    if cfg.sensitivity or (floors and target.passed(figure(free))):
        spared = " and the ratios in prune.sensitivity" * bool(cfg.sensitivity)
        remedy = f"{way} prune.{name}{f', or loosen {floors}' * bool(floors)}."
        return f"{start} the floors{spared} allow at {bound}. {remedy}"
    more = "beyond" if any(g.frozen.endswith(FLOORED) for g in job.graph.groups) else "about"
    without = f" Without the floors {floors} it is {more} {figure(free):.2f}." if floors else ""
    stays = f"Of the FLOPs, {kept_whole(job.model, job.graph)}."
    return f"{start} what can be pruned brings at {bound}. {stays}{without} {way} prune.{name}."


def binding(model: nn.Module, graph: Graph, cfg: PruneConfig) -> list[str]:
    """Return the floors, with their values, without which some group that can be pruned could shrink further."""
    ties = [[graph.groups[i] for i in tie] for tie in graph.ties]
    ties = [t for t in ties if all(not g.frozen or g.frozen.endswith(FLOORED) for g in t)]

    def least(options: Mapping[str, Any]) -> list[int]:
        return [allowed(model, graph, t, replace(cfg, **options))[-1] for t in ties]

    now = least({})
    found = [o for o in FREE if least({o: FREE[o]}) != now] or [o for o in FREE if least(FREE) != now]
    return [f"prune.{o}={getattr(cfg, o):g}" for o in found]


def kept_whole(model: nn.Module, graph: Graph) -> str:
    """Return in words the reasons why groups stay whole whose layers hold most of the FLOPs, with their shares."""
    costs = layer_flops(model, graph, graph.shapes)
    kinds: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for g, share in zip(graph.groups, group_shares(graph, costs, sum(costs.values()) or 1.0)):
        if g.frozen:
            kinds[re.sub(r"\S*[.\d]\S*", "", g.frozen)].append((share, g.frozen))  # alike but for a path or a number
    worst = sorted(kinds.values(), key=lambda k: -sum(share for share, _ in k))[:3]
    told = [(f"{sum(share for share, _ in k):.0%} {max(k)[1]}", len(k) - 1) for k in worst]
    return "; ".join(f"{text}{f' (and {more} like it)' * bool(more)}" for text, more in told)


def _polish(
    low: list[int], high: list[int], target: Target, ties: Sequence[TiedGroups], miss: Callable[[list[int]], float]
) -> list[int]:
    """Return the units nearest to the goal: on the way from one side of it to the other, then by single steps."""
    units, best = low, min(low, high, key=miss)
    for i, v in enumerate(high):  # several may jump at the same share: one after the other
        if units[i] != v and miss(best) > target.tolerance / 2:
            units = [*units[:i], v, *units[i + 1 :]]
            best = min(best, units, key=miss)
    while not target.slow and miss(best) > target.tolerance / 2:
        moves = []
        for i, t in enumerate(ties):
            place = t.allowed.index(best[i])
            near = t.allowed[max(place - 1, 0) : place + 2] if t.share is None else []
            moves += [[*best[:i], u, *best[i + 1 :]] for u in near if u != best[i]]
        nearest = min(moves, key=miss, default=best)
        if miss(nearest) >= miss(best):
            break
        best = nearest
    return best
