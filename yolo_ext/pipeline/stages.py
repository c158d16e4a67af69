# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`compress`: base model in, smaller and verified model out, stage by stage; here those of the float model.

A stage reads the files of earlier ones, writes its own folder and returns a record. It is done once: a killed run goes
on with the stage that has none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs, stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import PruneConfig
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.latency import bench, speedup
from yolo_ext.deployment.runtime import conv_report
from yolo_ext.pipeline.int8 import onnx_accuracy, ptq, qat, verify
from yolo_ext.pipeline.report import finish
from yolo_ext.pipeline.run import FINETUNE, Run, finetuning, measure, open_run, train
from yolo_ext.pipeline.smaller import smaller
from yolo_ext.pruning.masks import eligible, packed_mb, sparsity, zero_weights
from yolo_ext.pruning.plan import layer_report
from yolo_ext.pruning.prune import prune_model
from yolo_ext.pruning.surgery import TOLERANCE
from yolo_ext.reporting.tables import ABSENT, align
from yolo_ext.runs import Record
from yolo_ext.stock.context import recalibrate
from yolo_ext.training.probes import make_probes


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
    stock.check_stock()
    run = open_run(str(model), str(data or ""), resume, dict(options), [stage.name for stage in STAGES])
    todo = [stage for stage in STAGES if stage.wanted(run) or (run.folder / stage.name / "stage.json").exists()]
    kept = False  # what a training has made
    for i, stage in enumerate(todo, 1):
        LOGGER.info(f"\n{colorstr('bold', 'compress: ')}stage {i}/{len(todo)} {stage.name}")
        kept |= stage.trains
        try:
            run.done[stage.name] = runs.stage(run.folder, stage.name, partial(stage.work, run))
        except UsageError:  # what only a measurement shows to be out of reach or broken
            if run.fresh and not kept:
                shutil.rmtree(run.folder)
            raise
    return finish(run)


# Before and by training ----------------------------------------------------------------------------------------------
def base(run: Run) -> Record:
    """Measure the base model, as ONNX too when the result will be ONNX."""
    m = measure(run, run.base)
    if run.quant:
        file = export_onnx(run.load(run.base)[0], run.folder / "base" / "fp32.onnx", run.imgsz)
        m.update(size_mb=runs.size_mb(file), map_onnx={"fp32": onnx_accuracy(run, file)["map"]})
        m.update({k: v for k, v in conv_report(file).items() if k in ("convs", "int8_convs")})
    return Record(m)


def sparsify(run: Run) -> Record:
    """Train the base model until channels that it does not need are near zero."""
    cfg = run.sparsity
    assert cfg
    options: dict[str, Any] = {"sparsity": cfg}
    if distill := run.teaching:  # losses that see the scale of features would defend the scale factors
        options["distill"] = replace(distill, features="pkd", logits="kl_binary", temperature=None, layers=[])
    best = train(run, "sparsify", options, {**FINETUNE, **run.native, "epochs": cfg.epochs})
    found = manifest(run.load(best)[0]).sparsity
    note = f"Sparsity training brought {100 * found['share']:.1f} % of the channels below {cfg.threshold:g}."
    return Record(measure(run, best), run.relative(best), notes=[note])


def finetune(run: Run) -> Record:
    """Fine-tune, with distillation if asked."""
    options = {"distill": run.teaching, "prune": run.prune if run.prunes_later else None}
    best = train(run, "finetune", {k: v for k, v in options.items() if v}, finetuning(run))
    record = Record(measure(run, best), run.relative(best))
    return _describe(run, record, run.load(best)[0], "finetune") if run.prunes_later else record


