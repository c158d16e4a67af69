# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity training of one run: what is pulled on, how far in each step, and what is protected from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from yolo_ext.core.config import PruneConfig, SparsityConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.core.schedules import pulls
from yolo_ext.sparsity import layout
from yolo_ext.sparsity.penalties import DEFAULTS, Channels, penalties, segment

FEWEST = 8  # channels of each group that are always protected
WINDOW, FASTEST = 4, 0.2  # BatchNorm statistics are renewed so often in an epoch, at this momentum at most
MEMORY = 0.999  # of the mean of squared gradients, as in Adam; its bias is the same for all and falls out
EASIEST = 8.0  # times the median, and its inverse for the hardest to move
HOLD = 2.0  # times the threshold, so that they stay above it while the largest one still grows
RAISE, LOWER = 1.5, 0.5  # what `auto` multiplies the pull by after an epoch


@dataclass
class Controller:
    """Steers the pull: up until enough channels are gone or the fitness has dropped too far, then down for good."""

    target: float  # share of channels below the threshold to reach
    max_drop: float  # of the fitness
    gain: float = 1.0  # what the pull of the schedule is multiplied by
    reference: float | None = None  # fitness after the first epoch, from which drops are counted
    lowering: bool = False  # the turning point is over

    def update(self, share: float, fitness: float) -> None:
        """Set the gain for the next epoch from the share of channels below the threshold and the fitness of this."""
        self.reference = fitness if self.reference is None else self.reference
        self.lowering = self.lowering or share >= self.target or self.reference - fitness > self.max_drop
        self.gain *= LOWER if self.lowering else RAISE


