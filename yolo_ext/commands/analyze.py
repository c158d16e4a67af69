# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands that tell how things are: analyze and sensitivity of a model, checks of the installation."""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from yolo_ext.commands import LOGGER, Count, Technique, command, numbers
from yolo_ext.core.config import PruneConfig, parse
from yolo_ext.core.errors import UsageError, YoloExtError

SHARES = (0.25, 0.5, 0.75)  # of channels, that `sensitivity` tries


@command("Print every group of coupled channels: size, cost, prunable or the reason why not")
def analyze(model: str | Path, imgsz: Count | None = None, **place: Any) -> list[dict[str, Any]]:
    """Print and write every group of coupled channels: members, cost, prunable or the reason why not.

    Args:
        model: ``.pt`` or ``.yaml``.

    Returns: One row for each group.
    Raises: `UsageError` if the model cannot be loaded or must not be changed any more.
    """
    from yolo_ext import pruning, runs, stock
    from yolo_ext.pruning.analyze import table
    from yolo_ext.reporting.tables import write_summary

    net, ckpt = stock.load_model(model)
    pruning.check_prunable(net)
    size = stock.image_size(net, ckpt, imgsz)
    rows = pruning.analyze_model(net, size)
    LOGGER.info(table(rows))
    folder = runs.folder(place, task=stock.task_of(net), mode="analyze")
    runs.write_json(folder / "groups.json", rows)
    figures = runs.model_figures(net, Path(model), size)
    write_summary(folder, figures, figures)
    return rows


