# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Export to ONNX, and from there by OpenVINO's own converter to its intermediate representation."""

import ast
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ultralytics.utils import LOGGER, YAML

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.data.records import staged_folder
from yolo_ext.deployment.decode import Size, height_width
from yolo_ext.deployment.detector import READ, read_metadata
from yolo_ext.deployment.runtime import NMS, Source, consumers_of, need_openvino, run, session
from yolo_ext.stock import input_channels
from yolo_ext.stock.load import export_file, float_model, head_args

SIMPLIFY_TOLERANCE = 1e-5
SUFFIX = "_openvino_model"  # by which Ultralytics knows such a folder


def max_relative_error(reference: list[np.ndarray], other: list[np.ndarray], floor: float = 1.0) -> float:
    """Return the largest ``|a - b| / max(floor, |a|)`` over paired arrays, infinite where shapes differ or a NaN is."""
    if [a.shape for a in reference] != [b.shape for b in other]:
        return float("inf")
    errors = [float((np.abs(a - b) / np.maximum(floor, np.abs(a))).max(initial=0.0)) for a, b in zip(reference, other)]
    return float("inf") if any(np.isnan(errors)) else max(errors, default=0.0)


def simplify_checked(proto: onnx.ModelProto, *shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Simplify with onnxsim, if ONNX Runtime's outputs for images of each shape (B, C, H, W) agree within 1e-5."""
    import onnxsim

    try:
        simplified, _ = onnxsim.simplify(proto)
        before, after = (session(p.SerializeToString()) for p in (proto, simplified))
        rng = np.random.default_rng(0)
        images = [rng.random(shape, dtype=np.float32) for shape in shapes]
        error = max(max_relative_error(run(before, x), run(after, x)) for x in images)
        problem = f"changed the outputs by {error:.1e}" if error > SIMPLIFY_TOLERANCE else ""
    except Exception as failure:  # onnxsim is native code and raises whatever its passes raise
        problem = f"failed ({failure})"
    if problem:
        LOGGER.warning(f"onnxsim {problem}; the graph is exported unsimplified.")
    return proto if problem else simplified


def to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in FP16, but for input, output and box decode: from 512 px on FP16 has steps of half a pixel."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    dims = {t.name: list(t.dims) for t in proto.graph.initializer}
    consumers = consumers_of(proto.graph)
    decoding: set[str] = set()  # nodes behind the last layers with trained weights: softmax, box decode, NMS
    for node in reversed(proto.graph.node):  # in order of computation, so that consumers come first
        users = [u for name in node.output for u in consumers[name]]
        weight = next((dims[name] for name in node.input[1:2] if name in dims), [])
        # The DFL convolution has the fixed weights 0, 1, ... of an expected value: (1, bins, 1, 1).
        layer = node.op_type in {"Conv", "ConvTranspose", "Gemm"} and not (weight[:1] == [1] and weight[2:] == [1, 1])
        if not layer and all(u.name in decoding for u in users):
            decoding.add(node.name)
    kept = {"op_block_list": DEFAULT_OP_BLOCK_LIST, "node_block_list": sorted(decoding)}
    return convert_float_to_float16(proto, keep_io_types=True, **kept)


def export_onnx(weights: Source, out: str | Path, imgsz: Size, *, opset: int | None = None, simplify: bool = True,
                batch: int = 1, dynamic: bool = False, end2end: bool = False, nms: Mapping[str, Any] | None = None,
                half: bool = False) -> Path:  # fmt: skip
    """Export an Ultralytics model to ONNX with Ultralytics' exporter and metadata.

    Args:
        weights: A ``.pt`` file or an Ultralytics model; neither is changed.
        out: File to write, ``.onnx``, replaced atomically; also returned.
        imgsz: Input size in pixels, the side of a square or height and width, multiples of the largest stride.
        opset: ONNX opset; None takes Ultralytics' choice for the installed torch.
        simplify: Run onnxsim; the result is kept only if ONNX Runtime's outputs agree within 1e-5.
        dynamic: Leave batch, height and width open.
        batch: Batch size of a static graph; with embedded NMS the largest one of an open graph.
        end2end: Export the NMS-free head of a dual-head model (YOLO26, YOLOv10) instead of the one-to-many head.
        nms: Embed NMS as Ultralytics does, with these options (keys of `runtime.NMS`); None leaves it out.
        half: FP16 weights and activations, with FP32 input, output and box decode.
    Raises: `UsageError`: ``weights``, ``out``, ``imgsz`` or ``nms`` is not usable. `CheckFailed`: Ultralytics' exporter
        failed.
    """
    out, (h, w), model = Path(out), height_width(imgsz), float_model(weights)
    stride = int(max(model.stride))
    if out.suffix != ".onnx":
        raise UsageError(f"Output '{out}' does not end in '.onnx'. Give a file name such as 'model.onnx'.")
    for side in (h, w):
        if side < stride or side % stride:
            near = max(stride, round(side / stride) * stride)
            raise UsageError(f"imgsz={side} is not a multiple of the model's stride {stride}. Try imgsz={near}.")
    if nms is not None and model.task == "classify":
        raise UsageError("nms=True is illegal for a classification model, which has no boxes. Leave it out.")
    args: dict[str, Any] = {"imgsz": [h, w], "batch": batch, "dynamic": dynamic, "opset": opset, **head_args(end2end)}
    embedded = {**NMS, **nms} if nms is not None else {}
    args |= {**embedded, "nms": True} if embedded else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            proto = onnx.load(export_file(model, Path(folder), format="onnx", simplify=False, **args))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckFailed(f"Export to ONNX failed ({type(error).__name__}: {reason}).") from error
    metadata = {p.key: p.value for p in proto.metadata_props}
    if embedded:  # kept so that `verify` can suppress the same way; Ultralytics reads only its own keys
        metadata["args"] = str({**ast.literal_eval(metadata["args"]), **embedded})
    if simplify:
        channels = input_channels(model)
        other = (batch if embedded else batch + 2, channels, h + stride, w)
        proto = simplify_checked(proto, (batch, channels, h, w), *([other] if dynamic else []))
    proto = to_half(proto) if half else proto
    del proto.metadata_props[:]  # onnxsim appends a second copy of every entry
    onnx.helper.set_model_props(proto, metadata)
    atomic_write(out, proto.SerializeToString())
    return out


def export_openvino(onnx_path: str | Path, out: str | Path, *, half: bool = False) -> Path:
    """Convert an ONNX file, float or with Q/DQ, into a folder that ``YOLO(out)`` and OpenVINO load.

    Args:
        onnx_path: File with Ultralytics' metadata.
        out: Folder to write, ``*_openvino_model``, replaced if it is there; also returned.
        half: Store the weights in FP16.
    Raises: `UsageError`: OpenVINO is not installed, ``out`` has another ending, or OpenVINO cannot read the file.
    """
    openvino, out = need_openvino(), Path(out)
    if not out.name.endswith(SUFFIX):
        raise UsageError(f"Output '{out}' does not end in '{SUFFIX}', by which Ultralytics knows it. Rename it.")
    stem = out.name.removesuffix(SUFFIX)
    with staged_folder(out, rf"{re.escape(stem)}\.(xml|bin)|metadata\.yaml") as made:
        try:
            model = openvino.convert_model(str(onnx_path))
        except Exception as error:  # OpenVINO's exceptions share no public base class
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"OpenVINO cannot convert '{onnx_path}' ({reason}).") from error
        openvino.save_model(model, str(made / f"{stem}.xml"), compress_to_fp16=half)
        found = read_metadata(session(onnx_path), onnx_path)
        YAML.save(made / "metadata.yaml", {k: v for k, v in found.items() if k not in READ and v is not None})
    return out
