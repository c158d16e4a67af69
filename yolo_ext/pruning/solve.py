# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Targets and their solver: kept units whose figure meets a goal, found on plans and copies only."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note, size_mb
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table
from yolo_ext.pruning.graph import Graph
from yolo_ext.pruning.groups import TiedGroups
from yolo_ext.pruning.plan import Job, Steps, Widths, kept_of
from yolo_ext.stock.context import recalibrate

targets = Table("pruning target")  # row: Job -> Target


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

    def miss(self, value: float) -> float:
        """Return how far a figure is from the goal, relative to it."""
        return abs(value - self.goal) / (self.goal or 1.0)

    def passed(self, value: float) -> bool:
        """Tell whether a figure lies beyond the goal."""
        return value > self.goal if self.rises else value < self.goal


def measure(model: nn.Module, graph: Graph, imgsz: int = 640) -> Callable[[Widths], tuple[float, float]]:
    """Return a function from kept widths to (FLOPs, parameters) of the deployed model, which builds nothing.

    FLOPs are 2 x MACs for a square image of side `imgsz` in pixels, as Ultralytics counts them; convolutions grow with
    the image, attention with its square, a classifier not at all. Widths of `{}` stand for the whole model.
    """
    modules = dict(model.named_modules())
    layers = uses_of_weights(model, graph)
    biased = {p for p in layers if modules[p].bias is not None or f"{p.rpartition('.')[0]}.bn" in modules}
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
        return flops + other[0], params + other[1]

    flops, params = counted({})
    total = sum(p.numel() for p in stock.deployed(model).parameters())
    return partial(counted, other=(stock.gflops(model, imgsz) * 1e9 - flops, total - params))


def uses_of_weights(model: nn.Module, graph: Graph) -> dict[str, float]:
    """Return how often each weight of the layers that are deployed is used for an image of the traced size."""
    deployed, modules = stock.deployed_layers(model), dict(model.named_modules())
    found = {}
    for path, (positions, _) in graph.convs.items():
        if path in deployed and path in graph.shapes:
            stride = modules[path].stride if isinstance(modules[path], nn.ConvTranspose2d) else (1, 1)
            found[path] = positions / (stride[0] * stride[1])
    return found


def layer_flops(model: nn.Module, graph: Graph) -> dict[str, float]:
    """Return the FLOPs (2 x MACs) of each layer with weights after deployment, for one image of the traced size."""
    found = {}
    for path, uses in uses_of_weights(model, graph).items():
        (n_out, n_in), (_, kernel) = graph.shapes[path], graph.convs[path]
        found[path] = 2.0 * kernel * n_out * n_in / getattr(model.get_submodule(path), "groups", 1) * uses
    return found


def _analytic(job: Job, which: int) -> Callable[[list[int]], float]:
    """Return before / after of FLOPs (0) or parameters (1)."""
    figures = measure(job.model, job.graph, job.imgsz)
    before = figures({})[which]
    return lambda units: before / figures(job.widths(units))[which]


@targets.row("speedup", "FLOPs before / FLOPs after")
def speedup(job: Job) -> Target:
    """Aim at a FLOPs ratio of the deployed model."""
    return Target(_analytic(job, 0), job.cfg.speedup or 1.0)


@targets.row("params", "Parameters before / parameters after")
def params(job: Job) -> Target:
    """Aim at a parameter ratio of the deployed model."""
    return Target(_analytic(job, 1), job.cfg.params or 1.0)


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
    shapes = {p: list(s) for p, s in job.graph.shapes.items()}

    def megabytes(units: list[int]) -> float:
        copy = job.pruned(units)
        told = {"config": asdict(job.cfg), "kept": kept_of(job.graph, job.ties, units)}
        note(copy, prune={"shapes": shapes, "frozen": job.graph.reasons(), **manifest(copy).prune, **told})
        return size_mb(copy)

    return Target(megabytes, job.cfg.size_mb or 0.0, rises=False, trials=16, slow=True)


@targets.row("latency", "Measured latency before / after")
def latency(job: Job) -> Target:
    """Aim at a latency ratio, measured for each trial."""
    if (speed := job.probes.speed) is None:
        raise UsageError("'prune.latency' is measured on this machine, which needs data=... or imgsz=... to run with.")
    whole = job.whole
    figure = lambda units: 1.0 if units == whole else speed(job.model, job.pruned(units))  # noqa: E731
    return Target(figure, job.cfg.latency or 1.0, tolerance=0.05, trials=8, slow=True, noisy=True)


