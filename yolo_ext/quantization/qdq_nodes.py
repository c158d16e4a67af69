# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The ONNX nodes and initializers of quantized tensors, and rewrites that change no number but the time."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.quantization.spec import Profile, Spec

BIAS_LIMIT = 2**29  # leaves the INT32 accumulator room for the products


@dataclass(frozen=True)
class Params:
    """How ONNX quantizes one activation tensor."""

    scale: np.float32  # step between two codes
    zero: np.generic  # code of zero, of the storage type
    clip: tuple[np.float32, np.float32] | None = None  # ends of the range where the storage type has more codes


def quant_params(entry: dict[str, Any], signed: bool = False, name: str = "a tensor") -> Params:
    """Return scale and zero point of the range of a site's entry, in the float32 arithmetic of the fake quantizers."""
    # Signed integers are the same codes less half their number. At 8 and 16 bits a symmetric tensor also has the code
    # below its narrow range, as in TensorRT; only values beyond the range reach it.
    spec = Spec.of(entry)
    lo, hi = (np.float32(entry.get(end, np.nan)) for end in ("lo", "hi"))
    with np.errstate(over="ignore"):
        scale = (max(-lo, hi) if spec.symmetric else hi - lo) / np.float32(spec.qmax)
    if not (np.isfinite(scale) and scale > 0 and lo <= 0 <= hi):
        raise UsageError(
            f"The range of {name} is [{entry.get('lo', 'none')}, {entry.get('hi', 'none')}]; quantization needs a "
            "finite one that is not empty and holds zero. Calibrate with images that resemble those of training."
        )
    width = 8 if spec.bits <= 8 else 16
    zero = 0 if spec.symmetric else int(np.rint(-lo / scale))
    ends = np.float32(spec.qmin - zero) * scale, np.float32(spec.qmax - zero) * scale
    half = 2 ** (width - 1)
    stored = zero + (0 if signed else half) if spec.symmetric else zero - (half if signed else 0)
    dtype = np.dtype(f"{'' if signed else 'u'}int{width}")
    return Params(scale, dtype.type(stored), ends if spec.bits != width else None)


@dataclass
class Editor:
    """Makes nodes, and collects their initializers."""

    profile: Profile
    constants: dict[str, np.ndarray]  # of the float file by name
    initializers: list[TensorProto] = field(default_factory=list)  # what the new nodes need
    shared: dict[tuple[Any, ...], str] = field(default_factory=dict)  # dequantized tensors by tensor and parameters

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer and return its name."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def qdq(self, x: str, y: str, params: Params, base: str, clip_behind: bool = False) -> list[NodeProto]:
        """Return the nodes, named by `base`, that quantize and dequantize `x` into `y`, and clip where needed."""
        # To clip behind the pair leaves the Q next to the convolution that it makes an integer one.
        scale, zero = self.constant(f"{base}_scale", params.scale), self.constant(f"{base}_zero_point", params.zero)
        source = f"{base}_clipped" if params.clip and not clip_behind else x
        result = f"{base}_unclipped" if params.clip and clip_behind else y
        q = _node("QuantizeLinear", [source, scale, zero], f"{base}_quantized", base)
        pair = [q, _node("DequantizeLinear", [q.output[0], scale, zero], result, base)]
        if not params.clip:
            return pair
        ends = [self.constant(f"{base}_{end}", v) for end, v in zip(("min", "max"), params.clip)]
        clip = _node("Clip", [result if clip_behind else x, *ends], y if clip_behind else source, base)
        return [*pair, clip] if clip_behind else [clip, *pair]

    def input(self, x: str, params: Params, base: str) -> tuple[str, list[NodeProto]]:
        """Return the name of `x` quantized with these parameters, and its Q/DQ pair unless it exists already."""
        key = (x, params, str(params.zero.dtype))
        if key in self.shared:
            return self.shared[key], []
        self.shared[key] = y = f"{base}_dequantized"
        return y, self.qdq(x, y, params, base)

    def weights(self, node: NodeProto, path: str, entry: Any, x: Params | None) -> tuple[list[str], list[NodeProto]]:
        """Return the names of weight and bias as a layer with quantized input `x` reads them, and their DQ nodes."""
        w, spec = self.constants[node.input[1]], Spec.of(entry)
        if w.dtype != np.float32:
            raise UsageError(f"The weight of '{path}' is {w.dtype}; INT8 starts from a float32 export (half=False).")
        axis, qmax = channel_axis(node) % w.ndim, np.float32(spec.qmax)
        ratio = np.asarray(entry.get("ratio", [1.0]), np.float32)
        if ratio.size not in (1, w.shape[axis] if spec.per_channel else 1):
            has = f"has {w.shape[axis]} channels, its state {ratio.size}"
            raise CheckFailed(f"The weight of '{path}' {has}. Calibrate again.")
        dims = tuple(d for d in range(w.ndim) if d != axis or not spec.per_channel)
        scale = np.maximum(np.abs(w).max(dims).reshape(-1) * ratio, np.float32(1e-12)) / qmax
        bias = self.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        integer = x is not None and self.profile.int32_bias and spec.bits <= 8 and x.zero.itemsize == 1
        if bias is not None and integer:  # a nearly dead channel must not push its bias beyond INT32
            largest = np.abs(bias).reshape(-1, scale.size).max(0)
            scale = np.maximum(scale, largest / (x.scale * np.float32(BIAS_LIMIT)))  # type: ignore[union-attr]
        shape = [-1 if d == axis else 1 for d in range(w.ndim)]
        codes = np.clip(np.rint(w / scale.reshape(shape)), -qmax, qmax)
        codes = codes.astype(np.int8 if spec.bits <= 8 else np.int16)
        nodes = [self._dequantized(f"{path}.weight", codes, scale if spec.per_channel else scale[0], axis)]
        if bias is not None and integer:
            step = np.tile(scale, len(bias) // scale.size) * x.scale  # type: ignore[union-attr]
            nodes.append(self._dequantized(f"{path}.bias", np.rint(bias / step).astype(np.int32), step, 0))
        kept = [node.input[2]] if bias is not None and not integer else []
        return [*(n.output[0] for n in nodes), *kept], nodes

    def _dequantized(self, base: str, codes: np.ndarray, scale: Any, axis: int) -> NodeProto:
        """Return the node that dequantizes a constant that is stored as codes."""
        values = {"quantized": codes, "scale": scale, "zero_point": np.zeros_like(scale, codes.dtype)}
        inputs = [self.constant(f"{base}_{name}", value) for name, value in values.items()]
        along = {"axis": axis} if np.ndim(scale) else {}
        return _node("DequantizeLinear", inputs, f"{base}_dequantized", base, **along)


def _node(op: str, inputs: list[str], output: str, base: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], f"{base}_{op}", **attributes)


