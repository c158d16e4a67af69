# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What of a student corresponds to what of a teacher: classes by name, levels by stride, maps by layer."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.distillation.stack import Term
from yolo_ext.distillation.taps import layer_shapes


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


def level_map(student: nn.Module, teacher: nn.Module, name: str) -> list[tuple[int, int]]:
    """Return (level of the student, level of the teacher) for each stride that both heads have.

    Raises:
        UsageError: If they share none.
    """
    ours, theirs = ([int(s) for s in stock.detection_head(m).stride] for m in (student, teacher))
    found = [(i, theirs.index(s)) for i, s in enumerate(ours) if s in theirs]
    if not found:
        raise UsageError(f"Teacher '{name}' has strides {theirs}, the student {ours}. Give one with a common stride.")
    return found


def pick_levels(raw: dict[str, Any], levels: list[int]) -> dict[str, Any]:
    """Return the raw output of one branch with these levels only, in this order."""
    if levels == list(range(len(raw["feats"]))):
        return raw
    sizes = [f.shape[-2] * f.shape[-1] for f in raw["feats"]]
    parts = {k: raw[k].split(sizes, -1) for k in ("boxes", "scores")}
    picked = {k: torch.cat([v[i] for i in levels], -1) for k, v in parts.items()}
    return {**picked, "feats": [raw["feats"][i] for i in levels]}


def class_map(teacher: Any, student: Any, path: str) -> tuple[list[int], list[int]]:
    """Return the classes that student and teacher share by name: indices of the student, indices of the teacher.

    Raises:
        UsageError: If they share none.
    """
    key = lambda name: str(name).strip().lower()  # noqa: E731
    theirs = {key(n): i for i, n in teacher.names.items()}
    shared = [(i, theirs[key(n)]) for i, n in student.names.items() if key(n) in theirs]
    if not shared:
        raise UsageError(
            f"Teacher '{path}' knows none of the classes {list(student.names.values())[:5]}; it knows "
            f"{list(teacher.names.values())[:10]}. Give a teacher that was trained on the same classes."
        )
    return [i for i, _ in shared], [j for _, j in shared]


def with_classes(teacher: nn.Module, names: dict[int, str], path: str) -> nn.Module:
    """Bring the outputs of a model to the classes of a data set, in place; classes that it does not know get no score.

    Args:
        teacher: Detector with a branch of scores for each level, or classifier.
        names: Classes of the data.
        path: File of the teacher, for the message.

    Returns:
        The same model.

    Raises:
        UsageError: If they share no class.
    """
    head = stock.detection_head(teacher)
    ours, theirs = class_map(teacher, SimpleNamespace(names=names), path)
    if ours == theirs == list(range(len(teacher.names))) and len(names) == len(ours):
        return teacher
    branches = [b for k in ("cv3", "one2one_cv3") for b in getattr(head, k, None) or ()]
    for last in [b[-1] for b in branches] or [head.linear]:
        weight, bias = last.weight.data, last.bias.data
        last.weight = nn.Parameter(weight.new_zeros(len(names), *weight.shape[1:]))
        last.bias = nn.Parameter(bias.new_full((len(names),), -30.0))
        last.weight.data[ours], last.bias.data[ours] = weight[theirs], bias[theirs]
        setattr(last, "out_channels" if isinstance(last, nn.Conv2d) else "out_features", len(names))
    if branches:
        head.no, head.nc = head.no + len(names) - head.nc, len(names)
    teacher.names = dict(names)
    return teacher


def sites(term: Term, student: nn.Module, teacher: nn.Module, levels: list[tuple[int, int]]) -> list[Site]:
    """Return which maps a feature loss compares.

    Args:
        term: The loss with its `layers`: ``neck`` (the inputs of the head), ``backbone`` (what the neck takes from it),
            a layer index, the path of a module, or ``student:teacher`` where they are unlike.
        student: Student.
        teacher: Teacher.
        levels: Result of `level_map`.

    Raises:
        UsageError: If a layer does not exist, gives no map, or their sizes differ.
    """
    found: list[Site] = []
    for layer in term.layers or ("neck",):
        if layer == "neck":
            if not levels:
                raise UsageError("A classifier has no neck: give 'distill.features=None', or layers such as [4, 6].")
            widths = [stock.level_widths(m) for m in (student, teacher)]
            found += [Site(i, j, (widths[0][i], widths[1][j])) for i, j in levels]
        elif layer == "backbone":
            found += _backbone(student, teacher)
        else:
            ours, _, theirs = layer.partition(":")
            found.append(_layer(student, teacher, ours, theirs or ours))
    return found


def _shapes(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    return layer_shapes(model, paths, 2 * stock.max_stride(model), stock.input_channels(model))


def _layer(student: nn.Module, teacher: nn.Module, ours: str, theirs: str) -> Site:
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
