# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What each group of coupled channels costs, why it can or cannot be pruned, and what a model loses without it."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import LOGGER, TQDM, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import atomic_write, fingerprint
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import tell_time
from yolo_ext.core.registry import Need
from yolo_ext.pruning.criteria import criteria, resolved
from yolo_ext.pruning.evidence import Probes, collect, task_losses
from yolo_ext.pruning.graph import Graph, Group, build_graph
from yolo_ext.pruning.groups import TiedGroups, tied_groups
from yolo_ext.pruning.labels import layer_channels
from yolo_ext.pruning.plan import Job, in_words
from yolo_ext.pruning.solve import group_shares, layer_flops
from yolo_ext.reporting.figures import plot_sensitivity
from yolo_ext.reporting.tables import ABSENT, align, cell
from yolo_ext.runs import write_csv
from yolo_ext.stock.accuracy import score
from yolo_ext.stock.context import recalibrate
from yolo_ext.stock.load import as_exported

RUNS, WARMUP = 15, 3
REASON = 71  # columns, from the left
FILE = "sensitivity.json"
RATIOS = (0.25, 0.5, 0.75)
CHANGES = ("method", "include", "exclude", "images", "recalibrate", "seed")  # options that the curves depend on


def analyze_model(model: nn.Module, imgsz: int = 640, runs: int = RUNS) -> list[dict[str, Any]]:
    """List every group of channels of a model.

    Args:
        model: Unfused YOLO of any family; it is not changed.
        imgsz: Side in pixels of the square image for FLOPs and latency.
        runs: Timed forward passes.
    Returns: Rows in the order of the model: `layers` produce the channels, `readers` take them in; shares of FLOPs and
        latency are of the deployed model, spent by `layers`, the latter None where its passes differ by more than that;
        `prunable`, or the `reason` why not.
    """
    graph = build_graph(model, imgsz)
    costs = layer_flops(model, graph)
    times = np.array([group_shares(graph, seconds, seconds[""]) for seconds in layer_times(model, imgsz, runs)])
    flops, (low, latency, high) = group_shares(graph, costs, sum(costs.values())), np.percentile(times, (10, 50, 90), 0)
    return [
        {"name": g.name, "part": _part(graph, g), "layers": graph.layers(g),
         "readers": [m.module for m in g.members if m.dim == "in"], "channels": g.size, "flops_share": f,
         "latency_share": float(t) if spread < t else None, "prunable": not g.frozen, "reason": g.frozen}
        for g, f, t, spread in zip(graph.groups, flops, latency, high - low)
    ]  # fmt: skip


def _part(graph: Graph, group: Group) -> str:
    """Return which channels of its first layer a group holds, empty for all of them."""
    index = group.members[0].index.flatten()
    if index.numel() == graph.shapes.get(group.name, (index.numel(), 0))[0]:
        return ""
    low, high = int(index.min()), int(index.max()) + 1
    return f"{low}:{high}" if high - low == index.numel() else f"{index.numel()} of {low}:{high}"


@torch.inference_mode()
def layer_times(model: nn.Module, imgsz: int, runs: int = RUNS) -> list[dict[str, float]]:
    """Return for each pass of a deployed copy the seconds by layer, and by "" of all, on one thread of torch."""
    fused = as_exported(stock.deployed(model).float().cpu())
    passes: list[dict[str, float]] = []
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(time.perf_counter())

    def after(name: str, *_: Any) -> None:
        passes[-1][name] += time.perf_counter() - began.pop()  # a layer may run at several scales

    for path, m in fused.named_modules():
        if layer_channels(m):
            m.register_forward_pre_hook(before)
            parent = path.rpartition(".")[0]  # a reparameterised block stands for its widest branch
            branch = stock.WIDEST_BRANCH.get(type(fused.get_submodule(parent)).__name__)
            m.register_forward_hook(partial(after, f"{parent}.{branch}" if branch else path))
    x = torch.rand(1, stock.input_channels(model), imgsz, imgsz)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(WARMUP + runs):
            passes.append(defaultdict(float))
            before()
            fused(x)
            after("")
    finally:
        torch.set_num_threads(threads)
    return passes[WARMUP:]


