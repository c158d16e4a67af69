# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Whether a model fits the data, or another model, that it is to be used with: task, classes, channels, keypoints."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.stock.context import quiet
from yolo_ext.stock.model import OPAQUE, detection_head, input_channels, task_of

PROMPTED = {"WorldModel": "YOLO-World", "YOLOEModel": "YOLOE", "YOLOESegModel": "YOLOE"}  # whose classes are texts
Given: TypeAlias = nn.Module | Mapping[str, Any]
ONE_CLASS = {0: "item"}  # what Ultralytics makes of the classes with single_cls=True
TRAIN = "train the model on these data first"
REMEDIES = {
    "number of classes": f"Give the data that it was trained on, or {TRAIN}.",
    "class numbers": f"Number the classes of the data as the model does, or {TRAIN}.",
    "class names": f"Give classes that are the same the names of the model in data.yaml, or {TRAIN}.",
    "image channels": f"Set 'channels' in data.yaml, or {TRAIN}.",
    "keypoint shape": f"Give the data that it was trained on, or {TRAIN}.",
}


def check_fit(model: Given, info: Mapping[str, Any], said: tuple[Any, Any], *, rebuilt: bool = False) -> str:
    """Refuse data, `said` as the user calls both, that do not fit a model; one that is `rebuilt` for them: say why."""
    for key, ours, theirs in differences(model, info):  # the first is told
        told = f"{key} {ours} of the model, {theirs} of the data"
        if not rebuilt:
            raise UsageError(f"'{said[0]}' does not fit '{said[1]}': {told}. {REMEDIES[key]}")
        return told
    return ""


def differences(model: Given, other: Given) -> Iterator[tuple[str, Any, Any]]:
    """Yield what keeps a model from standing for another one, or from fitting data, with what both have of it."""
    facts = _facts(model), _facts(other)
    ours, theirs = ([str(name).strip().lower() for _, name in sorted(f.pop("names").items())] for f in facts)
    # Names that say nothing agree with all.
    named = all(any(n not in (f"{i}", f"class_{i}") for i, n in enumerate(names)) for names in (ours, theirs))
    moved = [n for n, own in zip(theirs, ours) if n != own and n in ours]
    if len(ours) != len(theirs):
        yield "number of classes", len(ours), len(theirs)
    elif moved:
        name = moved[0]
        yield "class numbers", f"{ours.index(name)} for '{name}'", f"{theirs.index(name)} for '{name}'"
    elif named and len(ours) > 1 and not {*ours} & {*theirs}:
        yield "class names", ", ".join(ours[:5]), ", ".join(theirs[:5])
    for key, value in facts[0].items():
        if value and facts[1][key] and value != facts[1][key]:
            yield key, value, facts[1][key]


def _facts(of: Given) -> dict[str, Any]:
    """Return what has to agree, of a model or of data; None where it says nothing."""
    if isinstance(of, nn.Module):
        shape = getattr(detection_head(of), "kpt_shape", None)
        found: dict[str, Any] = {"names": of.names, "task": task_of(of), "image channels": input_channels(of)}
    else:  # data were read for the task of the model
        shape = of.get("kpt_shape")
        found = {"names": of["names"], "task": None, "image channels": of.get("channels")}
    return {**found, "keypoint shape": list(shape or ())}


def one_class(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked data as Ultralytics reads them with single_cls=True."""
    return {**info, "names": dict(ONE_CLASS), "nc": 1, "single_cls": True}


def refuse_untrainable(model: nn.Module) -> None:
    """Refuse models that have trainers, validators and losses of their own where data are read."""
    kind = "RT-DETR" if isinstance(detection_head(model), OPAQUE) else PROMPTED.get(type(model).__name__, "")
    if kind:
        why = f"{kind} is trained and validated in a way of its own, which yolo_ext does not know"
        raise UsageError(f"{why}. It can be pruned with epochs=0 and without data, and exported.")


def rebuilt(model: Any, info: Mapping[str, Any]) -> Any:
    """Return a model as a training builds it for data: itself where the shapes fit, else one with what fits of it."""
    shapes = [k for k, *_ in differences(model, info) if k not in ("class numbers", "class names")]
    if not shapes:
        return model
    pose = {"data_kpt_shape": info["kpt_shape"]} if task_of(model) == "pose" else {}
    with quiet(logging.ERROR), torch.random.fork_rng(devices=[]):
        built: Any = type(model)(dict(model.yaml), ch=info["channels"], nc=info["nc"], verbose=False, **pose)
        built.names = dict(info["names"])  # by which rows of the head find their place
        built.load(model, verbose=False)
    built.args = getattr(model, "args", {})
    return built.eval()
