# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands export and verify: a model out of training into files for a runtime, and proof that they are equal."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yolo_ext.commands import (  # isort: skip
    LOGGER, PLACE, Count, Device, Limits, Names, Natural, Share, Size, Technique, Weights, command, tell_idle,
)  # fmt: skip
from yolo_ext.core.config import changed, given_options, parse
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import suggest

UNREAD = {"mode", "max_drop", "mixed", "epochs", "lr0", "observe_epochs", "freeze_bn", "supervision"}  # of `quant`
PRECISION = {"8": "int8", "int8": "int8", "w8a8": "int8", "16": "half", "fp16": "half", "w16a16": "half",
             "32": "", "fp32": ""}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What to export, and how."""

    net: Any  # module, float, with or without the ranges of a quantization
    imgsz: Any  # pixels: one side, or height and width
    precision: str  # "" for FP32, half or int8
    data: str | Path | None  # dataset YAML to calibrate on
    quant: dict[str, Any]  # quantization options
    graph: dict[str, Any]  # arguments of `export_onnx`
    modelopt: dict[str, Any] | None  # checkpoint of Ultralytics' own QAT, if the model is one
    quantized: bool  # whether the model carries ranges of a quantization


@command("Write ONNX or OpenVINO (FP32, FP16, INT8) or any other Ultralytics format")
def export(
    model: Weights, format: str = "onnx", out: str | Path | None = None, *, imgsz: Size = None,
    batch: Count | None = None, dynamic: bool | None = None, opset: Count | None = None, simplify: bool | None = None,
    half: bool | None = None, int8: bool | None = None, quantize: Natural | str | None = None,
    data: str | Path | None = None, quant: Technique = None, nms: bool | None = None, conf: Share | None = None,
    iou: Share | None = None, max_det: Count | None = None, agnostic_nms: bool | None = None, **native: Any,
) -> dict[str, Any]:  # fmt: skip
    """Export a model; ONNX and OpenVINO by us, every other format by Ultralytics with the weights of the model.

    Args:
        model: ``.pt``, pruned or not. A QAT model, of ours or of Ultralytics (`quantize=8`), also gets its INT8 file.
        format: ``onnx``, ``openvino`` or another format of Ultralytics.
        out: File or folder to write, by default beside the model; an INT8 file gets ``_int8`` added to its name.
        imgsz: Input size in pixels, one number or height and width; that of the training by default.
        batch: Images per call.
        dynamic: Leave batch and image size open.
        opset: ONNX opset.
        simplify: Simplify the graph, where that changes nothing; on by default.
        half: FP16 weights and activations.
        int8: INT8; needs `data` unless the model carries its ranges.
        quantize: What Ultralytics calls precision: 8, 16 or 32.
        data: Dataset YAML to calibrate on.
        nms: NMS inside the graph; False takes the NMS-free head of a model that has two.
        conf: Lowest confidence, for NMS inside the graph.
        iou: IoU above which the less certain object is dropped, for NMS inside the graph.
        max_det: Most objects of an image, for NMS inside the graph.
        agnostic_nms: NMS over all classes together, inside the graph.
        native: `project`, `name`, `exist_ok`, `save_dir` for the run folder; other formats: any export argument.

    Returns: ``files``, those written, the INT8 file last.
    Raises: `UsageError` if the model or an option is wrong, `CheckFailed` if the exporter failed.
    """
    asked = {k: v for k, v in locals().items() if k not in ("model", "format", "out", "native")}
    from yolo_ext import runs, stock
    from yolo_ext.checkpoint import manifest
    from yolo_ext.quantization.qat import is_modelopt
    from yolo_ext.reporting.tables import write_summary
    from yolo_ext.stock.load import export_formats

    formats = [f for f in export_formats()["Argument"] if f != "-"]
    if format not in formats:
        raise UsageError(f"Unknown export format '{format}'.{suggest(format, formats)} Legal: {', '.join(formats)}.")
    net, ckpt = _open(model)
    given = {k: v for k, v in asked.items() if v is not None}
    if format not in ("onnx", "openvino"):
        if quant:
            raise UsageError(f"'quant' options are for onnx and openvino; Ultralytics quantizes '{format}' by itself.")
        return {"files": [_by_ultralytics(model, format, out, {**given, **native})]}
    if unused := sorted(set(native) - {*PLACE, "device", "mode"}):
        raise UsageError(f"Our export does not know {', '.join(unused)}. Legal: {', '.join(asked)}, out.")
    modelopt = ckpt if is_modelopt(ckpt) else None
    job = Job(net, _size(net, ckpt, imgsz), _precision(given), data, given_options(quant),
              _graph(given), modelopt, bool(modelopt or manifest(net).quant))  # fmt: skip
    int8 = job.precision == "int8" or (format == "onnx" and job.quantized and job.precision != "half")
    if job.quant and not int8:
        raise UsageError("'quant' options are for an INT8 file. Add int8=True, and data=data.yaml to calibrate on.")
    net.to(stock.device_of(native.get("device")) if int8 else "cpu")  # where it is calibrated; exports run on the CPU
    files = (_onnx if format == "onnx" else _openvino)(Path(model), job, out)
    idle = {} if int8 else {"data": data, "device": native.get("device")}
    tell_idle([f"{key} (only INT8 is calibrated)" for key, value in idle.items() if value is not None])
    figures = runs.model_figures(net, Path(model), _side(job.imgsz))
    folder = runs.folder({k: native.get(k) for k in PLACE}, task=stock.task_of(net), mode="export")
    write_summary(folder, figures, {**figures, "size_mb": runs.size_mb(files[-1])}, table=False)
    told = ", ".join(f"{file} ({runs.size_mb(file):.1f} MB)" for file in files)
    written = " ".join(f"{key}={file}" for key, file in zip(("onnx", "int8"), files))
    use = f"verify model={model} {written} data={data or 'data.yaml'}"
    runs.saved(told, f"yolo-ext {use if format == 'onnx' else f'bench models={model},{files[0]}'}")
    return {"files": files}


def _open(model: str | Path) -> tuple[Any, dict[str, Any]]:
    """Load a model, one of Ultralytics' own QAT as the stock model that it holds, and its checkpoint dict."""
    from yolo_ext import stock
    from yolo_ext.quantization.qat import is_modelopt, load_modelopt

    try:
        net, ckpt = stock.load_model(model)
    except UsageError as error:  # such a file needs ModelOpt to load
        try:
            return load_modelopt(model)
        except Exception:
            raise error from None
    return load_modelopt(model) if is_modelopt(ckpt) else (net, ckpt)


