# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands around the pipeline: analyze, sensitivity, checks."""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER

from yolo_ext import runs, stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig, parse
from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.stock.load import load_model

PLACE = ("project", "name", "exist_ok", "save_dir")


def _imgsz(model: str | Path, given: Any) -> int:
    """Return the image size given by the user, else that of the checkpoint's training."""
    return int(given or (load_model(model)[1].get("train_args") or {}).get("imgsz") or 640)


def check_imgsz(imgsz: Any, net: nn.Module) -> int:
    """Return an image size that fits the strides of a model.

    Raises:
        UsageError: If it is no multiple of the largest stride.
    """
    stride = stock.max_stride(net)
    if not isinstance(imgsz, int) or imgsz <= 0 or imgsz % stride:
        near = max(round(imgsz / stride), 1) * stride if isinstance(imgsz, (int, float)) else 640
        raise UsageError(f"'imgsz={imgsz}' is illegal. Legal: a multiple of {stride}, such as {near}.")
    return imgsz


def analyze(model: str | Path, imgsz: int | None = None, **place: Any) -> list[dict[str, Any]]:
    """Print and write every group of coupled channels: members, cost, prunable or the reason why not.

    Args:
        model: ``.pt`` or ``.yaml``.
        imgsz: Side of the square input in pixels.
        place: `project`, `name`, `exist_ok`, `save_dir`.

    Returns:
        One row for each group.

    Raises:
        UsageError: If the model cannot be loaded or must not be changed any more.
    """
    from yolo_ext.pruning import analyze as groups
    from yolo_ext.pruning.surgery import check_prunable

    net, _ = load_model(model)
    check_prunable(net)
    size = check_imgsz(_imgsz(model, imgsz), net)
    rows = groups.analyze(net, size)
    LOGGER.info(groups.table(rows))
    folder = runs.folder(place, task=stock.task_of(net), mode="analyze")
    runs.write_json(folder / "groups.json", rows)
    figures = runs.model_figures(net, Path(model), size)
    runs.write_summary(folder, figures, figures)
    return rows