@command("Measure what each group of channels is worth to pruning; kind=quant: what each layer loses by INT8")
def sensitivity(
    model: str | Path, data: str, kind: Literal["prune", "quant"] = "prune", ratios: Any = None,
    prune: Technique = None, quant: Technique = None, by: Literal["layer", "block"] = "layer", images: Count = 32,
    map: bool = False, imgsz: Count | None = None, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure what each layer is worth to pruning or loses by quantization, and write json, csv and a picture.

    Args:
        model: Trained ``.pt``.
        data: Dataset YAML.
        kind: `prune` for mAP and losses against the share pruned, group by group; `quant` for the error in boxes and
            scores with one layer alone in INT8, and the ms that INT8 saves there.
        ratios: Pruning: shares to try, a list or separated by commas; 0.25,0.5,0.75 by default.
        prune: Pruning options that matter: `method`, `include`, `exclude`, `images`, `recalibrate`, floors.
        quant: Quantization options that matter: those of profile and calibration.
        by: Quantization: `layer` or `block`.
        images: Quantization: train images on which detections are compared.
        map: Quantization: measure the mAP on the val split with each layer alone in INT8, too, which takes long.
        place: `project`, `name`, `exist_ok`, `save_dir`; a folder that holds an unfinished analysis is gone on with.

    Returns: The contents of ``sensitivity.json``, which `prune.sensitivity` takes, or of ``quant_sensitivity.json``.
    Raises: `UsageError` if the input is wrong.
    """
    from yolo_ext import pruning, stock
    from yolo_ext.data.check import check_data

    strange = [k for k, v in {"ratios": ratios, "prune": prune}.items() if v] if kind == "quant" else [*(quant or ())]
    if strange:
        raise UsageError(f"'{strange[0]}' does not go with kind={kind}. See `yolo-ext help sensitivity`.")
    cfg = parse({"quant": quant or {}} if kind == "quant" else {"prune": {"ratio": 0.5, **(prune or {})}})[kind]
    hint = "shares above 0 and below 1, such as ratios=0.25,0.5,0.75"
    shares = {*numbers("ratios", SHARES if ratios is None else ratios, float, lambda r: 0 < r < 1, hint)}
    net, ckpt = stock.load_model(model)
    stock.refuse_rtdetr(net)
    size = stock.image_size(net, ckpt, imgsz)
    if kind == "prune":
        pruning.check_prunable(net)
    info = check_data(data, task=stock.task_of(net))
    if kind == "prune":
        return _of_pruning(net, cfg, info, size, tuple(sorted(shares)), place)
    return _of_quantization(net, cfg, info, size, by, images, map, place)


def _of_pruning(net: Any, cfg: Any, info: Any, size: int, shares: tuple[float, ...], place: Any) -> dict[str, Any]:
    """Measure mAP and losses with each group pruned by each share, and write what was found."""
    from yolo_ext import pruning, runs, stock
    from yolo_ext.pruning.analyze import write
    from yolo_ext.training.prune import make_probes

    probes = make_probes(info, size, cfg, stock.task_of(net), net)
    folder = runs.folder(place, task=stock.task_of(net), mode="sensitivity")
    try:
        found = pruning.measure_sensitivity(net, pruning.build_graph(net), cfg, probes, shares, folder=folder)
    except UsageError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    files = write(found, folder)
    LOGGER.info(f"Results saved to {', '.join(str(f) for f in files)}; use them with prune.sensitivity={files[0]}")
    return found


def _of_quantization(
    net: Any, cfg: Any, info: dict[str, Any], size: int, by: str, images: int, accuracy: bool, place: dict[str, Any]
) -> dict[str, Any]:
    """Calibrate a model, compare its layers in INT8 one by one, and write what was found."""
    from yolo_ext import quantization, runs, stock
    from yolo_ext.checkpoint import manifest
    from yolo_ext.data.check import calibration_images, letterbox_batches
    from yolo_ext.quantization.search import table, write
    from yolo_ext.training.prune import make_probes

    task = stock.task_of(net)
    quantization.prepare(net, cfg, info, size)
    quantized = manifest(quantization.strip(net)).quant
    chosen = calibration_images(cfg.source or info, cfg.calib, cfg.seed)[:images]
    batches = letterbox_batches(chosen, size, crop=task == "classify")
    score = make_probes(info, size, PruneConfig(ratio=0.5), task, net).score if accuracy else None
    saved = _ms_saved(net, quantized, size)
    found = {"profile": quantized["profile"]}
    found |= quantization.sensitivity(net, quantized["state"], batches, by, score, saved)
    LOGGER.info(table(found))
    files = write(found, runs.folder(place, task=task, mode="sensitivity"))
    LOGGER.info(f"Results saved to {', '.join(str(f) for f in files)}")
    return found


def _ms_saved(net: Any, quantized: Mapping[str, Any], imgsz: int) -> dict[str, float] | None:
    """Return the ms that INT8 saves in each layer in ONNX Runtime; None for a profile of another runtime."""
    from yolo_ext import deployment, quantization
    from yolo_ext.deployment.latency import saved_ms

    profile = quantization.resolve_profile(quantized["profile"])
    if not profile.output:
        return None
    with tempfile.TemporaryDirectory() as folder:
        fp32 = deployment.export_onnx(net, Path(folder) / "fp32.onnx", imgsz)
        int8 = Path(folder) / "int8.onnx"
        quantization.write_qdq(fp32, int8, quantized["state"], profile)
        return saved_ms(fp32, int8, quantized["state"], imgsz)


@command("Check the installation")
def checks() -> bool:
    """Print versions and the state of the installation; return whether all is well."""
    from yolo_ext import stock
    from yolo_ext.quantization.spec import resolve_profile

    for key, value in {**stock.cpu_info(), "profile": resolve_profile("auto").name}.items():
        LOGGER.info(f"{key:<14}{value}")
    problems = []
    with suppress(PackageNotFoundError):
        version("thop")
        remedy = "pip uninstall -y thop && pip install --force-reinstall --no-deps ultralytics-thop"
        problems.append(f"PyPI's 'thop' overwrites 'ultralytics-thop', which may report 0.0 GFLOPs. Run: {remedy}")
    try:
        stock.check_stock()
        stock.gflops(stock.load_model("yolov8n.yaml")[0], 64)
    except YoloExtError as e:
        problems.append(str(e))
    for p in problems:
        LOGGER.error(p)
    LOGGER.info(f"{len(problems)} problems" if problems else "All checks passed")
    return not problems
