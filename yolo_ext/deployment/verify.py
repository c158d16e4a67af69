# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Proof that an exported file does what the model does: raw tensors, detections, INT8 against its simulation, mAP."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import TQDM
from ultralytics.utils.metrics import batch_probiou, box_iou

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.compare import compare, compare_weights, first_difference, inputs, summary
from yolo_ext.deployment.contract import judged
from yolo_ext.deployment.decode import Size, height_width
from yolo_ext.deployment.runtime import CPU, NMS, Source, conv_report, describe, load_image, postprocess, predictor
from yolo_ext.stock import device_of
from yolo_ext.stock.accuracy import METRICS, accuracy
from yolo_ext.stock.evidence import Evidence

# FP32 limits: well above rounding (1e-3 px, 2e-6 on a trained model), well below a wrong weight. INT8 limits: between a
# saturating AVX2 kernel (5 px, 0.39) and a sound one (0.23 px, 0.02 to 0.04: single codes that round differently).
# Torch fake-quant differs from the simulation by codes that round differently too: 0.11 px and 0.04 on a trained model,
# as much as moving every pixel by 1e-6 does. In an untrained one that alone is 1.6 px, so twice of it is allowed where
# there is a torch model to measure it on.
CHECKS = {  # by figure: in words, and the limits for FP32 and FP16
    "weight_max": ("ONNX against PyTorch: largest relative weight difference", 1e-3, 5e-2),
    "score_max": ("ONNX against PyTorch: largest score difference", 1e-4, 2e-2),
    "box_max": ("ONNX against PyTorch: largest box difference (px)", 1e-2, 1.0),
    "extra_max": ("ONNX against PyTorch: largest difference of masks, keypoints, angles", 1e-3, 5e-2),
    "matched": ("ONNX against PyTorch: share of matched detections", 0.995, 0.95),
    "map": ("ONNX against PyTorch: largest accuracy difference", 1e-3, 5e-3),
    "int8_box_mean": ("INT8 against its float simulation: mean box difference (px)", 0.3, 0.3),
    "int8_score_max": ("INT8 against its float simulation: largest score difference", 0.1, 0.1),
    "torch_box_mean": ("Fake-quantized PyTorch against that simulation: mean box difference (px)", 0.3, 0.3),
    "torch_score_max": ("Fake-quantized PyTorch against that simulation: largest score difference", 0.1, 0.1),
}
MATCH_IOU = {"fp32": 0.99, "fp16": 0.9}
BOXES = {"detect", "segment", "pose", "obb"}  # tasks with detections
LACKS = {"classify": ("box_max", "extra_max"), "detect": ("extra_max",)}  # what the outputs of a task do not hold
MOVED, FRAGILE = 1e-6, 2.0
CONFIDENT = 0.1  # anchors below this score never become detections, and their boxes are noise


def verify_tensors(model: Source, onnx_path: str | Path, images: Iterable[str | Path], imgsz: Size,
                   device: torch.device = CPU) -> dict[str, Any]:  # fmt: skip
    """Compare the raw outputs of a torch model and of its float export (in FP16: of confident anchors only)."""
    meta = describe(onnx_path)
    if None not in meta["shape"][2:] and tuple(meta["shape"][2:]) != height_width(imgsz):
        raise UsageError(f"'{onnx_path}' is a static graph of shape {meta['shape']}; imgsz={imgsz} does not fit it.")
    opened = partial(predictor, device=device)
    pair = opened(model, end2end=meta["end2end"], nms=meta["nms"]), opened(onnx_path)
    found = compare(*pair, inputs(images, imgsz, meta), meta)
    more = {k: found[k] for k in ("inputs", "shapes", "worst")}
    rows = found["rows"] if meta["precision"] == "fp32" or meta["task"] == "classify" else _confident(found["rows"])
    return {**summary(rows), "extra_max": found["rest"], **more}


def _confident(rows: np.ndarray) -> np.ndarray:
    """Return the rows of `compare` of anchors that score 0.1 or more, at least the 100 best."""
    return rows[rows[:, 2] >= np.append(np.sort(rows[:, 2])[-100:], CONFIDENT).min()]