def table(rows: Sequence[Mapping[str, Any]], imgsz: int) -> str:
    """Return the rows of `analyze_model` as aligned text, and what can be pruned in its last line."""
    timed, can = [r for r in rows if r["latency_share"]], [r for r in rows if r["prunable"]]
    lines = []
    for r in rows:
        more = f"[{r['part']}]" if r["part"] else ""
        more += f" +{len(r['layers']) - 1}" if len(r["layers"]) > 1 else ""
        cost = [f"{r['flops_share']:.1%}", *([cell(r["latency_share"], ".1%")] if timed else [])]
        answer = "yes" if r["prunable"] else f"no: {in_words(r['reason'])}"
        lines.append([r["name"] + more, r["channels"], *cost, f"{answer:<{REASON}}"])
    text = align(lines, ["Group", "Channels", "FLOPs", *(["Latency"] if timed else []), f"{'Prunable':<{REASON}}"])
    if unsure := len(rows) - len(timed):
        which = f"of these {unsure} groups is not known" if timed else "of no group is known"
        text += f"\n{ABSENT} The latency {which}: it differs from pass to pass by more than it is"
    flops, time = (sum(r[k] or 0 for r in can) for k in ("flops_share", "latency_share"))
    least = "at least " if unsure else ""
    told = f", {least}{time:.0%} of the latency (torch, 1 thread, {imgsz} px)" if timed else f" at {imgsz} px"
    return f"{text}\n{len(can)} of {len(rows)} groups can be pruned: {flops:.0%} of the FLOPs{told}"