# Pruning -------------------------------------------------------------------------------------------------------------
def prune(run: Run) -> Record:
    """Prune the newest model to the target and re-estimate BatchNorm."""
    cfg, (model, args) = run.prune, deepcopy(run.load())
    assert cfg
    probes = make_probes(run.info, run.imgsz, cfg, run.task, model)
    if cfg.kind == "structured":
        model = prune_model(model, cfg, run.imgsz, probes)
    else:
        zero_weights(model, cfg, cfg.ratio)
    if probes.images and cfg.recalibrate and cfg.kind != "unstructured":  # small weights hardly move the statistics
        recalibrate(model, probes.images())
    file = run.save(model, args, "prune", "weights", "pruned.pt")
    return _describe(run, Record(measure(run, file), run.relative(file)), model, "prune")


def _describe(run: Run, record: Record, pruned: nn.Module, stage: str) -> Record:
    """Return the record of a stage that pruned, with its layers, checks and notes, and write the plan or the masks."""
    assert run.prune
    if run.prune.kind != "structured":
        return replace(record, notes=_masks(run, run.prune, pruned, stage))
    plan = manifest(pruned).prune
    runs.write_json(run.folder / stage / "plan.json", plan)
    gate = {"name": "Pruned model equals the masked dense one", "value": plan["gap"], "limit": TOLERANCE}
    notes = [  # of PAGCP: how far it pruned each group, and which loss set the limit
        f"{r['name']} {r['outcome']} ({100 * r['ratio']:.0f} % of {r['channels']} channels"
        + (f", limited by {r['limit']})" if r["limit"] else ")")
        for r in plan["notes"]
    ]
    return replace(record, layers=layer_report(pruned), checks=[{**gate, "passed": True}], notes=notes)


def _masks(run: Run, cfg: PruneConfig, masked: nn.Module, stage: str) -> list[str]:
    """Write what is zero and which layers could be, and return it in sentences for the report."""
    found, rows = sparsity(masked), eligible(masked, cfg)
    runs.write_json(run.folder / stage / "masks.json", {**found, "eligible": rows})
    able, wide = (sum(bool(r[k]) for r in rows) for k in ("eligible", "gain"))
    notes = [
        f"{100 * found['masked']:.1f} % of the weights of {able} of {len(rows)} layers are zero. This saves disk space "
        f"({packed_mb(masked):.1f} MB zipped), not time."
    ]
    if cfg.kind == "2:4":
        notes.append(f"{wide} layers are wide enough for sparse tensor cores to run them faster (masks.json).")
    for note in notes:
        LOGGER.info(f"{colorstr('prune: ')}{note}")
    return notes


# Comparison ----------------------------------------------------------------------------------------------------------
def compare(run: Run) -> Record:
    """Put the pruned model beside what else costs as many FLOPs: the same family built narrower, and random pruning."""
    pruned = run.load()[0]
    width, narrow = smaller(pruned, stock.gflops(pruned, run.imgsz), run.imgsz)
    random = _random_baseline(run, pruned)
    rows = {"base": run.base, "pruned": run.weights(), width: narrow, "random criterion, same FLOPs and epochs": random}
    with tempfile.TemporaryDirectory() as tmp:
        files = {name: export_onnx(m, Path(tmp) / f"{i}.onnx", run.imgsz) for i, (name, m) in enumerate(rows.items())}
        times = bench(files, run.imgsz, threads=1, rounds=100, seconds=15)
    found: list[dict[str, Any]] = []
    for name, m in rows.items():
        figures = measure(run, m) if isinstance(m, Path) else runs.model_figures(m, None, run.imgsz)
        row = {k: figures.get(k) for k in ("params", "gflops", "map")}
        found.append({"name": name, **row, "ort": times[name]["median"]})
    cells = [[r["name"], f"{r['params']:,}", f"{r['gflops']:.2f}", ABSENT if r["map"] is None else f"{r['map']:.4f}",
              f"{r['ort']:.2f}"] for r in found]  # fmt: skip
    LOGGER.info(align(cells, ["For comparison", "Parameters", "GFLOPs", "mAP50-95", "ONNX Runtime ms"]))
    return Record(rows=found)