class Sparsifier:
    """The penalty of one run, never part of a saved model: `coefficient` pulls in all epochs, `pull` in this one."""

    def __init__(self, model: nn.Module, cfg: SparsityConfig, prune_cfg: PruneConfig, epochs: int,
                 prune_epochs: Sequence[int] = ()) -> None:  # fmt: skip
        """Find what pruning with these options could remove; the pull ends at the first of the epochs that prune."""
        self.cfg, self.prune_cfg = cfg, prune_cfg
        self.row = penalties[cfg.method]
        self.scales = Need.SCALES in self.row.needs
        self.coefficient = DEFAULTS.get(cfg.method, 1.0) if cfg.coefficient is None else cfg.coefficient
        first = min(prune_epochs, default=None)
        self.pulls = pulls(cfg=cfg, coefficient=self.coefficient, epochs=epochs, first_pruning=first)
        self.controller = Controller(cfg.target, cfg.max_drop) if cfg.auto else None
        self.pull = 0.0
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        self._momenta = {name: m.momentum for name, m in norms.items() if m.momentum}
        self.rebuild(model)

    def rebuild(self, model: nn.Module) -> None:
        """Find the groups anew after surgery; the mean of squared gradients starts anew with them."""
        self.groups = layout.sparse_groups(model, self.prune_cfg, self.scales)
        self.layout = layout.lay_out(model, self.groups, weights=not self.scales)
        self.state: dict[str, torch.Tensor] = {}
        norms = self._channels(model).norms
        self.reference = self._largest(norms)
        self.held = torch.zeros_like(norms, dtype=torch.bool)
        self._floor: torch.Tensor | None = None
        self._value: torch.Tensor | None = None

    @property
    def protected(self) -> list[str]:
        """Names of groups whose protected channels would have gone as well."""
        parts = self.held.cpu().split([g.size for g in self.groups])
        return list(dict.fromkeys(g.name for g, held in zip(self.groups, parts) if held.any()))

    def set_epoch(self, epoch: int) -> None:
        """Set the pull of an epoch, counted from 0, and choose anew which channels are protected."""
        self.pull = self.pulls[epoch] * (self.controller.gain if self.controller else 1.0)
        self._floor = self._value = None

    def keep_up(self, model: nn.Module, batches: int) -> None:
        """Let the statistics of BatchNorm follow scales that shrink fast, or validation sees a model of long ago."""
        least = min(FASTEST, WINDOW / batches) if self.pull else 0.0
        for name, own in self._momenta.items():
            model.get_submodule(name).momentum = max(own, least)

    @torch.no_grad()
    def shrink(self, model: nn.Module, fraction: float) -> None:
        """Pull once for this fraction of the batches of an epoch, after an optimizer step or at the end of one."""
        if self.pull and fraction:
            if self.cfg.adaptive:
                self._watch(model)
            factors = self._factors(model, self.pull * fraction)
            both = (factors,) if self.scales else (factors[self.layout.owner], factors)
            layout.multiply(model, self.layout, *both)

    @torch.no_grad()
    def follow(self, model: nn.Module, ema: nn.Module) -> None:
        """Make scales that are zero in the model zero in its EMA, which would take long to get there."""
        if self.pull and self.scales:
            layout.multiply(ema, self.layout, (layout.read_scales(model, self.layout) != 0).float())

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Return the value of the penalty, 0-dim: mean strength of a channel, relative to the largest for weights."""
        if self._value is None:
            self._value = self._mean(self._channels(model).norms)
        return self._value

    def penalised(self) -> set[str]:
        """Return the names of the parameters that need no weight decay beside the penalty."""
        return {*self.layout.scales, *(name for name, _, _ in self.layout.weights)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and plain values."""
        steering = dict(vars(self.controller)) if self.controller else {}
        return {"penalty": dict(self.state), "reference": self.reference, "held": self.held, "auto": steering}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned for the same model and options."""
        device = self.reference.device
        self.state = {k: v.to(device) for k, v in state["penalty"].items()}
        self.reference, self.held = state["reference"].to(device), state["held"].to(device)
        if self.controller:
            vars(self.controller).update(state["auto"])

    def _channels(self, model: nn.Module) -> Channels:
        """Return all channels as they are now."""
        own, gammas = self.layout, layout.read_scales(model, self.layout)
        norms = layout.scale_norms(gammas, own) if self.scales else layout.weight_norms(model, own)
        return Channels(own.group, len(self.groups), gammas, own.owner, norms, self._ease())

    def _watch(self, model: nn.Module) -> None:
        """Average the squared gradients of the scales, which the optimizer step has just used."""
        params = [model.get_parameter(name) for name in self.layout.scales]
        if all(p.grad is None for p in params):
            return
        # no loss needs those without a gradient
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        squares = torch.cat(grads)[self.layout.slots].float().square()
        mean = self.state.get("squares", torch.zeros_like(squares))
        self.state["squares"] = mean.lerp(squares, 1 - MEMORY)

    def _ease(self) -> torch.Tensor | float:
        """Return (C,) median over own RMS of the gradient of scales: the metric of ProxGen (2020, arXiv:2007.07484)."""
        if "squares" not in self.state:
            return 1.0
        rms = layout.scale_norms(self.state["squares"].sqrt(), self.layout)
        known = (self.layout.scale_table < len(self.layout.owner)).any(1)
        ease = (rms[known].median() / rms.clamp(min=1e-12)).clamp(1 / EASIEST, EASIEST)
        return torch.where(known, ease, 1.0)

    def _largest(self, norms: torch.Tensor) -> torch.Tensor:
        """Return (groups,) the largest of the (C,) strengths in each group."""
        return segment(norms, self.layout.group, len(self.groups), "amax")

    def _mean(self, norms: torch.Tensor) -> torch.Tensor:
        """Return the mean strength of a channel, relative to the largest of its group for weights."""
        return (norms if self.scales else norms / self._largest(norms).clamp(min=1e-12)[self.layout.group]).mean()

    def _factors(self, model: nn.Module, pull: float) -> torch.Tensor:
        """Return the factors of the penalty, raised where a channel is protected."""
        channels = self._channels(model)
        if not self.scales and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(channels.norms, 0)  # BatchNorm statistics differ between devices
        self._value = self._mean(channels.norms)
        if self._floor is None:
            self._floor = self._floors(channels.norms)
        factors = self.row.fn(channels, pull)
        strength = (channels.gammas.abs() if self.scales else channels.norms).clamp(min=1e-12)
        if not isinstance(factors, torch.Tensor) or factors.shape != strength.shape:
            raise UsageError(
                f"The sparsity penalty '{self.cfg.method}' returned {getattr(factors, 'shape', type(factors))}. "
                f"Legal: a tensor of {len(strength)} factors, one for each channel."
            )
        floor = self._floor[channels.owner] if self.scales else self._floor
        limit = (floor / strength).clamp(max=1)
        limit = limit if self.scales else limit.sqrt()  # a weight and the scale behind it both shrink
        held = limit > factors
        self.held |= torch.cat([held, held.new_zeros(1)])[self.layout.scale_table].any(1) if self.scales else held
        return torch.maximum(factors, limit)

    def _floors(self, norms: torch.Tensor) -> torch.Tensor:
        """Return (C,) strengths below which a channel is not drawn: zero but for the strongest ones of each group."""
        floors = torch.zeros_like(norms)
        largest = torch.maximum(self.reference, self._largest(norms))
        for g, start, top in zip(self.groups, self.layout.starts, largest):
            k = min(g.size, max(FEWEST, math.ceil(self.cfg.protect * g.size)))
            floors[start + norms[start : start + g.size].topk(k).indices] = HOLD * self.cfg.threshold * top
        return floors