def measure_sensitivity(
    model: nn.Module, graph: Graph, cfg: PruneConfig, probes: Probes, ratios: Sequence[float] = RATIOS,
    folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Prune each group alone, with those that it is tied to, on a copy, recalibrate BatchNorm, and measure.

    Args:
        model: The model; it is not changed.
        graph: Its couplings from `build_graph`, used once.
        cfg: Pruning options; the criterion, the scope and the number of images count, the targets do not.
        probes: `batches`, `images` and `accuracy` are needed.
        ratios: Shares of channels to remove, each above 0 and below 1; floors and rounding are not applied.
        folder: Where `sensitivity.json` is kept up to date after each group and read again by a repeated call.
    Returns: Plain data: `groups`, each with a `curve` of `map` (what `metric` says) and losses over the ratios;
        `trained`, the model as it is, and `base`, the same after the recalibration that all others get.
    Raises: `UsageError`: If data are missing, a ratio is illegal or nothing can be pruned.
    """
    if probes.batches is None or probes.images is None or probes.accuracy is None:
        raise UsageError("Sensitivity is measured on train and val images. Give data=data.yaml.")
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise UsageError(f"Sensitivity ratios {list(ratios)} are illegal. Legal: above 0 and below 1, at least one.")
    cfg = resolved(cfg, data=True)
    evidence = collect(model, cfg.method, probes.batches()) if Need.DATA in criteria[cfg.method].needs else None
    ties = tied_groups(model, graph, replace(cfg, ratios={}), evidence)
    if not ties:
        raise UsageError("Nothing can be pruned: every group is frozen or excluded. See `yolo-ext analyze`.")
    images, trained = list(probes.images()) if cfg.recalibrate else [], score(probes.accuracy(model))
    start = time.monotonic()
    found: dict[str, Any] = {
        "metric": stock.metric(stock.task_of(model)),
        "ratios": sorted(ratios), "trained": trained, "base": _measure(deepcopy(model), probes, images),
        "groups": [], "complete": False,
        "key": {"model": fingerprint(model), **{k: v for k, v in asdict(cfg).items() if k in CHANGES}},
    }  # fmt: skip
    seconds, found["groups"] = time.monotonic() - start, _earlier(folder, found)
    measured = {g["name"] for g in found["groups"]}
    todo = [tied for tied in ties if tied.name not in measured]
    points = len(todo) * len(ratios)
    tell_time("sensitivity", seconds * points, f"{len(todo)} groups x {len(ratios)} shares")
    job, flops = Job(model, graph, ties, cfg, probes), layer_flops(model, graph)
    shares = {id(g): s for g, s in zip(graph.groups, group_shares(graph, flops, sum(flops.values())))}
    for tied in TQDM(todo, desc="Pruning sensitivity"):
        found["groups"].append({
            "name": tied.name, "layers": list(dict.fromkeys(p for g in tied.groups for p in graph.layers(g))),
            "channels": tied.channels, "flops_share": sum(shares[id(g)] for g in tied.groups),
            "curve": _curve(job, tied, images, found["ratios"]),
        })  # fmt: skip
        _save(found, folder)
    found["complete"] = True
    _save(found, folder)
    return found


def _curve(job: Job, tied: TiedGroups, images: list[torch.Tensor], ratios: Iterable[float]) -> list[dict[str, Any]]:
    """Return the points of one curve; ratios that come to the same number of units give one point."""
    levels: dict[int, float] = {}
    for wanted in ratios:
        levels.setdefault(min(max(round(tied.units * (1 - wanted)), 1), tied.units), wanted)
    levels.pop(tied.units, None)
    points = []
    for units, wanted in levels.items():
        pruned = job.pruned([units if t is tied else t.units for t in job.ties])
        point = {"wanted": wanted, "ratio": 1 - units / tied.units, "channels": tied.channels * units // tied.units}
        points.append({**point, **_measure(pruned, job.probes, images)})
    return points


def _measure(model: nn.Module, probes: Probes, images: list[torch.Tensor]) -> dict[str, float]:
    """Return `map` and each loss of a model that may be changed; without images BatchNorm stays as it is."""
    assert probes.batches is not None and probes.accuracy is not None
    recalibrate(model, images)
    return {"map": score(probes.accuracy(model)) or 0.0, **task_losses(model, probes.batches())}


def _earlier(folder: Path | None, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups that an earlier call with the same model, options and data has measured."""
    file = folder / FILE if folder else None
    if file is None or not file.is_file():
        return []
    try:
        old, base = json.loads(file.read_text(encoding="utf-8")), now["base"]
        same = all(old[k] == now[k] for k in ("key", "ratios")) and old["base"].keys() == base.keys()
        # base figures differ where data or the image size do
        same = same and all(abs(v - base[k]) <= 1e-4 * max(1.0, abs(v)) for k, v in old["base"].items())
    except (ValueError, LookupError, TypeError, AttributeError):  # not a file of ours
        same = False
    if not same:
        other = "belongs to another model, other options or other data"
        raise UsageError(f"'{file}' {other}. Give another name= or remove the file.")
    LOGGER.info(f"{colorstr('sensitivity: ')}{len(old['groups'])} groups are measured already and not repeated")
    return old["groups"]  # type: ignore[no-any-return]


def _save(found: dict[str, Any], folder: Path | None) -> None:
    """Write what is known so far, if there is a folder."""
    if folder:
        atomic_write(Path(folder) / FILE, json.dumps(found, indent=2))


def losses_table(found: Mapping[str, Any], imgsz: int, rows: int = 15) -> str:
    """Return what the groups that a sensitivity analysis ranks first lose by each share, so many, as aligned text."""
    base = found["base"]["map"]
    lost = {g["name"]: {p["wanted"]: base - p["map"] for p in g["curve"]} for g in found["groups"]}
    ranked = sorted(found["groups"], key=lambda g: -max(lost[g["name"]].values(), default=0.0))
    cells = [[g["name"], g["channels"], f"{g['flops_share']:.1%}",
              *(cell(lost[g["name"]].get(r), ".4f") for r in found["ratios"])] for g in ranked[:rows]]  # fmt: skip
    head = ["Group", "Channels", "FLOPs", *(f"{r:.0%} pruned" for r in found["ratios"])]
    more = f"\n{len(ranked) - rows} more groups with smaller losses" if len(ranked) > rows else ""
    title = f"{found['metric']} at {imgsz} px that is lost with one group pruned alone, of {base:.4f}"
    return f"{title}\n{align(cells, head)}{more}"


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write a sensitivity analysis as JSON, as CSV with one row for each point, and as a picture; return the files."""
    _save(found, folder)
    files, losses = [folder / f"sensitivity.{kind}" for kind in ("json", "csv", "png")], [*found["base"]][1:]
    write_csv(files[1], [
        {"name": g["name"], "layers": " ".join(g["layers"]), "channels": g["channels"], "flops_share": g["flops_share"],
         "ratio": p["ratio"], "kept": p["channels"], "map": p["map"], "map_drop": found["base"]["map"] - p["map"],
         **{k: p[k] for k in losses}} for g in found["groups"] for p in g["curve"]
    ])  # fmt: skip
    plot_sensitivity(found, files[2])
    return files
