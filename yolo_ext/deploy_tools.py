# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands export and verify: a model out of training into files for a runtime, and proof that they are equal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs, stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import parse
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.reporting.tables import write_summary
from yolo_ext.stock.load import load_model

PLACE = ("project", "name", "exist_ok", "save_dir")
PRECISION = {8: "int8", "int8": "int8", "w8a8": "int8", 16: "half", "fp16": "half", "w16a16": "half"}
NMS_KEYS = ("conf", "iou", "max_det", "agnostic_nms")
OURS = ("imgsz", "batch", "dynamic", "opset", "simplify", "half", "int8", "quantize", "data", "quant", "nms", *NMS_KEYS)


def _open(model: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model, one of Ultralytics' own QAT as the stock model that it holds, and its checkpoint dict."""
    from yolo_ext.quantization.modelopt import is_modelopt, load_modelopt

    try:
        net, ckpt = load_model(model)
    except UsageError as error:  # such a file needs ModelOpt to load
        try:
            return load_modelopt(model)
        except Exception:
            raise error from None
    return load_modelopt(model) if is_modelopt(ckpt) else (net, ckpt)


def _size(ckpt: dict[str, Any], given: Any) -> Any:
    """Return the image size given by the user, a whole number or (height, width), else that of the training."""
    if given is None:
        given = (ckpt.get("train_args") or {}).get("imgsz") or 640
    sides = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(sides) not in (1, 2) or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides):
        raise UsageError(f"'imgsz={given}' is illegal: give a whole number, or height and width as imgsz=[480,640].")
    return sides[0] if len({*sides}) == 1 else tuple(sides)


def export(model: str | Path, format: str = "onnx", out: str | Path | None = None, **options: Any) -> list[Path]:
    """Export a model; ONNX and OpenVINO by us, every other format by Ultralytics with the weights of the model.

    Args:
        model: ``.pt``, pruned or not. A QAT model, of ours or of Ultralytics (`quantize=8`), also gets its INT8 file.
        format: ``onnx`` or a format of Ultralytics.
        out: File or folder to write, by default beside the model; an INT8 file gets ``_int8`` added to its name.
        options: `imgsz` (one number or height and width), `batch`, `dynamic`, `opset`, `simplify`, `half`, `int8` with
            `data` for calibration and `quant` options, `nms` with `conf`, `iou`, `max_det`, `agnostic_nms`; for other
            formats any export argument; `project`, `name`, `exist_ok`, `save_dir` for the run folder.

    Returns:
        The files written.

    Raises:
        UsageError: If the model or an option is wrong.
        CheckFailed: If the exporter failed.
    """
    from ultralytics.engine.exporter import export_formats

    from yolo_ext.quantization.modelopt import is_modelopt

    formats = [f for f in export_formats()["Argument"] if f != "-"]
    if format not in formats:
        raise UsageError(f"Unknown export format '{format}'.{suggest(format, formats)} Legal: {', '.join(formats)}.")
    net, ckpt = _open(model)
    if format not in ("onnx", "openvino"):
        return [_by_ultralytics(model, format, out, options)]
    if unused := sorted(set(options) - {*OURS, *PLACE, "device", "mode"}):
        raise UsageError(f"Our export does not know {', '.join(unused)}. Legal: {', '.join(OURS)}, out.")
    imgsz = _size(ckpt, options.get("imgsz"))
    if is_modelopt(ckpt):  # the key alone is in every checkpoint of Ultralytics
        options = {**options, "modelopt": ckpt}
    carries = format == "onnx" and (manifest(net).get("quant") or "modelopt" in options)
    if options.get("quant") and not carries and _precision(options) != "int8":
        raise UsageError("'quant' options are for an INT8 file. Add int8=True, and data=data.yaml to calibrate on.")
    files = (_onnx if format == "onnx" else _openvino)(Path(model), net, out, imgsz, options)
    for file in files:
        LOGGER.info(f"Export saved as {file} ({_megabytes(file):.1f} MB)")
    side = imgsz if isinstance(imgsz, int) else max(imgsz)
    figures = runs.model_figures(net, Path(model), side)
    folder = runs.folder({k: options.get(k) for k in PLACE}, task=stock.task_of(net), mode="export")
    before = {**figures, "size_mb": None}  # fp16 in a .pt against fp32 in ONNX would compare nothing
    write_summary(folder, before, {**figures, "size_mb": _megabytes(files[-1])})
    return files


def _megabytes(path: Path) -> float:
    return sum(f.stat().st_size for f in path.rglob("*")) / 1e6 if path.is_dir() else runs.size_mb(path)