def channel_axis(node: NodeProto) -> int:
    """Return the axis of the output channels in the weight of a layer's node."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 0 if node.op_type == "Conv" else -1 if node.op_type == "MatMul" else 1


def fuse_silu(nodes: list[NodeProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """Return the nodes with every `x * sigmoid(x)` as one QuickGelu, which ONNX Runtime makes in float graphs only."""
    uses = Counter([*(name for n in nodes for name in n.input), *(o.name for o in graph.output)])
    sigmoids = {n.output[0]: n for n in nodes if n.op_type == "Sigmoid" and uses[n.output[0]] == 1}
    fused, drop = [], set()
    for n in nodes:
        gate = next((i for i in n.input if i in sigmoids), None) if n.op_type == "Mul" else None
        if gate and {x := sigmoids[gate].input[0], gate} == set(n.input):
            drop.add(gate)
            n = helper.make_node("QuickGelu", [x], list(n.output), n.name, domain="com.microsoft", alpha=1.0)
        fused.append(n)
    return [n for n in fused if n.output[0] not in drop]


def transpose_dfl(nodes: list[NodeProto], editor: Editor) -> list[NodeProto]:
    """Return the nodes with the DFL softmax over the last axis, where ONNX Runtime is about ten times faster."""
    # Behind (batch, 4, anchors, 16) instead of (batch, 16, 4, anchors), the Conv is a MatMul with the same numbers.
    makers = {n.output[0]: n for n in nodes}
    for conv in nodes:
        softmax = makers.get(conv.input[0]) if conv.op_type == "Conv" and "dfl" in conv.name else None
        if softmax is None or softmax.op_type != "Softmax":
            continue
        transpose = makers.get(softmax.input[0])
        if transpose is None or [list(a.ints) for a in transpose.attribute] != [[0, 2, 1, 3]]:
            continue
        weight = editor.constants[conv.input[1]].reshape(1, 1, -1, 1)
        name = editor.constant(f"{conv.input[1]}_last_axis", weight)
        renamed = {n.output[0]: f"{n.output[0]}_last_axis" for n in (transpose, softmax)}
        transpose.attribute[0].ints[:] = [0, 1, 3, 2]
        softmax.attribute[0].i = 3
        conv.op_type, conv.input[1] = "MatMul", name
        del conv.attribute[:]
        for n in (transpose, softmax, conv):
            n.input[0], n.output[0] = (renamed.get(name, name) for name in (n.input[0], n.output[0]))
    return nodes
