# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands around the pipeline: analyze, sensitivity, export, verify, bench, convert, checks."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER

from yolo_ext import compat, runs
from yolo_ext.checkpoint import load_model, manifest
from yolo_ext.config import parse
from yolo_ext.errors import UsageError, YoloExtError
from yolo_ext.registry import suggest

PLACE = ("project", "name", "exist_ok", "save_dir")


def _imgsz(model: str | Path, given: Any) -> int:
    """Return the image size given by the user, else that of the checkpoint's training."""
    return int(given or (load_model(model)[1].get("train_args") or {}).get("imgsz") or 640)


def check_imgsz(imgsz: Any, net: nn.Module) -> int:
    """Return an image size that fits the strides of a model.

    Raises:
        UsageError: If it is no multiple of the largest stride.
    """
    stride = compat.max_stride(net)
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
    folder = runs.folder(place, task=compat.task_of(net), mode="analyze")
    runs.write_json(folder / "groups.json", rows)
    figures = runs.model_figures(net, Path(model), size)
    runs.write_summary(folder, figures, figures)
    return rows


def sensitivity(
    model: str | Path, data: str, ratios: Any = None, prune: Any = None, imgsz: int | None = None, **place: Any
) -> dict[str, Any]:
    """Measure mAP and losses against the share pruned, group by group, and write json, csv and a picture.

    Args:
        model: Trained ``.pt``.
        data: Dataset YAML.
        ratios: Shares to try, a list or separated by commas.
        prune: Pruning options that matter: `method`, `include`, `exclude`, `images`, `recalibrate`, floors.
        imgsz: Side of the square input in pixels.
        place: `project`, `name`, `exist_ok`, `save_dir`; a folder that holds an unfinished analysis is gone on with.

    Returns:
        The contents of ``sensitivity.json``, which `prune.sensitivity` takes.

    Raises:
        UsageError: If the input is wrong.
    """
    from yolo_ext.data.check import check_data
    from yolo_ext.probes import make_probes
    from yolo_ext.pruning import sensitivity as curves
    from yolo_ext.pruning.graph import build_graph
    from yolo_ext.pruning.surgery import check_prunable

    cfg = parse({"prune": {"ratio": 0.5, **(prune or {})}})["prune"]
    shares = _shares(ratios)
    net, _ = load_model(model)
    check_prunable(net)
    size = check_imgsz(_imgsz(model, imgsz), net)
    info = check_data(data, task=compat.task_of(net))
    probes = make_probes(info, size, cfg, compat.task_of(net), net)
    folder = runs.folder(place, task=compat.task_of(net), mode="sensitivity")
    try:
        found = curves.sensitivity(net, build_graph(net), cfg, probes, shares, folder=folder)
    except UsageError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    files = curves.write(found, folder)
    LOGGER.info(f"Results saved to {', '.join(str(f) for f in files)}; use them with prune.sensitivity={files[0]}")
    return found


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


def export(model: str | Path, format: str = "onnx", out: str | Path | None = None, **options: Any) -> list[Path]:
    """Export a model; ONNX by us, every other format by Ultralytics.

    Args:
        model: ``.pt``, pruned or not. A QAT model also gets its INT8 ONNX.
        format: ``onnx`` or a format of Ultralytics.
        out: ONNX file to write, by default beside the model.
        options: `imgsz`, `opset`, `simplify`, `dynamic`, `batch`; for other formats any export argument.

    Returns:
        The files written.

    Raises:
        UsageError: If the model or an option is wrong.
    """
    from ultralytics.engine.exporter import export_formats

    formats = [f for f in export_formats()["Argument"] if f != "-"]
    if format not in formats:
        raise UsageError(f"Unknown export format '{format}'.{suggest(format, formats)} Legal: {', '.join(formats)}.")
    net, _ = load_model(model)
    if format != "onnx":
        from ultralytics import YOLO

        return [Path(YOLO(str(model)).export(format=format, **options))]
    from yolo_ext.deployment.export import export_onnx

    ours = {k: options.pop(k) for k in ("opset", "simplify", "dynamic", "batch") if k in options}
    imgsz = _imgsz(model, options.pop("imgsz", None))
    if unused := sorted(set(options) - {*PLACE, "device", "mode"}):
        raise UsageError(
            f"Our ONNX export does not know {', '.join(unused)}. Legal: imgsz, opset, simplify, dynamic, batch, out."
        )
    target = Path(out or Path(model).with_suffix(".onnx"))
    files = [export_onnx(model, target, imgsz, **ours)]
    if quant := manifest(net).get("quant"):
        from yolo_ext.quantization.profiles import resolve_profile
        from yolo_ext.quantization.qdq import write_qdq

        files.append(target.with_name(f"{target.stem}_int8.onnx"))
        write_qdq(files[0], files[1], quant["ranges"], resolve_profile(quant["profile"]))
    for file in files:
        LOGGER.info(f"Export saved as {file} ({runs.size_mb(file):.1f} MB)")
    figures = runs.model_figures(net, Path(model), imgsz)
    folder = runs.folder({k: options.get(k) for k in PLACE}, task=compat.task_of(net), mode="export")
    before = {**figures, "size_mb": None}  # fp16 in a .pt against fp32 in ONNX would compare nothing
    runs.write_summary(folder, before, {**figures, "size_mb": runs.size_mb(files[-1])})
    return files