def _size(net: Any, ckpt: dict[str, Any], given: Any) -> Any:
    """Return the image size given by the user, a whole number or (height, width), else that of the training."""
    from yolo_ext import stock

    if given is None:
        return stock.image_size(net, ckpt)
    sides = list(given) if isinstance(given, (list, tuple)) else [given]
    return sides[0] if len({*sides}) == 1 else tuple(sides)


def _side(imgsz: Any) -> int:
    """Return the longer side of an image size in pixels."""
    return imgsz if isinstance(imgsz, int) else max(imgsz)


def _precision(given: dict[str, Any]) -> str:
    """Return "", "half" or "int8" from `half`, `int8` or Ultralytics' newer `quantize`."""
    level = str(given.get("quantize", 32))
    if level not in PRECISION:
        raise UsageError(f"'quantize={level}' is illegal for ONNX and OpenVINO. Legal: 8, 16, 32.")
    asked = {k for k in ("half", "int8") if given.get(k)} | ({PRECISION[level]} - {""})
    if len(asked) > 1:
        raise UsageError("half=True and int8=True exclude each other: give one of them.")
    return next(iter(asked), "")


def _graph(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `export_onnx`."""
    nms = {k: given[k] for k in ("conf", "iou", "max_det", "agnostic_nms") if k in given}
    if given.get("nms") is not True and nms:
        raise UsageError(f"{', '.join(nms)}: only for embedded NMS. Add nms=True, or leave it out.")
    ours: dict[str, Any] = {k: given[k] for k in ("opset", "simplify", "dynamic", "batch") if k in given}
    return {**ours, "nms": nms if given.get("nms") else None, "end2end": given.get("nms") is False}


def _onnx(model: Path, job: Job, out: Any) -> list[Path]:
    """Write the float file and, for a quantized model or if asked, its INT8 file."""
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.quantization.qdq import write_qdq

    half = job.precision == "half"
    target = Path(out or model.with_name(f"{model.stem}{'_fp16' if half else ''}.onnx"))
    if half or not (job.precision or job.quantized):
        return [export_onnx(job.net, target, job.imgsz, half=half, **job.graph)]
    net, state, profile = _quantized(job, "auto")  # before anything is written
    fp32 = export_onnx(net, target, job.imgsz, **job.graph)
    int8 = target.with_name(f"{target.stem}_int8.onnx")
    written = write_qdq(fp32, int8, state, profile)
    _prove(job, int8, written["convs"], net, state, profile)
    return [fp32, int8]


def _prove(job: Job, file: Path, convs: dict[str, str], net: Any, state: Any, profile: Any) -> None:
    """Count the convolutions that run as INT8; with `quant.strict` those that do not against the plan fail."""
    from yolo_ext.checkpoint import manifest
    from yolo_ext.pipeline.int8 import prove, shortfall, told

    quant = {"float": {}, **manifest(net).quant, "state": state, "profile": profile.name}
    told([shortfall(prove(file, convs, quant), profile.name)], bool(job.quant.get("strict")))


def _openvino(model: Path, job: Job, out: Any) -> list[Path]:
    """Convert our ONNX file with OpenVINO's own converter."""
    from yolo_ext.deployment.export import SUFFIX, export_onnx, export_openvino
    from yolo_ext.deployment.runtime import need_openvino
    from yolo_ext.quantization.qdq import write_qdq

    need_openvino()
    kind = {"int8": "_int8", "half": "_fp16"}.get(job.precision, "")
    net, int8 = job.net, job.precision == "int8"
    if int8:
        net, state, profile = _quantized(job, "openvino")
    target = out or model.with_name(f"{model.stem}{kind}{SUFFIX}")
    with tempfile.TemporaryDirectory() as folder:
        fp32, file = (Path(folder) / f"{name}.onnx" for name in ("fp32", "int8"))
        export_onnx(net, fp32, job.imgsz, **job.graph)
        if not int8:
            return [export_openvino(fp32, target, half=job.precision == "half")]
        written = write_qdq(fp32, file, state, replace(profile, fuse_silu=False))
        made = export_openvino(file, target)
    _prove(job, made, written["convs"], net, state, profile)
    return [made]


def _quantized(job: Job, default: str) -> tuple[Any, Any, Any]:
    """Return float model, state and profile: of the model's own quantization where exact, else calibrated on images."""
    from yolo_ext import quantization, stock
    from yolo_ext.checkpoint import manifest, note
    from yolo_ext.data.check import check_data
    from yolo_ext.quantization.spec import convert

    if job.modelopt:
        return _imported(job, quantization.resolve_profile(job.quant.get("profile") or default))
    known, cfg = manifest(job.net).quant, parse({"quant": {"profile": default, **job.quant}})["quant"]
    tell_idle([f"quant.{key} (only in quantize and compress)" for key in sorted(UNREAD & changed(cfg).keys())])
    if known and set(job.quant) <= {"profile", "strict"}:
        source = quantization.resolve_profile(known["profile"])
        given = job.quant.get("profile") or (source.name if default == "auto" else default)
        target = quantization.resolve_profile(given)
        try:
            return job.net, convert(known["state"], source, target), target
        except UsageError:
            if not job.data:
                raise
    if not job.data:
        raise UsageError("int8=True needs images to calibrate on. Give data=data.yaml.")
    note(job.net, quant=None)  # calibrated anew
    quantization.prepare(job.net, cfg, check_data(job.data, task=stock.task_of(job.net)), _side(job.imgsz))
    return quantization.strip(job.net), manifest(job.net).quant["state"], quantization.resolve_profile(cfg.profile)


def _imported(job: Job, profile: Any) -> tuple[Any, Any, Any]:
    """Return model, state and profile from the ranges of Ultralytics' QAT, with those calibrated that it lacks."""
    from yolo_ext import stock
    from yolo_ext.data.check import calibration_images, check_data, letterbox_batches
    from yolo_ext.quantization.fake_quant import merge_branches, strip_fake_quant
    from yolo_ext.quantization.qat import complete, import_state

    def batches() -> Iterator[Any]:
        """Yield images (B, C, H, W); asked for where something is missing only."""
        if not job.data:
            why = f"are those of convolution inputs; profile '{profile.name}' needs others too"
            raise UsageError(f"The ranges of Ultralytics' QAT {why}. Give data=data.yaml to calibrate them.")
        images = calibration_images(check_data(job.data, task=stock.task_of(job.net)))
        yield from letterbox_batches(images, _side(job.imgsz), **stock.seen_by(job.net))

    merge_branches(job.net, batches())
    state = complete(job.net, import_state(job.modelopt or {}, job.net), profile, batches())
    return strip_fake_quant(job.net), state, profile


def _by_ultralytics(model: str | Path, format: str, out: Any, options: dict[str, Any]) -> Path:
    """Hand a format over to Ultralytics, which exports the module in the file, pruned or not; nothing is installed."""
    from ultralytics import YOLO

    if out:
        raise UsageError(f"'out={out}' is only for onnx and openvino: Ultralytics writes '{format}' beside the model.")
    try:
        return Path(YOLO(str(model)).export(format=format, **{k: options[k] for k in options if k not in PLACE}))
    except ImportError as error:
        name = error.name or str(error)
        raise UsageError(f"Exporting '{format}' needs the package '{name}'. Run `pip install {name}`.") from error
    except Exception as error:  # every backend has exceptions of its own
        reason = " ".join(str(error).split())[:300]
        raise CheckFailed(f"Ultralytics could not export '{format}' ({type(error).__name__}: {reason}).") from error


@command("Compare an ONNX file with its .pt; exit status 1 when they differ")
def verify(
    model: Weights, onnx: str | Path, int8: str | Path | None = None, data: str | Path | None = None,
    source: Names = None, imgsz: Size = None, contract: Limits = None,
    device: Device = None, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Compare an ONNX file with the model that it came from, print the checks and write them.

    Args:
        model: ``.pt`` of the float model.
        onnx: Its FP32 or FP16 ONNX.
        int8: Its INT8 ONNX, checked against its own simulation.
        data: Dataset YAML whose val images are used; adds a comparison of accuracy.
        source: Folder, glob or list of images instead of `data`.
        imgsz: Size of the input in pixels; by default that of the ONNX file.

    Returns: ``passed``, ``checks`` and what they measured.
    Raises: `UsageError` if a file is missing or there are no images.
    """
    from yolo_ext import runs, stock
    from yolo_ext.data.check import check_data
    from yolo_ext.data.records import list_images
    from yolo_ext.deployment.contract import read_limits
    from yolo_ext.deployment.runtime import describe
    from yolo_ext.deployment.verify import verify as run
    from yolo_ext.reporting.tables import TEXT, write_summary

    for key, file in (("onnx", onnx), ("int8", int8)):
        if file and Path(file).suffix != ".onnx":
            raise UsageError(f"'{key}={file}' is no '.onnx' file. Give the one that was exported from '{model}'.")
    net, ckpt = stock.load_model(model)
    if not data and not source:
        raise UsageError("No images to verify on. Give data=data.yaml or source=folder.")
    tell_idle([data and source and "source (the val images of data are taken)"])
    size = _size(net, ckpt, imgsz or describe(onnx)["imgsz"])
    images = check_data(data, task=stock.task_of(net))["images"]["val"] if data else list_images(source)
    limits = read_limits(contract, stock.task_of(net), net.names, data=data)
    found = run(model, onnx, images[:32], size, int8_onnx=int8, data=data, contract=limits, device=device)
    tell_idle([limits and "contract" not in found and "contract (accuracy needs a square input without NMS)"])
    LOGGER.info(TEXT.get_template("verify.txt.j2").render(found, images=len(images[:32]), file=int8).rstrip())
    folder = runs.folder(place, task=stock.task_of(net), mode="verify")
    runs.write_json(folder / "verify.json", found)
    base, ours = ((found.get("map") or {}).get(k) or {} for k in ("torch", "onnx"))
    figures = runs.model_figures(net, Path(model), _side(size))
    after = {**figures, "size_mb": runs.size_mb(Path(onnx)), **ours}
    write_summary(folder, {**figures, **base}, after, table=False)
    models = ",".join(str(file) for file in (model, onnx, int8) if file)
    runs.saved(folder, f"yolo-ext bench models={models} imgsz={_side(size)}" if found["passed"] else "")
    return found
