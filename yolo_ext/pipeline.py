# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`compress`: base model in, smaller and verified model out. Stages read files, write files and are never repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, YAML, colorstr

from yolo_ext import compat, runs
from yolo_ext.checkpoint import load_model, manifest, save_model
from yolo_ext.config import as_plain, parse
from yolo_ext.errors import UsageError

# What fine-tuning uses unless the user says otherwise: the model is trained already, so the rate is low and warm-up short.
FINETUNE = {"epochs": 30, "batch": 16, "optimizer": "AdamW", "lr0": 0.001, "cos_lr": True, "warmup_epochs": 1.0}
QAT = {"optimizer": "AdamW", "cos_lr": True, "warmup_epochs": 0.5, "mosaic": 0.0, "close_mosaic": 0, "batch": 16}
PICTURES = 4
CHECKS = {  # the checks of `deployment.verify` in words
    "score_max": "FP32 ONNX against PyTorch: largest score difference",
    "box_max": "FP32 ONNX against PyTorch: largest box difference (px)",
    "extra_max": "FP32 ONNX against PyTorch: largest difference of masks, keypoints, angles",
    "matched": "FP32 ONNX against PyTorch: share of matched detections",
    "map": "FP32 ONNX against PyTorch: mAP50-95 difference",
    "int8_box_mean": "INT8 against its simulation: mean box difference (px)",
    "int8_score_max": "INT8 against its simulation: largest score difference",
}


@dataclass
class Run:
    """One compression run.

    Attributes:
        folder: Run folder.
        base: Base model file.
        data: Path of the data.yaml, None when no stage needs data.
        info: Checked dataset dict.
        imgsz: Side of the square input in pixels.
        configs: Parsed technique options.
        native: Ultralytics training arguments given by the user.
        done: What finished stages recorded, by stage.
    """

    folder: Path
    base: Path
    data: str | None
    info: dict[str, Any]
    imgsz: int
    configs: dict[str, Any]
    native: dict[str, Any]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Fine-tune epochs."""
        return int(self.native.get("epochs", FINETUNE["epochs"]))

    def weights(self) -> Path:
        """Return the newest float weights."""
        found = [d["weights"] for d in self.done.values() if d.get("weights")]
        return self.folder / found[-1] if found else self.base


def compress(
    model: str | Path, data: str | Path | None = None, *, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Compress a trained YOLO and prove the result.

    Args:
        model: Base ``.pt`` (a ``.yaml`` is taken when nothing is trained).
        data: Dataset YAML; may be left out only when there is no training and no quantization.
        resume: Go on with the run folder that `project` and `name` say; finished stages are not repeated.
        options: `prune`, `distill`, `quant` (dicts, dataclasses or None) and any Ultralytics training argument;
            `epochs` counts fine-tune epochs, `quant.epochs` QAT epochs.

    Returns:
        The contents of ``summary.json`` plus ``run_dir`` and ``checks``.

    Raises:
        UsageError: If the input is wrong; nothing has been written then.
    """
    compat.check_version()
    run = _open(str(model), data, resume, options)
    stages = _stages(run)
    for i, (name, stage) in enumerate(stages, 1):
        LOGGER.info(f"\n{colorstr('bold', 'compress: ')}stage {i}/{len(stages)} {name}")
        run.done[name] = runs.stage(run.folder, name, lambda stage=stage: stage(run))  # type: ignore[misc]
    return _finish(run)


