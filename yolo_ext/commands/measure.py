# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands that measure: models side by side, and what each layer of a model is worth."""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from yolo_ext.commands import (  # isort: skip
    LOGGER, Count, Counts, Device, Limits, Names, Resume, Technique, Weights, command, each, tell_idle,
)  # fmt: skip
from yolo_ext.core.config import PruneConfig, changed, comma_list, given_options, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import resumes

TIMES = ("runtime", "threads", "batch", "median", "p10", "p90", "n")
UNUSED = {  # options that an analysis of sensitivity does not look at
    "prune": ("ratios", "sensitivity", "at", "every", "start", "end", "steps", "schedule", "force", "compare",
              "runtime"),
    "quant": ("mode", "max_drop", "mixed", "strict", "epochs", "lr0", "observe_epochs", "freeze_bn", "supervision"),
}  # fmt: skip
Shares = Annotated[Any, lambda v: each(v, float, lambda r: 0 < r < 1), "above 0 and below 1, such as 0.25,0.5,0.75"]
RATIO = {"ratio": "speedup", "p10": "speedup_p10", "p90": "speedup_p90", "significant": "significant"}


@command("Measure latency, memory and mAP of .pt, .onnx and OpenVINO models side by side")
def bench(
    models: Names, imgsz: Count | None = None, threads: Counts = 1, batch: Counts = 1, rounds: Count = 100,
    data: str | Path | None = None, source: str | Path | None = None, contract: Limits = None,
    profile: bool = False, memory: bool = True, device: Device = None, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure files side by side, print the tables and write them.

    Args:
        models: ``.pt`` and ``.onnx`` files and ``*_openvino_model`` folders, a list or separated by commas; the first
            one is the reference.
        imgsz: Side of the square input in pixels; by default that of the first model.
        threads: Threads of each runtime, one number or several to try.
        batch: Images per call, one number or several to try.
        rounds: Timed calls of each model.
        data: Dataset YAML; adds accuracy, a plot of it against latency, and the contract of each with the first one.
        source: Image for which letterbox and NMS are timed, by default one of `data`, else noise.
        profile: Also print and write the time of each operator inside ONNX Runtime.
        memory: Also measure peak memory, each model in a process of its own.
        device: Where the accuracy is measured; times are those of the CPU.

    Returns: The contents of ``bench.json``: ``rows`` (by model, threads and batch), ``models``, ``env``, ``profile``,
        and with `data` ``contract`` (by model, as of `compare`) and ``checks``.
    Raises: `UsageError` if a file is missing or does not fit.
    """
    from ultralytics.utils import TQDM

    from yolo_ext import runs, stock
    from yolo_ext.deployment.contract import read_limits
    from yolo_ext.deployment.latency import operators, runtime_of
    from yolo_ext.deployment.runtime import describe
    from yolo_ext.reporting.figures import plot_tradeoff
    from yolo_ext.reporting.tables import TEXT, write_summary
    from yolo_ext.stock import accuracy

    files = comma_list(models)
    if missing := [f for f in files if not Path(f).exists()]:
        raise UsageError(f"Model files do not exist: {', '.join(missing)}. Give models=a.pt,b.onnx.")
    for file in files:
        runtime_of(file)
        if data:
            accuracy.validator_of(file, data)
    limits = read_limits(contract, *(accuracy.about(files[0])[:2] if data else ("detect", {})), data=data)
    counts, batches = ([*dict.fromkeys(comma_list(given, int))] for given in (threads, batch))
    first, env = (counts[0], batches[0]), stock.cpu_info()
    about = {} if Path(files[0]).is_dir() else describe(files[0])
    given = stock.image_size(*stock.load_model(files[0]), imgsz) if files[0].endswith(".pt") else imgsz
    size = given or about.get("imgsz", (640,))[0]
    LOGGER.info(", ".join(f"{k} {v}" for k, v in env.items() if v is not None))
    env["load"] = stock.tell_busy()
    image, name = _image(data, source, size, about.get("channels", 3))
    kept: list[Any] = []  # evidence of each model
    to = {"keep": kept.append, "device": device}
    about = {f: _about(f, image, size, first, data, memory, to) for f in TQDM(files, desc="Models")}
    judged = _judged(files, kept, limits)
    rows = [row for t in counts for b in batches for row in _measure(files, size, t, b, rounds)]
    found: dict[str, Any] = {"env": env, "imgsz": size, "rounds": rounds, "image": name, "rows": rows, "models": about,
                             "metric": stock.metric(kept[0].about["task"] if kept else "detect"), **judged}  # fmt: skip
    if profile:
        found["profile"] = {
            f: operators(f, size, threads=first[0], batch=first[1]) for f in files if f.endswith(".onnx")
        }
    LOGGER.info(TEXT.get_template("bench.txt.j2").render(found))
    folder = runs.folder(place, task="detect", mode="bench")
    runs.write_json(folder / "bench.json", found)
    runs.write_csv(folder / "bench.csv", [{**r, **about[r["model"]]} for r in rows])
    if data:
        points = [{**r, "name": Path(r["model"]).name, "map": about[r["model"]]["score"]}
                  for r in rows if (r["threads"], r["batch"]) == first]  # fmt: skip
        note = f"{size} px, batch {first[1]}, threads {first[0]}"
        plot_tradeoff(points, folder / "tradeoff.png", note, found["metric"])
    figures = _figures(rows, about)
    stages = {Path(f).name: figures[f] for f in files}
    write_summary(folder, figures[files[0]], figures[files[-1]], stages, table=False)
    best = min(rows[: len(files)], key=lambda r: r["median"])["model"]
    runs.saved(folder, f"yolo predict model={best} imgsz={size} source=image.jpg")
    return found


def _measure(files: list[str], size: int, threads: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each model in one setting; the first model is the reference."""
    from yolo_ext.deployment.latency import bench, speedup

    found = bench({f: Path(f) for f in files}, size, threads=threads, batch=batch, rounds=rounds)
    ratios = {f: speedup(found[files[0]], found[f]) for f in files}
    return [{"model": f, **{k: found[f][k] for k in TIMES}, **{c: r[k] for k, c in RATIO.items()}, "speed": r["words"]}
            for f, r in ratios.items()]  # fmt: skip


def _image(data: str | Path | None, source: str | Path | None, size: int, channels: int) -> tuple[Any, str]:
    """Return a picture (height, width, channels) for letterbox and NMS, and its name."""
    import numpy as np

    from yolo_ext.data.check import check_data
    from yolo_ext.data.records import list_images
    from yolo_ext.stock.load import read_image

    if not data and not source:
        noise = np.random.default_rng(0).integers(0, 255, (size * 3 // 4, size, channels), dtype=np.uint8)
        return noise, "noise, on which NMS has little to do: give source=image"
    task = "classify" if Path(str(data)).is_dir() else "detect"  # by the form of the data
    for file in list_images(source) if source else check_data(str(data), task=task)["images"]["val"]:
        if (image := read_image(file, channels)) is not None:
            return image, str(file)
    raise UsageError(f"No image in '{source or data}' can be read. Give source=image.")


def _judged(files: list[str], kept: list[Any], limits: dict[str, float]) -> dict[str, Any]:
    """Return what the evidence of each model says against that of the first one, and the checks of a contract."""
    from yolo_ext.deployment.contract import judged

    found = {f: judged(kept[0], evidence, limits) for f, evidence in zip(files[1:], kept[1:])}
    checks = [{**c, "name": f"{f}: {c['name']}"} for f, judgement in found.items() for c in judgement["checks"]]
    return {"contract": found, "checks": checks}


def _about(
    file: str, image: Any, size: int, setting: tuple[int, int], data: Any, memory: bool, to: dict[str, Any]
) -> dict[str, Any]:
    """Return what is measured once for each model: size, surroundings, memory with (threads, batch), accuracy."""
    from yolo_ext import runs
    from yolo_ext.deployment.footprint import peak_memory
    from yolo_ext.deployment.latency import around
    from yolo_ext.deployment.runtime import conv_report
    from yolo_ext.stock.accuracy import accuracy, score

    path = Path(file)
    convs = conv_report(path) if path.suffix != ".pt" else {}
    counts = {k: convs[k] for k in ("convs", "int8_convs") if convs}
    measured = accuracy(path, data, size, **to) if data else {}
    return {"imgsz": size, "size_mb": runs.size_mb(path), **(around(path, image, size) if path.is_file() else {}),
            **counts, "int8": f"{convs['int8_convs']} of {convs['convs']}" if convs else None,
            **((memory and peak_memory(path, size, *setting)) or {}), "score": score(measured),
            **measured}  # fmt: skip


def _figures(rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of `summary.json` by model: of the first setting, and of the first one with batch 32."""
    figures: dict[str, dict[str, Any]] = {}
    for row in reversed(rows):
        known = about[row["model"]]
        key = {"torch": "torch", "ort": "ort_int8" if known.get("int8_convs") else "ort"}.get(row["runtime"])
        found = {**known}
        found["latency_batch32_ms" if row["batch"] == 32 else "latency_ms"] = {key: row["median"]} if key else {}
        found["latency_ratio"] = {key: {k: row[c] for k, c in RATIO.items()}} if key else {}
        figures[row["model"]] = {**figures.get(row["model"], {}), **found}
    return figures


@command("Print every group of coupled channels: size, cost, prunable or the reason why not")
def analyze(model: Weights, imgsz: Count | None = None, **place: Any) -> dict[str, Any]:
    """Print and write every group of coupled channels: members, cost, prunable or the reason why not.

    Args:
        model: ``.pt`` or ``.yaml``.

    Returns: ``rows``, one for each group.
    Raises: `UsageError` if the model cannot be loaded or must not be changed any more.
    """
    from yolo_ext import pruning, runs, stock
    from yolo_ext.pruning.analyze import table
    from yolo_ext.reporting.tables import write_summary

    net, ckpt = stock.load_model(model)
    pruning.check_prunable(net)
    size = stock.image_size(net, ckpt, imgsz)
    rows = pruning.analyze_model(net, size)
    LOGGER.info(table(rows, size))
    folder = runs.folder(place, task=stock.task_of(net), mode="analyze")
    runs.write_json(folder / "groups.json", rows)
    figures = runs.model_figures(net, Path(model), size)
    write_summary(folder, figures, figures, table=False)
    runs.saved(folder, f"yolo-ext prune model={model} epochs=0 prune.speedup=2")
    return {"rows": rows}


@command("Measure what each group of channels is worth to pruning, or each layer loses by INT8")
def sensitivity(
    model: Weights, data: str | Path, kind: Literal["prune", "quant"] = "prune", ratios: Shares = None,
    prune: Technique = None, quant: Technique = None, by: Literal["layer", "block"] = "layer", images: Count = 32,
    map: bool = False, imgsz: Count | None = None, device: Device = None, resume: Resume = False, **place: Any,
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
    given = {k: v for k, v in locals().items() if k not in ("place", "resume")}
    from yolo_ext import pruning, runs, stock
    from yolo_ext.data.check import check_data

    others = {"quant": {"ratios": ratios, "prune": prune},
              "prune": {"quant": quant, "by": by != "layer", "images": images != 32, "map": map}}  # fmt: skip
    if strange := [k for k, v in others[kind].items() if v]:
        raise UsageError(f"'{strange[0]}' does not go with kind={kind}. See `yolo-ext help sensitivity`.")
    cfg = parse({"quant": quant or {}} if kind == "quant" else {"prune": {"ratio": 0.5, **given_options(prune)}})[kind]
    tell_idle([f"{kind}.{k}" for k in changed(cfg) if k in UNUSED[kind]])
    shares = {*comma_list((0.25, 0.5, 0.75) if ratios is None else ratios, float)}
    net, ckpt = stock.load_model(model)
    stock.refuse_untrainable(net)
    size = stock.image_size(net, ckpt, imgsz)
    if kind == "prune":
        pruning.check_prunable(net)
    info = check_data(data, task=stock.task_of(net))
    info = stock.one_class(info) if net.names == stock.ONE_CLASS else info
    stock.check_fit(net, info, (model, data))
    net.to(stock.device_of(device))
    if kind == "prune":
        table, files, found = _of_pruning(net, cfg, info, size, tuple(sorted(shares)), place, given)
        use = f"compress model={model} data={data} prune.sensitivity={files[0]}"
    else:
        table, files, found = _of_quantization(net, cfg, info, size, by, images, map, place)
        use = f"quantize model={model} data={data} quant.max_drop=0.005"
    LOGGER.info(f"\n{table}\n")
    runs.saved(files[0].parent, f"yolo-ext {use}")
    return found


def _of_pruning(
    net: Any, cfg: Any, info: Any, size: int, shares: tuple[float, ...], place: Any, given: dict[str, Any]
) -> Any:
    """Measure mAP and losses with each group pruned by each share; return table, files and contents of the first."""
    from yolo_ext import pruning, runs, stock
    from yolo_ext.pruning.analyze import losses_table, write
    from yolo_ext.training.prune import make_probes

    probes = make_probes(info, size, cfg, stock.task_of(net), net)
    folder = runs.folder(place, task=stock.task_of(net), mode="sensitivity")
    if not (folder / "sensitivity.json").exists():
        runs.record(folder / "args.yaml", given)
    resumes("sensitivity", folder, "sensitivity.json")
    try:
        found = pruning.measure_sensitivity(net, pruning.build_graph(net), cfg, probes, shares, folder=folder)
    except UsageError:
        runs.discard(folder)
        raise
    return losses_table(found, size), write(found, folder), found


def _of_quantization(
    net: Any, cfg: Any, info: dict[str, Any], size: int, by: str, images: int, accuracy: bool, place: Any
) -> Any:
    """Calibrate a model, compare its layers in INT8 one by one, and return the same."""
    from yolo_ext import deployment, quantization, runs, stock
    from yolo_ext.checkpoint import manifest
    from yolo_ext.data.check import calibration_images, letterbox_batches
    from yolo_ext.deployment.latency import saved_ms
    from yolo_ext.quantization.search import table, write
    from yolo_ext.stock.accuracy import score
    from yolo_ext.training.prune import make_probes

    quantization.prepare(net, cfg, info, size)
    quantized = manifest(quantization.strip(net)).quant
    chosen = calibration_images(cfg.source or info, cfg.calib, cfg.seed)[:images]
    batches = letterbox_batches(chosen, size, **stock.seen_by(net))
    measured = make_probes(info, size, PruneConfig(ratio=0.5), stock.task_of(net), net).accuracy
    worth = (lambda m: score(measured(m)) or 0.0) if accuracy and measured else None
    profile = quantization.resolve_profile(quantized["profile"])
    costs: dict[str, float] | None = None
    if profile.output:  # one of ONNX Runtime, where the time that INT8 saves can be measured
        with tempfile.TemporaryDirectory() as tmp:
            fp32, int8 = (Path(tmp) / f"{kind}.onnx" for kind in ("fp32", "int8"))
            deployment.export_onnx(net, fp32, size)
            quantization.write_qdq(fp32, int8, quantized["state"], profile)
            costs = saved_ms(fp32, int8, quantized["state"], size)
    found = {"profile": quantized["profile"]}
    found |= quantization.sensitivity(net, quantized["state"], batches, by, worth, costs)
    head = f"Errors with one {by} alone in INT8 (1: with all), {found['images']} train images at {size} px"
    folder = runs.folder(place, task=stock.task_of(net), mode="sensitivity")
    return f"{head}\n{table(found)}", write(found, folder), found
