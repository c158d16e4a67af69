# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""AdaRound: whether to round a weight up or down, learned one block at a time from images, without labels."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, TQDM

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.fake_quant import quantized_layers, set_mode
from yolo_ext.quantization.layers import channel_axis, channel_rows, weight_rows
from yolo_ext.stock.context import evaluating

IMAGES = 64  # kept in memory, with the maps that later blocks read
CHUNK = 8  # images per forward pass and per step
LEARNING_RATE = 3e-2
REGULARISER = 300.0  # of the mean over the weights, beside the error as a share of that of nearest rounding
WARMUP = 0.2  # share of the steps before shares are pushed to 0 or 1
BETA = (20.0, 2.0)
STRETCH = (-0.1, 1.1)  # of the rectified sigmoid, whose ends are then reached


class Rounding:
    """Learned rounding of the weight of one quantized layer, in rows (channels, n)."""

    def __init__(self, layer: Any) -> None:
        """Start where the weights are, between two codes."""
        self.layer = layer
        rows, scaled = channel_rows(layer), weight_rows(layer)  # the latter is one row where there is one scale
        largest = scaled.abs().amax(1, keepdim=True)
        scale = (largest * layer.weight_ratio.view(-1, 1)).clamp_min(1e-12) / layer.weight_spec.qmax
        fold = layer.folding()
        scale = scale if fold is None else scale / fold.view(-1, 1)
        self.scale = scale.expand(len(rows), 1)  # value of a code
        self.down = (rows / self.scale).floor()  # codes next below the weights
        rest = (rows / self.scale - self.down).clamp(1e-3, 1 - 1e-3)
        self.logits = (-((STRETCH[1] - STRETCH[0]) / (rest - STRETCH[0]) - 1).log()).requires_grad_()  # what is learned
        # Rounded to the nearest code: zeros stay zero, and the largest weight, which sets the scale.
        first = torch.zeros_like(scaled, dtype=torch.bool).scatter_(1, scaled.abs().argmax(1, keepdim=True), True)
        self.nearest = first.view_as(rows) | (rows == 0)

    def up(self) -> torch.Tensor:
        """Return the shares of rounding up, 0 to 1."""
        return (torch.sigmoid(self.logits) * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)

    def weight(self, up: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight for shares of rounding up, in the shape of the layer's weight."""
        layer, qmax = self.layer, self.layer.weight_spec.qmax
        codes = (self.down + torch.where(self.nearest, (up >= 0.5).float(), up)).clamp(-qmax, qmax)
        return _unrowed(codes * self.scale, layer)

    @torch.no_grad()
    def bake(self) -> None:
        """Write the learned codes into the float weight of the layer."""
        learned, weight = self.weight((self.up() >= 0.5).float()), self.layer.weight
        weight.copy_(torch.where(_unrowed(self.nearest, self.layer), weight, learned))


def _unrowed(rows: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return rows (channels, n) in the shape of the layer's weight."""
    axis = channel_axis(layer)
    return rows.view(layer.weight.transpose(0, axis).shape).transpose(0, axis)


def adaround(model: Any, batches: Iterable[torch.Tensor], steps: int) -> dict[str, tuple[float, float]]:
    """Learn in so many steps how to round the weights of each block; return path -> squared error before and after."""
    # So that a block gives what it gives in the float model, for inputs from the quantized blocks before it (Nagel et
    # al., arXiv:2004.10568; Li et al., arXiv:2102.05426). Nearest rounding then finds the learned codes.
    images = [*islice(chain.from_iterable(batches), IMAGES)]
    if not images:
        raise UsageError("AdaRound got no images.")
    chunks = torch.stack(images).to(next(model.parameters()).device).split(CHUNK)
    exact: dict[int, list[Any]] = {-1: list(chunks)}  # maps by number of the layer
    quantized: dict[int, list[Any]] = {-1: list(chunks)}
    errors: dict[str, tuple[float, float]] = {}
    skipped: list[str] = []
    try:
        with evaluating(model):
            for child in TQDM(model.model, desc="Rounding (AdaRound)"):
                units = _units(child, f"model.{child.i}", head=child is model.model[-1])
                set_mode(model, "float")
                exact[-1], targets = _run(child, exact, units)
                set_mode(model, "on")
                made, inputs = _run(child, quantized, units)
                for path, unit in units.items():
                    if path in inputs and path in targets:
                        errors[path] = _learn(unit, inputs[path][0], targets[path][1], steps)
                    else:
                        skipped.append(path)
                quantized[-1] = _run(child, quantized, {})[0] if units and child is not model.model[-1] else made
                if child.i in model.save:
                    exact[child.i], quantized[child.i] = exact[-1], quantized[-1]
    finally:
        set_mode(model, "on")
    if skipped:
        LOGGER.warning(f"AdaRound leaves {', '.join(skipped)} as they are: not run, or several maps go in or out")
    return errors


def _units(child: nn.Module, path: str, head: bool) -> dict[str, nn.Module]:
    """Return by path what is reconstructed as a whole: a layer of the model, of its head every branch."""
    found = {} if head else {path: child}
    for name, m in child.named_children() if head else ():
        branches = m.named_children() if isinstance(m, nn.ModuleList) else ()
        found |= {f"{path}.{name}.{k}": branch for k, branch in branches} or {f"{path}.{name}": m}
    return {p: m for p, m in found.items() if any(layer.weight_spec for _, layer, _ in quantized_layers(m))}


@torch.no_grad()
def _run(child: Any, maps: dict[int, list[Any]], units: dict[str, nn.Module]) -> tuple[list[Any], dict[str, Any]]:
    """Run a layer on all chunks; return its results, and by path input and output of units that have one each."""
    seen: dict[str, list[Any]] = {path: [] for path in units}
    hooks = [m.register_forward_hook(lambda m, x, y, p=path: seen[p].append((*x, y))) for path, m in units.items()]
    many = isinstance(child.f, (list, tuple))
    sources = [f if f == -1 else f % child.i for f in (child.f if many else [child.f])]
    with evaluating(child, hooks):
        results = [child([*x] if many else x[0]) for x in zip(*(maps[f] for f in sources))]

    def single(calls: list[Any]) -> bool:
        tensors = all(len(call) == 2 and all(isinstance(v, torch.Tensor) for v in call) for call in calls)
        return tensors and len(calls) == len(results)

    return results, {path: [torch.cat(v) for v in zip(*calls)] for path, calls in seen.items() if single(calls)}


def _learn(unit: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, steps: int) -> tuple[float, float]:
    """Learn the rounding of the weights in a unit and bake it where it is better; return the error before and after."""
    roundings = [Rounding(layer) for _, layer, _ in quantized_layers(unit) if layer.weight_spec]
    before = _error(unit, inputs, targets)
    logits = [r.logits for r in roundings]
    optimizer = torch.optim.Adam(logits, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    with _soft(roundings), torch.enable_grad():
        for step in range(steps):
            chosen = torch.randperm(len(inputs), generator=generator)[:CHUNK].to(inputs.device)
            loss = (unit(inputs[chosen]) - targets[chosen]).square().mean() / max(before, 1e-20)
            if (done := (step / steps - WARMUP) / (1 - WARMUP)) >= 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * done
                undecided = sum((1 - (2 * r.up() - 1).abs().pow(beta)).sum() for r in roundings)
                loss = loss + REGULARISER / sum(v.numel() for v in logits) * undecided
            gradients = torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True)
            for v, gradient in zip(logits, gradients):
                v.grad = gradient
            optimizer.step()
    kept = [r.layer.weight.clone() for r in roundings]
    for r in roundings:
        r.bake()
    after = _error(unit, inputs, targets)
    for r, weight in zip(roundings, [] if after < before else kept):
        r.layer.weight.data.copy_(weight)
    return before, min(before, after)


@contextmanager
def _soft(roundings: list[Rounding]) -> Iterator[None]:
    """Let layers compute with shares between two codes."""
    for r in roundings:
        r.layer.quantized_weight = lambda r=r: r.weight(r.up()).to(r.layer.weight.dtype)
    try:
        yield
    finally:
        for r in roundings:
            del r.layer.quantized_weight


@torch.no_grad()
def _error(unit: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    pairs = zip(inputs.split(CHUNK), targets.split(CHUNK))
    return float(torch.stack([(unit(x) - y).square().mean() * len(x) for x, y in pairs]).sum() / len(inputs))
