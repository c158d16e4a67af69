# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""FP32 ONNX export: Ultralytics' exporter, then onnxsim, accepted only where it changes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from yolo_ext.checkpoint import atomic_write
from yolo_ext.deployment.runtime import float_model, quiet, run, session
from yolo_ext.errors import CheckFailed, UsageError

SIMPLIFY_TOLERANCE = 1e-5


def head_args(end2end: bool) -> dict[str, Any]:
    """Return the Ultralytics arguments that select the head of a dual-head model (YOLO26, YOLOv10).

    Args:
        end2end: True for the one-to-one (NMS-free) head, False for the one-to-many head.

    Returns:
        ``end2end=`` for releases that have that option, otherwise ``nms=`` (False means NMS-free there).
    """
    if "end2end" in DEFAULT_CFG_DICT:
        return {"end2end": end2end}
    return {"nms": False if end2end else None}


def _ultralytics_onnx(model: Any, folder: Path, args: dict[str, Any]) -> onnx.ModelProto:
    """Export through Ultralytics inside ``folder``, so that nothing appears beside the user's weights."""
    from ultralytics.engine.exporter import Exporter

    model.pt_path = str(folder / "model.pt")  # the exporter derives the output name from it
    with quiet():
        file = Exporter(overrides={"format": "onnx", "device": "cpu", "simplify": False, "mode": "export", **args})(
            model
        )
    return onnx.load(file)


def max_relative_error(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Return the largest ``|a - b| / max(1, |a|)`` over paired arrays, infinite where shapes differ or a NaN is.

    Args:
        reference: Arrays of any shape.
        other: Arrays of the same shapes.

    Returns:
        The largest relative error; below 1 in magnitude the error is absolute, so zeros cannot blow it up.
    """
    if [a.shape for a in reference] != [b.shape for b in other]:
        return float("inf")
    errors = [float((np.abs(a - b) / np.maximum(1.0, np.abs(a))).max(initial=0.0)) for a, b in zip(reference, other)]
    return float("inf") if any(np.isnan(errors)) else max(errors, default=0.0)


def simplify_checked(proto: onnx.ModelProto, shape: tuple[int, int, int, int]) -> onnx.ModelProto:
    """Simplify with onnxsim and keep the result only if ONNX Runtime gives the same outputs.

    Args:
        proto: The model to simplify.
        shape: Input shape (B, C, H, W) of the random test image.

    Returns:
        The simplified model, or ``proto`` itself after a warning.
    """
    import onnxsim

    try:
        simplified, _ = onnxsim.simplify(proto)
        x = np.random.default_rng(0).random(shape, dtype=np.float32)
        error = max_relative_error(*(run(session(p.SerializeToString()), x) for p in (proto, simplified)))
    except Exception as failure:  # onnxsim is native code and raises whatever its passes raise
        LOGGER.warning(f"onnxsim failed ({failure}); the graph is exported unsimplified.")
        return proto
    if error > SIMPLIFY_TOLERANCE:
        LOGGER.warning(f"onnxsim changed the outputs by {error:.1e}; the graph is exported unsimplified.")
        return proto
    return simplified


def export_onnx(
    weights: str | Path | nn.Module,
    out: str | Path,
    imgsz: int,
    *,
    opset: int | None = None,
    simplify: bool = True,
    dynamic: bool = False,
    batch: int = 1,
    end2end: bool = False,
) -> Path:
    """Export an Ultralytics model to FP32 ONNX with Ultralytics' exporter and metadata.

    Args:
        weights: A ``.pt`` file or an Ultralytics model; neither is changed.
        out: File to write, ``.onnx``; replaced atomically.
        imgsz: Square input size in pixels, a multiple of the largest stride.
        opset: ONNX opset; None takes Ultralytics' choice for the installed torch.
        simplify: Run onnxsim; the result is kept only if ONNX Runtime's outputs agree within 1e-5.
        dynamic: Leave batch, height and width open.
        batch: Batch size of a static graph.
        end2end: Export the NMS-free head of a dual-head model (YOLO26, YOLOv10) instead of the one-to-many head.

    Returns:
        ``out`` as a path.

    Raises:
        UsageError: ``weights``, ``out`` or ``imgsz`` is not usable.
        CheckFailed: Ultralytics' exporter failed.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise UsageError(f"Output '{out}' does not end in '.onnx'. Give a file name such as 'model.onnx'.")
    model = float_model(weights)
    stride = int(max(model.stride))
    if imgsz < stride or imgsz % stride:
        near = max(stride, round(imgsz / stride) * stride)
        raise UsageError(f"imgsz={imgsz} is not a multiple of the model's stride {stride}. Try imgsz={near}.")
    args = {"imgsz": imgsz, "batch": batch, "dynamic": dynamic, "opset": opset, **head_args(end2end)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            proto = _ultralytics_onnx(model, Path(folder), args)
        except Exception as error:
            raise CheckFailed(f"Export to ONNX failed ({type(error).__name__}: {error}).") from error
    metadata = {p.key: p.value for p in proto.metadata_props}
    if simplify:
        proto = simplify_checked(proto, (batch, model.yaml.get("channels", 3), imgsz, imgsz))
    del proto.metadata_props[:]  # onnxsim appends a second copy of every entry
    onnx.helper.set_model_props(proto, metadata)
    atomic_write(out, proto.SerializeToString())
    return out
