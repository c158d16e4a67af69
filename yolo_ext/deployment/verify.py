# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Proof that an exported file does what the model does: raw tensors, detections, INT8 against its simulation, mAP."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils.metrics import box_iou

from yolo_ext.deployment.export import head_args, max_relative_error
from yolo_ext.deployment.runtime import (
    Predict,
    Source,
    conv_report,
    describe,
    detect,
    float_model,
    load_image,
    predictor,
    quiet,
)
from yolo_ext.errors import UsageError

# FP32 limits: well above rounding (1e-3 px, 2e-6 on a trained model), well below a wrong weight. INT8 limits: between a
# saturating AVX2 kernel (5 px, 0.39) and a sound one (0.23 px, 0.02 to 0.04: single codes that round differently).
LIMITS = {
    "score_max": 1e-4,
    "box_max": 1e-2,
    "extra_max": 1e-3,
    "matched": 0.995,
    "map": 1e-3,
    "int8_box_mean": 0.3,
    "int8_score_max": 0.1,
}
CONFIDENT = 0.1  # anchors below this score never become detections, and their boxes are noise


def _inputs(images: Iterable[str | Path], imgsz: int, channels: int = 3) -> Iterator[np.ndarray]:
    """Yield the real images, then noise, all zeros and all ones, which reach ranges that photographs do not."""
    for path in images:
        yield load_image(path, imgsz)
    shape = (1, channels, imgsz, imgsz)
    yield np.random.default_rng(0).random(shape, dtype=np.float32)
    yield np.zeros(shape, np.float32)
    yield np.ones(shape, np.float32)


def _rows(output: np.ndarray, end2end: bool) -> np.ndarray:
    """Return one image's output as rows: anchors of a dense head, detections of an end-to-end head."""
    return output[0] if end2end or output.ndim == 2 else output[0].T