def verify(model: str, onnx: str, int8: str | None = None, data: str | None = None, source: str | None = None,
           imgsz: int | None = None, **place: Any) -> dict[str, Any]:  # fmt: skip
    """Compare an ONNX file with the model that it came from, print the checks and write them.

    Args:
        model: ``.pt`` of the float model.
        onnx: Its FP32 ONNX.
        int8: Its INT8 ONNX, checked against its own simulation.
        data: Dataset YAML whose val images are used; adds a comparison of mAP.
        source: Folder, glob or list of images instead of `data`.
        imgsz: Side of the square input in pixels.
        place: `project`, `name`, `exist_ok`, `save_dir`.

    Returns:
        ``passed``, ``checks`` and what they measured.

    Raises:
        UsageError: If a file is missing or there are no images.
    """
    from yolo_ext.data.calibration import list_images
    from yolo_ext.data.check import check_data
    from yolo_ext.deployment.verify import verify as run
    from yolo_ext.reporting.tables import align

    net, _ = load_model(model)
    if not data and not source:
        raise UsageError("No images to verify on. Give data=data.yaml or source=folder.")
    images = check_data(data, task=compat.task_of(net))["images"]["val"] if data else list_images(source)
    found = run(model, onnx, images[:32], _imgsz(model, imgsz), int8_onnx=int8, data=data)
    rows = [
        [c["name"], f"{c['value']:.3g}", f"{c['limit']:.3g}", "ok" if c["passed"] else "FAILED"]
        for c in found["checks"]
    ]
    LOGGER.info(align(rows, ["Check", "Value", "Limit", "Result"]))
    folder = runs.folder(place, task=compat.task_of(net), mode="verify")
    runs.write_json(folder / "verify.json", found)
    figures = runs.model_figures(net, Path(model), _imgsz(model, imgsz))
    maps = found.get("map") or {}
    after = {
        **figures,
        "size_mb": runs.size_mb(Path(int8 or onnx)),
        "map_onnx": {"fp32": (maps.get("onnx") or {}).get("map")},
    }
    runs.write_summary(folder, {**figures, **(maps.get("torch") or {})}, {**after, **(maps.get("onnx") or {})})
    return found


