# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a target measures on the model that a plan would give."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass

from torch import nn

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note, size_mb
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Table
from yolo_ext.pruning.bundles import Bundle, Widths, kept_of, widths_of
from yolo_ext.pruning.graph import Graph
from yolo_ext.pruning.probes import Probes
from yolo_ext.pruning.solve import Target
from yolo_ext.pruning.surgery import apply_plan
from yolo_ext.stock.context import recalibrate

targets = Table("pruning target")  # row: Job -> Target


@dataclass(frozen=True)
class Job:
    """What is pruned and what may be asked about it.

    Attributes:
        model: The model; it is not changed.
        graph: Its couplings.
        made: Its bundles, those with a share of their own included.
        cfg: Pruning options.
        probes: What data and the clock can tell.
        imgsz: Side of the image in pixels, for the FLOPs.
    """

    model: nn.Module
    graph: Graph
    made: list[Bundle]
    cfg: PruneConfig
    probes: Probes
    imgsz: int = 640

    def pruned(self, units: list[int]) -> nn.Module:
        """Return a pruned copy."""

        return apply_plan(deepcopy(self.model), kept_of(self.graph, self.made, units))


def measure(model: nn.Module, graph: Graph, imgsz: int = 640) -> Callable[[Widths], tuple[float, float]]:
    """Return a function from kept widths to (FLOPs, parameters) of the deployed model, which builds nothing.

    Args:
        model: The model that the graph was built from.
        graph: Its couplings.
        imgsz: Side of the square image in pixels for the FLOPs (2 x MACs, as Ultralytics counts them). Convolutions
            grow with the image, attention with its square, a classifier not at all.

    Returns:
        The function; `{}` stands for the whole model, `bundles.widths_of` gives the widths of a plan.
    """
    deployed, modules = stock.deployed_layers(model), dict(model.named_modules())
    layers = {p: c for p, c in graph.convs.items() if p in deployed and p in graph.shapes}
    biased = {p for p in layers if modules[p].bias is not None or f"{p.rpartition('.')[0]}.bn" in modules}
    area = _area(modules, graph, imgsz)
    work, depth = {}, {}  # multiplications of each weight; groups
    for path, (positions, _) in layers.items():
        stride = modules[path].stride if isinstance(modules[path], nn.ConvTranspose2d) else (1, 1)
        work[path] = positions * (area if positions > 1 else 1) / (stride[0] * stride[1])
        depth[path] = getattr(modules[path], "groups", 1)
    values = {f"{p}.proj.conv" for p, m in modules.items() if isinstance(m, stock.ATTENTION)} & set(layers)

    def counted(widths: Widths) -> tuple[float, float]:
        flops = params = 0.0
        for path, (_, kernel) in layers.items():
            n_out, n_in = graph.shapes[path]
            out, inp = widths.get((path, "out"), n_out), widths.get((path, "in"), n_in)
            weights = out * kernel * (1 if depth[path] == n_out else inp / depth[path])
            flops += 2.0 * work[path] * (weights + work[path] * inp * (path in values))  # attention x values
            params += weights + out * (path in biased)
        return flops, params

    whole = counted({})
    other_flops = stock.gflops(model, imgsz) * 1e9 - whole[0]
    other_params = sum(p.numel() for p in stock.deployed(model).parameters()) - whole[1]

    def figures(widths: Widths) -> tuple[float, float]:
        flops, params = counted(widths)
        return flops + other_flops, params + other_params

    return figures


def _area(modules: dict[str, nn.Module], graph: Graph, imgsz: int) -> float:
    """Return how many times more pixels an image of `imgsz` has than the one that the graph was traced with."""
    stem, (positions, _) = next(iter(graph.convs.items()))  # layers are listed in the order of their first call
    return imgsz**2 / (positions * getattr(modules[stem], "stride", (1,))[0] ** 2)


# Targets -------------------------------------------------------------------------------------------------------------
def _analytic(job: Job, which: int) -> Callable[[list[int]], float]:
    """Return before / after of FLOPs (0) or parameters (1)."""
    figures = measure(job.model, job.graph, job.imgsz)
    before = figures({})[which]
    return lambda units: before / figures(widths_of(job.graph, job.made, units))[which]


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
    """Aim at a share of the channels of all bundles that have no share of their own."""
    weight = [0 if b.share is not None else sum(g.size for g in b.groups) / b.units for b in job.made]
    total = sum(w * b.units for w, b in zip(weight, job.made)) or 1.0

    def removed(units: list[int]) -> float:
        return sum(w * (b.units - u) for w, b, u in zip(weight, job.made, units)) / total

    return Target(removed, job.cfg.ratio or 0.0)


@targets.row("size_mb", "Size of the .pt in MB")
def size(job: Job) -> Target:
    """Aim at the size of the fp16 checkpoint, whose manifest grows with the plan that it holds."""
    frozen = {m.module: g.frozen for g in job.graph.groups if g.frozen for m in g.members if m.dim == "out"}
    shapes = {p: list(s) for p, s in job.graph.shapes.items()}

    def megabytes(units: list[int]) -> float:
        copy = job.pruned(units)
        record = {"config": asdict(job.cfg), "kept": kept_of(job.graph, job.made, units)}
        note(copy, prune={"shapes": shapes, "frozen": frozen, **manifest(copy).prune, **record})
        return size_mb(copy)

    return Target(megabytes, job.cfg.size_mb or 0.0, rises=False, trials=16, slow=True)


@targets.row("latency", "Measured latency before / after")
def latency(job: Job) -> Target:
    """Aim at a latency ratio, measured for each trial."""
    if (speed := job.probes.speed) is None:
        raise UsageError("'prune.latency' is measured on this machine, which needs data=... or imgsz=... to run with.")
    whole = [b.units for b in job.made]
    figure = lambda units: 1.0 if units == whole else speed(job.model, job.pruned(units))  # noqa: E731
    return Target(figure, job.cfg.latency or 1.0, tolerance=0.05, trials=8, slow=True, noisy=True)


@targets.row("max_drop", "Largest loss of mAP50-95 right after pruning and BatchNorm recalibration", needs=[Need.DATA])
def max_drop(job: Job) -> Target:
    """Prune as far as the recalibrated mAP stays within a drop; EagleEye, Li et al., 2020, arXiv:2007.02491."""

    score, images, allowed = job.probes.score, job.probes.images, job.cfg.max_drop or 0.0
    if score is None or images is None:
        raise UsageError("'prune.max_drop' measures mAP, which needs data. Give data=data.yaml, or another target.")
    whole, dense = [b.units for b in job.made], deepcopy(job.model)
    recalibrate(dense, images())  # as each trial is, or the drop would show what recalibration does to any model
    base = score(dense)
    if base <= allowed:
        raise UsageError(
            f"'prune.max_drop={allowed:g}' says nothing: the model itself has mAP50-95 {base:.4f} on these data. "
            "Train it first, or give a smaller drop."
        )

    def drop(units: list[int]) -> float:
        if units == whole:
            return 0.0
        trial = job.pruned(units)
        recalibrate(trial, images())
        return base - score(trial)

    return Target(drop, allowed, trials=7, slow=True, noisy=True, cap=True)
