# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Models as functions, letterbox before and NMS after them, and what ONNX Runtime really runs in INT8."""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn
from ultralytics.utils.nms import non_max_suppression

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.deployment import decode
from yolo_ext.deployment.decode import Size, full_batches, height_width
from yolo_ext.deployment.detector import letterbox, open_session, read_metadata, session_options
from yolo_ext.stock import OPAQUE, input_channels
from yolo_ext.stock.context import replaced
from yolo_ext.stock.load import as_exported, choose_head, float_model, planes, read_image, with_nms

Source: TypeAlias = str | Path | nn.Module  # Ultralytics model, ``.pt`` file or ``.onnx`` file
CPU = torch.device("cpu")
Predict = Callable[[np.ndarray], list[np.ndarray]]  # from images (B, C, H, W), float32 in 0..1, to raw outputs
NMS = {"conf": 0.25, "iou": 0.7, "max_det": 300, "agnostic_nms": False}  # Ultralytics' defaults of embedded NMS
FLOAT_CONVS = {"Conv", "FusedConv", "ConvTranspose"}
DFL = "dfl/conv/Conv"  # end of the name of a convolution that our INT8 files hold as a MatMul
INTEGER_CONVS = {"QLinearConv", "QLinearConvTranspose", "ConvInteger"}
INTEGER_OPS = {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QGemm", *INTEGER_CONVS}


def load_image(path: str | Path, imgsz: Size, channels: int = 3) -> np.ndarray:
    """Read one image as the predictor does, see `preprocess`; UsageError where it cannot be read."""
    image = read_image(path, channels)
    if image is None:
        raise UsageError(f"Image '{path}' does not exist or cannot be read. Give readable image files.")
    return preprocess(image, imgsz)


def preprocess(image: np.ndarray, imgsz: Size) -> np.ndarray:
    """Letterbox a picture (height, width, C), BGR, 0..255, to (1, C, height, width), RGB, float32 in 0..1."""
    return np.ascontiguousarray(planes(letterbox(image, height_width(imgsz)))[None], dtype=np.float32) / 255


def is_final(meta: dict[str, Any]) -> bool:
    """Tell whether the rows of an output are detections, which are only thresholded, and not anchors."""
    return bool(meta["end2end"] or meta["nms"] or meta.get("stretch"))


def postprocess(y: np.ndarray, meta: dict[str, Any], conf: float, iou: float) -> torch.Tensor:
    """Give detections (N, 6+): x1, y1, x2, y2 in px (OBB: centre, size), score, class, more, of an output (1, ...)."""
    final = is_final(meta)
    options = {"nc": meta["nc"], "end2end": final, "rotated": meta["task"] == "obb", "max_det": 300}
    return non_max_suppression(torch.from_numpy(y), conf, iou, **options)[0]


def session(model: str | Path | bytes, threads: int | None = None, *, simulate: bool = False,
            profile: Path | None = None, gpu: int | None = None) -> ort.InferenceSession:  # fmt: skip
    """Open a file or serialised model; `simulate` runs Q/DQ in float, `profile` is the prefix of the profile's file."""
    options = session_options(threads)
    # Idle workers would otherwise spin on and steal cores from the model that is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if simulate:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return open_session(model, options, gpu)


def run(model: ort.InferenceSession, x: np.ndarray) -> list[np.ndarray]:
    """Return the outputs, in graph order, of a session with one input for images (B, C, H, W), float32 in 0..1."""
    return model.run(None, {model.get_inputs()[0].name: x})


def describe(source: Source) -> dict[str, Any]:
    """Return what is needed to read a model's outputs, of an ONNX file also its ``shape``, None where it is open."""
    if _is_torch(source):
        model = float_model(source)
        dual = all(getattr(model.model[-1], name, None) is not None for name in ("one2one_cv2", "cv2"))
        end2end = bool(getattr(model, "end2end", False))
        return {"task": model.task, "nc": len(model.names), "end2end": end2end, "dual": dual, "nms": None,
                "stretch": isinstance(model.model[-1], OPAQUE), "channels": input_channels(model)}  # fmt: skip
    if Path(source).suffix != ".onnx":
        raise UsageError(f"'{source}' is no '.onnx' file. Give one that yolo-ext or Ultralytics exported.")
    opened = session(source)
    meta = read_metadata(opened, source)
    given, shape = meta["args"], opened.get_inputs()[0].shape
    proto = onnx.load(source, load_external_data=False)
    quantized = any(n.op_type in INTEGER_OPS for n in proto.graph.node)
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    return {
        "task": meta["task"], "nc": len(meta["names"]), "end2end": bool(meta["end2end"]), "dual": False,
        "stretch": meta["stretch"], "channels": shape[1] if isinstance(shape[1], int) else 3,
        "nms": {**NMS, **{k: given[k] for k in NMS if k in given}} if given.get("nms") is True else None,
        "shape": [n if isinstance(n, int) else None for n in shape],
        "imgsz": height_width(meta["imgsz"] or 640),
        "batch": int(meta.get("batch") or 1), "stride": int(meta["stride"]),
        "opset": next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")),
        "precision": "int8" if quantized else "fp16" if half else "fp32",
    }  # fmt: skip


def _is_torch(source: Source) -> bool:
    return isinstance(source, nn.Module) or str(source).endswith(".pt")


def predictor(source: Source, *, end2end: bool = False, simulate: bool = False,
              nms: dict[str, Any] | None = None, device: torch.device = CPU) -> Predict:  # fmt: skip
    """Turn a model into a function from images to raw head outputs.

    Args:
        source: Ultralytics model, ``.pt`` file or ``.onnx`` file.
        end2end: Head of a dual-head torch model to run; an ONNX file has only one.
        simulate: ONNX only: run Q/DQ in float instead of in integer operators.
        nms: Torch only: suppress as an export with these options of embedded NMS does, see `describe`.
        device: What the model runs on, in full float32; an ONNX file where ONNX Runtime has a provider for it.
    Returns: Function of images (B, C, H, W), any number, that gives the outputs: boxes and scores, then mask
        prototypes. RT-DETR's rows come as those of other heads without NMS: x1, y1, x2, y2 in px, score, class.
    """
    if _is_torch(source):
        model = as_exported(choose_head(float_model(source), end2end)).to(device)
        net = with_nms(model, nms) if nms else model

        def forward(x: np.ndarray) -> list[np.ndarray]:
            with torch.inference_mode(), replaced(torch.backends.cudnn, allow_tf32=False):
                y = net(torch.from_numpy(x).to(device))
            return [t.cpu().numpy() for t in (y if isinstance(y, (tuple, list)) else [y])]

        return _in_px(forward) if isinstance(model.model[-1], OPAQUE) else forward
    opened = session(source, simulate=simulate, gpu=device.index if device.type == "cuda" else None)
    size = opened.get_inputs()[0].shape[0]

    def batches(x: np.ndarray) -> list[np.ndarray]:
        n = size if isinstance(size, int) else len(x)
        filled = full_batches(x, n)
        parts = [run(opened, filled[i : i + n]) for i in range(0, len(filled), n)]
        return [np.concatenate(ys)[: len(x)] for ys in zip(*parts)]

    head = opened.get_modelmeta().custom_metadata_map.get("head")
    return _in_px(batches) if head == "RTDETRDecoder" else batches


def _in_px(predict: Predict) -> Predict:
    """Have an RT-DETR return its rows (B, N, 6) as other heads without NMS do: x1, y1, x2, y2 in px, score, class."""

    def forward(x: np.ndarray) -> list[np.ndarray]:
        rows = np.stack([decode.queries(output) for output in predict(x)[0]])
        frame = np.tile(np.float32(x.shape[:1:-1]), 2)
        return [np.concatenate([np.stack([decode.corners(r[:, :4]) for r in rows]) * frame, rows[..., 4:]], 2)]

    return forward


def need_openvino() -> Any:
    """Return the module of OpenVINO, and refuse to go on where it is not installed."""
    told = "OpenVINO is not installed. Run `pip install openvino`, or give an ONNX file (format=onnx)."
    with refused(told, ImportError):
        return import_module("openvino")


def compiled(folder: str | Path, threads: int = 1, options: dict[str, str] | None = None) -> Any:
    """Return the model of an OpenVINO folder compiled for the CPU, with more properties of OpenVINO."""
    openvino = need_openvino()
    file = next(Path(folder).glob("*.xml"), None)
    if file is None:
        raise UsageError(f"'{folder}' holds no OpenVINO model (.xml). Export one with format=openvino.")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **(options or {})}
    return openvino.Core().compile_model(str(file), "CPU", settings)