def _precision(options: dict[str, Any]) -> str:
    """Return "", "half" or "int8" from `half`, `int8` or Ultralytics' newer `quantize`."""
    asked = {k for k in ("half", "int8") if options.get(k)}
    given = options.get("quantize")
    if given not in (None, 32, "32", "fp32"):
        key = int(given) if str(given).isdigit() else str(given)
        if key not in PRECISION:
            raise UsageError(f"'quantize={given}' is illegal for ONNX and OpenVINO. Legal: 8, 16, 32.")
        asked.add(PRECISION[key])
    if len(asked) > 1:
        raise UsageError("half=True and int8=True exclude each other: give one of them.")
    return next(iter(asked), "")


def _float_file(model: Path | nn.Module, out: Path, imgsz: Any, options: dict[str, Any], half: bool) -> Path:
    from yolo_ext.deployment.export import export_onnx

    ours = {k: options[k] for k in ("opset", "simplify", "dynamic", "batch") if options.get(k) is not None}
    nms = {k: options[k] for k in NMS_KEYS if options.get(k) is not None}
    if options.get("nms") is not True and nms:
        raise UsageError(f"{', '.join(nms)}: only for embedded NMS. Add nms=True, or leave it out.")
    embedded = nms if options.get("nms") is True else None
    return export_onnx(model, out, imgsz, nms=embedded, end2end=options.get("nms") is False, half=half, **ours)


def _quantized(net: nn.Module, imgsz: Any, options: dict[str, Any], profile: str) -> tuple[nn.Module, Any, Any]:
    """Return float model, state and profile: from its own quantization where that is exact, else calibrated on images.

    Args:
        net: Float model, which may carry the state of a quantization.
        imgsz: Input size in pixels.
        options: Options of the export.
        profile: Profile to use where the user names none.
    """
    from yolo_ext.quantization.convert import convert
    from yolo_ext.quantization.profiles import resolve_profile

    given = options.get("quant") or {}
    known = manifest(net).get("quant")
    if "modelopt" in options:
        return _imported(net, imgsz, options, given.get("profile") or profile)
    if known and set(given) <= {"profile"}:
        source = resolve_profile(known["profile"])
        target = resolve_profile(given.get("profile") or (source.name if profile == "auto" else profile))
        try:
            return net, convert(known["state"], source, target), target
        except UsageError:
            if not options.get("data"):
                raise
    if not options.get("data"):
        raise UsageError("int8=True needs images to calibrate on. Give data=data.yaml.")
    from yolo_ext.data.check import check_data
    from yolo_ext.quantization.qat import prepare, strip

    cfg = parse({"quant": {"profile": profile, **given}})["quant"]
    side = imgsz if isinstance(imgsz, int) else max(imgsz)
    manifest(net).pop("quant", None)  # calibrated anew
    prepare(net, cfg, check_data(options["data"], task=stock.task_of(net)), side)
    return strip(net), manifest(net)["quant"]["state"], resolve_profile(cfg.profile)


def _imported(net: nn.Module, imgsz: Any, options: dict[str, Any], profile: str) -> tuple[nn.Module, Any, Any]:
    """Return model, state and profile from the ranges of Ultralytics' QAT, with those calibrated that it lacks."""
    from yolo_ext.quantization import modelopt
    from yolo_ext.quantization.branches import merge_branches
    from yolo_ext.quantization.fake_quant import strip_fake_quant
    from yolo_ext.quantization.profiles import resolve_profile

    def batches() -> Iterator[torch.Tensor]:  # asked for where something is missing only
        from yolo_ext.data.calibration import calibration_images, letterbox_batches
        from yolo_ext.data.check import check_data

        if not options.get("data"):
            raise UsageError(
                f"The ranges of Ultralytics' QAT are those of convolution inputs; profile '{target.name}' needs others "
                "too. Give data=data.yaml to calibrate them."
            )
        images = calibration_images(check_data(options["data"], task=stock.task_of(net)))
        crop, side = stock.task_of(net) == "classify", imgsz if isinstance(imgsz, int) else max(imgsz)
        yield from letterbox_batches(images, side, crop=crop)

    target = resolve_profile(profile)
    merge_branches(net, batches())
    state = modelopt.complete(net, modelopt.import_state(options["modelopt"], net), target, batches())
    return strip_fake_quant(net), state, target


def _onnx(model: Path, net: nn.Module, out: Any, imgsz: Any, options: dict[str, Any]) -> list[Path]:
    """Write the float file and, for a quantized model or if asked, its INT8 file."""
    from yolo_ext.deployment.runtime import conv_report
    from yolo_ext.quantization.qdq import write_qdq

    precision = _precision(options)
    target = Path(out or model.with_name(f"{model.stem}{'_fp16' if precision == 'half' else ''}.onnx"))
    quantized = manifest(net).get("quant") or "modelopt" in options
    if precision != "int8" and (precision or not quantized):
        return [_float_file(net, target, imgsz, options, precision == "half")]
    net, state, profile = _quantized(net, imgsz, options, "auto")  # before anything is written
    files = [_float_file(net, target, imgsz, options, half=False), target.with_name(f"{target.stem}_int8.onnx")]
    write_qdq(files[0], files[1], state, profile)
    if profile.output:  # made for ONNX Runtime
        integer, convs = conv_report(files[1])["int8_convs"], conv_report(files[0])["convs"]
        LOGGER.info(f"{colorstr('quantize: ')}{integer} of {convs} convolutions run as INT8 in ONNX Runtime")
    return files


