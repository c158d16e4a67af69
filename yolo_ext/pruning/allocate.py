# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""How a share of all channels is spread over the bundles."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Table, suggest
from yolo_ext.pruning.bundles import Bundle

Steps = Callable[[float], list[int]]  # share of units to remove, 0..1 -> kept units of each bundle
scopes = Table("pruning scope")  # row: (bundles, model) -> the class of each bundle; units are ranked in their class


@scopes.row("global", "Rank the channels of the whole model together")
def everything(made: list[Bundle], model: nn.Module) -> list[Hashable]:
    """Put all bundles into one class."""
    return [0] * len(made)


@scopes.row("local", "Remove the same share of each group")
def each(made: list[Bundle], model: nn.Module) -> list[Hashable]:
    """Put each bundle into a class of its own."""
    return list(range(len(made)))


@scopes.row("isomorphic", "Rank within groups of the same structure", paper="Fang et al., 2024, arXiv:2407.04616")
def isomorphic(made: list[Bundle], model: nn.Module) -> list[Hashable]:
    """Put bundles into one class whose groups have the same size and the same kinds of layers."""
    modules = dict(model.named_modules())

    def kind(path: str, dim: str) -> tuple:
        m = modules[path]
        return type(m).__name__, getattr(m, "kernel_size", ()), getattr(m, "groups", 1) > 1, dim

    return [
        tuple(sorted((g.size, tuple(sorted(kind(m.module, m.dim) for m in g.members))) for g in b.groups)) for b in made
    ]


def ranked(made: list[Bundle], classes: list[Hashable]) -> Steps:
    """Return steps that remove the same share of the worst units of each class.

    Args:
        made: Bundles.
        classes: The class of each.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, c in enumerate(classes):
        members[c].append(i)
    owners = []
    for places in members.values():
        scores = torch.cat([made[i].scores for i in places])
        owner = torch.cat([torch.full((made[i].units,), i) for i in places])
        owners.append(owner[scores.argsort(stable=True)])

    def steps(share: float) -> list[int]:
        worst = torch.cat([torch.zeros(0, dtype=torch.long), *(owner[: round(share * len(owner))] for owner in owners)])
        gone = torch.bincount(worst, minlength=len(made)).tolist()
        return [b.round(b.units - g) for b, g in zip(made, gone)]

    return steps


def from_sensitivity(made: list[Bundle], curves: dict[str, Any]) -> Steps:
    """Return steps that prune each bundle as far as its measured mAP drop stays below one tolerance for all.

    Args:
        made: Bundles.
        curves: Content of the file of `yolo-ext sensitivity`. The share 0..1 counts through all drops in it, from
            none to the largest; between two measured ratios the drop is taken as linear, beyond the last one nothing
            is known and nothing is pruned.

    Raises:
        UsageError: If a bundle has no curve.
    """
    groups = {g["name"]: g for g in curves["groups"]}
    lines = [_line(b, groups, curves["base"]["map"]) for b in made]
    drops = sorted(d for line in lines for _, d in line) or [0.0]

    def steps(share: float) -> list[int]:
        tolerance = np.interp(share * (len(drops) - 1), range(len(drops)), drops)
        ratios = [np.interp(tolerance, [d for _, d in line], [r for r, _ in line]) for line in lines]
        return [b.round(b.units * (1 - float(r))) for b, r in zip(made, ratios)]

    return steps


def _line(bundle: Bundle, groups: dict[str, dict[str, Any]], base: float) -> list[tuple[float, float]]:
    """Return (ratio, drop) points of one bundle, from (0, 0) on, with drops that never fall."""
    group = groups.get(bundle.name)
    size = sum(g.size for g in bundle.groups)
    if group is None or group.get("channels", size) != size:
        problem = f"with {group['channels']} channels instead of {size}" if group else "at all"
        raise UsageError(
            f"The sensitivity file does not know {bundle.name} {problem}, so it belongs to another model."
            f"{suggest(bundle.name, list(groups)) if group is None else ''} "
            "Run `yolo-ext sensitivity` on this model, with the same prune.include, prune.exclude, prune.min_channels "
            "and prune.round_to."
        )
    points = sorted((p["ratio"], base - p["map"]) for p in group["curve"])
    # A drop below zero is noise; the tiny slope makes harmless bundles shrink step by step instead of all at once.
    worst = accumulate((max(0.0, drop) for _, drop in points), max)
    return [(0.0, 0.0), *((ratio, drop + 1e-6 * ratio) for (ratio, _), drop in zip(points, worst))]


def read_sensitivity(file: str) -> dict[str, Any]:
    """Read a file of `yolo-ext sensitivity`.

    Raises:
        UsageError: If it is missing or something else.
    """
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        (
            float(found["base"]["map"]),
            [(g["name"], [(p["ratio"], p["map"]) for p in g["curve"]]) for g in found["groups"]],
        )
    except OSError as e:
        raise UsageError(
            f"'prune.sensitivity={file}' cannot be read ({e.strerror}). Run `yolo-ext sensitivity`."
        ) from e
    except (ValueError, LookupError, TypeError) as e:
        raise UsageError(
            f"'prune.sensitivity={file}' is not a file of `yolo-ext sensitivity` ({type(e).__name__}: {e}). "
            "Give its sensitivity.json."
        ) from e
    return found
