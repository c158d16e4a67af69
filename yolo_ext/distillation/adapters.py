# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Maps that feature losses compare: which, read while the models run, brought to one width; and what losses train.

Nothing here is ever part of a saved model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.distillation.features import standardize
from yolo_ext.distillation.teacher import Guide
from yolo_ext.stock.context import evaluating


@dataclass(frozen=True)
class Site:
    """A map of the student and the map of the teacher that it is compared with.

    Attributes:
        student: Level of the head, or path of a layer, whose output is meant.
        teacher: The same for the teacher.
        widths: Channels of both.
    """

    student: int | str
    teacher: int | str
    widths: tuple[int, int]


def sites(layers: Sequence[str], student: nn.Module, guide: Guide) -> list[Site]:
    """Return the maps that are compared: neck, backbone, a layer index, the path of a module, or `student:teacher`."""
    found: list[Site] = []
    for layer in layers or ("neck",):
        if layer == "neck":
            if not guide.levels:
                raise UsageError("A classifier has no neck: give 'distill.features=None', or layers such as [4, 6].")
            widths = [stock.level_widths(m) for m in (student, guide.model)]
            found += [Site(i, j, (widths[0][i], widths[1][j])) for i, j in guide.levels]
        elif layer == "backbone":
            found += _backbone(student, guide.model)
        else:
            ours, _, theirs = layer.partition(":")
            found.append(_layer(student, guide.model, ours, theirs or ours))
    return found


def _layer(student: nn.Module, teacher: nn.Module, ours: str, theirs: str) -> Site:
    """Return the site of one layer each, given by index or path."""
    paths, shapes = [], []
    for model, name, who in ((student, ours, "student"), (teacher, theirs, "teacher")):
        path = f"model.{name}" if name.isdigit() else name
        modules = [n for n, _ in model.named_modules() if n]
        if path not in modules:
            raise UsageError(
                f"'distill.layers': the {who} has no layer '{name}'.{suggest(path, modules)} Legal: neck, backbone, "
                f"0 to {len(model.model) - 1}, or the path of a module such as model.4.cv2."
            )
        shape = _shapes(model, [path])[path]
        if shape is None:
            raise UsageError(f"'distill.layers': layer '{name}' of the {who} does not return one map (B, C, H, W).")
        paths.append(path)
        shapes.append(shape)
    if shapes[0][2:] != shapes[1][2:]:
        raise UsageError(
            f"'distill.layers': maps of layer '{ours}' of the student and '{theirs}' of the teacher differ in size, "
            f"{shapes[0][2:]} and {shapes[1][2:]}. Give two of one stride as 'student:teacher'."
        )
    return Site(paths[0], paths[1], (shapes[0][1], shapes[1][1]))


def _backbone(student: nn.Module, teacher: nn.Module) -> list[Site]:
    """Pair what the necks take from the backbones, by size; the deepest map of a size counts."""
    by_size: list[dict[Any, tuple[str, int]]] = []
    for model in (student, teacher):
        count = len((getattr(model, "yaml", None) or {}).get("backbone", ()))
        used = {i for m in model.model[count:] for i in ([m.f] if isinstance(m.f, int) else m.f) if 0 <= i < count}
        shapes = _shapes(model, [f"model.{i}" for i in sorted(used | {count - 1}) if i >= 0])
        by_size.append({s[2:]: (p, s[1]) for p, s in shapes.items() if s})
    ours, theirs = by_size
    found = [Site(ours[k][0], theirs[k][0], (ours[k][1], theirs[k][1])) for k in ours if k in theirs]
    if not found:
        raise UsageError("'distill.layers=backbone': the backbones have no maps of one size. Name layers instead.")
    return found


@torch.no_grad()
def _shapes(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """Return the shapes of layer outputs for one square image, None where one is not one (B, C, H, W) map."""
    like, size = next(model.parameters()), 2 * stock.max_stride(model)
    taps = Taps(model, paths)
    with evaluating(model):
        model(torch.zeros(1, stock.input_channels(model), size, size, device=like.device, dtype=like.dtype))
    found = taps.take()
    return {p: tuple(x.shape) if isinstance(x := found.get(p), torch.Tensor) and x.ndim == 4 else None for p in paths}


class Taps:
    """Keeps what chosen layers of a model return in its latest forward pass.

    The hook is one for all modules of the process, for as long as this object lives: hooks on the layers themselves
    would be copied into the EMA and saved with the checkpoint.
    """

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        """Listen to these layers of this very model, not of its copies; without paths to nothing."""
        self.found: dict[str, torch.Tensor] = {}
        if not paths:
            return
        modules, found = dict(model.named_modules()), self.found
        layers = {id(modules[p]): p for p in paths}

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            if (path := layers.get(id(module))) is not None:
                found[path] = output

        self.close = weakref.finalize(self, register_module_forward_hook(keep).remove)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the outputs by path and forget them, which frees their graph."""
        taken = dict(self.found)
        self.found.clear()
        return taken


class Align(nn.Module):
    """Bring student and teacher maps of one level to the same width.

    A student pruned from this very teacher is compared on the kept channels directly, without parameters. Otherwise a
    1x1 convolution maps the student where widths differ, and both sides are normalised per channel, so that the loss
    does not depend on magnitudes (as in RTMDet, Lyu et al., 2022, arXiv:2212.07784).
    """

    def __init__(self, student: int, teacher: int, kept: list[int] | None, *, always: bool = False) -> None:
        """Prepare for these channels; `kept` are those a student pruned from this teacher has, `always` wants weights.

        A convolution between equally wide maps lets the student shrink later.
        """
        super().__init__()
        self.kept = None if kept is None else torch.tensor(kept)
        direct = kept is not None or (student == teacher and not always)
        self.conv = None if direct else nn.Conv2d(student, teacher, 1, bias=False)
        self.norm = kept is None

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both maps, (B, C, H, W) each, comparable channel by channel."""
        if self.kept is not None:
            return student.float(), teacher[:, self.kept.to(teacher.device)].float()
        if self.conv is not None:
            student = self.conv(student.float())
        return standardize(student.float()), standardize(teacher.float())

    def shrink(self, index: list[int]) -> None:
        """Follow a student that is pruned while training: only these of its channels are left."""
        if self.kept is not None:
            self.kept = self.kept[torch.tensor(index)]
            return
        if self.conv is None:
            raise ValueError("An adapter without weights cannot follow a student that loses channels.")
        weight = self.conv.weight.detach()[:, torch.tensor(index, device=self.conv.weight.device)].clone()
        self.conv.weight, self.conv.in_channels = nn.Parameter(weight), len(index)


def generator(channels: int) -> nn.Module:
    """Return the generator of masked generative distillation (Yang et al., 2022, arXiv:2205.01529)."""
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)


class ContextBlock(nn.Module):
    """Add a context pooled over all positions to each of them (GcBlock, Cao et al., 2019, arXiv:1904.11492)."""

    def __init__(self, channels: int) -> None:
        """Build for this number of channels, as the identity: the last layer starts at 0."""
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) features with their context."""
        weights = self.attend(x).flatten(2).softmax(-1)
        context = x.flatten(2) @ weights.transpose(1, 2)
        return x + self.transform(context.unsqueeze(-1))


def contexts(channels: int) -> nn.Module:
    """Return the context blocks of the student and of the teacher for focal and global distillation."""
    return nn.ModuleList(ContextBlock(channels) for _ in range(2))


modules: dict[str, Callable[[int], nn.Module]] = {"mgd": generator, "fgd": contexts}
