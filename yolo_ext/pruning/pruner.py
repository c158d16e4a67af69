# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruners of torch-pruning that the user makes: what they cut becomes a plan, a proof, a manifest and a checkpoint."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import save_model
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import imported
from yolo_ext.pruning.depgraph import KNOWN, DependencyGraph
from yolo_ext.pruning.graph import Graph, Kept
from yolo_ext.pruning.groups import restrict
from yolo_ext.pruning.plan import record
from yolo_ext.pruning.solve import sizes
from yolo_ext.pruning.surgery import ADVICE, parameter_slices, verify
from yolo_ext.stock.context import undisturbed

HIGHEST, TRIALS, NEAR, TOLERANCE = 0.95, 12, 0.005, 0.01  # of the search for the ratio that meets a target
_LOCK = threading.Lock()
_FOUND: list[Any] = []  # the class that each one who is inside of `on_yolo` found, the first of all first


# The user's own script ----------------------------------------------------------------------------------------------
@contextmanager
def on_yolo(couplings: Graph | None = None) -> Iterator[None]:
    """Let torch-pruning find the groups of any YOLO: pruners and graphs that are made in this block work on our graph.

    Take an unmodified `torch_pruning.pruner.*` or `torch_pruning.DependencyGraph`, and as its model `YOLO(path).model`,
    of any family and task. What is made here works on after the block. Blocks may be nested and meet in threads.

    Args:
        couplings: What `build_graph` found of the model, where that is known; None looks at the model.
    Returns: A context that restores torch-pruning's own class at its end.
    Raises: `UsageError`: When a graph is made of something that is no YOLO network, or of a fused one.
    """
    with _LOCK:
        _FOUND.append(tp.DependencyGraph)
        tp.DependencyGraph = tp.dependency.DependencyGraph = DependencyGraph
    token = KNOWN.set(couplings or KNOWN.get())
    try:
        yield
    finally:
        KNOWN.reset(token)
        with _LOCK:
            found = _FOUND.pop()
            if not _FOUND:
                tp.DependencyGraph = tp.dependency.DependencyGraph = found


def save_pruned(pruner: Any, file: str | Path) -> Path:
    """Prove what a torch-pruning pruner has cut, and write the model as a checkpoint that plain ``YOLO(file)`` loads.

    The model may have been trained before, between and after the cuts. It gets a manifest with the kept channels, and a
    tripwire that stops stock training from rebuilding the dense network; our trainer trains the file on.

    Args:
        pruner: A pruner that was made inside of `on_yolo`, after its `step()`; its model is on any device.
        file: Where to write, a name that ends with ``.pt``.
    Returns: The path of the file.
    Raises: `UsageError`: If the pruner was made elsewhere, has cut nothing, or its model was cut by something else.
        CheckFailed: If the model differs from the dense one without these channels, or cannot be trained.
    """
    found, model = _graph(pruner), pruner.model
    if Path(file).suffix != ".pt":
        raise UsageError(f"'{file}' is no name of a checkpoint. Give one that ends with .pt, such as pruned.pt.")
    if not (kept := found.plan()):
        raise UsageError("The pruner has not cut anything yet. Call pruner.step() before save_pruned(...).")
    try:
        gap = verify(regrown(found.dense, model, kept), model, kept)
    except CheckFailed as e:
        advice = "Nothing was written. Keep your own blocks whole: on_yolo(build_graph(model, whole=[MyBlock]))."
        raise CheckFailed(f"{str(e).removesuffix(ADVICE).strip()} {advice}") from e
    cfg = PruneConfig(method=f"tp:{type(pruner.importance).__name__}", pruner=f"torch_pruning:{type(pruner).__name__}")
    record(found.dense, model, found.couplings, kept, cfg, gap)
    return save_model(model, Path(file))


def _graph(pruner: Any) -> DependencyGraph:
    """Return the graph of a pruner, which must be one of ours."""
    if not isinstance(found := getattr(pruner, "DG", None), DependencyGraph):
        made = f"This {type(pruner).__name__} was not made inside of yolo_ext.on_yolo()"
        raise UsageError(f"{made}. Write: with yolo_ext.on_yolo(): pruner = tp.pruner.MagnitudePruner(model, ...)")
    return found


@torch.no_grad()
def regrown(dense: nn.Module, pruned: nn.Module, kept: Kept) -> nn.Module:
    """Return a dense copy on the CPU with what the pruned model has now where it kept it, and ones elsewhere."""
    copy = deepcopy(dense).cpu()
    now = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    for name, t in (*copy.named_parameters(), *copy.named_buffers()):
        path, _, leaf = name.rpartition(".")
        places, slices = [*map(np.arange, t.shape)], parameter_slices(copy.get_submodule(path), kept.get(path, {}))
        for dim, index in slices.get("bias" if leaf.startswith("running_") else leaf, []):
            places[dim] = np.array(index)
        t.fill_(1)[np.ix_(*places)] = now[name].to(t)
    return copy


# prune.pruner -------------------------------------------------------------------------------------------------------
def by_pruner(model: nn.Module, graph: Graph, cfg: PruneConfig, imgsz: int = 640) -> Kept:
    """Return what stays when a pruner that the function `cfg.pruner` makes has pruned to the target of `cfg`."""
    restrict(model, graph, cfg)
    name = next((t for t in ("speedup", "params") if getattr(cfg, t)), None)
    if name is None:
        return _pruned_by(model, graph, cfg, imgsz).DG.plan()  # type: ignore[no-any-return]
    goal, figure = getattr(cfg, name), "gflops" if name == "speedup" else name
    before, low, high, best = sizes(model, imgsz)[figure], 0.0, HIGHEST, (0.0, Kept())
    for _ in range(TRIALS):
        share = (low + high) / 2
        pruner = _pruned_by(model, graph, replace(cfg, ratio=share, speedup=None, params=None), imgsz)
        reached = before / sizes(pruner.model, imgsz)[figure]
        best = min(best, (reached, pruner.DG.plan()), key=lambda b: abs(b[0] - goal))
        low, high = (share, high) if reached < goal else (low, share)
        if abs(best[0] / goal - 1) <= NEAR:
            break
    if abs(best[0] / goal - 1) > TOLERANCE:
        reach = f"'prune.{name}={goal:g}' cannot be met: {cfg.pruner} comes as near as {best[0]:.3g}"
        if high == HIGHEST:
            raise UsageError(f"{reach}, whatever its ratio. Lower prune.{name}, or let the pruner go further.")
        LOGGER.warning(f"{colorstr('prune: ')}{reach}, because of how it rounds")
    return best[1]


def _pruned_by(model: nn.Module, graph: Graph, cfg: PruneConfig, imgsz: int) -> Any:
    """Return a pruner of the user's, made for a copy of the model, after all its steps."""
    copy, make, device = deepcopy(model), imported("pruner", cfg.pruner or ""), next(model.parameters()).device
    with undisturbed(device, cfg.seed), on_yolo(graph):  # for importances at random, and for the image
        pruner = make(copy, torch.rand(1, stock.input_channels(model), imgsz, imgsz, device=device), cfg)
        if _graph(pruner).model is not copy:
            made = f"'prune.pruner={cfg.pruner}' made a pruner of another model"
            raise UsageError(f"{made}. Prune the one that it is given.")
        while pruner.current_step < pruner.iterative_steps:
            pruner.step()
    return pruner