def conv_report(path: str | Path) -> dict[str, Any]:
    """Count the convolutions of an ONNX file or OpenVINO folder and those run in integers on this CPU, or why not."""
    runtime, reasons = ("OpenVINO", _openvino_convs(path)) if Path(path).is_dir() else ("ONNX Runtime", _convs(path))
    floats = {name: why for name, why in reasons.items() if why}
    done = [name for name in reasons if name not in floats]
    return {"runtime": runtime, "convs": len(reasons), "int8_convs": len(done), "int8": done, "float_convs": floats}


def _convs(path: str | Path) -> dict[str, str]:
    """Return why each convolution of an ONNX file is float, by name, "" for integer ones."""
    session(path)  # reports a missing or broken file
    model = onnx.load(path)
    kinds = FLOAT_CONVS | INTEGER_CONVS
    convs = [n for n in model.graph.node if n.op_type in kinds or (n.op_type == "MatMul" and n.name.endswith(DFL))]
    for node in convs:
        node.name = node.name or node.output[0]
    options = session_options(1)
    # Q/DQ fusion is among the extended optimisations; the layout passes that follow only rename and reorder nodes.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        open_session(model.SerializeToString(), options)
        optimized = onnx.load(options.optimized_model_filepath).graph
    integer = {n.name for n in (*optimized.node, *convs) if n.op_type in INTEGER_CONVS}
    reason = _reasons(model.graph)
    return {n.name: "" if n.name in integer else reason(n) for n in convs}


