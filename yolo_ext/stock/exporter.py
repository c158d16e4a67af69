# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ultralytics' exporter, and models made to return what their export returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.engine.exporter import Exporter, NMSModel, export_formats
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_ext.stock.context import quiet
from yolo_ext.stock.load import no_autoinstall

__all__ = ["as_exported", "choose_head", "export_file", "export_formats", "head_args", "with_nms"]


def head_args(end2end: bool) -> dict[str, Any]:
    """Return the arguments that select the one-to-one (NMS-free) or the one-to-many head of a dual-head model.

    ``end2end=`` for releases that have that option, otherwise ``nms=``, where False means NMS-free.
    """
    if "end2end" in DEFAULT_CFG_DICT:
        return {"end2end": end2end}
    return {"nms": False if end2end else None}


def choose_head(model: Any, end2end: bool) -> Any:
    """Have a dual-head model run its NMS-free head or the other one; a model with a single head stays as it is."""
    if bool(getattr(model, "end2end", False)) != end2end:
        model.end2end = end2end
    return model


def as_exported(model: Any) -> Any:
    """Have the head of a model return what an export does, without the tensors that only training reads."""
    model.model[-1].export = True
    return model


def with_nms(model: Any, nms: dict[str, Any]) -> nn.Module:
    """Wrap a model as the exporter does to embed NMS with these options."""
    model.model[-1].xyxy = True
    return NMSModel(model, get_cfg(overrides={"format": "onnx", "dynamic": False, "batch": 1, **nms}))


def export_file(model: Any, folder: Path, **args: Any) -> Path:
    """Export a float model into a folder, so that nothing appears beside the user's weights, and return the file."""
    model.pt_path = str(folder / "model.pt")  # the exporter derives the output name from it
    with quiet(), no_autoinstall():
        return Path(Exporter(overrides={"device": "cpu", "mode": "export", **args})(model))
