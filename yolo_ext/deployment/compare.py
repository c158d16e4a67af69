# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Two models side by side: raw outputs anchor by anchor, weights, and the first node of an ONNX file that differs."""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.decode import Size, full_batches, height_width
from yolo_ext.deployment.export import export_onnx, max_relative_error
from yolo_ext.deployment.runtime import Predict, Source, describe, is_final, load_image, run, session
from yolo_ext.stock import deployed, module_path, quiet
from yolo_ext.stock.load import as_exported, choose_head, float_model

TIE = 1e-4  # scores closer than this have no order
EDGE = 1e-3  # rounding decides whether a detection this close to the threshold of embedded NMS is there
PIXELS = 10.0  # floor of the relative error of keypoints: a limit of 1e-3 then means 1e-2 px, as for boxes
WEIGHT_FLOOR = 1e-3  # share of a tensor's largest weight; errors of smaller weights are measured against it
LAYERS, OPS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear), {"Conv", "ConvTranspose", "Gemm"}
STEP = 64  # tensors read at once, which bounds memory
TOLERANCES = {"fp32": (1e-4, 1e-5), "fp16": (3e-2, 1e-2)}  # relative to the largest value; the second if none is found


def inputs(images: Iterable[str | Path], imgsz: Size, meta: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield batches (B, C, H, W), float32 in 0..1: images, noise, zeros, ones, and other sizes if open."""
    batch, channels = meta["shape"][0] or 1, meta["channels"]
    images, (h, w) = list(images), height_width(imgsz)
    one = (1, channels, h, w)
    made = [np.random.default_rng(0).random(one, dtype=np.float32), np.zeros(one, np.float32), np.ones(one, np.float32)]
    # In an even image the queries of RT-DETR are all alike, and rounding chooses among them.
    made = made[:1] if meta["stretch"] else made
    singles = itertools.chain((load_image(path, (h, w), channels) for path in images), made)
    while waiting := list(itertools.islice(singles, batch)):
        yield np.concatenate(waiting)
    two = [*images, *images][:2]
    if meta["shape"][0] is None:
        yield np.concatenate([*(load_image(path, (h, w), channels) for path in two), made[-1]])
    if None in meta["shape"][2:]:
        yield np.concatenate([load_image(path, (h + meta["stride"], w), channels) for path in two])


def _aligned(a: np.ndarray, b: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Pair detections; rounding decides on the order of ties, and which rows at the score of the last one are there."""
    a = a[a[:, 4] > max(a[:, 4].min(), b[:, 4].min(), floor) + TIE]
    distance = np.abs(a[:, None, :4] - b[None, :, :4]).max(2) + 100 * np.abs(a[:, None, 4] - b[None, :, 4])
    distance[a[:, None, 5] != b[None, :, 5]] = np.inf
    matched = b[distance.argmin(1)].copy()
    matched[np.isinf(distance.min(1))] = np.inf
    return a, matched


def _differences(a: list[np.ndarray], b: list[np.ndarray], meta: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Return for an image box error (px), score error and top score of `a` (N, 3), and the error of the rest."""
    final = is_final(meta)
    p, q = (y if final or y.ndim == 1 else y.T for y in (a[0], b[0]))
    rest = max_relative_error(a[1:], b[1:])
    if p.ndim == 1:  # classification: one row of probabilities, no boxes
        return np.array([[0.0, np.abs(p - q).max(), p.max()]]), rest
    ranked = np.zeros((0, 3))
    if final and not meta["nms"]:  # always full and sorted: scores also compare rank by rank, whatever their rows are
        ranked = np.array([[0.0, np.abs(p[:, 4] - q[:, 4]).max(), 0.0]])
    if final:
        p, q = _aligned(p, q, meta["nms"]["conf"] + EDGE if meta["nms"] else 0.0)
    scores, extras = slice(4, 5 if final else 4 + meta["nc"]), 6 if final else 4 + meta["nc"]
    if p.shape[1] > extras and len(p):
        floor = PIXELS if meta["task"] == "pose" else 1.0
        rest = max(rest, max_relative_error([p[:, extras:]], [q[:, extras:]], floor))
    error = np.abs(p - q)
    rows = np.stack([error[:, :4].max(1), error[:, scores].max(1), p[:, scores].max(1)], 1)
    return np.concatenate([rows, ranked]), rest


def compare(a: Predict, b: Predict, batches: Iterable[np.ndarray], meta: dict[str, Any]) -> dict[str, Any]:
    """Compare the raw outputs of two models, ``rows`` as of `_differences`, over batches (B, C, H, W) in 0..1."""
    rows, rest, worst = [], 0.0, (-1.0, np.zeros(0))
    shapes: list[list[int]] = []
    for x in batches:
        ya, yb = a(x), b(x)
        mine, other = ([y.shape for y in outputs] for outputs in (ya, yb))
        if mine != other:
            raise UsageError(f"The two models give outputs of shapes {mine} and {other}.")
        shapes += [list(x.shape)] if list(x.shape) not in shapes else []
        for i in range(len(x)):
            found, extra = _differences([y[i] for y in ya], [y[i] for y in yb], meta)
            rows.append(found)
            rest = max(rest, extra)
            size = float(np.nan_to_num(found[:, :2] * [0.01, 1.0], nan=np.inf).max(initial=extra))
            worst = (size, x) if size > worst[0] else worst
    found = np.concatenate([*rows, np.zeros((int(not any(map(len, rows))), 3))])  # embedded NMS may find nothing
    return {"rows": found, "rest": rest, "inputs": len(rows), "shapes": shapes, "worst": worst[1]}


def summary(rows: np.ndarray) -> dict[str, float]:
    """Return maximum and mean of the box (px) and score errors of `compare`'s rows."""
    worst, mean = rows.max(0).tolist(), rows.mean(0).tolist()
    return {"box_max": worst[0], "box_mean": mean[0], "score_max": worst[1], "score_mean": mean[1]}


def compare_weights(model: Source, onnx_path: str | Path, end2end: bool, limit: float) -> dict[str, Any]:
    """Compare the weights in an ONNX file by name with the fused model's: one that is off may hide in the outputs."""
    known = {k: v.numpy() for k, v in _fused(model, end2end).state_dict().items() if v.ndim}
    found: dict[str, dict[str, float]] = {}
    compared, largest = 0, 0.0
    for tensor in onnx.load(onnx_path).graph.initializer:
        a = known.get(_known(tensor.name, known))
        if a is None or list(tensor.dims) != list(a.shape):
            continue
        error = np.abs(a - onnx.numpy_helper.to_array(tensor).astype(np.float32))
        error /= np.abs(a) + WEIGHT_FLOOR * np.abs(a).max() + np.finfo(np.float32).tiny
        error = np.nan_to_num(error, nan=np.inf)
        compared, largest = compared + 1, max(largest, float(error.max(initial=0.0)))
        if off := int((error > limit).sum()):
            found[tensor.name] = {"error": float(error.max()), "values": off, "of": int(error.size)}
    worst_first = dict(sorted(found.items(), key=lambda item: -item[1]["error"]))
    return {"compared": compared, "weight_max": largest, "different": worst_first}


def _fused(model: Source, end2end: bool) -> Any:
    with quiet():
        return deployed(choose_head(float_model(model), end2end))


def _known(name: str, known: Iterable[str]) -> str:
    """Return the name in the model of a tensor of an ONNX file, "" without one; embedded NMS adds one level."""
    return next((n for n in (name, name.removeprefix("model.")) if n in known), "")


def first_difference(model: Source, onnx_path: str | Path, x: np.ndarray,
                     different: Mapping[str, Any] | None = None) -> dict[str, Any] | None:  # fmt: skip
    """Find the first node that differs: layers from the model's modules, those between from a fresh plain export."""
    meta, proto = describe(onnx_path), onnx.load(onnx_path)
    x = full_batches(x, meta["shape"][0] or 1)
    with tempfile.TemporaryDirectory() as folder:
        options = {k: meta[k] for k in ("opset", "batch", "end2end", "nms")} | {"dynamic": None in meta["shape"]}
        reference = onnx.load(export_onnx(model, Path(folder) / "m.onnx", x.shape[2:], simplify=False, **options))
    layers = _layer_outputs(model, x, meta["end2end"])
    for tolerance in TOLERANCES[meta["precision"]]:
        passed: list[str] = []
        for node, gap, layer in _gaps(proto, reference, layers, x):
            bad = {name: different[name] for name in node.input if different and name in different}
            if gap > tolerance or bad:
                found = {"node": node.name, "op": node.op_type}
                found["module"] = layer or module_path(node.name).rpartition(".")[0]
                return {**found, "tensor": node.output[0], "error": gap, "weights": bad, "between": passed}
            passed = [] if layer else [*passed, node.name]
    return None


def _layer_outputs(model: Source, x: np.ndarray, end2end: bool) -> dict[str, np.ndarray]:
    """Run the fused model once and return the output of each convolution and linear layer by module path."""
    net = as_exported(_fused(model, end2end))
    found: dict[str, np.ndarray] = {}
    for path, module in net.named_modules():
        if isinstance(module, LAYERS):  # copied, because the activation that follows may work in place
            module.register_forward_hook(lambda _m, _i, y, path=path: found.__setitem__(path, y.numpy().copy()))
    with torch.inference_mode():
        net(torch.from_numpy(x))
    return found


def _gaps(proto: onnx.ModelProto, reference: onnx.ModelProto, layers: Mapping[str, np.ndarray],
          x: np.ndarray) -> Iterator[tuple[onnx.NodeProto, float, str | None]]:  # fmt: skip
    """Yield the nodes in order of computation with their relative error and, for a layer, its module path."""
    shared = {name for n in reference.graph.node for name in n.output}
    weights = {f"{path}.weight": path for path in layers}
    nodes = [(n, n.output[0]) for n in proto.graph.node if n.output]
    for start in range(0, len(nodes), STEP):
        part = nodes[start : start + STEP]
        paths = {t: weights.get(_known(n.input[1], weights)) for n, t in part if n.op_type in OPS and n.input[1:]}
        mine = _tensors(proto, [t for _, t in part], x)
        fresh = _tensors(reference, [t for _, t in part if not paths.get(t) and t in shared], x)
        for n, t in part:
            path = paths.get(t)
            yield n, _gap(layers[path] if path else fresh.get(t), mine[t]), path


def _gap(a: np.ndarray | None, b: np.ndarray) -> float:
    """Return the largest difference relative to the largest value of ``a``; 0 where there is nothing to compare."""
    if a is None or not np.issubdtype(a.dtype, np.floating):
        return 0.0
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a)
    a, b = (np.where(finite, x, 0) for x in (a, b))
    return max_relative_error([a], [b], floor=float(np.abs(a).max(initial=0.0)) + 1e-12)


def _tensors(proto: onnx.ModelProto, names: list[str], x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the named inner tensors of a graph for an input; `proto` comes back with them as its outputs."""
    if not names:
        return {}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return dict(zip(names, run(session(proto.SerializeToString()), x)))
