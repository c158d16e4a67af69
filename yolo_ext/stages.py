# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The stages of `compress`: each reads the files of earlier ones, writes its own folder and returns a plain record.

A record may hold `metrics` (figures of `summary.json`), `weights` (newest float model, relative to the run folder) and
`checks`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs, stock
from yolo_ext.checkpoint import manifest, save_model
from yolo_ext.core.config import PruneConfig, as_plain
from yolo_ext.quant_stages import accuracy, ptq, qat, verify  # noqa: F401  the pipeline finds every stage here
from yolo_ext.stage_common import (
    FINETUNE,
    Record,
    Run,
    distill_config,
    distill_options,
    finetune_arguments,
    measure,
    train,
)
from yolo_ext.stock.load import load_model


def base(run: Run) -> Record:
    """Measure the base model, as ONNX too when the result will be ONNX."""
    m = measure(run, run.base)
    if run.configs["quant"]:
        from yolo_ext.deployment.export import export_onnx
        from yolo_ext.deployment.runtime import conv_report

        file = export_onnx(run.base, run.folder / "base" / "fp32.onnx", run.imgsz)
        m.update(size_mb=runs.size_mb(file), map_onnx={"fp32": accuracy(run, file)["map"]})
        m.update({k: v for k, v in conv_report(file).items() if k in ("convs", "int8_convs")})
    return {"metrics": m}


def sparsify(run: Run) -> Record:
    """Train the base model until channels that it does not need are near zero."""
    cfg = run.configs["sparsity"]
    options: dict[str, Any] = as_plain({"sparsity": cfg})
    if distill := distill_config(run):  # losses that see the scale of features would defend the scale factors
        free = replace(distill, features="pkd", logits="kl_binary", temperature=None, layers=[])
        options.update(as_plain({"distill": free}))
    best = train(run, "sparsify", options, {**FINETUNE, **run.native, "epochs": cfg.epochs})
    found = manifest(load_model(best)[0])["sparsity"]
    note = f"Sparsity training brought {100 * found['share']:.1f} % of the channels below {cfg.threshold:g}."
    return {"metrics": measure(run, best), "weights": str(best.relative_to(run.folder)), "notes": [note]}


def prune(run: Run) -> Record:
    """Prune the newest model to the target and re-estimate BatchNorm."""
    from yolo_ext.probes import make_probes
    from yolo_ext.pruning.surgery import prune_model
    from yolo_ext.stock.context import recalibrate

    cfg = run.configs["prune"]
    model, ckpt = load_model(run.weights())
    probes = make_probes(run.info, run.imgsz, cfg, stock.task_of(model), model)
    if cfg.kind != "structured":
        from yolo_ext.pruning.unstructured import zero_weights

        zero_weights(pruned := model, cfg, cfg.ratio)
    else:
        pruned = prune_model(model, cfg, run.imgsz, probes)
    if probes.images and cfg.recalibrate and cfg.kind != "unstructured":  # small weights hardly move the statistics
        recalibrate(pruned, probes.images())
    pruned.args = dict(ckpt.get("train_args") or {})
    file = save_model(pruned, run.folder / "prune" / "weights" / "pruned.pt")
    found = {"metrics": measure(run, file), "weights": str(file.relative_to(run.folder))}
    return {**found, **_pruning_record(run, pruned, "prune")}


def _pruning_record(run: Run, pruned: nn.Module, stage: str) -> Record:
    """Return layers and checks of a pruned model, and write its plan."""
    from yolo_ext.pruning.record import layer_report
    from yolo_ext.pruning.surgery import TOLERANCE

    if run.configs["prune"].kind != "structured":
        return {"notes": _masks(run, pruned, stage)}
    record = manifest(pruned)["prune"]
    runs.write_json(run.folder / stage / "plan.json", record)
    gate = {
        "name": "Pruned model equals the masked dense one",
        "value": record["gap"],
        "limit": TOLERANCE,
        "passed": True,
    }
    return {"layers": layer_report(pruned), "checks": [gate], "notes": _limits(record["notes"])}


def _limits(rows: list[dict[str, Any]]) -> list[str]:
    """Say of each group how far PAGCP pruned it and which loss set the limit."""
    return [
        f"{r['name']} {r['outcome']} ({100 * r['ratio']:.0f} % of {r['channels']} channels"
        + (f", limited by {r['limit']})" if r["limit"] else ")")
        for r in rows
    ]


def _masks(run: Run, masked: nn.Module, stage: str) -> list[str]:
    """Write what is zero and which layers could be, and return it in sentences for the report."""
    from yolo_ext.pruning.unstructured import eligible, packed_mb, sparsity

    found, rows = sparsity(masked), eligible(masked, run.configs["prune"])
    runs.write_json(run.folder / stage / "masks.json", {**found, "eligible": rows})
    able, wide = (sum(bool(r[k]) for r in rows) for k in ("eligible", "gain"))
    notes = [
        f"{100 * found['masked']:.1f} % of the weights of {able} of {len(rows)} layers are zero. This saves disk space "
        f"({packed_mb(masked):.1f} MB zipped), not time."
    ]
    if run.configs["prune"].kind == "2:4":
        notes.append(f"{wide} layers are wide enough for sparse tensor cores to run them faster (masks.json).")
    for note in notes:
        LOGGER.info(f"{colorstr('prune: ')}{note}")
    return notes


