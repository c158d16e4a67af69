# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Raw outputs of two models side by side: scores, boxes and what the task adds, anchor by anchor, and weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.export import max_relative_error
from yolo_ext.deployment.processing import Predict, Size, height_width, load_image
from yolo_ext.deployment.runtime import Source
from yolo_ext.stock.context import quiet
from yolo_ext.stock.load import float_model

TIE = 1e-4  # scores closer than this have no order
EDGE = 1e-3  # rounding decides whether a detection this close to the threshold of embedded NMS is there
PIXELS = 10.0  # floor of the relative error of keypoints: a limit of 1e-3 then means 1e-2 px, as for boxes
WEIGHT_FLOOR = 1e-3  # share of a tensor's largest weight; errors of smaller weights are measured against it


def inputs(images: Iterable[str | Path], imgsz: Size, meta: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield batches: the real images, then noise, zeros and ones, which reach ranges that photographs do not.

    Args:
        images: Image files.
        imgsz: Input size in pixels.
        meta: `runtime.describe` of the ONNX file. A static one gets full batches of its size; an open one gets every
            image alone, three at once, and two of another size.

    Yields:
        Arrays (B, C, H, W), float32 in 0..1.
    """
    batch, channels = meta["shape"][0] or 1, meta["shape"][1] or 3
    images, (h, w) = list(images), height_width(imgsz)
    singles = _singles(images, (h, w), channels)
    while waiting := list(itertools.islice(singles, batch)):
        yield np.concatenate(waiting)
    two = [*images, *images][:2]
    if meta["shape"][0] is None:
        yield np.concatenate([load_image(p, (h, w)) for p in two] + [np.zeros((1, channels, h, w), np.float32)])
    if None in meta["shape"][2:]:
        yield np.concatenate([load_image(p, (h + meta["stride"], w)) for p in two])


def _singles(images: Iterable[str | Path], size: tuple[int, int], channels: int) -> Iterator[np.ndarray]:
    for path in images:
        yield load_image(path, size)
    shape = (1, channels, *size)
    yield np.random.default_rng(0).random(shape, dtype=np.float32)
    yield np.zeros(shape, np.float32)
    yield np.ones(shape, np.float32)


def _rows(output: np.ndarray, final: bool) -> np.ndarray:
    """Return one image's output as rows: anchors of a dense head, detections of an end-to-end head or NMS."""
    return output if final or output.ndim == 1 else output.T


def _aligned(a: np.ndarray, b: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Pair the rows of two lists of detections, whose order is only defined up to ties in the score.

    Rows at the score of the last one are left out: which of them made it into the top k is a matter of rounding.
    """
    a = a[a[:, 4] > max(a[:, 4].min(), b[:, 4].min(), floor) + TIE]
    distance = np.abs(a[:, None, :4] - b[None, :, :4]).max(2) + 100 * np.abs(a[:, None, 4] - b[None, :, 4])
    distance[a[:, None, 5] != b[None, :, 5]] = np.inf
    matched = b[distance.argmin(1)].copy()
    matched[np.isinf(distance.min(1))] = np.inf
    return a, matched


def _differences(
    a: list[np.ndarray], b: list[np.ndarray], meta: dict[str, Any]
) -> tuple[np.ndarray, float, list[np.ndarray]]:
    """Compare the outputs for one image.

    Returns:
        Per row (largest box error in px, largest score error, top score of ``a``), the relative error of the rest, and
        the absolute errors of each output.
    """
    final = meta["end2end"] or bool(meta["nms"])
    p, q = _rows(a[0], final), _rows(b[0], final)
    rest, others = max_relative_error(a[1:], b[1:]), [np.abs(y - z) for y, z in zip(a[1:], b[1:])]
    if p.ndim == 1:  # classification: one row of probabilities, no boxes
        error = np.abs(p - q)
        return np.array([[0.0, error.max(), p.max()]]), rest, [error, *others]
    ranked = np.zeros((0, 3))
    if final:
        if meta["end2end"]:  # always full and sorted, so scores also compare rank by rank, whatever rows they belong to
            ranked = np.array([[0.0, np.abs(p[:, 4] - q[:, 4]).max(), 0.0]])
        p, q = _aligned(p, q, meta["nms"]["conf"] + EDGE if meta["nms"] else 0.0)
    scores = slice(4, 5 if final else 4 + meta["nc"])
    first_extra = 6 if final else 4 + meta["nc"]
    if p.shape[1] > first_extra and len(p):
        floor = PIXELS if meta["task"] == "pose" else 1.0
        rest = max(rest, max_relative_error([p[:, first_extra:]], [q[:, first_extra:]], floor))
    error = np.abs(p - q)
    rows = np.stack([error[:, :4].max(1), error[:, scores].max(1), p[:, scores].max(1)], 1)
    return np.concatenate([rows, ranked]), rest, [error, *others]


def compare(a: Predict, b: Predict, batches: Iterable[np.ndarray], meta: dict[str, Any]) -> dict[str, Any]:
    """Run two models over all inputs and compare their raw outputs.

    Args:
        a: The reference.
        b: The other one.
        batches: Images (B, C, H, W), float32 in 0..1.
        meta: `runtime.describe` of either.

    Returns:
        ``rows`` (box error in px, score error and top score of the reference for each anchor), ``rest`` (largest
        relative error of masks, keypoints and angles), ``outputs`` (``max`` and ``mean`` absolute error of each),
        ``inputs`` (number of images), ``shapes``, and ``worst``, the batch with the largest error.

    Raises:
        UsageError: The outputs have different shapes.
    """
    rows, rest, count, worst = [], 0.0, 0, (-1.0, np.zeros(0))
    shapes: list[list[int]] = []
    errors: list[list[tuple[float, float, int]]] = []
    for x in batches:
        ya, yb = a(x), b(x)
        if [y.shape for y in ya] != [y.shape for y in yb]:
            raise UsageError(
                f"The two models give outputs of shapes {[y.shape for y in ya]} and {[y.shape for y in yb]}."
            )
        count += len(x)
        shapes += [list(x.shape)] if list(x.shape) not in shapes else []
        for i in range(len(x)):
            found, extra, each = _differences([y[i] for y in ya], [y[i] for y in yb], meta)
            rows.append(found)
            rest = max(rest, extra)
            errors.append([(float(e.max(initial=0)), float(e.sum()), e.size) for e in each])
            size = float(np.nan_to_num(found[:, :2] * [0.01, 1.0], nan=np.inf).max(initial=extra))
            worst = (size, x) if size > worst[0] else worst
    outputs = [
        {"max": max(m for m, _, _ in per), "mean": sum(s for _, s, _ in per) / max(1, sum(n for _, _, n in per))}
        for per in zip(*errors)
    ]
    return {
        "rows": np.concatenate(rows),
        "rest": rest,
        "outputs": outputs,
        "inputs": count,
        "shapes": shapes,
        "worst": worst[1],
    }


def summary(rows: np.ndarray) -> dict[str, float]:
    """Return maximum and mean of the box (px) and score errors of `compare`'s rows."""
    worst, mean = rows.max(0).tolist(), rows.mean(0).tolist()
    return {"box_max": worst[0], "box_mean": mean[0], "score_max": worst[1], "score_mean": mean[1]}


def compare_weights(model: Source, onnx_path: str | Path, end2end: bool, limit: float) -> dict[str, Any]:
    """Compare the weights inside an ONNX file with those of the fused model, by name.

    A single weight that is a little off may move no score by more than rounding does; here it shows exactly.

    Args:
        model: Float Ultralytics model or ``.pt`` file.
        onnx_path: Its export in FP32 or FP16.
        end2end: Head of a dual-head model that was exported.
        limit: Relative error from which on a value counts as different.

    Returns:
        ``compared`` (number of tensors found on both sides), ``weight_max`` (largest relative error) and
        ``different``: tensor name to its largest relative error and how many values are off, the worst first.
    """
    known = deployed_weights(model, end2end)
    found: dict[str, dict[str, float]] = {}
    compared, largest = 0, 0.0
    for tensor in onnx.load(onnx_path).graph.initializer:
        name = weight_name(tensor.name, known)
        if name is None or list(tensor.dims) != list(known[name].shape):
            continue
        a, b = known[name], numpy_helper.to_array(tensor).astype(np.float32)
        error = np.abs(a - b) / (np.abs(a) + WEIGHT_FLOOR * np.abs(a).max() + np.finfo(np.float32).tiny)
        error = np.nan_to_num(error, nan=np.inf)
        compared, largest = compared + 1, max(largest, float(error.max(initial=0.0)))
        if off := int((error > limit).sum()):
            found[tensor.name] = {"error": float(error.max()), "values": off, "of": int(error.size)}
    worst_first = dict(sorted(found.items(), key=lambda item: -item[1]["error"]))
    return {"compared": compared, "weight_max": largest, "different": worst_first}


def deployed_weights(model: Source, end2end: bool) -> dict[str, np.ndarray]:
    """Return the tensors of the fused model by name, as an export holds them."""
    with quiet():
        net = float_model(model)
        if getattr(net, "end2end", False) != end2end:
            net.end2end = end2end
        return {k: v.numpy() for k, v in net.fuse(verbose=False).state_dict().items() if v.ndim}


def weight_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name in the model of a tensor of an ONNX file, None without one; embedded NMS adds one level."""
    return next((n for n in (name, name.removeprefix("model.")) if n in known), None)