def _random_baseline(run: Run, pruned: nn.Module) -> Path:
    """Prune the base by the random criterion to the same FLOPs and train it as the delivered model was."""
    assert run.prune
    model, args = deepcopy(run.load(run.base))
    ratio = stock.gflops(model, run.imgsz) / stock.gflops(pruned, run.imgsz)
    cfg = replace(PruneConfig(method="random", speedup=ratio), round_to=run.prune.round_to)
    made = prune_model(model, cfg, run.imgsz)
    if images := make_probes(run.info, run.imgsz, cfg, run.task).images:
        recalibrate(made, images())
    file = run.save(made, args, "compare", "random.pt")
    options = {"distill": run.teaching} if run.teaching else {}
    return train(run, "compare/random", options, finetuning(run), file) if run.epochs else file


# Latency -------------------------------------------------------------------------------------------------------------
def latency(run: Run) -> Record:
    """Measure base and compressed files interleaved in ONNX Runtime; INT8 also on all threads, and beside PyTorch."""
    rounds, seconds = (200, 20) if run.quant else (100, 15)
    with tempfile.TemporaryDirectory() as tmp:
        onnx = _onnx_files(run, Path(tmp))
        times = bench(onnx, run.imgsz, threads=1, rounds=rounds, seconds=seconds)
    ratios = {name: speedup(times["base FP32"], times[name]) for name in list(onnx)[1:]}
    for name, r in ratios.items():
        verdict = "" if r["significant"] else ", within the spread: no claim"
        spread = f"{r['ratio']:.2f}x ({r['p10']:.2f} to {r['p90']:.2f})"
        LOGGER.info(f"{colorstr('latency: ')}{name} is {spread} as fast as base FP32 in ONNX Runtime{verdict}")
    if run.quant:
        torch = {"base torch": run.base, "compressed torch": run.weights()}
        times.update(bench(torch, run.imgsz, threads=1, rounds=100, seconds=15))
    if run.quant and (threads := os.cpu_count() or 1) > 1:
        wide = bench(onnx, run.imgsz, threads=threads, rounds=100, seconds=10)
        times.update({f"{name}, {threads} threads": found for name, found in wide.items()})
    rows = [{"name": k, **{f: v[f] for f in ("median", "p10", "p90", "n")}} for k, v in times.items()]
    return Record(rows=rows, ratios=ratios)


def _onnx_files(run: Run, folder: Path) -> dict[str, Path]:
    """Return the ONNX files of base and result by name, written into a folder where the run delivers none."""
    if run.quant:
        made = {f"compressed {kind.upper()}": run.folder / "onnx" / f"{kind}.onnx" for kind in ("fp32", "int8")}
        return {"base FP32": run.folder / "base" / "fp32.onnx", **made}
    models = {"base FP32": run.base, "compressed FP32": run.weights()}
    return {name: export_onnx(run.load(m)[0], folder / f"{name}.onnx", run.imgsz) for name, m in models.items()}


# Order ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """One stage: its name and folder, what does it, when a run wants it, and whether it trains."""

    name: str
    work: Callable[[Run], Record]
    wanted: Callable[[Run], Any] = lambda run: True
    trains: bool = False


def _cuts(run: Run) -> PruneConfig | None:
    """Return the pruning options of a run that takes channels away."""
    return run.prune if run.prune and run.prune.kind == "structured" else None


STAGES = (  # in this order
    Stage("base", base),
    Stage("sparsify", sparsify, lambda run: run.sparsity, trains=True),
    Stage("prune", prune, lambda run: run.prune and not run.prunes_later),
    Stage("finetune", finetune, lambda run: run.epochs > 0 and (run.prune or run.distill), trains=True),
    Stage("compare", compare, lambda run: (cuts := _cuts(run)) and cuts.compare),
    Stage("ptq", ptq, lambda run: run.quant),
    Stage("qat", qat, lambda run: run.quant and run.quant.mode != "ptq", trains=True),
    Stage("verify", verify, lambda run: run.quant),
    Stage("latency", latency, lambda run: run.quant or _cuts(run)),
)
