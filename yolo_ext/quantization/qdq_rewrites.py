# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Rewrites of an ONNX graph that change no number and let ONNX Runtime run it faster."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


def fuse_silu(nodes: list[NodeProto], graph: onnx.GraphProto) -> list[NodeProto]:
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


def transpose_dfl(
    nodes: list[NodeProto], constants: Mapping[str, np.ndarray], initializers: list[TensorProto]
) -> list[NodeProto]:
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
        weight, name = constants[conv.input[1]].reshape(1, 1, -1, 1), f"{conv.input[1]}_last_axis"
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
        renamed = {n.output[0]: f"{n.output[0]}_last_axis" for n in (transpose, softmax)}
        transpose.attribute[0].ints[:] = [0, 1, 3, 2]
        softmax.attribute[0].i = 3
        conv.op_type, conv.input[1] = "MatMul", name
        del conv.attribute[:]
        for n in (transpose, softmax, conv):
            n.input[0] = renamed.get(n.input[0], n.input[0])
            n.output[0] = renamed.get(n.output[0], n.output[0])
    return nodes
