# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where the work of a model is: every group of coupled channels, its cost, and why it can or cannot be pruned."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.pruning.graph import Graph, Group, build_graph
from yolo_ext.pruning.labels import layer_channels
from yolo_ext.pruning.solve import layer_flops
from yolo_ext.reporting.tables import align
from yolo_ext.stock.load import as_exported

RUNS, WARMUP = 15, 3


def analyze_model(model: nn.Module, imgsz: int = 640, runs: int = RUNS) -> list[dict[str, Any]]:
    """List every group of channels of a model.

    Args:
        model: Unfused YOLO of any family; it is not changed.
        imgsz: Side in pixels of the square image for FLOPs and latency.
        runs: Timed forward passes.

    Returns:
        Rows in the order of the model: `name`, `part` (such as ``64:128`` where the first layer holds more), `layers`
        (those that produce the channels), `readers` (those that take
        them in), `channels`, `flops_share` and `latency_share` (of the deployed model, spent by the layers that produce
        the channels; a layer that several groups share counts by channels), `prunable`, `reason` why not.
    """
    graph = build_graph(model, imgsz)
    costs = layer_flops(model, graph)
    times, whole = layer_times(model, imgsz, runs)
    flops, latency = group_shares(graph, costs, sum(costs.values())), group_shares(graph, times, whole)
    return [
        {
            "name": g.name,
            "part": _part(graph, g),
            "layers": graph.layers(g),
            "readers": [m.module for m in g.members if m.dim == "in"],
            "channels": g.size,
            "flops_share": f,
            "latency_share": t,
            "prunable": not g.frozen,
            "reason": g.frozen,
        }
        for g, f, t in zip(graph.groups, flops, latency)
    ]


def _part(graph: Graph, group: Group) -> str:
    """Return which channels of its first layer a group holds, empty for all of them."""
    index = group.members[0].index.flatten()
    if index.numel() == graph.shapes.get(group.name, (index.numel(), 0))[0]:
        return ""
    low, high = int(index.min()), int(index.max()) + 1
    return f"{low}:{high}" if high - low == index.numel() else f"{index.numel()} of {low}:{high}"


@torch.inference_mode()
def layer_times(model: nn.Module, imgsz: int, runs: int = RUNS) -> tuple[dict[str, float], float]:
    """Return the median seconds of each layer of a deployed copy, and of the whole, on one thread of torch."""
    fused = as_exported(stock.deployed(model).float().cpu())
    samples: dict[str, list[float]] = defaultdict(list)
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(time.perf_counter())

    def after(name: str, *_: Any) -> None:
        samples[name].append(time.perf_counter() - began.pop())

    for path, m in fused.named_modules():
        if layer_channels(m):
            m.register_forward_pre_hook(before)
            m.register_forward_hook(partial(after, _unfused(fused, path)))
    x = torch.rand(1, stock.input_channels(model), imgsz, imgsz)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(WARMUP + runs):
            if i == WARMUP:
                samples.clear()
            before()
            fused(x)
            after("")
    finally:
        torch.set_num_threads(threads)
    calls = {name: len(values) // runs for name, values in samples.items()}  # a layer may run at several scales
    found = {name: median(values) * calls[name] for name, values in samples.items()}
    return found, found.pop("")


def _unfused(fused: nn.Module, path: str) -> str:
    """Return the name that a layer had before fusing; a reparameterised block takes that of its widest branch."""
    parent, _, _ = path.rpartition(".")
    branch = stock.WIDEST_BRANCH.get(type(fused.get_submodule(parent)).__name__)
    return f"{parent}.{branch}" if branch else path


def group_shares(graph: Graph, costs: Mapping[str, float], whole: float) -> list[float]:
    """Return the share, 0..1, that each group of the graph has in `whole`, from the `costs` of the layers by path."""
    return [
        sum(costs.get(m.module, 0.0) * m.index.numel() / graph.shapes[m.module][0]
            for m in g.members if m.dim == "out" and m.module in graph.shapes) / whole
        for g in graph.groups
    ]  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `analyze_model` as aligned text."""
    lines = []
    for r in rows:
        more = f"[{r['part']}]" if r["part"] else ""
        more += f" +{len(r['layers']) - 1}" if len(r["layers"]) > 1 else ""
        cost = [f"{r['flops_share']:.1%}", f"{r['latency_share']:.1%}"]
        lines.append([r["name"] + more, f"{r['channels']}", *cost, "yes" if r["prunable"] else r["reason"]])
    text = align(lines, ["Group", "Channels", "FLOPs", "Latency", "Prunable"])
    can = [r for r in rows if r["prunable"]]
    return (
        f"{text}\n{len(can)} of {len(rows)} groups can be pruned. Their layers hold "
        f"{sum(r['flops_share'] for r in can):.0%} of the FLOPs and {sum(r['latency_share'] for r in can):.0%} of the "
        "latency (torch, one thread)."
    )
