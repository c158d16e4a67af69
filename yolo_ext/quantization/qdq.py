# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Write calibrated ranges into an FP32 ONNX file as Q/DQ nodes that ONNX Runtime turns into INT8 convolutions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from yolo_ext.checkpoint import atomic_write
from yolo_ext.errors import CheckFailed, UsageError
from yolo_ext.quantization.profiles import Profile

Ranges = dict[str, dict[str, list[float]]]
BIAS_LIMIT = 2**29  # leaves the INT32 accumulator room for the products


def write_qdq(fp32: Path, out: Path, ranges: dict[str, dict[str, list[float]]], profile: Profile) -> dict[str, Any]:
    """Write the INT8 version of an FP32 ONNX file.

    Every convolution in `ranges` gets U8 Q/DQ on its input and on its output before the activation, an INT8 weight with
    per-channel scales and an INT32 bias. Everything else, the metadata included, stays as it is.

    Args:
        fp32: File exported by Ultralytics from the fused float model; names of nodes or weights follow module paths.
        out: File to write.
        ranges: `{convolution path: {"input": [lo, hi], "output": [lo, hi]}}` of the fused or the unfused model.
        profile: What the runtime executes.

    Returns:
        `{"quantized": [paths], "float": {path: reason}}` over all convolutions of the file.

    Raises:
        UsageError: If the file is missing, not ONNX, or older than opset 13.
        CheckFailed: If a convolution in `ranges` is not in the file.
    """
    model = _load(Path(fp32))
    graph = model.graph
    todo = deployed_ranges(ranges, {_conv_path(n, ranges) for n in graph.node if n.op_type == "Conv"})
    editor = _Editor(profile, _constants(graph))
    quantized, kept = [], {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        path = _conv_path(node, todo) if node.op_type == "Conv" else ""
        if path in todo:
            nodes += editor.quantize_conv(node, path, todo.pop(path))
            quantized.append(path)
            continue
        if path:
            kept[path] = "no calibrated range"
        nodes.append(node)
    if todo:
        raise CheckFailed(
            f"{fp32} lacks {len(todo)} convolutions that have calibrated ranges, such as '{next(iter(todo))}'. "
            "Export the model that was calibrated, and calibrate again after any change of its structure."
        )
    nodes = _fuse_silu(nodes, graph) if profile.fuse_silu else nodes
    _replace(graph, _transpose_dfl(nodes, editor), editor.initializers)
    if profile.fuse_silu and all(o.domain != "com.microsoft" for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.checker.check_model(model, full_check=True)
    atomic_write(Path(out), model.SerializeToString())
    return {"quantized": quantized, "float": kept}


def deployed_ranges(ranges: Ranges, present: Collection[str]) -> Ranges:
    """Return the ranges of a model without those of a head branch that was not exported.

    Args:
        ranges: Ranges of a model that may have a one-to-many and a one-to-one head.
        present: Convolution paths of the exported file, which holds one of the two.
    """
    dual = {p for path in ranges if "one2one_" in path for p in (path, path.replace("one2one_", ""))}
    return {path: r for path, r in ranges.items() if path in present or path not in dual}


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise UsageError(f"There is no ONNX file '{path}'.")
    try:
        model = onnx.load(path)
    except Exception as e:  # protobuf raises its own DecodeError, which has no stable import path
        raise UsageError(f"Cannot read '{path}' as ONNX: {e}.") from e
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < 13:
        raise UsageError(f"'{path}' has opset {opset}; per-channel Q/DQ needs 13 or later. Export again with opset=18.")
    return model


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for n in graph.node:  # the exporter merges equal initializers and hands them on through Identity
        if n.op_type == "Identity" and n.input[0] in constants:
            constants[n.output[0]] = constants[n.input[0]]
    return constants


def _conv_path(node: NodeProto, known: dict[str, Any]) -> str:
    """Return the module path of a Conv node, from its name (`/model.2/m/m.0/cv1/conv/Conv`) or from its weight's."""
    parts: list[str] = []
    for part in node.name.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    path, by_weight = ".".join(parts), node.input[1].removesuffix(".weight")
    return path if path in known or not by_weight or by_weight not in known else by_weight


def quant_params(ends: Sequence[float], qmax: int) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of an asymmetric range, in the float32 arithmetic of the fake quantizers."""
    lo, hi = ends
    scale = (np.float32(hi) - np.float32(lo)) / np.float32(qmax)
    return scale, np.uint8(np.rint(-np.float32(lo) / scale))


@dataclass
class _Editor:
    """Makes the nodes and initializers of quantized convolutions."""

    profile: Profile
    constants: dict[str, np.ndarray]
    initializers: list[TensorProto] = field(default_factory=list)
    shared: dict[tuple[str, float, int], str] = field(default_factory=dict)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def qdq(self, x: str, y: str, params: tuple[np.float32, np.uint8], base: str) -> list[NodeProto]:
        scale = self.constant(f"{base}_scale", np.asarray(params[0]))
        zero = self.constant(f"{base}_zero_point", np.asarray(params[1]))
        return [
            helper.make_node("QuantizeLinear", [x, scale, zero], [f"{base}_quantized"], f"{base}_QuantizeLinear"),
            helper.make_node("DequantizeLinear", [f"{base}_quantized", scale, zero], [y], f"{base}_DequantizeLinear"),
        ]

    def input(self, x: str, params: tuple[np.float32, np.uint8], path: str) -> tuple[str, list[NodeProto]]:
        """Return the name of `x` quantized with these parameters, and its Q/DQ pair unless it exists already."""
        key = (x, float(params[0]), int(params[1]))
        if key in self.shared:
            return self.shared[key], []
        self.shared[key] = y = f"{path}.input_dequantized"
        return y, self.qdq(x, y, params, f"{path}.input")

    def weights(self, node: NodeProto, path: str, scale_x: np.float32) -> tuple[list[str], list[NodeProto]]:
        """Return names and DQ nodes of the INT8 weight and the INT32 bias."""
        w = self.constants[node.input[1]]
        if w.dtype != np.float32:
            raise UsageError(f"The weight of '{path}' is {w.dtype}; INT8 starts from a float32 export (half=False).")
        bias = self.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        qmax = np.float32(self.profile.weight_qmax)
        scale = np.maximum(np.abs(w).reshape(len(w), -1).max(1), np.float32(1e-12)) / qmax
        if bias is not None:  # a nearly dead channel must not push its bias beyond INT32
            scale = np.maximum(scale, np.abs(bias) / (scale_x * np.float32(BIAS_LIMIT)))
        shape = (-1,) + (1,) * (w.ndim - 1)
        codes = np.clip(np.rint(w / scale.reshape(shape)), -qmax, qmax).astype(np.int8)
        values = {"weight": (codes, scale)}
        if bias is not None:
            values["bias"] = (np.rint(bias / (scale * scale_x)).astype(np.int32), scale * scale_x)
        names, nodes = [], []
        for kind, (code, s) in values.items():
            base = f"{path}.{kind}"
            zero = self.constant(f"{base}_zero_point", np.zeros(len(w), code.dtype))
            inputs = [self.constant(f"{base}_quantized", code), self.constant(f"{base}_scale", s), zero]
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", inputs, [f"{base}_dequantized"], f"{base}_DequantizeLinear", axis=0
                )
            )
            names.append(f"{base}_dequantized")
        return names, nodes

    def quantize_conv(self, node: NodeProto, path: str, ranges: dict[str, list[float]]) -> list[NodeProto]:
        """Return the nodes that replace the Conv `node`; its output keeps its name behind the new Q/DQ pair."""
        params = quant_params(ranges["input"], self.profile.activation_qmax)
        x, nodes = self.input(node.input[0], params, path)
        names, dequantize = self.weights(node, path, params[0])
        conv = NodeProto()
        conv.CopyFrom(node)
        conv.input[:] = [x, *names]
        nodes += [*dequantize, conv]
        if "output" in ranges:
            conv.output[0] = f"{path}.output_float"
            output = quant_params(ranges["output"], self.profile.activation_qmax)
            nodes += self.qdq(conv.output[0], node.output[0], output, f"{path}.output")
        return nodes


def _fuse_silu(nodes: list[NodeProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """Return the nodes with every `x * sigmoid(x)` as one QuickGelu.

    ONNX Runtime does this itself in float graphs only: in a Q/DQ graph it gives each consumer its own DQ first.
    """
    uses: dict[str, int] = {o.name: 1 for o in graph.output}
    for n in nodes:
        for name in n.input:
            uses[name] = uses.get(name, 0) + 1
    sigmoids = {n.output[0]: n for n in nodes if n.op_type == "Sigmoid" and uses.get(n.output[0]) == 1}
    fused, drop = [], set()
    for n in nodes:
        gate = next((i for i in n.input if i in sigmoids), None) if n.op_type == "Mul" else None
        if gate and {sigmoids[gate].input[0], gate} == set(n.input):
            drop.add(gate)
            n = helper.make_node(
                "QuickGelu", [sigmoids[gate].input[0]], list(n.output), n.name, domain="com.microsoft", alpha=1.0
            )
        fused.append(n)
    return [n for n in fused if n.output[0] not in drop]


def _transpose_dfl(nodes: list[NodeProto], editor: _Editor) -> list[NodeProto]:
    """Return the nodes with the DFL softmax over the last axis, where ONNX Runtime is about ten times faster.

    Transpose to (batch, 16, 4, anchors), Softmax(axis=1) and Conv become Transpose to (batch, 4, anchors, 16),
    Softmax(axis=3) and MatMul: the same numbers in the same order.
    """
    makers = {n.output[0]: n for n in nodes}
    for conv in nodes:
        softmax = makers.get(conv.input[0]) if conv.op_type == "Conv" and "dfl" in conv.name else None
        if softmax is None or softmax.op_type != "Softmax":
            continue
        transpose = makers.get(softmax.input[0])
        if transpose is None or [list(a.ints) for a in transpose.attribute] != [[0, 2, 1, 3]]:
            continue
        weight = editor.constants[conv.input[1]].reshape(1, 1, -1, 1)
        renamed = {n.output[0]: f"{n.output[0]}_last_axis" for n in (transpose, softmax)}
        transpose.attribute[0].ints[:] = [0, 1, 3, 2]
        softmax.attribute[0].i = 3
        conv.op_type, conv.input[1] = "MatMul", editor.constant(f"{conv.input[1]}_last_axis", weight)
        del conv.attribute[:]
        for n in (transpose, softmax, conv):
            n.input[0] = renamed.get(n.input[0], n.input[0])
            n.output[0] = renamed.get(n.output[0], n.output[0])
    return nodes


def _replace(graph: onnx.GraphProto, nodes: list[NodeProto], initializers: list[TensorProto]) -> None:
    used = {name for n in nodes for name in n.input} | {o.name for o in graph.output}
    nodes = [n for n in nodes if n.op_type != "Identity" or n.output[0] in used]
    used = {name for n in nodes for name in n.input} | {o.name for o in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.node[:], graph.initializer[:]
    del graph.value_info[:]  # shapes of intermediate tensors that the edits made stale; runtimes infer them
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *initializers])