def _open(model: str, data: Any, resume: bool, options: dict[str, Any]) -> Run:
    """Check everything that can be checked before anything is written."""
    from yolo_ext.data.check import check_data

    configs = parse({k: options.pop(k, None) for k in parse({})})
    needs_data = bool(configs["distill"] or configs["quant"] or int(options.get("epochs", FINETUNE["epochs"])) > 0)
    base, ckpt = load_model(model)
    if not model.endswith(".pt") and (needs_data or configs["distill"] or configs["quant"]):
        raise UsageError(
            f"'model={model}' has no trained weights. Give a .pt; a .yaml can only be pruned with epochs=0."
        )
    if configs["distill"] and configs["distill"].teacher != "self":
        load_model(configs["distill"].teacher)
    if needs_data and not data:
        raise UsageError("'data' is missing. Give data=path/to/data.yaml (or epochs=0 to prune without data).")
    task = compat.task_of(base)
    info = check_data(str(data), task=task) if data else {}
    if info and info["nc"] != len(base.names):
        raise UsageError(
            f"'{model}' knows {len(base.names)} classes, '{data}' has {info['nc']}. Give the data it was trained on."
        )
    imgsz = int(options.pop("imgsz", None) or (ckpt.get("train_args") or {}).get("imgsz") or 640)
    stride = compat.max_stride(base)
    if imgsz % stride or imgsz <= 0:
        raise UsageError(
            f"'imgsz={imgsz}' is illegal. Legal: a multiple of {stride}, such as {max(round(imgsz / stride), 1) * stride}."
        )
    if configs["prune"]:  # a target that cannot be reached must be known before hours of training
        from yolo_ext.pruning.graph import build_graph
        from yolo_ext.pruning.targets import plan

        plan(base, build_graph(base), configs["prune"])
    place = {k: options.pop(k, None) for k in ("project", "name", "exist_ok", "save_dir")}
    folder = runs.folder(place, task=task, mode=str(options.pop("mode", None) or "compress"), resume=resume)
    plain = {"model": model, "data": str(data) if data else None, "imgsz": imgsz, **options, **as_plain(configs)}
    if resume and (before := runs.read(folder / "compress.yaml")) and before != plain:
        changed = sorted(k for k in {*before, *plain} if before.get(k) != plain.get(k))
        raise UsageError(
            f"Cannot resume '{folder}' with other options: {', '.join(changed)} changed. Start a new run instead."
        )
    YAML.save(folder / "compress.yaml", plain)
    YAML.save(folder / "args.yaml", {"model": model, "data": str(data) if data else None, "imgsz": imgsz, **options})
    return Run(folder, Path(model), str(data) if data else None, info, imgsz, configs, options)


def _stages(run: Run) -> list[tuple[str, Callable[[Run], dict[str, Any]]]]:
    """Return the stages that this run needs, in order."""
    prune, distill, quant = (run.configs[k] for k in ("prune", "distill", "quant"))
    train = run.epochs > 0 and (prune or distill)
    table: list[tuple[str, Callable[[Run], dict[str, Any]], Any]] = [
        ("base", _base, True),
        ("prune", _prune, prune),
        ("finetune", _finetune, train),
        ("ptq", _ptq, quant),
        ("qat", _qat, quant and quant.mode != "ptq"),
        ("verify", _verify, quant),
        ("latency", _latency, quant),
    ]
    return [(name, stage) for name, stage, wanted in table if wanted]


# Stages ----------------------------------------------------------------------------------------------------------------
def _measure(run: Run, weights: Path, with_map: bool = True) -> dict[str, Any]:
    """Return params, GFLOPs, size and, where there are data, mAP of float weights."""
    model, _ = load_model(weights)
    found = runs.model_figures(model, weights, run.imgsz)
    if run.data and with_map:
        from yolo_ext.deployment.verify import map_torch

        found.update(map_torch(weights, run.data, run.imgsz))
    return found


def _base(run: Run) -> dict[str, Any]:
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.deployment.verify import map_onnx

    m = _measure(run, run.base)
    if run.configs["quant"]:
        file = export_onnx(run.base, run.folder / "base" / "fp32.onnx", run.imgsz)
        m.update(size_mb=runs.size_mb(file), map_onnx={"fp32": map_onnx(file, run.data, run.imgsz)["map"]})
    return {"metrics": m}


def _prune(run: Run) -> dict[str, Any]:
    from yolo_ext.data.calibration import calibration_images, letterbox_batches
    from yolo_ext.pruning.surgery import layer_report, prune_model, recalibrate

    cfg = run.configs["prune"]
    base, ckpt = load_model(run.base)
    pruned = prune_model(base, cfg)
    if run.data and cfg.recalibrate:
        images = calibration_images(run.info, cfg.recalibrate, cfg.seed)
        recalibrate(pruned, letterbox_batches(images, run.imgsz))
    pruned.args = dict(ckpt.get("train_args") or {}) if ckpt else {}
    file = save_model(pruned, run.folder / "prune" / "weights" / "pruned.pt")
    record = manifest(pruned)["prune"]
    runs.write_json(run.folder / "prune" / "plan.json", record)
    return {
        "metrics": _measure(run, file),
        "weights": "prune/weights/pruned.pt",
        "layers": layer_report(pruned),
        "checks": [{"name": "pruned equals masked dense model", "value": record["gap"], "limit": 1e-9, "passed": True}],
    }


