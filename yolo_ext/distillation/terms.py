# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a run distils: losses with weight, schedule, layers and options each, and the balance with the task's loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from yolo_ext.core.config import DistillConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need, Row, Table, suggest
from yolo_ext.core.schedules import decays
from yolo_ext.distillation.features import feature_losses
from yolo_ext.distillation.logits import logit_losses

TIMING = ("schedule", "final", "start", "end", "warmup")
GIVEN = {"student", "teacher", "module", "boxes", "random", "weight"}  # not for the user to set
AUTO = ["kl_binary", "ld"]  # logit losses for heads with equal bins; the best of benchmarks/distillation.py
MEMORY = 0.95  # of the running means, so that they follow the last 20 batches or so
TABLES: dict[str, Table] = {"logits": logit_losses, "features": feature_losses}


@dataclass(frozen=True)
class Term:
    """One loss of a stack."""

    kind: str  # ``logits`` or ``features``
    row: Row
    weight: float  # at schedule factor 1
    timing: dict[str, Any]  # arguments of `core.schedules.loss_factor`
    options: dict[str, Any]  # keyword arguments of the method
    layers: tuple[str, ...] = ()  # whose maps a feature loss compares; none for the inputs of the head

    def needs(self, what: Need) -> bool:
        """Tell whether the method needs this; your own feature loss gets equal widths."""
        own = what is Need.EQUAL_WIDTH and self.kind == "features" and ":" in self.row.name
        return own or what in self.row.needs


def terms(cfg: DistillConfig) -> list[Term]:
    """Return the losses of a run, checked; one without an option of its own takes the common one."""
    found = []
    for kind, weight in (("logits", cfg.logit_weight), ("features", cfg.feature_weight)):
        stack = getattr(cfg, kind) or []
        entries = AUTO if stack == "auto" else _listed(stack)
        found += [_term(kind, {"name": e} if isinstance(e, str) else dict(e), weight, cfg) for e in entries]
    if cfg.temperature is not None and not any("temperature" in t.options for t in found):
        names = ", ".join(t.row.name for t in found)
        raise UsageError(f"'distill.temperature={cfg.temperature}' has no effect on {names}. Leave it out.")
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _term(kind: str, entry: dict[str, Any], weight: float, cfg: DistillConfig) -> Term:
    """Read one entry of a stack, whose options are checked against the signature of the method."""
    row = TABLES[kind][str(entry.pop("name"))]
    key = f"distill.{kind}: {row.name}"
    weight *= float(_number(key, "weight", entry.pop("weight", 1.0)))
    timing = {name: entry.pop(name, getattr(cfg, name)) for name in TIMING}
    _check_timing(key, timing)
    layers = _listed(entry.pop("layers", cfg.layers)) if kind == "features" else []
    legal = _options(row)
    for name, value in entry.items():
        if legal is not None and name not in legal:
            words = sorted({"name", "weight", *TIMING, *legal, *(["layers"] if kind == "features" else [])})
            raise UsageError(f"{key} has no option '{name}'.{suggest(name, words)} Legal: {', '.join(words)}.")
        if name == "temperature" and not _number(key, name, value) > 0:
            raise UsageError(f"{key}: 'temperature={value}' is out of range. Legal: above 0.")
    if cfg.temperature is not None and legal is not None and "temperature" in legal:
        entry.setdefault("temperature", cfg.temperature)
    return Term(kind, row, weight, timing, entry, tuple(str(x) for x in layers))


def _options(row: Row) -> set[str] | None:
    """Return the keyword arguments of a method that the user may set; None where it takes any."""
    found = inspect.signature(row.fn).parameters
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return None
    return set(list(found)[2:]) - GIVEN  # the first two are student and teacher, however they are called


def _number(key: str, name: str, value: Any) -> float:
    """Return a value that has to be a number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UsageError(f"{key}: '{name}={value}' is illegal: give a number of at least 0.")
    return value


def _check_timing(key: str, timing: Mapping[str, Any]) -> None:
    """Refuse a schedule that does not exist, and epochs in the wrong order."""
    decays[timing["schedule"]]
    for name in ("final", "start", "warmup", *(["end"] if timing["end"] is not None else [])):
        _number(key, name, timing[name])
    if timing["end"] is not None and timing["end"] <= timing["start"]:
        raise UsageError(f"{key}: 'end={timing['end']}' is not after 'start={timing['start']}'.")


def title(found: list[Term]) -> str:
    """Return a stack in words, such as ``bckd x 0.5 + cwd``."""
    return " + ".join(t.row.name + (f" x {t.weight:g}" if t.weight != 1 else "") for t in found)


class Balance(nn.Module):
    """A factor that keeps the distillation loss at a share of the task loss, by running means of both."""

    means: torch.Tensor  # a buffer, so that it is resumed with the adapters

    def __init__(self) -> None:
        """Start without a mean; the first batch sets it."""
        super().__init__()
        self.register_buffer("means", torch.zeros(2))

    def forward(self, task: torch.Tensor, distillation: torch.Tensor, share: float) -> torch.Tensor:
        """Take in the losses per image of a batch, that without schedule and factor, and return the factor to apply.

        Batches with a loss that is not finite change nothing.
        """
        now = torch.stack((task.detach(), distillation.detach())).to(self.means)
        if now.isfinite().all():
            first = self.means.sum() == 0
            self.means.copy_(torch.where(first, now, MEMORY * self.means + (1.0 - MEMORY) * now))
        return share * self.means[0] / self.means[1].clamp(min=1e-9)
