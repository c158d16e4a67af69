# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where an ONNX file leaves its model: the first node whose output, or weight, differs.

Convolutions and linear layers are compared with the torch modules themselves, found through the names of their weights.
The nodes between them have no module of their own; they are compared with the same tensors of a fresh, unsimplified
export of the same model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from yolo_ext.deployment.compare import weight_name
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.runtime import Source, describe, run, session
from yolo_ext.stock.context import quiet
from yolo_ext.stock.load import float_model

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
STEP = 64  # tensors read at once, which bounds memory
TOLERANCES = {"fp32": (1e-4, 1e-5), "fp16": (3e-2, 1e-2)}  # relative to the largest value; the second if none is found


def first_difference(
    model: Source, onnx_path: str | Path, x: np.ndarray, different: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Find the first node of an ONNX file, in the order of computation, that does not do what the model does.

    Args:
        model: Float Ultralytics model or ``.pt`` file.
        onnx_path: Its export.
        x: Input (B, C, H, W) on which the two differ.
        different: Weights known to differ, from `compare.compare_weights`.

    Returns:
        ``node``, ``op``, ``module`` (path in the model), ``tensor``, ``error`` (largest, relative to the tensor's
        largest value), ``weights`` (those of the node that differ) and ``between``, the nodes since the last layer that
        agreed, which are suspect too where the torch module got another input. None if no node can be blamed.
    """
    meta, proto = describe(onnx_path), onnx.load(onnx_path)
    batch = meta["shape"][0] or 1
    x = np.concatenate([x, np.repeat(x[-1:], -len(x) % batch, 0)])  # a static graph takes full batches only
    with tempfile.TemporaryDirectory() as folder:
        options = {"opset": meta["opset"], "batch": meta["batch"], "dynamic": None in meta["shape"]}
        fresh = export_onnx(
            model, Path(folder) / "fresh.onnx", x.shape[2:], simplify=False, end2end=meta["end2end"], nms=meta["nms"],
            **options,
        )  # fmt: skip
        reference = onnx.load(fresh)
    layers = _layer_outputs(model, x, meta["end2end"])
    for tolerance in TOLERANCES[meta["precision"]]:
        passed: list[str] = []
        for node, gap, layer in _gaps(proto, reference, layers, x):
            bad = {name: different[name] for name in node.input if different and name in different}
            if gap > tolerance or bad:
                found = {"node": node.name, "op": node.op_type, "module": layer or module_path(node.name)}
                return {**found, "tensor": node.output[0], "error": gap, "weights": bad, "between": passed}
            passed = [] if layer else [*passed, node.name]
    return None


def describe_difference(found: Mapping[str, Any] | None) -> str:
    """Return what `first_difference` found as one sentence."""
    if found is None:
        return "No single node differs from a fresh export of the model: names, order of outputs or options differ."
    text = f"First difference: node '{found['node']}' ({found['op']}) of module '{found['module']}'"
    text += f", off by {100 * found['error']:.2g} % of its largest value"
    for name, w in found["weights"].items():
        text += f"; {w['values']} of {w['of']} values of '{name}' differ, by up to {100 * w['error']:.2g} %"
    if not found["weights"] and found["between"]:
        text += f"; or a node before it: {', '.join(found['between'][-3:])}"
    return text + "."


def module_path(node: str) -> str:
    """Return the module path in a node name: ``/model.2/m/m.0/cv1/conv/Conv`` is of ``model.2.m.0.cv1.conv``."""
    parts: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _layer_outputs(model: Source, x: np.ndarray, end2end: bool) -> dict[str, np.ndarray]:
    """Run the fused model once and return the output of each convolution and linear layer by module path."""
    with quiet():
        net = float_model(model)
        if getattr(net, "end2end", False) != end2end:
            net.end2end = end2end
        net = net.fuse(verbose=False)
    net.model[-1].export = True
    found: dict[str, np.ndarray] = {}
    for path, module in net.named_modules():
        if isinstance(module, LAYERS):  # copied, because the activation that follows may work in place
            module.register_forward_hook(lambda _m, _i, y, path=path: found.__setitem__(path, y.numpy().copy()))
    with torch.inference_mode():
        net(torch.from_numpy(x))
    return found


def _gaps(
    proto: onnx.ModelProto, reference: onnx.ModelProto, layers: Mapping[str, np.ndarray], x: np.ndarray
) -> Iterator[tuple[onnx.NodeProto, float, str | None]]:
    """Yield the nodes in order of computation with their relative error and, for a layer, its module path."""
    shared = {name for n in reference.graph.node for name in n.output}
    weights = {f"{path}.weight": path for path in layers}
    nodes = [n for n in proto.graph.node if n.output]
    for start in range(0, len(nodes), STEP):
        part = nodes[start : start + STEP]
        paths = {n.output[0]: _layer(n, weights) for n in part}
        mine = _tensors(proto, [n.output[0] for n in part], x)
        fresh = _tensors(reference, [t for t, path in paths.items() if path is None and t in shared], x)
        for n in part:
            path = paths[n.output[0]]
            expected = layers[path] if path else fresh.get(n.output[0])
            yield n, _gap(expected, mine.get(n.output[0])), path


def _layer(node: onnx.NodeProto, weights: Mapping[str, str]) -> str | None:
    """Return the module path of a convolution or linear layer."""
    if node.op_type not in {"Conv", "ConvTranspose", "Gemm"} or len(node.input) < 2:
        return None
    name = weight_name(node.input[1], weights)
    return weights[name] if name else None


def _gap(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Return the largest difference relative to the largest value of ``a``; 0 where there is nothing to compare."""
    if a is None or b is None or not np.issubdtype(a.dtype, np.floating):
        return 0.0
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a)
    scale = float(np.abs(a[finite]).max(initial=0.0)) + 1e-12
    error = np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)).max(initial=0.0)
    return float("inf") if np.isnan(error) else float(error) / scale


def _tensors(proto: onnx.ModelProto, names: list[str], x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the named inner tensors of a graph for an input."""
    if not names:
        return {}
    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return dict(zip(names, run(session(opened.SerializeToString()), x)))