def _train(run: Run, stage: str, options: dict[str, Any], native: dict[str, Any]) -> Path:
    """Train the newest weights in the stage's folder, going on where a killed run stopped."""
    from ultralytics import YOLO

    from yolo_ext.trainers import trainer_for

    last = run.folder / stage / "weights" / "last.pt"
    resumable = last.exists() and runs.is_unfinished(last)
    model = YOLO(str(last if resumable else run.weights()))
    args = {
        "data": run.data,
        "imgsz": run.imgsz,
        "save_dir": str(run.folder / stage),
        "exist_ok": True,
        **native,
        **options,
    }
    if resumable:
        args = {"resume": True, "save_dir": args["save_dir"]}
    elif (run.folder / stage).exists():
        shutil.rmtree(run.folder / stage)
    model.train(trainer=trainer_for(model.task), **args)
    best = run.folder / stage / "weights" / "best.pt"
    return best if best.exists() else last


def _distill_options(run: Run) -> dict[str, Any]:
    cfg = run.configs["distill"]
    if cfg and cfg.teacher == "self":
        cfg = replace(cfg, teacher=str(run.base.resolve()))
    return as_plain({"distill": cfg}) if cfg else {}


def _step_every_batch(native: dict[str, Any]) -> None:
    """Set the nominal batch to the real one: with Ultralytics' 64, a small dataset gives a handful of steps per epoch."""
    if isinstance(native.get("batch"), int) and native["batch"] > 0:
        native.setdefault("nbs", native["batch"])