def _match(a: torch.Tensor, b: torch.Tensor, match_iou: float, rotated: bool) -> list[tuple[int, int]]:
    """Pair detections of one class greedily from the highest IoU down; return (row of a, row of b)."""
    turned = [torch.cat([d[:, :4], d[:, -1:]], 1) for d in (a, b)]
    overlap = batch_probiou(*turned) if rotated else box_iou(a[:, :4], b[:, :4])
    overlap, pairs = overlap * (a[:, None, 5] == b[None, :, 5]), []
    while overlap.numel() and overlap.max() >= match_iou:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        pairs.append((i, j))
        overlap[i], overlap[:, j] = -1, -1
    return pairs


def verify_detections(a: Source, b: Source, images: Iterable[str | Path], imgsz: Size, conf: float = 0.25, *,
                      match_iou: float = 0.99, margin: float = 1e-3,
                      device: torch.device = CPU) -> dict[str, Any]:  # fmt: skip
    """Pair detections of two models; rounding decides on those within ``margin`` of ``conf``, they need no partner."""
    metas, nms, conf = _alike(a, b, conf)
    predicts = [predictor(m, end2end=meta["end2end"], nms=nms, device=device) for m, meta in zip((a, b), metas)]
    rotated = metas[0]["task"] == "obb"
    images = list(images)
    total = partnered = 0
    for path in images:
        x = load_image(path, imgsz, metas[0]["channels"])
        da, db = (postprocess(p(x)[0], m, max(conf - margin, 0.0), NMS["iou"]) for p, m in zip(predicts, metas))
        pairs = _match(da, db, match_iou, rotated)
        for detections, partners in ((da, [i for i, _ in pairs]), (db, [j for _, j in pairs])):
            sure = detections[:, 4] > conf + margin
            total += int(sure.sum())
            partnered += int(sure[partners].sum())
    return {"matched": partnered / total if total else 1.0, "detections": total, "images": len(images)}


def _alike(a: Source, b: Source, conf: float) -> tuple[list[dict[str, Any]], Any, float]:
    """Return how to read two models that are to run the same head, their NMS, and the higher confidence threshold."""
    metas = [describe(a), describe(b)]
    for meta, other in (metas, metas[::-1]):  # a dual-head torch model runs the head that was exported
        meta["end2end"] = other["end2end"] if meta["dual"] and not other["dual"] else meta["end2end"]
    for key, what in (("task", "tasks"), ("channels", "numbers of channels")):
        if metas[0][key] != metas[1][key]:
            pair = f"{metas[0][key]} and {metas[1][key]}"
            raise UsageError(f"The models have different {what}: {pair}. Give the model that was exported.")
    if metas[0]["nc"] != metas[1]["nc"]:
        raise UsageError(f"The models have {metas[0]['nc']} and {metas[1]['nc']} classes. Give models of one data set.")
    nms = next((m["nms"] for m in metas if m["nms"]), None)
    if nms:  # both sides suppress as the file does, or its max_det would look like missed detections
        metas, conf = [{**m, "nms": nms} for m in metas], max(conf, nms["conf"])
    return metas, nms, conf


def verify_int8(fp32_onnx: str | Path, int8_onnx: str | Path, images: Sequence[str | Path], imgsz: Size,
                fake_quant: nn.Module | None = None, device: torch.device = CPU) -> dict[str, Any]:  # fmt: skip
    """Compare an INT8 file on the CPU with its float simulation (kernels), the FP32 file (error), and torch."""
    meta = describe(int8_onnx)
    if meta["precision"] != "int8":
        raise UsageError(f"'{int8_onnx}' is not quantized. Give the INT8 file that was written from '{fp32_onnx}'.")
    int8, simulated = predictor(int8_onnx), predictor(int8_onnx, simulate=True)
    pairs = {"float": (predictor(fp32_onnx), int8), "simulation": (simulated, int8)}
    if fake_quant is not None:
        torch_one = predictor(fake_quant, end2end=meta["end2end"], nms=meta["nms"], device=device)

        def moved(x: np.ndarray) -> list[np.ndarray]:
            return torch_one(x + np.float32(MOVED) * np.random.default_rng(0).choice(np.float32([-1, 1]), x.shape))

        pairs |= {"torch": (simulated, torch_one), "rounding": (torch_one, moved)}
    result: dict[str, Any] = {}
    for name, (reference, other) in pairs.items():
        batches = (load_image(path, imgsz, meta["channels"]) for path in images)
        rows = _confident(compare(reference, other, batches, meta)["rows"])
        result |= {name: {**summary(rows), "score_p99": float(np.quantile(rows[:, 1], 0.99))}, "anchors": len(rows)}
    if meta["task"] in BOXES:
        result["detections"] = verify_detections(fp32_onnx, int8_onnx, images, imgsz, match_iou=0.5, margin=0.05)
    return {**result, **conv_report(int8_onnx)}