def _aligned(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair the rows of two end-to-end outputs, whose order is only defined up to ties in the score.

    Rows at the score of the last one are left out: which of them made it into the top k is a matter of rounding.
    """
    a = a[a[:, 4] > max(a[:, 4].min(), b[:, 4].min()) + LIMITS["score_max"]]
    distance = np.abs(a[:, None, :4] - b[None, :, :4]).max(2) + 100 * np.abs(a[:, None, 4] - b[None, :, 4])
    distance[a[:, None, 5] != b[None, :, 5]] = np.inf
    matched = b[distance.argmin(1)].copy()
    matched[np.isinf(distance.min(1))] = np.inf
    return a, matched


def _differences(a: list[np.ndarray], b: list[np.ndarray], meta: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Return per row (largest box error in px, largest score error, top score of ``a``), and the error of the rest."""
    if [y.shape for y in a] != [y.shape for y in b]:
        raise UsageError(f"The two models give outputs of shapes {[y.shape for y in a]} and {[y.shape for y in b]}.")
    p, q = _rows(a[0], meta["end2end"]), _rows(b[0], meta["end2end"])
    rest = max_relative_error(a[1:], b[1:])
    if a[0].ndim == 2:  # classification: one row of probabilities, no boxes
        error = np.abs(p - q).max(keepdims=True)
        return np.stack([np.zeros_like(error), error, p.max(keepdims=True)], 1), rest
    ranked = np.zeros((0, 3))
    if meta["end2end"]:  # scores come sorted, so they also compare rank by rank, whatever rows they belong to
        ranked = np.array([[0.0, np.abs(p[:, 4] - q[:, 4]).max(), 0.0]])
        p, q = _aligned(p, q)
    scores = slice(4, 5 if meta["end2end"] else 4 + meta["nc"])
    first_extra = 6 if meta["end2end"] else 4 + meta["nc"]
    if p.shape[1] > first_extra and len(p):
        rest = max(rest, max_relative_error([p[:, first_extra:]], [q[:, first_extra:]]))
    box = np.abs(p[:, :4] - q[:, :4]).max(1)
    score = np.abs(p[:, scores] - q[:, scores]).max(1)
    return np.concatenate([np.stack([box, score, p[:, scores].max(1)], 1), ranked]), rest


def _compare(
    a: Predict, b: Predict, inputs: Iterable[np.ndarray], meta: dict[str, Any]
) -> tuple[np.ndarray, float, int]:
    """Run both over all inputs; return the stacked rows of `_differences`, the largest rest and the input count."""
    found = [_differences(a(x), b(x), meta) for x in inputs]
    return np.concatenate([rows for rows, _ in found]), max(rest for _, rest in found), len(found)


def _summary(rows: np.ndarray) -> dict[str, float]:
    """Return maximum and mean of the box (px) and score errors."""
    worst, mean = rows.max(0).tolist(), rows.mean(0).tolist()
    return {"box_max": worst[0], "box_mean": mean[0], "score_max": worst[1], "score_mean": mean[1]}


def verify_tensors(model: Source, onnx_path: str | Path, images: Iterable[str | Path], imgsz: int) -> dict[str, Any]:
    """Compare the raw head output of the torch model with ONNX Runtime's, anchor by anchor.

    Args:
        model: Float Ultralytics model or ``.pt`` file.
        onnx_path: Its FP32 export.
        images: Real images; noise, zeros and ones are always added.
        imgsz: Square input size in pixels.

    Returns:
        ``box_max, box_mean`` in pixels, ``score_max, score_mean``, ``extra_max`` (masks, keypoints, angle; relative),
        and ``inputs``, the number of inputs compared.

    Raises:
        UsageError: A file is missing, or the outputs have different shapes.
    """
    meta = describe(onnx_path)
    pair = predictor(model, end2end=meta["end2end"]), predictor(onnx_path)
    rows, rest, count = _compare(*pair, _inputs(images, imgsz), meta)
    return {**_summary(rows), "extra_max": rest, "inputs": count}


def _match(a: torch.Tensor, b: torch.Tensor, match_iou: float) -> list[tuple[int, int, float]]:
    """Pair detections of one class greedily from the highest IoU down; return (row of a, row of b, IoU)."""
    overlap, pairs = box_iou(a[:, :4], b[:, :4]) * (a[:, None, 5] == b[None, :, 5]), []
    while overlap.numel() and overlap.max() >= match_iou:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        pairs.append((i, j, float(overlap[i, j])))
        overlap[i], overlap[:, j] = -1, -1
    return pairs


def verify_detections(
    a: Source,
    b: Source,
    images: Iterable[str | Path],
    imgsz: int,
    conf: float = 0.25,
    iou: float = 0.7,
    *,
    match_iou: float = 0.99,
    margin: float = 1e-3,
) -> dict[str, Any]:
    """Compare the detections of two models after the same preprocessing and NMS.

    Args:
        a: Ultralytics model, ``.pt`` or ``.onnx`` file.
        b: The other one.
        images: Image files.
        imgsz: Square input size in pixels.
        conf: Confidence threshold.
        iou: NMS IoU threshold.
        match_iou: Two detections of one class are the same from this IoU on.
        margin: Detections this close to ``conf`` need no partner: rounding decides whether they appear.

    Returns:
        ``matched`` (share of detections of both sides with a partner), ``mean_iou`` and ``mean_score_diff`` of the
        pairs, ``detections`` (of both sides together) and ``images``.

    Raises:
        UsageError: A model or image is not usable, or the models differ in their classes.
    """
    metas = [describe(a), describe(b)]
    for meta, other in (metas, metas[::-1]):  # a dual-head torch model runs the head that was exported
        meta["end2end"] = other["end2end"] if meta["dual"] and not other["dual"] else meta["end2end"]
    if metas[0]["nc"] != metas[1]["nc"]:
        raise UsageError(
            f"The two models have {metas[0]['nc']} and {metas[1]['nc']} classes. Compare models of one data set."
        )
    predicts = [predictor(source, end2end=m["end2end"]) for source, m in zip((a, b), metas)]
    images = list(images)
    total = partnered = 0
    overlaps: list[float] = []
    score_diffs: list[float] = []
    for path in images:
        x = load_image(path, imgsz)
        da, db = (detect(p, x, m, max(conf - margin, 0.0), iou) for p, m in zip(predicts, metas))
        pairs = _match(da, db, match_iou)
        overlaps += [overlap for _, _, overlap in pairs]
        score_diffs += [abs(float(da[i, 4] - db[j, 4])) for i, j, _ in pairs]
        for found, partners in ((da, [i for i, _, _ in pairs]), (db, [j for _, j, _ in pairs])):
            sure = found[:, 4] > conf + margin
            total += int(sure.sum())
            partnered += int(sure[partners].sum())
    return {
        "matched": partnered / total if total else 1.0,
        "mean_iou": float(np.mean(overlaps)) if overlaps else None,
        "mean_score_diff": float(np.mean(score_diffs)) if score_diffs else None,
        "detections": total,
        "images": len(images),
    }


def verify_int8(
    fp32_onnx: str | Path, int8_onnx: str | Path, images: Iterable[str | Path], imgsz: int
) -> dict[str, Any]:
    """Compare a quantized file as it runs with its own float simulation and with the FP32 file.

    A gap to the simulation means the integer kernels compute something else than the Q/DQ graph says (saturation of
    8-bit weights on x86 without VNNI). A gap to FP32 is the quantization error itself.

    Args:
        fp32_onnx: The FP32 export.
        int8_onnx: The Q/DQ model made from it.
        images: Real images.
        imgsz: Square input size in pixels.

    Returns:
        ``simulation`` and ``float``, each ``box_max, box_mean`` (px) and ``score_max, score_mean`` over anchors scoring
        0.1 or more (at least the 100 best), ``anchors`` (their number), ``detections`` (INT8 against FP32, matched at
        IoU 0.5), and `conv_report`'s figures.

    Raises:
        UsageError: A file is missing, there is no image, or the outputs have different shapes.
    """
    images = _listed(images)
    meta = describe(int8_onnx)
    int8 = predictor(int8_onnx)
    result: dict[str, Any] = {}
    for name, reference in (("float", predictor(fp32_onnx)), ("simulation", predictor(int8_onnx, simulate=True))):
        rows, _, _ = _compare(reference, int8, (load_image(path, imgsz) for path in images), meta)
        confident = rows[:, 2] >= np.append(np.sort(rows[:, 2])[-100:], CONFIDENT).min()
        result |= {name: _summary(rows[confident]), "anchors": int(confident.sum())}
    detections = verify_detections(fp32_onnx, int8_onnx, images, imgsz, match_iou=0.5, margin=0.05)
    return {**result, "detections": detections, **conv_report(int8_onnx)}


def _listed(images: Iterable[str | Path]) -> list[str | Path]:
    images = list(images)
    if not images:
        raise UsageError("No images to verify on. Give at least one, better 16 or more, from the validation set.")
    return images


def _validate(module: Any, task: str, data: str | Path, imgsz: int, **args: Any) -> dict[str, float]:
    """Run Ultralytics' validator on the CPU; without rectangular batches .pt and static ONNX see the same pixels."""
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.models import yolo

    validators: dict[str, Any] = {"detect": yolo.detect.DetectionValidator, "obb": yolo.obb.OBBValidator}
    validators |= {"segment": yolo.segment.SegmentationValidator, "pose": yolo.pose.PoseValidator}
    if task not in validators:
        raise UsageError(f"Task '{task}' has no box mAP. Legal tasks: {', '.join(validators)}.")
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            check_det_dataset(str(data), autodownload=False)
        except Exception as error:
            raise UsageError(f"Data set '{data}' cannot be used ({error}). Give a YAML of data on disk.") from error
        args |= {"task": task, "data": str(data), "imgsz": imgsz, "device": "cpu", "mode": "val", "save_dir": folder}
        args |= {"rect": False, "plots": False, "verbose": False}
        found = validators[task](args=args, save_dir=Path(folder))(model=module)
    return {"map50": float(found["metrics/mAP50(B)"]), "map": float(found["metrics/mAP50-95(B)"])}


def map_torch(
    weights: Source, data: str | Path, imgsz: int, *, end2end: bool = False, batch: int = 16
) -> dict[str, float]:
    """Return the box mAP of a torch model on the val split, comparable with `map_onnx`.

    Args:
        weights: Ultralytics model or ``.pt`` file; not changed.
        data: Data set YAML. Nothing is downloaded.
        imgsz: Square input size in pixels.
        end2end: Use the NMS-free head of a dual-head model.
        batch: Images per forward pass.

    Returns:
        ``map50`` and ``map`` (mAP50-95), both 0..1.

    Raises:
        UsageError: The model, task or data set is not usable.
    """
    model = float_model(weights)
    return _validate(model, model.task, data, imgsz, batch=batch, **head_args(end2end))


def map_onnx(path: str | Path, data: str | Path, imgsz: int) -> dict[str, float]:
    """Return the box mAP of an ONNX file in ONNX Runtime on the val split.

    Args:
        path: ``.onnx`` file with Ultralytics' metadata.
        data: Data set YAML. Nothing is downloaded.
        imgsz: Square input size in pixels; a static file uses its own.

    Returns:
        ``map50`` and ``map`` (mAP50-95), both 0..1.

    Raises:
        UsageError: The file, task or data set is not usable.
    """
    return _validate(None, describe(path)["task"], data, imgsz, model=str(path), batch=1)


def verify(
    weights: Source,
    onnx_path: str | Path,
    images: Iterable[str | Path],
    imgsz: int,
    *,
    int8_onnx: str | Path | None = None,
    data: str | Path | None = None,
    limits: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Run every check that applies and compare it with its limit.

    Args:
        weights: Float Ultralytics model or ``.pt`` file.
        onnx_path: Its FP32 export.
        images: Real images, 16 or more for a result that means something.
        imgsz: Square input size in pixels.
        int8_onnx: Quantized file to check against its simulation.
        data: Data set YAML; adds the mAP of torch against that of the FP32 file.
        limits: Overrides of entries of `LIMITS`.

    Returns:
        ``passed``, ``checks`` (``name, value, limit, passed`` each) and what the checks measured under ``tensors``,
        ``detections``, ``int8`` and ``map``.

    Raises:
        UsageError: A file is missing or unusable, there is no image, or a limit is unknown.
    """
    if unknown := set(limits or ()) - set(LIMITS):
        raise UsageError(f"Unknown limits {sorted(unknown)}. Legal: {', '.join(LIMITS)}.")
    bounds, images = {**LIMITS, **(limits or {})}, _listed(images)
    meta = describe(onnx_path)
    tensors = verify_tensors(weights, onnx_path, images, imgsz)
    values = {name: tensors[name] for name in ("score_max", "box_max", "extra_max")}
    result: dict[str, Any] = {"tensors": tensors}
    if meta["task"] in {"detect", "segment", "pose"}:
        result["detections"] = verify_detections(weights, onnx_path, images, imgsz)
        values["matched"] = result["detections"]["matched"]
    if data is not None:
        pair = map_torch(weights, data, imgsz, end2end=meta["end2end"]), map_onnx(onnx_path, data, imgsz)
        result["map"] = dict(zip(("torch", "onnx"), pair))
        values["map"] = abs(pair[0]["map"] - pair[1]["map"])
    if int8_onnx is not None:
        result["int8"] = verify_int8(onnx_path, int8_onnx, images, imgsz)
        values |= {f"int8_{k}": result["int8"]["simulation"][k] for k in ("box_mean", "score_max")}
    checks = []
    for name, value in values.items():
        limit = bounds[name]
        passed = value >= limit if name == "matched" else value <= limit  # a NaN passes neither
        checks.append({"name": name, "value": value, "limit": limit, "passed": passed})
    return {"passed": all(c["passed"] for c in checks), "checks": checks, **result}