def _openvino(model: Path, net: nn.Module, out: Any, imgsz: Any, options: dict[str, Any]) -> list[Path]:
    """Convert our ONNX file with OpenVINO's own converter."""
    from yolo_ext.deployment.intermediate import SUFFIX, export_openvino, need_openvino
    from yolo_ext.quantization.qdq import write_qdq

    need_openvino()
    precision = _precision(options)
    kind = {"int8": "_int8", "half": "_fp16"}.get(precision, "")
    source: nn.Module = net
    if precision == "int8":
        source, state, profile = _quantized(net, imgsz, options, "openvino")
    with tempfile.TemporaryDirectory() as folder:
        file = _float_file(source, Path(folder) / "fp32.onnx", imgsz, options, half=False)
        if precision == "int8":
            fp32, file = file, Path(folder) / "int8.onnx"
            write_qdq(fp32, file, state, replace(profile, fuse_silu=False))
        return [export_openvino(file, out or model.with_name(f"{model.stem}{kind}{SUFFIX}"), half=precision == "half")]


def _by_ultralytics(model: str | Path, format: str, out: Any, options: dict[str, Any]) -> Path:
    """Hand a format over to Ultralytics, which exports the module in the file, pruned or not; nothing is installed."""
    from ultralytics import YOLO

    if out:
        raise UsageError(f"'out={out}' is only for onnx and openvino: Ultralytics writes '{format}' beside the model.")
    args = {k: v for k, v in options.items() if k not in PLACE}
    try:
        with stock.no_autoinstall():
            return Path(YOLO(str(model)).export(format=format, **args))
    except ImportError as error:
        name = error.name or str(error)
        raise UsageError(f"Exporting '{format}' needs the package '{name}'. Run `pip install {name}`.") from error
    except Exception as error:  # every backend has exceptions of its own
        reason = " ".join(str(error).split())[:300]
        raise CheckFailed(f"Ultralytics could not export '{format}' ({type(error).__name__}: {reason}).") from error


def verify(model: str, onnx: str, int8: str | None = None, data: str | None = None, source: str | None = None,
           imgsz: int | None = None, **place: Any) -> dict[str, Any]:  # fmt: skip
    """Compare an ONNX file with the model that it came from, print the checks and write them.

    Args:
        model: ``.pt`` of the float model.
        onnx: Its FP32 or FP16 ONNX.
        int8: Its INT8 ONNX, checked against its own simulation.
        data: Dataset YAML whose val images are used; adds a comparison of mAP.
        source: Folder, glob or list of images instead of `data`.
        imgsz: Size of the input in pixels; by default that of the ONNX file.
        place: `project`, `name`, `exist_ok`, `save_dir`.

    Returns:
        ``passed``, ``checks`` and what they measured.

    Raises:
        UsageError: If a file is missing or there are no images.
    """
    from yolo_ext.data.check import check_data
    from yolo_ext.data.records import list_images
    from yolo_ext.deployment.bisect import describe_difference
    from yolo_ext.deployment.runtime import describe
    from yolo_ext.deployment.verify import verify as run
    from yolo_ext.reporting.tables import align

    net, _ = load_model(model)
    if not data and not source:
        raise UsageError("No images to verify on. Give data=data.yaml or source=folder.")
    size = _size({}, imgsz or describe(onnx)["imgsz"])
    images = check_data(data, task=stock.task_of(net))["images"]["val"] if data else list_images(source)
    found = run(model, onnx, images[:32], size, int8_onnx=int8, data=data)
    rows = [
        [c["name"], f"{c['value']:.3g}", f"{c['limit']:.3g}", "ok" if c["passed"] else "FAILED"]
        for c in found["checks"]
    ]
    LOGGER.info(align(rows, ["Check", "Value", "Limit", "Result"]))
    if "first_difference" in found:
        LOGGER.info(describe_difference(found["first_difference"]))
    folder = runs.folder(place, task=stock.task_of(net), mode="verify")
    runs.write_json(folder / "verify.json", found)
    figures = runs.model_figures(net, Path(model), size if isinstance(size, int) else max(size))
    maps = found.get("map") or {}
    after = {
        **figures,
        "size_mb": runs.size_mb(Path(int8 or onnx)),
        "map_onnx": {"fp32": (maps.get("onnx") or {}).get("map") if found["precision"] == "fp32" else None},
    }
    before = {**figures, "size_mb": None, **(maps.get("torch") or {})}  # as in `export`
    write_summary(folder, before, {**after, **(maps.get("onnx") or {})})
    return found
