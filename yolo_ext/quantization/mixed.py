# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Mixed precision: the fewest layers left in float that bring a quantized model within its accuracy budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.config import QuantConfig
from yolo_ext.quantization.calibration import calibrate
from yolo_ext.quantization.fake_quant import insert_plan
from yolo_ext.quantization.plan import make_plan
from yolo_ext.quantization.profiles import Profile
from yolo_ext.quantization.spec import State

Trace = list[dict[str, float]]


def fewest_float(
    order: Sequence[Sequence[str]], evaluate: Callable[[list[str]], float], budget: float
) -> tuple[list[str], Trace]:
    """Find how many groups of layers, from the worst down, must stay float.

    Doubles the number until the budget holds, then halves the gap. If the loss falls as more layers are float, the
    number is the smallest; if it does not, the result holds the budget all the same.

    Args:
        order: Groups of layer paths, the one that is best left float first.
        evaluate: Loss of a model whose layers of these paths are float, in the unit of the budget.
        budget: Largest loss.

    Returns:
        The layers to leave float and the trials, each with the number of groups `float` and its `drop`. If no trial
        holds the budget these are the layers of the one that lost least.
    """
    trace: Trace = []

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
    """Write the layers that stay float as ``config_list.yaml``, which `quant.config_list` takes, and as JSON.

    Args:
        excluded: Layer paths.
        folder: Where to write.
        before: The user's own entries, which the file goes on saying.

    Returns:
        The two files.
    """
    entries = [*map(dict, before), *config_list(excluded)]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "config_list.yaml", folder / "config_list.json"]
    atomic_write(files[0], yaml.safe_dump(entries, sort_keys=False))
    atomic_write(files[1], json.dumps(entries, indent=2))
    return files


def leave_float(
    model: nn.Module,
    state: State,
    excluded: Sequence[str],
    profile: Profile,
    cfg: QuantConfig,
    batches: Callable[[], Iterable[torch.Tensor]],
) -> State:
    """Return the state of a model in which some layers stay float.

    A layer behind them that read their codes needs a quantizer of its own then; such ranges are measured.

    Args:
        model: Float model that the state belongs to; not changed.
        state: State with these layers quantized.
        excluded: Layer paths that stay float.
        profile: Profile of the state.
        cfg: Options that it was made with.
        batches: Gives images (B, C, H, W), 0 to 1.
    """
    plan, _ = make_plan(model, profile, cfg.exclude, [*cfg.config_list, *config_list(excluded)])
    known = {path: {s: state[path][s] for s in sites if s in state.get(path, {})} for path, sites in plan.items()}
    if all(plan[path].keys() == sites.keys() for path, sites in known.items()):
        return known
    net = deepcopy(model).float()
    insert_plan(net, plan)
    new = calibrate(net, batches(), cfg.observer, cfg.weight_observer)
    return {path: {**new[path], **sites} for path, sites in known.items()}