def _finetune(run: Run) -> dict[str, Any]:
    native = {**FINETUNE, **run.native}
    native.setdefault("close_mosaic", min(10, run.epochs // 3))
    _step_every_batch(native)
    best = _train(run, "finetune", _distill_options(run), native)
    return {"metrics": _measure(run, best), "weights": str(best.relative_to(run.folder))}


def _emit(run: Run, stage: str, weights: Path, ranges: dict[str, Any]) -> dict[str, Any]:
    """Write FP32 and INT8 ONNX of float weights and their ranges, and measure both."""
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.deployment.runtime import conv_report
    from yolo_ext.deployment.verify import map_onnx
    from yolo_ext.quantization.profiles import resolve_profile
    from yolo_ext.quantization.qdq import write_qdq

    fp32 = export_onnx(weights, run.folder / stage / "fp32.onnx", run.imgsz)
    int8 = run.folder / stage / "int8.onnx"
    written = write_qdq(fp32, int8, ranges, resolve_profile(run.configs["quant"].profile))
    convs = conv_report(int8)
    maps = {name: map_onnx(file, run.data, run.imgsz) for name, file in (("fp32", fp32), ("int8", int8))}
    m = _measure(run, weights)
    m.update(
        size_mb=runs.size_mb(int8),
        map_onnx={k: v["map"] for k, v in maps.items()},
        convs=convs["convs"],
        int8_convs=convs["int8_convs"],
    )
    LOGGER.info(
        f"{colorstr('quantize: ')}{convs['int8_convs']} of {convs['convs']} convs run as INT8 in ONNX Runtime, "
        f"mAP50-95 {maps['fp32']['map']:.4f} FP32 -> {maps['int8']['map']:.4f} INT8"
    )
    return {"metrics": m, "float": written["float"], "planned": len(written["quantized"])}


def _ptq(run: Run) -> dict[str, Any]:
    from yolo_ext.quantization.fake_quant import get_ranges
    from yolo_ext.quantization.qat import prepare

    weights = run.weights()
    model, _ = load_model(weights)
    reasons = prepare(model, run.configs["quant"], run.info, run.imgsz)
    return {**_emit(run, "ptq", weights, get_ranges(model)), "reasons": reasons, "chosen": str(weights)}


def _drop(done: dict[str, Any], reference: float) -> float:
    return reference - done["metrics"]["map_onnx"]["int8"]


def _qat(run: Run) -> dict[str, Any]:
    cfg, ptq = run.configs["quant"], run.done["ptq"]
    reference = ptq["metrics"]["map_onnx"]["fp32"]
    lost = _drop(ptq, reference)
    if cfg.mode == "auto" and lost <= cfg.max_drop:
        LOGGER.info(
            f"{colorstr('quantize: ')}PTQ loses {lost:.4f} mAP50-95, within quant.max_drop={cfg.max_drop:g}: no QAT"
        )
        return {"skipped": f"PTQ lost {lost:.4f}, within quant.max_drop={cfg.max_drop:g}"}
    native = {
        **run.native,
        **{k: v for k, v in QAT.items() if k not in run.native},
        "epochs": cfg.epochs,
        "lr0": cfg.lr0,
    }
    _step_every_batch(native)
    best = _train(run, "qat", {"quant": as_plain({"quant": cfg})["quant"], **_distill_options(run)}, native)
    model, _ = load_model(best)
    done = _emit(run, "qat", best, manifest(model)["quant"]["ranges"])
    better = _drop(done, reference) < lost
    LOGGER.info(
        f"{colorstr('quantize: ')}QAT is {'better than' if better else 'no better than'} PTQ: keeping {'QAT' if better else 'PTQ'}"
    )
    return {
        **done,
        "chosen": str(best),
        "better": better,
        **({"weights": str(best.relative_to(run.folder))} if better else {}),
    }


def _quantized(run: Run) -> tuple[str, dict[str, Any]]:
    """Return the stage whose INT8 file is delivered, and its record."""
    name = "qat" if run.done.get("qat", {}).get("better") else "ptq"
    return name, run.done[name]


def _verify(run: Run) -> dict[str, Any]:
    from yolo_ext.deployment.verify import verify

    stage, done = _quantized(run)
    (run.folder / "onnx").mkdir(exist_ok=True)
    for kind in ("fp32", "int8"):
        shutil.copyfile(run.folder / stage / f"{kind}.onnx", run.folder / "onnx" / f"{kind}.onnx")
    files = {k: run.folder / "onnx" / f"{k}.onnx" for k in ("fp32", "int8")}
    images = run.info["images"]["val"][:32]
    found = verify(done["chosen"], files["fp32"], images, run.imgsz, int8_onnx=files["int8"], data=run.data)
    cfg = run.configs["quant"]
    lost = _drop(done, run.done["ptq"]["metrics"]["map_onnx"]["fp32"])
    m = done["metrics"]
    found["checks"] += [
        {"name": "INT8 convs as planned", "value": m["int8_convs"], "limit": done["planned"],
         "passed": m["int8_convs"] >= done["planned"]},
        {"name": "INT8 mAP50-95 loss (quant.max_drop)", "value": lost, "limit": cfg.max_drop, "passed": lost <= cfg.max_drop},
    ]  # fmt: skip
    for c in found["checks"]:
        c["name"] = CHECKS.get(c["name"], c["name"])
    runs.write_json(run.folder / "verify" / "verify.json", found)
    return {"checks": found["checks"]}


def _latency(run: Run) -> dict[str, Any]:
    from yolo_ext.deployment.latency import bench, speedup

    files = {
        "base FP32": run.folder / "base" / "fp32.onnx",
        "compressed FP32": run.folder / "onnx" / "fp32.onnx",
        "compressed INT8": run.folder / "onnx" / "int8.onnx",
    }
    onnx = bench(files, run.imgsz, threads=1, rounds=200, seconds=20)
    torch = bench(
        {"base torch": run.base, "compressed torch": run.weights()}, run.imgsz, threads=1, rounds=100, seconds=15
    )
    ratios = {name: speedup(onnx["base FP32"], onnx[name]) for name in list(files)[1:]}
    for name, r in ratios.items():
        verdict = "" if r["significant"] else ", within the spread: no claim"
        LOGGER.info(
            f"{colorstr('latency: ')}{name} is {r['ratio']:.2f}x ({r['p10']:.2f} to {r['p90']:.2f}) base FP32 in ONNX Runtime{verdict}"
        )
    rows = [{"name": k, **{f: v[f] for f in ("median", "p10", "p90", "n")}} for k, v in {**onnx, **torch}.items()]
    runs.write_json(run.folder / "latency" / "latency.json", {"rows": rows, "ratios": ratios})
    return {"rows": rows, "ratios": ratios}


# Summary and report ----------------------------------------------------------------------------------------------------
def _finish(run: Run) -> dict[str, Any]:
    """Write weights/best.pt, summary.json and the report, print the table, and return the summary."""
    before = dict(run.done["base"]["metrics"])
    stage, after = "base", dict(before)
    for name in ("prune", "finetune"):
        if name in run.done:
            stage, after = name, dict(run.done[name]["metrics"])
    if run.configs["quant"]:
        stage, done = _quantized(run)
        after = dict(done["metrics"])
        times = {r["name"]: r["median"] for r in run.done["latency"]["rows"]}
        before["latency_ms"] = {"torch": times["base torch"], "ort": times["base FP32"]}
        after["latency_ms"] = {
            "torch": times["compressed torch"],
            "ort": times["compressed FP32"],
            "ort_int8": times["compressed INT8"],
        }
    if run.weights() != run.base:
        (run.folder / "weights").mkdir(exist_ok=True)
        shutil.copyfile(run.weights(), run.folder / "weights" / "best.pt")
    stages = {name: d["metrics"] for name, d in run.done.items() if "metrics" in d}
    summary = runs.write_summary(run.folder, before, after, stages)
    checks = [c for d in run.done.values() for c in d.get("checks", [])]
    _report(run, summary, checks)
    return {**summary, "run_dir": str(run.folder), "checks": checks}


def _report(run: Run, summary: dict[str, Any], checks: list[dict[str, Any]]) -> None:
    from yolo_ext.reporting.html import write_report
    from yolo_ext.reporting.plots import plot_channels, plot_stages

    plots, layers = [], run.done.get("prune", {}).get("layers", [])
    (run.folder / "plots").mkdir(exist_ok=True)
    if layers:
        plots.append(
            {
                "path": str(plot_channels(layers, run.folder / "plots" / "channels.png")),
                "caption": "Channels before and after",
            }
        )
    plots.append(
        {"path": str(plot_stages(summary["stages"], run.folder / "plots" / "stages.png")), "caption": "Stage by stage"}
    )
    if (curve := run.folder / "finetune" / "results.png").exists():
        plots.append({"path": str(curve), "caption": "Fine-tuning"})
    stages = {k: v for k, v in summary["stages"].items() if k != "base"}  # the report puts the base in front itself
    report: dict[str, Any] = {
        "title": f"Compression report: {run.base.name}",
        "command": summary["command"],
        "summary": {**summary, "stages": stages},
        "layers": layers,
        "checks": checks,
        "plots": plots,
        "pictures": _pictures(run) if run.data else [],
        "plan": {k: v for k, v in as_plain(run.configs).items() if v},
    }
    if "latency" in run.done:
        ratio = run.done["latency"]["ratios"]["compressed INT8"]
        report["latency"] = {
            "rows": run.done["latency"]["rows"],
            "note": f"1 thread, batch 1, {run.imgsz} px, all models interleaved in one process. INT8 against base FP32 in ONNX "
            f"Runtime: {ratio['ratio']:.2f}x (10 to 90 % of rounds: {ratio['p10']:.2f} to {ratio['p90']:.2f}).",
        }
        _, done = _quantized(run)
        report["quantization"] = {
            "convs": done["metrics"]["convs"], "int8_convs": done["metrics"]["int8_convs"],
            "float": {k: run.done["ptq"]["reasons"].get(k, v) for k, v in done["float"].items()},
        }  # fmt: skip
    page = write_report(run.folder, report)
    LOGGER.info(f"Report: {page}")


def _pictures(run: Run) -> list[dict[str, str]]:
    """Draw base and compressed detections side by side on the first val images."""
    from ultralytics import YOLO

    from yolo_ext.deployment.runtime import quiet
    from yolo_ext.reporting.plots import side_by_side

    int8 = run.folder / "onnx" / "int8.onnx"
    new = int8 if run.configs["quant"] else run.weights()
    if compat.task_of(load_model(run.base)[0]) == "classify" or new == run.base:
        return []
    images, made = run.info["images"]["val"][:PICTURES], []
    with quiet():
        models = [YOLO(str(p), task="detect" if p.suffix == ".onnx" else None) for p in (run.base, new)]
        for i, image in enumerate(images):
            boxes = []
            for m in models:
                found = m.predict(str(image), imgsz=run.imgsz, device="cpu", verbose=False, rect=False)[0]
                boxes.append([tuple(r) for r in found.boxes.data.tolist()] if found.boxes is not None else [])
            path = run.folder / "plots" / f"detections_{i}.png"
            missed, added = side_by_side(str(image), *boxes, run.info["names"], path)
            made.append({"path": str(path), "caption": f"{Path(image).name}: {missed} missed, {added} added"})
    return made