def bench(
    models: str | list[str], imgsz: int = 640, threads: int = 1, batch: int = 1, rounds: int = 100, **place: Any
) -> dict[str, Any]:
    """Measure files side by side, print the table and write it.

    Args:
        models: ``.pt`` and ``.onnx`` files, a list or separated by commas; the first one is the reference.
        imgsz: Side of the square input in pixels.
        threads: Threads of each runtime.
        batch: Images per call.
        rounds: Timed calls of each model.
        place: `project`, `name`, `exist_ok`, `save_dir`.

    Returns:
        Figures by file name.

    Raises:
        UsageError: If a file is missing or does not fit.
    """
    from yolo_ext.deployment.latency import bench as run
    from yolo_ext.deployment.latency import speedup
    from yolo_ext.reporting.tables import align

    files = [m.strip() for m in (models.split(",") if isinstance(models, str) else models)]
    if missing := [f for f in files if not Path(f).is_file()]:
        raise UsageError(f"Model files do not exist: {', '.join(missing)}. Give models=a.pt,b.onnx.")
    found = run({f: Path(f) for f in files}, int(imgsz), threads=int(threads), batch=int(batch), rounds=int(rounds))
    rows = []
    for f in files:
        r = speedup(found[files[0]], found[f])
        verdict = "reference" if f == files[0] else f"{r['ratio']:.2f}x" if r["significant"] else "within the spread"
        rows.append([f, *(f"{found[f][k]:.2f}" for k in ("median", "p10", "p90")), verdict])
    LOGGER.info(align(rows, ["Model", "Median ms", "p10", "p90", "Speed"]))
    LOGGER.info(f"{threads} threads, batch {batch}, {imgsz} px, {rounds} interleaved rounds")
    folder = runs.folder(place, task="detect", mode="bench")
    plain = {f: {k: v for k, v in r.items() if k != "samples"} for f, r in found.items()}
    runs.write_json(folder / "bench.json", plain)
    first, last = (_latency_figures(f, found[f]) for f in (files[0], files[-1]))
    runs.write_summary(folder, first, last, {Path(f).name: _latency_figures(f, found[f]) for f in files})
    return plain


def _latency_figures(file: str, found: dict[str, Any]) -> dict[str, Any]:
    from yolo_ext.deployment.runtime import conv_report

    key, more = "torch", {}
    if found["runtime"] == "ort":
        convs = conv_report(file)
        more = {"convs": convs["convs"], "int8_convs": convs["int8_convs"]}
        key = "ort_int8" if convs["int8_convs"] else "ort"
    return {"size_mb": runs.size_mb(Path(file)), "latency_ms": {key: found["median"]}, **more}


def convert(
    source: str, out: str, format: str = "voc", classes: Any = None, ratio: Any = None, seed: int = 0, **splits: Any
) -> Any:
    """Convert a dataset to YOLO format without touching the source.

    Args:
        source: Folder with Annotations/ and JPEGImages/ or images/.
        out: New folder.
        format: ``voc``.
        classes: Class names, a list or separated by commas; found when not given.
        ratio: Shares of train, val and test, such as ``0.8,0.2``, instead of ImageSets.
        seed: Seed of the random split.
        splits: `train`, `val`, `test`: which list of ImageSets/Main feeds which split.

    Returns:
        What was converted.

    Raises:
        UsageError: If the source or an option is wrong; nothing has been written then.
    """
    from yolo_ext.data.voc import convert_voc

    if format != "voc":
        raise UsageError(f"Unknown dataset format '{format}'.{suggest(format, ['voc'])} Legal: voc.")
    names = classes.split(",") if isinstance(classes, str) else [str(c) for c in classes] if classes else None
    shares = ratio.split(",") if isinstance(ratio, str) else ratio if isinstance(ratio, (list, tuple)) else None
    try:
        ratios = dict(zip(("train", "val", "test"), (float(r) for r in shares))) if shares else None
    except ValueError as e:
        raise UsageError(f"'ratio={ratio}' is illegal. Give shares such as ratio=0.8,0.2.") from e
    if ratio is not None and not ratios:
        raise UsageError(f"'ratio={ratio}' is illegal. Give one share for each split, such as ratio=0.8,0.2.")
    lists = {k: str(v) for k, v in splits.items()} or None
    names = [n.strip() for n in names] if names else None
    return convert_voc(Path(source), Path(out), classes=names, splits=lists, ratios=ratios, seed=int(seed))


def checks() -> bool:
    """Print versions and the state of the installation; return whether all is well."""
    from yolo_ext.deployment.runtime import cpu_info
    from yolo_ext.quantization.profiles import resolve_profile

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
        compat.check_version()
        compat.gflops(load_model("yolov8n.yaml")[0], 64)
    except YoloExtError as e:
        problems.append(str(e))
    for p in problems:
        LOGGER.error(p)
    LOGGER.info("All checks passed" if not problems else f"{len(problems)} problems")
    return not problems