def sensitivity(
    model: str | Path, data: str, kind: str = "prune", ratios: Any = None, prune: Any = None, quant: Any = None,
    by: str = "layer", images: int = 32, map: bool = False, imgsz: int | None = None, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure what each layer is worth to pruning or loses by quantization, and write json, csv and a picture.

    Args:
        model: Trained ``.pt``.
        data: Dataset YAML.
        kind: `prune` for mAP and losses against the share pruned, group by group; `quant` for the error in boxes and
            scores with one layer alone in INT8, and the ms that INT8 saves there.
        ratios: Pruning: shares to try, a list or separated by commas.
        prune: Pruning options that matter: `method`, `include`, `exclude`, `images`, `recalibrate`, floors.
        quant: Quantization options that matter: those of profile and calibration.
        by: Quantization: `layer` or `block`.
        images: Quantization: train images on which detections are compared.
        map: Quantization: measure the mAP on the val split with each layer alone in INT8, too, which takes long.
        imgsz: Side of the square input in pixels.
        place: `project`, `name`, `exist_ok`, `save_dir`; a folder that holds an unfinished analysis is gone on with.

    Returns:
        The contents of ``sensitivity.json``, which `prune.sensitivity` takes, or of ``quant_sensitivity.json``.

    Raises:
        UsageError: If the input is wrong.
    """
    if kind not in ("prune", "quant"):
        raise UsageError(f"'kind={kind}' is illegal. Legal: prune, quant.")
    strange = [k for k, v in {"ratios": ratios, "prune": prune}.items() if v] if kind == "quant" else [*(quant or ())]
    if strange:
        raise UsageError(f"'{strange[0]}' does not go with kind={kind}. See `yolo-ext help sensitivity`.")
    if kind == "quant":
        return _quant_sensitivity(model, data, quant or {}, by, images, map, imgsz, place)
    from yolo_ext.data.check import check_data
    from yolo_ext.probes import make_probes
    from yolo_ext.pruning import sensitivity as curves
    from yolo_ext.pruning.graph import build_graph
    from yolo_ext.pruning.surgery import check_prunable

    cfg = parse({"prune": {"ratio": 0.5, **(prune or {})}})["prune"]
    shares = _shares(ratios)
    net, _ = load_model(model)
    check_prunable(net)
    stock.refuse_rtdetr(net)
    size = check_imgsz(_imgsz(model, imgsz), net)
    info = check_data(data, task=stock.task_of(net))
    probes = make_probes(info, size, cfg, stock.task_of(net), net)
    folder = runs.folder(place, task=stock.task_of(net), mode="sensitivity")
    try:
        found = curves.sensitivity(net, build_graph(net), cfg, probes, shares, folder=folder)
    except UsageError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    files = curves.write(found, folder)
    LOGGER.info(f"Results saved to {', '.join(str(f) for f in files)}; use them with prune.sensitivity={files[0]}")
    return found


def _quant_sensitivity(
    model: str | Path, data: str, quant: dict[str, Any], by: str, images: int, accuracy: bool, imgsz: int | None,
    place: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Calibrate a model, compare its layers in INT8 one by one, and write what was found."""
    from yolo_ext.data.calibration import calibration_images, letterbox_batches
    from yolo_ext.data.check import check_data
    from yolo_ext.probes import make_probes
    from yolo_ext.quantization import sensitivity as errors
    from yolo_ext.quantization.qat import prepare, strip

    if by not in errors.BY:
        raise UsageError(f"'by={by}' is illegal. Legal: {', '.join(errors.BY)}.")
    cfg = parse({"quant": quant})["quant"]
    net, _ = load_model(model)
    stock.refuse_rtdetr(net)
    size = check_imgsz(_imgsz(model, imgsz), net)
    info = check_data(data, task=stock.task_of(net))
    prepare(net, cfg, info, size)
    found_in = manifest(strip(net))["quant"]
    chosen = calibration_images(cfg.source or info, cfg.calib, cfg.seed)[:images]
    batches = letterbox_batches(chosen, size, crop=stock.task_of(net) == "classify")
    probes = make_probes(info, size, PruneConfig(ratio=0.5), stock.task_of(net), net)
    score = probes.score if accuracy else None
    found = errors.sensitivity(net, found_in["state"], batches, by, score, _ms_saved(net, found_in, size))
    found = {"profile": found_in["profile"], **found}
    LOGGER.info(errors.table(found))
    files = errors.write(found, runs.folder(place, task=stock.task_of(net), mode="sensitivity"))
    LOGGER.info(f"Results saved to {', '.join(str(f) for f in files)}")
    return found


def _ms_saved(net: nn.Module, quant: dict[str, Any], imgsz: int) -> dict[str, float] | None:
    """Return what INT8 saves in each layer in ONNX Runtime; None for a profile of another runtime."""
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.deployment.operators import saved_ms
    from yolo_ext.quantization.profiles import resolve_profile
    from yolo_ext.quantization.qdq import write_qdq

    profile = resolve_profile(quant["profile"])
    if not profile.output:
        return None
    with tempfile.TemporaryDirectory() as folder:
        fp32 = export_onnx(net, Path(folder) / "fp32.onnx", imgsz)
        write_qdq(fp32, Path(folder) / "int8.onnx", quant["state"], profile)
        return saved_ms(fp32, Path(folder) / "int8.onnx", quant["state"], imgsz)


def _shares(ratios: Any) -> tuple[float, ...]:
    """Read shares of channels from a list, a number or text."""
    items = ratios.split(",") if isinstance(ratios, str) else ratios if isinstance(ratios, (list, tuple)) else [ratios]
    try:
        shares = (0.25, 0.5, 0.75) if ratios is None else tuple(sorted({float(r) for r in items}))
    except (TypeError, ValueError):
        shares = ()
    if not shares or not all(0 < r < 1 for r in shares):
        raise UsageError(
            f"'ratios={ratios}' is illegal. Give shares above 0 and below 1, such as ratios=0.25,0.5,0.75."
        )
    return shares


def checks() -> bool:
    """Print versions and the state of the installation; return whether all is well."""
    from yolo_ext.quantization.profiles import resolve_profile
    from yolo_ext.stock.context import cpu_info

    for key, value in cpu_info().items():
        LOGGER.info(f"{key:<14}{value}")
    LOGGER.info(f"{'profile':<14}{resolve_profile('auto').name}")
    problems = []
    try:
        version("thop")
        problems.append(
            "PyPI's 'thop' is installed and overwrites 'ultralytics-thop'; Ultralytics may report 0.0 GFLOPs. "
            "Run: pip uninstall -y thop && pip install --force-reinstall --no-deps ultralytics-thop"
        )
    except PackageNotFoundError:
        pass
    try:
        stock.check_version()
        stock.gflops(load_model("yolov8n.yaml")[0], 64)
    except YoloExtError as e:
        problems.append(str(e))
    for p in problems:
        LOGGER.error(p)
    LOGGER.info("All checks passed" if not problems else f"{len(problems)} problems")
    return not problems