def finetune(run: Run) -> Record:
    """Fine-tune, with distillation if asked."""
    options = distill_options(run)
    if run.prunes_later:
        options["prune"] = as_plain({"prune": run.configs["prune"]})["prune"]
    best = train(run, "finetune", options, finetune_arguments(run))
    found = {"metrics": measure(run, best), "weights": str(best.relative_to(run.folder))}
    return {**found, **(_pruning_record(run, load_model(best)[0], "finetune") if run.prunes_later else {})}


def compare(run: Run) -> Record:
    """Put the pruned model beside what else costs as many FLOPs: the same family built narrower, and random pruning."""
    import tempfile

    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.deployment.latency import bench
    from yolo_ext.pruning.smaller import smaller
    from yolo_ext.reporting.tables import ABSENT, align

    pruned = load_model(run.weights())[0]
    width, narrow = smaller(pruned, stock.gflops(pruned, run.imgsz), run.imgsz)
    rows = {"base": run.base, "pruned": run.weights(), width: narrow}
    if run.configs["prune"].compare:
        rows["random criterion, same FLOPs and epochs"] = _random_baseline(run, pruned)
    with tempfile.TemporaryDirectory() as tmp:
        files = {name: export_onnx(m, Path(tmp) / f"{i}.onnx", run.imgsz) for i, (name, m) in enumerate(rows.items())}
        times = bench(files, run.imgsz, threads=1, rounds=100, seconds=15)
    found = []
    for name, m in rows.items():
        trained = isinstance(m, Path)
        figures = measure(run, m) if trained else runs.model_figures(m, None, run.imgsz)
        found.append(
            {"name": name, **{k: figures.get(k) for k in ("params", "gflops", "map")}, "ort": times[name]["median"]}
        )
    cells = [[r["name"], f"{r['params']:,}", f"{r['gflops']:.2f}", ABSENT if r["map"] is None else f"{r['map']:.4f}",
              f"{r['ort']:.2f}"] for r in found]  # fmt: skip
    LOGGER.info(align(cells, ["For comparison", "Parameters", "GFLOPs", "mAP50-95", "ONNX Runtime ms"]))
    return {"rows": found}


def _random_baseline(run: Run, pruned: nn.Module) -> Path:
    """Prune the base by the random criterion to the same FLOPs and train it as the delivered model was."""
    from yolo_ext.probes import make_probes
    from yolo_ext.pruning.surgery import prune_model
    from yolo_ext.stock.context import recalibrate

    model, ckpt = load_model(run.base)
    ratio = stock.gflops(model, run.imgsz) / stock.gflops(pruned, run.imgsz)
    cfg = replace(PruneConfig(method="random", speedup=ratio), round_to=run.configs["prune"].round_to)
    made = prune_model(model, cfg, run.imgsz)
    if images := make_probes(run.info, run.imgsz, cfg, stock.task_of(model)).images:
        recalibrate(made, images())
    made.args = dict(ckpt.get("train_args") or {})
    file = save_model(made, run.folder / "compare" / "random.pt")
    return train(run, "compare/random", distill_options(run), finetune_arguments(run), file) if run.epochs else file


def latency(run: Run) -> Record:
    """Measure base and compressed files interleaved, on one thread and on all."""
    from yolo_ext.deployment.latency import bench, speedup

    onnx = {
        "base FP32": run.folder / "base" / "fp32.onnx",
        "compressed FP32": run.folder / "onnx" / "fp32.onnx",
        "compressed INT8": run.folder / "onnx" / "int8.onnx",
    }
    torch = {"base torch": run.base, "compressed torch": run.weights()}
    times = bench(onnx, run.imgsz, threads=1, rounds=200, seconds=20)
    ratios = {name: speedup(times["base FP32"], times[name]) for name in list(onnx)[1:]}
    for name, r in ratios.items():
        verdict = "" if r["significant"] else ", within the spread: no claim"
        spread = f"{r['ratio']:.2f}x ({r['p10']:.2f} to {r['p90']:.2f})"
        LOGGER.info(f"{colorstr('latency: ')}{name} is {spread} as fast as base FP32 in ONNX Runtime{verdict}")
    times.update(bench(torch, run.imgsz, threads=1, rounds=100, seconds=15))
    if (threads := os.cpu_count() or 1) > 1:
        wide = bench(onnx, run.imgsz, threads=threads, rounds=100, seconds=10)
        times.update({f"{name}, {threads} threads": found for name, found in wide.items()})
    rows = [{"name": k, **{f: v[f] for f in ("median", "p10", "p90", "n")}} for k, v in times.items()]
    return {"rows": rows, "ratios": ratios}