def _openvino_convs(folder: str | Path) -> dict[str, str]:
    convs: dict[str, str] = {}
    for node in compiled(folder).get_runtime_model().get_ordered_ops():
        kind, precision = (node.get_rt_info()[k].astype(str) for k in ("layerType", "runtimePrecision"))
        if kind in ("Convolution", "Deconvolution"):
            why = "" if precision in ("i8", "u8") else f"OpenVINO runs it in {precision} on this CPU"
            convs[node.get_friendly_name().removesuffix("/WithoutBiases")] = why
    return convs


def consumers_of(graph: onnx.GraphProto) -> defaultdict[str, list[Any]]:
    """Return the nodes that read each tensor of a graph."""
    consumers = defaultdict[str, list[Any]](list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    return consumers


def _reasons(graph: onnx.GraphProto) -> Callable[[Any], str]:
    """Return a function that explains a float convolution from the Q/DQ nodes around it."""
    producer = {name: n for n in graph.node for name in n.output}
    consumers = consumers_of(graph)
    outputs = {o.name for o in graph.output}
    dtype = {t.name: t.data_type for t in graph.initializer}

    def dequantized(name: str) -> bool:
        return name in producer and producer[name].op_type == "DequantizeLinear"

    def reason(conv: Any) -> str:
        if conv.op_type == "ConvTranspose":
            return "ONNX Runtime has no integer kernel for transposed convolutions"
        x, w = (dequantized(name) for name in conv.input[:2])
        if not x and not w:
            return "no Q/DQ (kept float by the profile)"
        if not x or not w:
            return "weight not dequantized" if x else "input not dequantized"
        out = conv.output[0]
        if [u.op_type for u in consumers[out]] in (["Relu"], ["Clip"]):  # folded where the zero point already clips
            out = consumers[out][0].output[0]
        users = consumers[out]
        if not any(u.op_type == "QuantizeLinear" for u in users):
            return "no Q on the output"
        if len(users) > 1 or out in outputs:
            return "more than one consumer of the output"
        if dtype.get(producer[conv.input[0]].input[2]) != dtype.get(users[0].input[2]):
            return "input and output have different integer types"
        if len(conv.input) > 2 and conv.input[2] and not dequantized(conv.input[2]):
            return "bias not dequantized"
        return "not fused by ONNX Runtime on this CPU (x86 needs unsigned activations)"

    return reason
