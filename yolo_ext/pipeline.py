# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`compress`: base model in, smaller and verified model out. Stages are done once; a killed run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, YAML, colorstr

from yolo_ext import runs, stages, stock
from yolo_ext.core.config import EXT_DEFAULTS, as_plain, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.criteria import criteria
from yolo_ext.stage_common import FINETUNE, Record, Run
from yolo_ext.stock.load import load_model
from yolo_ext.tools import check_imgsz
from yolo_ext.training import check_pruning_epochs, check_quantization, check_techniques

STAGES = ("base", "sparsify", "prune", "finetune", "compare", "ptq", "qat", "verify", "latency")  # in this order
TRAININGS = {"sparsify", "finetune", "qat"}
PICTURES = 4


def compress(
    model: str | Path, data: str | Path | None = None, *, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Compress a trained YOLO and prove the result.

    Args:
        model: Base ``.pt`` (a ``.yaml`` is taken when nothing is trained).
        data: Dataset YAML; may be left out only when there is no training and no quantization.
        resume: Go on with the run folder that `project` and `name` say; finished stages are not repeated.
        options: `sparsity`, `prune`, `distill`, `quant` (dicts, dataclasses or None) and any Ultralytics training
            argument; `epochs` counts fine-tune epochs, `sparsity.epochs` and `quant.epochs` those of their stages.

    Returns:
        The contents of ``summary.json`` plus ``run_dir`` and ``checks``.

    Raises:
        UsageError: If the input is wrong; nothing has been written then.
    """
    stock.check_version()
    run = _open(str(model), str(data or ""), resume, dict(options))
    todo = _wanted(run)
    for i, (name, stage) in enumerate(todo, 1):
        LOGGER.info(f"\n{colorstr('bold', 'compress: ')}stage {i}/{len(todo)} {name}")
        try:
            run.done[name] = runs.stage(run.folder, name, lambda stage=stage: stage(run))  # type: ignore[misc]
        except UsageError:
            # What only a measurement shows to be out of reach or broken; what a training has made is kept.
            if run.fresh and not TRAININGS & {*run.done, name}:
                shutil.rmtree(run.folder)
            raise
    return _finish(run)


def _open(model: str, data: str, resume: bool, options: dict[str, Any]) -> Run:
    """Check everything that can be checked before anything is written."""
    mode = str(options.pop("mode", None) or "compress")
    place = {k: options.pop(k, None) for k in ("project", "name", "exist_ok", "save_dir")}
    imgsz = options.pop("imgsz", None)
    configs = parse({k: options.pop(k, None) for k in EXT_DEFAULTS})
    base, ckpt = load_model(model)
    epochs = int(options.get("epochs", FINETUNE["epochs"]))
    if reason := _learns_from_data(configs, epochs):
        if not model.endswith(".pt"):
            raise UsageError(
                f"'model={model}' has no trained weights, which {reason} needs. "
                "Give a .pt; a .yaml can be pruned with epochs=0 only."
            )
        if not data:
            hint = ", or epochs=0 to prune without data" if reason.startswith("'epochs") else ""
            raise UsageError(f"'data' is missing, which {reason} needs. Give data=path/to/data.yaml{hint}.")
    if data:
        stock.refuse_rtdetr(base)
    info = _check_data(data, model, base) if data else {}
    size = check_imgsz(imgsz or (ckpt.get("train_args") or {}).get("imgsz") or 640, base)
    # A target that cannot be reached or a teacher that does not fit must be known before hours of training.
    sparse = configs["sparsity"].epochs if configs["sparsity"] else 0
    check_techniques(model, base, info.get("names") or base.names, configs, options.get("freeze"), size, sparse)
    _check_pruning_epochs(configs, options, epochs)
    if quant := configs["quant"]:  # whose QAT learns from labels and a teacher of its own
        alone = {"quant": replace(quant, mode="qat"), "distill": None}
        check_quantization(alone, options, stock.task_of(base), info)
    folder = runs.folder(place, task=stock.task_of(base), mode=mode, resume=resume)
    fresh = not any(folder.iterdir())
    plain = {"model": model, "data": data, "imgsz": size, **options, **as_plain(configs)}
    _check_resume(folder, plain) if resume else _start_over(folder)
    YAML.save(folder / "compress.yaml", plain)
    YAML.save(folder / "args.yaml", {k: v for k, v in plain.items() if k not in EXT_DEFAULTS})
    return Run(folder, Path(model), data, info, size, configs, options, fresh)


def _learns_from_data(configs: dict[str, Any], epochs: int) -> str:
    """Return which option needs data and trained weights, or an empty string."""
    prune = configs["prune"]
    found = {
        f"'epochs={epochs}'": epochs > 0,
        "'distill'": configs["distill"],
        "'quant'": configs["quant"],
    }
    if prune and prune.kind == "structured":
        found[f"'prune.method={prune.method}'"] = prune.method != "auto" and Need.DATA in criteria[prune.method].needs
        found["'prune.max_drop'"] = prune.max_drop is not None
        found["'prune.scope=pagcp'"] = prune.scope == "pagcp"
    return next((name for name, needs in found.items() if needs), "")


def _check_pruning_epochs(configs: dict[str, Any], options: dict[str, Any], epochs: int) -> None:
    """Refuse pruning while training that does not fit the fine-tuning; quantization comes after it."""
    prune = configs["prune"]
    if prune and not epochs and (prune.at or prune.every or prune.steps or prune.start or prune.end):
        raise UsageError("'epochs=0' trains nothing, so there are no epochs to prune in. Leave prune.at or every out.")
    check_pruning_epochs({**configs, "quant": None}, {**options, "epochs": max(epochs, 1)})


def _check_data(data: str, model: str, base: Any) -> dict[str, Any]:
    from yolo_ext.data.check import check_data

    info = check_data(data, task=stock.task_of(base))
    if info["nc"] != len(base.names):
        raise UsageError(
            f"'{model}' knows {len(base.names)} classes, '{data}' has {info['nc']}. Give the data it was trained on."
        )
    return info


def _start_over(folder: Path) -> None:
    """Remove the stages of an earlier run from a folder that the user lets us write again (`exist_ok=True`)."""
    if (folder / "compress.yaml").exists():
        for stage in STAGES:
            shutil.rmtree(folder / stage, ignore_errors=True)


def _check_resume(folder: Path, options: dict[str, Any]) -> None:
    """Refuse to mix stages of different options in one folder."""
    before = runs.read(folder / "compress.yaml")
    changed = sorted(k for k in {*before, *options} if before.get(k) != options.get(k))
    if changed:
        raise UsageError(
            f"'{folder}' holds a run with other options ({', '.join(changed)} changed). "
            "Give another name=, or the options of that run to go on with it."
        )


def _wanted(run: Run) -> list[tuple[str, Callable[[Run], Record]]]:
    """Return the stages that this run needs, in order."""
    prune, distill, quant = (run.configs[k] for k in ("prune", "distill", "quant"))
    wanted = {
        "sparsify": run.configs["sparsity"],
        "prune": prune and not run.prunes_later,
        "compare": prune and prune.kind == "structured",
        "finetune": run.epochs > 0 and (prune or distill),
        "qat": quant and quant.mode != "ptq",
        **dict.fromkeys(("ptq", "verify", "latency"), quant),
    }
    return [(name, getattr(stages, name)) for name in STAGES if wanted.get(name, True)]


def _finish(run: Run) -> dict[str, Any]:
    """Write weights/best.pt, summary.json and the report, print the table, and return the summary."""
    before = dict(run.done["base"]["metrics"])
    quant = run.configs["quant"]
    floats = [n for n in ("base", "sparsify", "prune", "finetune") if "metrics" in run.done.get(n, {})]
    last = run.quantized()[0] if quant else floats[-1]
    after = dict(run.done[last]["metrics"])
    if quant:
        times = {r["name"]: r["median"] for r in run.done["latency"]["rows"]}
        before["latency_ms"] = {"torch": times["base torch"], "ort": times["base FP32"]}
        after["latency_ms"] = {
            "torch": times["compressed torch"],
            "ort": times["compressed FP32"],
            "ort_int8": times["compressed INT8"],
        }
    elif rows := {r["name"]: r for r in run.done.get("compare", {}).get("rows", [])}:
        before["latency_ms"], after["latency_ms"] = ({"ort": rows[n]["ort"]} for n in ("base", "pruned"))
    if run.weights() != run.base:
        (run.folder / "weights").mkdir(exist_ok=True)
        shutil.copyfile(run.weights(), run.folder / "weights" / "best.pt")
    figures = {name: d["metrics"] for name, d in run.done.items() if "metrics" in d}
    figures.update({last: after, "base": before})  # with the latencies, which are measured at the end
    summary = runs.write_summary(run.folder, before, after, figures)
    checks = [c for d in run.done.values() for c in d.get("checks", [])]
    page = _report(run, summary, checks)
    LOGGER.info(f"Report: {page}")
    return {**summary, "run_dir": str(run.folder), "checks": checks}


# Report --------------------------------------------------------------------------------------------------------------
def _report(run: Run, summary: dict[str, Any], checks: list[dict[str, Any]]) -> Path:
    from yolo_ext.reporting.pages import write_report
    from yolo_ext.reporting.plots import plot_channels, plot_stages

    (run.folder / "plots").mkdir(exist_ok=True)
    layers: list[dict[str, Any]] = next((d["layers"] for d in run.done.values() if d.get("layers")), [])
    plots = [(plot_stages(summary["stages"], run.folder / "plots" / "stages.png"), "Stage by stage")]
    if layers:
        plots.append((plot_channels(layers, run.folder / "plots" / "channels.png"), "Channels before and after"))
    curves = [
        (run.folder / stage / "results.png", f"Training curves: {stage}") for stage in ("sparsify", "finetune", "qat")
    ]
    plots += [(path, caption) for path, caption in curves if path.exists()]
    report = {
        "title": f"Compression report: {run.base.name}",
        "command": summary["command"],
        # The report puts the base in front of the stages itself.
        "summary": {**summary, "stages": {k: v for k, v in summary["stages"].items() if k != "base"}},
        "layers": layers,
        "checks": checks,
        "comparison": run.done.get("compare", {}).get("rows", []),
        "notes": [note for d in run.done.values() for note in d.get("notes", [])],
        "plots": [{"path": str(p), "caption": c} for p, c in plots],
        "pictures": _pictures(run) if run.data else [],
        "plan": {k: v for k, v in as_plain(run.configs).items() if v},
        **(_quantization(run) if run.configs["quant"] else {}),
    }
    return write_report(run.folder, report)


def _quantization(run: Run) -> dict[str, Any]:
    """Return the report's sections on latency and on what runs in INT8."""
    ratio, record = run.done["latency"]["ratios"]["compressed INT8"], run.quantized()[1]
    return {
        "latency": {
            "rows": run.done["latency"]["rows"],
            "note": f"1 thread unless said otherwise, batch 1, {run.imgsz} px, interleaved. INT8 against "
            f"base FP32 in ONNX Runtime: {ratio['ratio']:.2f}x (10 to 90 %: {ratio['p10']:.2f} to {ratio['p90']:.2f}).",
        },
        "quantization": {
            "convs": record["metrics"]["convs"],
            "int8_convs": record["metrics"]["int8_convs"],
            **{k: record[k] for k in ("float", "f1", "profile", "calibration")},
            "parity": run.done["verify"]["parity"],
        },
    }


def _pictures(run: Run) -> list[dict[str, str]]:
    """Draw base and compressed detections side by side on the first val images."""
    from ultralytics import YOLO

    from yolo_ext.reporting.plots import side_by_side
    from yolo_ext.stock.context import quiet

    new = run.folder / "onnx" / "int8.onnx" if run.configs["quant"] else run.weights()
    task, made = stock.task_of(load_model(run.base)[0]), []
    if task not in ("detect", "segment", "pose") or new == run.base:
        return []
    with quiet():
        models = [YOLO(str(p), task=task) for p in (run.base, new)]
        for i, image in enumerate(run.info["images"]["val"][:PICTURES]):
            found: list[Any] = []
            for m in models:
                boxes = m.predict(str(image), imgsz=run.imgsz, device="cpu", verbose=False, rect=False)[0].boxes
                found.append([tuple(r) for r in boxes.data.tolist()] if boxes is not None else [])
            path = run.folder / "plots" / f"detections_{i}.png"
            missed, added = side_by_side(str(image), found[0], found[1], run.info["names"], path)
            made.append({"path": str(path), "caption": f"{Path(image).name}: {missed} missed, {added} added"})
    return made
