# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Zeros inside the weights: magnitude masks (global or by layer) and the 2:4 pattern.

A mask is the zeros themselves: a weight of a listed layer that is exactly 0 stays 0. So masks need no buffers and
survive fp16, EMA, pickling, resume and export. No runtime of today gets faster from them; files get smaller by zip.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from yolo_ext.checkpoint import manifest, note, set_tripwire
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.groups import refuse_frozen
from yolo_ext.pruning.labels import LAYERS, layer_channels, weight_dim
from yolo_ext.stock.model import DFL, WIDEST_BRANCH, matches

GAIN_CHANNELS = 256  # sparse tensor cores (Ampere and later) pay off from about here, in and out
LAYER_FLOOR = 0.01  # share of a layer that the global ranking spares: a layer without weights would never learn again


@dataclass(frozen=True)
class Masks:
    """The zeros of a training run."""

    record: dict[str, Any]  # entry `masks` of the manifest: kind, layers, ratio
    kept: dict[str, torch.Tensor]  # layer path -> boolean tensor of the shape of its weight, False where it stays zero


def eligible(model: nn.Module, cfg: PruneConfig) -> list[dict[str, Any]]:
    """List the layers that may get zeros as `cfg` says, and why others may not; `gain`: sparse tensor cores help."""
    modules = dict(model.named_modules())
    included = set().union(*(matches(model, s, "prune.include") for s in cfg.include or [".*"]))
    excluded = set().union(*(matches(model, s, "prune.exclude") for s in cfg.exclude))
    rows: list[dict[str, Any]] = []
    for path, m in modules.items():
        if isinstance(m, LAYERS):
            n_out, n_in = layer_channels(m) or (0, 0)
            reason = _unfit(modules, path, cfg.kind) if rows else "reads the image"
            reason = reason or ("is excluded by prune.exclude" if path in excluded else "")
            reason = reason or ("" if path in included else "is not in prune.include")
            gain = not reason and cfg.kind == "2:4" and min(n_in, n_out) >= GAIN_CHANNELS
            rows.append({"name": path, "weights": m.weight.numel(), "in": n_in, "out": n_out, "eligible": not reason,
                         "reason": reason, "gain": gain and not isinstance(m, nn.ConvTranspose2d)})  # fmt: skip
    return rows


def _unfit(modules: dict[str, nn.Module], path: str, kind: str) -> str:
    """Return why a layer cannot take zeros of this kind, or an empty string."""
    parent = path.rpartition(".")[0]
    if isinstance(modules[parent], DFL):
        return "holds the fixed weights of the box distribution"
    if getattr(modules[path], "groups", 1) > 1:
        return "is a grouped or depthwise conv: few weights, each of which matters"
    if kind == "2:4":
        if type(modules[parent.rpartition(".")[0]]).__name__ in WIDEST_BRANCH:
            return "is summed with another branch on export, which breaks the pattern"
        if (n_in := (layer_channels(modules[path]) or (0, 0))[1]) % 4:
            return f"has {n_in} input channels, not a multiple of 4"
    return ""


@torch.no_grad()
def zero_weights(model: nn.Module, cfg: PruneConfig, ratio: float | None = None) -> None:
    """Zero the smallest weights in place, a share `ratio` or else `cfg.ratio`, and note the masks in the manifest.

    Han et al., 2015, arXiv:1506.02626; the two largest of four input channels: Mishra et al., 2021, arXiv:2104.08378.
    """
    rows = eligible(model, cfg)
    names = [r["name"] for r in rows if r["eligible"]]
    if not names:
        reasons = "; ".join(sorted({r["reason"] for r in rows}))
        raise UsageError(f"No layer can take 'prune.kind={cfg.kind}': each one {reasons}.")
    refuse_frozen(model, names)
    layers = [model.get_submodule(n) for n in names]
    weights = [m.weight for m in layers]
    ratio = 0.5 if cfg.kind == "2:4" else (cfg.ratio or 0.0) if ratio is None else ratio
    if cfg.kind == "2:4":
        kept = [_two_of_four(m.weight, weight_dim(m, "in")) for m in layers]
    elif cfg.scope == "local":
        kept = [_largest(w.abs().flatten(), ratio).view_as(w) for w in weights]
    else:
        values = [w.abs().flatten() for w in weights]
        top = torch.stack([v.max() for v in values]).max()
        for v in values:  # the largest ones of each layer are raised above those of all
            v[v.topk(math.ceil(LAYER_FLOOR * len(v))).indices] += top
        flat = _largest(torch.cat(values), ratio)
        kept = [k.view_as(w) for k, w in zip(flat.split([w.numel() for w in weights]), weights)]
    for w, k in zip(weights, kept):
        w.mul_(k)
    note(model, masks={"kind": cfg.kind, "layers": names, "ratio": ratio})
    set_tripwire(model)


def _largest(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return a mask that is False for exactly that share of the (n,) values, the smallest, the first of equal ones."""
    kept = torch.ones_like(values, dtype=torch.bool)
    kept[values.argsort(stable=True)[: round(ratio * len(values))]] = False
    return kept


def _two_of_four(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a mask that keeps the two largest of every four consecutive positions in a dimension."""
    quads = weight.abs().movedim(dim, -1).unflatten(-1, (-1, 4))
    order = quads.argsort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(quads, dtype=torch.bool).scatter_(-1, order[..., 2:], False)
    return kept.flatten(-2).movedim(-1, dim)


def capture(model: nn.Module) -> Masks | None:
    """Return the masks of a model, which are its zeros, or None when it has none."""
    record = manifest(model).masks
    if not record:
        return None
    modules = dict(model.named_modules())
    return Masks(dict(record), {path: modules[path].weight.detach() != 0 for path in record["layers"]})


@torch.no_grad()
def apply(masks: Masks, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Zero the masked weights of a model or its EMA again, and the moments of its optimizer at the same places."""
    modules, state = dict(model.named_modules()), optimizer.state if optimizer else {}
    for path, kept in masks.kept.items():
        weight = modules[path].weight
        for t in (weight, *state.get(weight, {}).values()):
            if isinstance(t, torch.Tensor) and t.shape == weight.shape:
                t.mul_(kept.to(t.device))
    note(model, masks=masks.record)


def sparsity(model: nn.Module) -> dict[str, Any]:
    """Return the share of zeros in the layers with masks (`masked`), in all parameters (`overall`) and by `layers`."""
    names = manifest(model).masks.get("layers") or [p for p, m in model.named_modules() if isinstance(m, LAYERS)]
    rows = []
    for name in names:
        zeros, n = _zeros(model.get_submodule(name).weight)
        rows.append({"name": name, "weights": n, "zeros": zeros, "share": zeros / n})
    zeros, n = map(sum, zip(*map(_zeros, model.parameters())))
    masked = sum(r["zeros"] for r in rows) / sum(r["weights"] for r in rows)
    return {"masked": masked, "overall": zeros / n, "layers": rows}


def _zeros(t: torch.Tensor) -> tuple[int, int]:
    """Return how many elements are zero, and how many there are."""
    return t.numel() - int(t.count_nonzero()), t.numel()


def packed_mb(model: nn.Module) -> float:
    """Return the size in MB of the fp16 weights after zip (deflate): what zeros save on disk."""
    packer, size = zlib.compressobj(), 0
    for t in model.state_dict().values():
        t = t.detach().half() if t.is_floating_point() else t
        size += len(packer.compress(t.cpu().contiguous().numpy().tobytes()))
    return (size + len(packer.flush())) / 1e6