@targets.row("max_drop", "Largest loss of mAP50-95 right after pruning and BatchNorm recalibration", needs=[Need.DATA])
def max_drop(job: Job) -> Target:
    """Prune as far as the recalibrated mAP stays within a drop; EagleEye, Li et al., 2020, arXiv:2007.02491."""
    score, images, allowed = job.probes.score, job.probes.images, job.cfg.max_drop or 0.0
    if score is None or images is None:
        raise UsageError("'prune.max_drop' measures mAP, which needs data. Give data=data.yaml, or another target.")
    whole, dense = job.whole, deepcopy(job.model)
    recalibrate(dense, images())  # as each trial is, or the drop would show what recalibration does to any model
    base = score(dense)
    if base <= allowed:
        why = f"the model itself has mAP50-95 {base:.4f} on these data. Train it first, or give a smaller drop."
        raise UsageError(f"'prune.max_drop={allowed:g}' says nothing: {why}")

    def drop(units: list[int]) -> float:
        if units == whole:
            return 0.0
        trial = job.pruned(units)
        recalibrate(trial, images())
        return base - score(trial)

    return Target(drop, allowed, trials=7, slow=True, noisy=True, cap=True)


def solve(name: str, target: Target, steps: Steps, ties: Sequence[TiedGroups], cfg: PruneConfig) -> list[int]:
    """Return the kept units of each whose figure is nearest to the goal (within it, if it is a cap)."""
    seen: dict[tuple[int, ...], float] = {}
    figure = partial(_figure, name, target, sum(t.units for t in ties), seen)

    def miss(units: list[int]) -> float:
        return target.miss(figure(units))

    least, most = steps(0.0), steps(1.0)
    if not target.passed(figure(most)):
        if not target.cap and miss(most) > target.tolerance:
            raise UsageError(_unreachable(name, target, figure(most), cfg))
        return most
    if target.passed(figure(least)) and miss(least) > target.tolerance:
        now = f"{name} is {figure(least):.4g}{' with prune.ratios alone' * bool(cfg.ratios)}"
        passed = f"'prune.{name}={target.goal:g}' is passed before anything is pruned for it"
        raise UsageError(f"{passed}: {now}. Leave one of them out or change it.")
    low, high = _bisect(target, lambda share: figure(steps(share)))
    if target.cap:
        found = steps(low)
        if all(u == t.units for u, t in zip(found, ties)):
            mildest = f"the mildest of {len(seen)} trials loses {min(f for f in seen.values() if f > target.goal):.4f}"
            remedy = f"Raise prune.{name}, or prune to another target and fine-tune."
            raise UsageError(f"'prune.{name}={target.goal:g}' cannot be met: {mildest}. {remedy}")
        return found
    found = min(steps(low), steps(high), key=miss)
    if not target.noisy and miss(found) > target.tolerance / 2:
        found = _polish(steps(low), steps(high), target, ties, miss)
    if miss(found) > target.tolerance:
        why = "the measurements spread" if target.noisy else f"prune.round_to={cfg.round_to} leaves nothing nearer"
        LOGGER.warning(f"{colorstr('prune: ')}{name} is {figure(found):.4g} instead of {target.goal:g}: {why}")
    return found


def _figure(name: str, target: Target, whole: int, seen: dict[tuple[int, ...], float], units: list[int]) -> float:
    """Return the figure of these units, measured once; `whole` is the number of all units."""
    if (key := tuple(units)) not in seen:
        seen[key] = target.figure(units)
        if target.slow:
            done = f"trial {len(seen)}: {sum(units) / whole:.1%} of the channels"
            LOGGER.info(f"{colorstr('prune: ')}{done}, {name} {seen[key]:.4g} (target {target.goal:g})")
    return seen[key]


def _bisect(target: Target, figure: Callable[[float], float]) -> tuple[float, float]:
    """Return shares on both sides of the goal, from a function of the share to the figure."""
    low, high = 0.0, 1.0
    for _ in range(target.trials):
        if not target.cap and min(target.miss(figure(low)), target.miss(figure(high))) <= target.tolerance / 2:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if target.passed(figure(middle)) else (middle, high)
    return low, high


def _unreachable(name: str, target: Target, most: float, cfg: PruneConfig) -> str:
    """Return what to say when the floors keep the figure away from the goal, rounded to what can be reached."""
    bound, way = (f"most {most - 0.005:.2f}", "Lower") if target.rises else (f"least {most + 0.005:.2f}", "Raise")
    spared = " and the ratios in prune.sensitivity" * bool(cfg.sensitivity)
    return (
        f"'prune.{name}={target.goal:g}' cannot be reached: the floors{spared} allow at {bound}. {way} prune.{name}, "
        f"lower prune.min_channels={cfg.min_channels} or prune.round_to={cfg.round_to}, "
        f"or raise prune.max_ratio={cfg.max_ratio:g}."
    )


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
