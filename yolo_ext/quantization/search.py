# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Mixed precision: what the quantization of each layer costs and gains, and the fewest layers to leave float."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from ultralytics.utils import TQDM

from yolo_ext import stock
from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import tell_time
from yolo_ext.core.options import QuantConfig
from yolo_ext.quantization.calibrate import calibrate_rest, known
from yolo_ext.quantization.fake_quant import insert_state, strip_fake_quant
from yolo_ext.quantization.plan import make_plan
from yolo_ext.quantization.spec import Profile, State
from yolo_ext.reporting.figures import plot_quant_sensitivity
from yolo_ext.reporting.tables import ABSENT, align
from yolo_ext.runs import write_csv
from yolo_ext.stock.load import choose_head

CONFIDENT, LEAST = 0.1, 100  # anchors below this score never become detections; so many are looked at in any case
COLUMNS = ("name", "layers", "error", "box_mean", "score_max", "score_mean", "sqnr", "map_drop", "ms", "error_per_ms")
EXACT = 200.0  # dB where no score changed at all
FLOOR = 0.25  # share of the mean ms of a group below which a gain in time is noise
Score = Callable[[nn.Module], float]


def sensitivity(
    model: nn.Module, state: State, batches: Iterable[torch.Tensor], by: str = "layer", score: Score | None = None,
    costs: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Quantize each layer alone and compare what is detected with the float model.

    Args:
        model: Float model that the state belongs to; not changed.
        state: Calibrated state of all layers.
        batches: Images (B, C, H, W), 0 to 1.
        by: `layer`, or `block` for all layers of one entry of the model YAML (or branch of the head) together.
        score: Accuracy of a model, 0 to 1; measured for each group if given.
        costs: Layer path -> ms that INT8 saves there.
    Returns: `groups`, the worst first, with errors of boxes (px) and scores at confident anchors, `sqnr` (dB, of class
        logits), and what `score` and `costs` add; `all`, the errors with everything quantized; `base`, the float model.
    Raises: `UsageError`: If there are no images or no quantized layers, or `by` is illegal.
    """
    if by not in ("layer", "block"):
        raise UsageError(f"'by={by}' is illegal. Legal: layer, block.")
    # The head that an export holds: anchors keep their places, and a list of detections has no order to compare.
    net = choose_head(deepcopy(model).float().eval().requires_grad_(False), False)
    images = [b.to(next(net.parameters()).device) for b in batches]
    made = _groups(net, state, by)
    if not images or not made:
        raise UsageError("Sensitivity needs images and at least one quantized layer. Give data=, check quant.exclude.")
    reference, base, start = _Reference(net, images), score(model) if score else None, time.monotonic()
    whole, groups = _measure(net, state, list(state), reference, score), []
    tell_time("sensitivity", (time.monotonic() - start) * len(made), f"{len(made)} {by}s")
    for name, paths in TQDM(made.items(), desc="Quantization sensitivity"):
        errors = _measure(net, state, paths, reference, score)
        shares = [errors[k] / whole[k] for k in ("box_mean", "score_mean") if whole[k] > 0]
        row: dict[str, Any] = {"name": name, "layers": paths, "error": sum(shares) / max(len(shares), 1), **errors}
        if base is not None:
            row["map_drop"] = base - row["map"]
        if costs is not None:
            row["ms"] = sum(costs.get(p, 0.0) for p in paths)
        groups.append(row)
    if costs is not None:
        least = max(FLOOR * sum(max(g["ms"], 0.0) for g in groups) / len(groups), 1e-6)
        for g in groups:
            g["error_per_ms"] = g["error"] / max(g["ms"], least)
    groups.sort(key=lambda g: (-g["error"], g["name"]))
    return {
        "by": by, "images": sum(len(b) for b in images), "anchors": len(reference.rows), "base": {"map": base},
        "metric": stock.metric(stock.task_of(net)), "groups": groups, "all": whole,
    }  # fmt: skip


def _groups(net: nn.Module, state: State, by: str) -> dict[str, list[str]]:
    """Return name -> layer paths; layers of a head that is not exported, and sums by themselves, are no group."""
    head = stock.head_prefix(net)
    groups: dict[str, list[str]] = {}
    for path, sites in state.items():
        if "weight" not in sites or ("one2one_" in path and path.replace("one2one_", "") in state):
            continue
        name = ".".join(path.split(".")[: 3 if path.startswith(head) else 2]) if by == "block" else path
        groups.setdefault(name, []).append(path)
    return groups


class _Reference:
    """Outputs of the float model at its confident anchors."""

    def __init__(self, net: Any, images: list[torch.Tensor]) -> None:
        self.images, self.final = images, bool(getattr(net, "end2end", False))
        self.classify = stock.task_of(net) == "classify"
        self.nc = len(net.names) if hasattr(net, "names") else stock.detection_head(net).nc
        rows = list(self._rows(net))
        tops = torch.cat([self.scores(r).amax(1) for r in rows])
        least = min(CONFIDENT, float(tops.topk(min(LEAST, len(tops))).values[-1]))
        self.keep = [self.scores(r).amax(1) >= least for r in rows]
        self.rows = torch.cat([r[k] for r, k in zip(rows, self.keep)])

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the class scores of rows (n, columns) of an output."""
        return rows if self.classify else rows[:, 4:5] if self.final else rows[:, 4 : 4 + self.nc]

    @torch.inference_mode()
    def _rows(self, net: nn.Module) -> Iterator[torch.Tensor]:
        """Yield for each batch what a model returns of each anchor (anchors, columns)."""
        for x in self.images:
            y: Any = net(x)
            while isinstance(y, (tuple, list)):
                y = y[0]
            yield y if y.ndim == 2 else (y if self.final else y.transpose(1, 2)).flatten(0, 1)

    def compared(self, net: nn.Module) -> dict[str, float]:
        """Return the errors of another model at the same anchors."""
        rows = torch.cat([r[k] for r, k in zip(self._rows(net), self.keep)])
        box = torch.zeros(1) if self.classify else (rows - self.rows)[:, :4].abs().amax(1)
        score = (self.scores(rows) - self.scores(self.rows)).abs().amax(1)
        a, b = (torch.logit(self.scores(r).cpu().double(), eps=1e-6) for r in (self.rows, rows))
        noise = float((a - b).square().sum())
        return {
            "box_mean": float(box.mean()), "score_max": float(score.max()), "score_mean": float(score.mean()),
            "sqnr": 10 * math.log10(float(a.square().sum()) / noise) if noise > 0 else EXACT,
        }  # fmt: skip


def _measure(net: nn.Module, state: State, paths: list[str], reference: Any, score: Score | None) -> dict[str, float]:
    """Return the errors with only these layers quantized."""
    part = {path: state[path] for path in paths}
    insert_state(net, part)
    try:
        return {**reference.compared(net), **({"map": score(net)} if score else {})}
    finally:
        strip_fake_quant(net)


def table(found: Mapping[str, Any], rows: int = 15) -> str:
    """Return the worst groups that `sensitivity` found, so many, as an aligned table."""
    heads = {"error": "Error", "box_mean": "Box px", "score_max": "Score", "sqnr": "Score SQNR dB",
             "map_drop": f"{found.get('metric', 'mAP')} drop", "ms": "ms saved"}  # fmt: skip
    shown = [k for k in heads if any(k in g for g in found["groups"])]

    def cell(group: Mapping[str, Any], key: str) -> str:
        if key == "sqnr":
            return "exact" if group[key] >= EXACT else f"{group[key]:.1f}"
        return f"{group[key]:.4f}" if key in group else ABSENT

    lines = [{"name": "everything", "error": 1.0, **found["all"]}, *found["groups"][:rows]]
    cells = [[g["name"], *(cell(g, key) for key in shown)] for g in lines]
    more = len(found["groups"]) - rows
    tail = f"\n{more} more {found['by']}s with smaller errors" if more > 0 else ""
    return align(cells, [f"Quantized {found['by']}", *(heads[k] for k in shown)]) + tail


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what `sensitivity` found as JSON, as CSV with a row for each group, and as a picture; return the files."""
    files = [folder / f"quant_sensitivity.{kind}" for kind in ("json", "csv", "png")]
    atomic_write(files[0], json.dumps(found, indent=2))
    shown = [{k: g.get(k) for k in COLUMNS} for g in found["groups"]]
    write_csv(files[1], [{**g, "layers": " ".join(g["layers"])} for g in shown])
    plot_quant_sensitivity(found, files[2])
    return files


def order(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the layers of each group that `sensitivity` found, those first whose INT8 costs most for what it saves."""
    by_value = sorted(found["groups"], key=lambda g: (-g.get("error_per_ms", g["error"]), g["name"]))
    return [g["layers"] for g in by_value]


def fewest_float(
    order: Sequence[Sequence[str]], evaluate: Callable[[list[str]], float], budget: float
) -> tuple[list[str], list[dict[str, float]]]:
    """Return the layers of the fewest first groups whose loss, as `evaluate` says, holds a budget, and all trials."""
    trace: list[dict[str, float]] = []

    def layers(k: int) -> list[str]:
        return [path for group in order[:k] for path in group]

    def holds(k: int) -> bool:
        trace.append({"float": k, "drop": float(evaluate(layers(k)))})
        return trace[-1]["drop"] <= budget

    low, high = -1, 0  # `low` misses the budget, or is not there; `high` is the next to try
    while not holds(high):
        if high == len(order):
            return layers(int(min(trace, key=lambda t: (t["drop"], t["float"]))["float"])), trace
        low, high = high, min(max(2 * high, 1), len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return layers(high), trace


def config_list(excluded: Sequence[str]) -> list[dict[str, Any]]:
    """Return an entry in the style of NNI that leaves layers float, empty when there are none."""
    return [{"op_names": list(excluded), "exclude": True}] if excluded else []


def write_config_list(excluded: Sequence[str], folder: Path, before: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
    """Write the layers that stay float, behind the user's own entries, as a YAML and a JSON; return both."""
    entries = [*map(dict, before), *config_list(excluded)]
    files = [folder / "config_list.yaml", folder / "config_list.json"]
    atomic_write(files[0], yaml.safe_dump(entries, sort_keys=False))
    atomic_write(files[1], json.dumps(entries, indent=2))
    return files


def leave_float(
    model: nn.Module, state: State, excluded: Sequence[str], profile: Profile, cfg: QuantConfig,
    batches: Callable[[], Iterable[torch.Tensor]],
) -> State:  # fmt: skip
    """Return the state of a float model with these layers left float; readers of their codes get ranges from images."""
    plan, _ = make_plan(model, profile, cfg.exclude, [*cfg.config_list, *config_list(excluded)])
    given = known(plan, state)
    if all(plan[path].keys() == sites.keys() for path, sites in given.items()):
        return given
    return calibrate_rest(deepcopy(model).float(), plan, given, batches(), cfg.observer, cfg.weight_observer)
