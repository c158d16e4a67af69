# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What each layer's channels are worth: mAP and losses after pruning one group alone, by the share removed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, TQDM, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import atomic_write, fingerprint
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.analyze import group_shares
from yolo_ext.pruning.criteria import criteria, resolved
from yolo_ext.pruning.evidence import Probes, collect, task_losses
from yolo_ext.pruning.graph import Graph
from yolo_ext.pruning.groups import TiedGroups, tied_groups
from yolo_ext.pruning.plan import Job
from yolo_ext.pruning.solve import layer_flops
from yolo_ext.reporting.curves import plot_sensitivity
from yolo_ext.stock.context import recalibrate

FILE = "sensitivity.json"
RATIOS = (0.25, 0.5, 0.75)
CHANGES = ("method", "include", "exclude", "images", "recalibrate", "seed")  # options that the curves depend on


def measure_sensitivity(
    model: nn.Module,
    graph: Graph,
    cfg: PruneConfig,
    probes: Probes,
    ratios: Sequence[float] = RATIOS,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Prune each group alone, with those that it is tied to, on a copy, recalibrate BatchNorm, and measure.

    Args:
        model: The model; it is not changed.
        graph: Its couplings from `build_graph`, used once.
        cfg: Pruning options; the criterion, the scope and the number of images count, the targets do not.
        probes: `batches`, `images` and `score` are needed.
        ratios: Shares of channels to remove, each above 0 and below 1; floors and rounding are not applied.
        folder: Where `sensitivity.json` is kept up to date after each group and read again by a repeated call.

    Returns:
        Plain data: `metric`, what `map` stands for; `ratios`; `trained`, its value for the model as it is; `base`, the
        unpruned model after the recalibration that all others get, with `map` and each loss; `groups`, one for each
        group, with `name`, `layers` (that produce the channels), `channels`, `flops_share` and `curve`, whose points
        hold `wanted` and real `ratio`, kept `channels`, `map` and each loss; `complete`; and `key`, the options.

    Raises:
        UsageError: If data are missing, a ratio is illegal or nothing can be pruned.
    """
    if probes.batches is None or probes.images is None or probes.score is None:
        raise UsageError("Sensitivity is measured on train and val images. Give data=data.yaml.")
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise UsageError(f"Sensitivity ratios {list(ratios)} are illegal. Legal: above 0 and below 1, at least one.")
    cfg = resolved(cfg, data=True)
    evidence = collect(model, cfg.method, probes.batches()) if Need.DATA in criteria[cfg.method].needs else None
    ties = tied_groups(model, graph, replace(cfg, ratios={}), evidence)
    if not ties:
        raise UsageError("Nothing can be pruned: every group is frozen or excluded. See `yolo-ext analyze`.")
    images = list(probes.images()) if cfg.recalibrate else []
    found: dict[str, Any] = {
        "metric": "top-1" if stock.task_of(model) == "classify" else "mAP50-95",
        "ratios": sorted(ratios),
        "trained": probes.score(model),
        "base": _measure(deepcopy(model), probes, images),
        "groups": [],
        "complete": False,
        "key": {"model": fingerprint(model), **{k: v for k, v in asdict(cfg).items() if k in CHANGES}},
    }
    found["groups"] = _earlier(folder, found)
    measured = {g["name"] for g in found["groups"]}
    job, shares = Job(model, graph, ties, cfg, probes), _flops_shares(model, graph)
    for tied in (bar := TQDM(ties, desc="Sensitivity")):
        if tied.name not in measured:
            bar.set_description(f"Sensitivity: {tied.name}")
            row = {
                "name": tied.name,
                "layers": list(dict.fromkeys(p for g in tied.groups for p in graph.layers(g))),
                "channels": tied.channels,
                "flops_share": sum(shares[id(g)] for g in tied.groups),
            }
            found["groups"].append({**row, "curve": _curve(job, tied, images, found["ratios"])})
            _save(found, folder)
    found["complete"] = True
    _save(found, folder)
    return found


def _flops_shares(model: nn.Module, graph: Graph) -> dict[int, float]:
    """Return the share of the FLOPs, 0..1, by id of a group."""
    flops = layer_flops(model, graph)
    return {id(g): s for g, s in zip(graph.groups, group_shares(graph, flops, sum(flops.values())))}


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
    assert probes.batches is not None and probes.score is not None
    recalibrate(model, images)
    return {"map": probes.score(model), **task_losses(model, probes.batches())}


def _earlier(folder: Path | None, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups that an earlier call with the same model, options and data has measured."""
    file = folder / FILE if folder else None
    if file is None or not file.is_file():
        return []
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        same = all(old[k] == now[k] for k in ("key", "ratios")) and _equal(old["base"], now["base"])
    except (ValueError, LookupError, TypeError, AttributeError):  # not a file of ours
        same = False
    if not same:  # base figures differ where data or the image size do
        raise UsageError(
            f"'{file}' belongs to another model, other options or other data. Give another name= or remove the file."
        )
    LOGGER.info(f"{colorstr('sensitivity: ')}{len(old['groups'])} groups are measured already and not repeated")
    return old["groups"]


def _equal(a: dict[str, float], b: dict[str, float]) -> bool:
    """Tell whether two sets of figures agree within rounding."""
    return a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-4 * max(1.0, abs(a[k])) for k in a)


def _save(found: dict[str, Any], folder: Path | None) -> None:
    """Write what is known so far, if there is a folder."""
    if folder:
        atomic_write(Path(folder) / FILE, json.dumps(found, indent=2))


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write a sensitivity analysis as JSON, as CSV with one row for each point, and as a picture; return the files."""
    folder = Path(folder)
    _save(found, folder)
    losses = [k for k in found["base"] if k != "map"]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "layers", "channels", "flops_share", "ratio", "kept", "map", "map_drop", *losses])
    for g in found["groups"]:
        for p in g["curve"]:
            group = [g["name"], " ".join(g["layers"]), g["channels"], g["flops_share"]]
            drop = found["base"]["map"] - p["map"]
            rows.writerow([*group, p["ratio"], p["channels"], p["map"], drop, *(p[k] for k in losses)])
    atomic_write(folder / "sensitivity.csv", text.getvalue())
    picture = plot_sensitivity(found, folder / "sensitivity.png")
    return [folder / FILE, folder / "sensitivity.csv", picture]