def verify(weights: Source, onnx_path: str | Path, images: Iterable[str | Path], imgsz: Size, *,
           int8_onnx: str | Path | None = None, fake_quant: nn.Module | None = None,
           data: str | Path | None = None, contract: Mapping[str, float] | None = None,
           device: Any = None) -> dict[str, Any]:  # fmt: skip
    """Compare a float file, an INT8 file made from it, and, on ``data``, accuracy, with `CHECKS` and a contract."""
    meta, images, (height, width) = describe(onnx_path), list(images), height_width(imgsz)
    precision = meta["precision"]
    if not images:
        raise UsageError("No images to verify on. Give at least one, better 16 or more, from the validation set.")
    if precision == "int8":
        raise UsageError(f"'{onnx_path}' is quantized. Give the FP32 file it was made from as onnx= and it as int8=.")
    bounds = {k: half if precision == "fp16" else full for k, (_, full, half) in CHECKS.items()}
    result: dict[str, Any] = {"precision": precision}
    device = device_of(device)
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        "tensors": partial(verify_tensors, weights, onnx_path, images, imgsz, device=device),
        "weights": partial(compare_weights, weights, onnx_path, meta["end2end"], bounds["weight_max"]),
    }
    if meta["task"] in BOXES:
        paired = partial(verify_detections, weights, onnx_path, images, imgsz, device=device)
        todo["detections"] = partial(paired, match_iou=MATCH_IOU[precision])
    evidence: list[Evidence] = []
    if data is not None and not meta["nms"] and height == width:  # the threshold of embedded NMS cuts the curve
        measured = partial(accuracy, data=data, imgsz=width, keep=evidence.append, device=device)
        of_torch = partial(measured, weights, end2end=meta["end2end"])
        todo["map"] = lambda: {"torch": of_torch(), "onnx": measured(onnx_path)}
    if int8_onnx is not None:
        todo["int8"] = partial(verify_int8, onnx_path, int8_onnx, images, imgsz, fake_quant, device=device)
    for name, work in TQDM(todo.items(), desc="Verifying"):
        result[name] = work()
    worst = result["tensors"].pop("worst")
    for figure, value in result.get("int8", {}).get("rounding", {}).items():
        for name in {f"int8_{figure}", f"torch_{figure}"} & bounds.keys():
            bounds[name] = max(bounds[name], FRAGILE * value)
    if meta["task"] == "classify" and "map" in result:  # rounding decides between two equal scores
        bounds["map"] = max(bounds["map"], 1.01 / result["map"]["torch"]["images"])
    checks = _checks(result, bounds, meta["task"])
    if evidence and contract is not None:
        result["contract"] = judged(evidence[0], evidence[1], contract)
        checks += [{"key": "contract", **c} for c in result["contract"]["checks"]]
    failed = {c["key"] for c in checks if not c["passed"]}
    if failed & {"weight_max", "score_max", "box_max", "extra_max", "matched"}:
        result["first_difference"] = first_difference(weights, onnx_path, worst, result["weights"]["different"])
    return {"passed": not failed, "checks": checks, **result}


def _checks(result: dict[str, Any], bounds: dict[str, float], task: str) -> list[dict[str, Any]]:
    """Return the table of checks: each figure that was measured with its limit."""
    names = [name for name in ("score_max", "box_max", "extra_max") if name not in LACKS.get(task, ())]
    values = {name: result["tensors"][name] for name in names}
    if result["weights"]["compared"]:
        values["weight_max"] = result["weights"]["weight_max"]
    if "detections" in result:
        values["matched"] = result["detections"]["matched"]
    if "map" in result:
        one, other = result["map"].values()
        values["map"] = max(abs(one[k] - other[k]) for k in METRICS[task])
    for prefix, name in (("int8", "simulation"), ("torch", "torch")):
        gap = result.get("int8", {}).get(name, {})
        values |= {f"{prefix}_{k}": gap[k] for k in ("box_mean", "score_max") if gap}
    passed = {k: v >= bounds[k] if k == "matched" else v <= bounds[k] for k, v in values.items()}  # a NaN: neither
    return [{"key": k, "name": CHECKS[k][0], "value": v, "limit": bounds[k], "passed": bool(passed[k])}
            for k, v in values.items()]  # fmt: skip
