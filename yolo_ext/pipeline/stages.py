# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`compress`: base model in, smaller and verified model out. A stage is done once: it reads the files of earlier ones,
writes its own folder and returns a record, and a killed run goes on with the stage that has none."""

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
from yolo_ext.checkpoint import atomic_write, manifest
from yolo_ext.core.config import changes
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import let_go, logged
from yolo_ext.deployment.contract import judged
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.latency import bench, speedup
from yolo_ext.deployment.runtime import conv_report
from yolo_ext.pipeline.compare import compare
from yolo_ext.pipeline.int8 import onnx_figures, ptq, qat, verify
from yolo_ext.pipeline.report import contents, pictures
from yolo_ext.pipeline.run import FINETUNE, Run, finetuning, measure, open_run, train
from yolo_ext.pruning.masks import eligible, packed_mb, sparsity, zero_weights
from yolo_ext.pruning.plan import layer_report
from yolo_ext.pruning.prune import prune_model
from yolo_ext.pruning.surgery import TOLERANCE
from yolo_ext.reporting.pages import write_report
from yolo_ext.reporting.tables import ABSENT, comparison_rows, conclude, write_summary
from yolo_ext.runs import Record
from yolo_ext.stock.evidence import Evidence, hash_of
from yolo_ext.training.prune import budget_checks, make_probes

LATENCIES = (  # figures of `summary.json` before and after by what was measured
    {"torch": "base torch", "ort": "base FP32"},
    {"torch": "compressed torch", "ort": "compressed FP32", "ort_int8": "compressed INT8"},
)


@logged()
def compress(model: Any, data: Any = None, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Compress a trained YOLO and prove the result, as the command of this name does; returned is ``summary.json``."""
    stock.check_stock()
    busy = stock.tell_busy()
    run = open_run(str(model), str(data or ""), resume, dict(options), [stage.name for stage in STAGES])
    run.busy = busy
    todo = [stage for stage in STAGES if stage.wanted(run) or (run.folder / stage.name / "stage.json").exists()]
    kept, again = False, list[str]()  # what a training has made; stages that are done again
    for i, stage in enumerate(todo, 1):
        LOGGER.info(f"\n{colorstr('bold', 'compress: ')}stage {i}/{len(todo)} {stage.name}")
        kept |= stage.trains
        start = hash_of(run.load()[0]) if run.weights().suffix == ".pt" else ""
        work = partial(runs.stage, run.folder, stage.name, partial(stage.work, run), start, again)
        try:
            record = _extra(run, f"Stage {stage.name}", work) if stage.extra else work()
        except UsageError:  # what only a measurement shows to be out of reach or broken
            if run.fresh and not kept:
                let_go()
                shutil.rmtree(run.folder)
            raise
        if record:
            LOGGER.info(_line(run, stage.name, record))
            run.done[stage.name] = record
            kept |= bool(record.weights)
    return finish(run)


def _line(run: Run, name: str, record: Record) -> str:
    """Return in one line what a stage did, which figures it changed, the outcome of its checks and its seconds."""
    earlier = next((d.metrics for d in reversed(run.done.values()) if d.metrics), None)
    rows, passed = comparison_rows(earlier, record.metrics), [c["passed"] for c in record.checks or []]
    moved = ", ".join(f"{r.label} {r.before} -> {r.after}" for r in rows if r.after not in (ABSENT, r.before))
    moved = f"{moved.replace(f'{ABSENT} -> ', '')} at {run.imgsz} px" if moved else ""
    proved = f"{sum(passed)} of {len(passed)} checks passed" if passed else ""
    told = [record.skipped, record.said, moved, proved, f"{record.seconds or 0:.0f} s"]
    return f"{colorstr('bold', f'{name}: ')}{'; '.join(part for part in told if part)}"


def _extra(run: Run, name: str, work: Callable[[], Any]) -> Any:
    """Return what work gives that a result is complete without; None, with a warning, where it fails."""
    try:
        return work()
    except Exception as e:  # of whatever library
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        run.left_out.append(f"{name} is left out, as it failed ({why}).")
        LOGGER.warning(f"{colorstr('compress: ')}{run.left_out[-1]}")
        return None


def base(run: Run) -> Record:
    """Measure the base model, as ONNX too when the result will be ONNX."""
    m = measure(run, run.base, "base")
    if run.limits:
        contract(run, "base", n=20)  # refuses limits of classes and sizes that the split does not hold
    if run.quant:
        file = export_onnx(run.load(run.base)[0], run.folder / "base" / "fp32.onnx", run.imgsz, **run.graph)
        m.update(size_mb=runs.size_mb(file), **onnx_figures(run, fp32=run.accuracy(file)))
        m.update({k: v for k, v in conv_report(file).items() if k in ("convs", "int8_convs")})
    return Record(m)


def contract(run: Run, stage: str, **options: Any) -> dict[str, Any]:
    """Return what the evidence of a stage says against that of the base; nothing where one was not measured."""
    files = [run.folder / name / "evidence.npz" for name in ("base", stage)]
    if not all(file.exists() for file in files):
        return {}
    base, new = map(Evidence.read, files)
    return judged(base, new, run.limits, confidence=run.confidence, **options)


def sparsify(run: Run) -> Record:
    """Train the base model until channels that it does not need are near zero."""
    cfg = run.sparsity
    assert cfg
    options: dict[str, Any] = {"sparsity": cfg}
    if distill := run.teaching:  # losses that see the scale of features would defend the scale factors
        options["distill"] = replace(distill, features="pkd", logits="kl_binary", layers=[])
    best = train(run, "sparsify", options, {**FINETUNE, **run.native, "epochs": cfg.epochs})
    share = manifest(run.load(best)[0]).sparsity["share"]
    said = f"{cfg.epochs} epochs of {cfg.method} brought {100 * share:.1f} % of the channels below {cfg.threshold:g}"
    figures = measure(run, best, "sparsify")
    return Record(figures, run.relative(best), said=said, notes=[f"Sparsity training: {said}."])


def finetune(run: Run) -> Record:
    """Fine-tune, with distillation if asked."""
    options = {"distill": run.teaching, "prune": run.prune if run.prunes_later else None}
    best = train(run, "finetune", {k: v for k, v in options.items() if v}, finetuning(run))
    taught = f", teacher {run.teaching.teacher}" if run.teaching else ""
    record = Record(measure(run, best, "finetune"), run.relative(best), said=f"{run.epochs} epochs{taught}")
    return _describe(run, record, run.load(best)[0], "finetune") if run.prunes_later else record


def prune(run: Run) -> Record:
    """Prune the newest model to the target and re-estimate BatchNorm."""
    cfg, (model, args) = run.prune, deepcopy(run.load())
    assert cfg
    probes = make_probes(run.info, run.imgsz, cfg, run.task, model.to(run.device))
    if cfg.kind == "structured":
        model = prune_model(model, cfg, run.imgsz, probes)
    else:
        zero_weights(model, cfg, cfg.ratio)
    if probes.images and cfg.recalibrate and cfg.kind != "unstructured":  # small weights hardly move the statistics
        stock.recalibrate(model, probes.images())
    file = run.save(model, args, "prune", "weights", "pruned.pt")
    return _describe(run, Record(measure(run, file, "prune"), run.relative(file)), model, "prune")


def _describe(run: Run, record: Record, pruned: nn.Module, stage: str) -> Record:
    """Return the record of a stage that pruned, with its layers, checks and notes, and write the plan or the masks."""
    cfg, folder = run.prune, run.folder / stage
    assert cfg
    asked = " ".join(f"{k}={v}" for k, v in changes({"prune": cfg}).items() if k != "prune.method")
    if cfg.kind == "structured":
        plan = manifest(pruned).prune
        runs.write_json(folder / "plan.json", plan)
        gate = {"name": "Pruned model equals the masked dense one", "value": plan["gap"], "limit": TOLERANCE}
        said = f"{plan['config']['method']}, {asked}, equal to the masked dense model within {plan['gap']:.0e}"
        record = replace(record, said="; ".join(s for s in (record.said, said) if s))
        return replace(record, layers=layer_report(pruned), checks=[{**gate, "passed": True}])
    found, rows = sparsity(pruned), eligible(pruned, cfg)
    runs.write_json(folder / "masks.json", {**found, "eligible": rows})
    able, wide = (sum(bool(r[k]) for r in rows) for k in ("eligible", "gain"))
    share, size = f"{100 * found['masked']:.1f} % of the weights of {able} of {len(rows)} layers", packed_mb(pruned)
    notes = [f"{share} are zero. This saves disk space ({size:.1f} MB zipped), not time."]
    if cfg.kind == "2:4":
        notes.append(f"{wide} layers are wide enough for sparse tensor cores to run them faster (masks.json).")
    return replace(record, said=f"{asked}: {share} are zero", notes=notes)


def latency(run: Run) -> Record:
    """Measure base and compressed files interleaved in ONNX Runtime; INT8 also on all threads, and beside PyTorch."""
    rounds, seconds = (200, 20) if run.quant else (100, 15)
    with tempfile.TemporaryDirectory() as tmp:
        if run.quant:
            made = {f"compressed {kind.upper()}": run.folder / "onnx" / f"{kind}.onnx" for kind in ("fp32", "int8")}
            onnx = {"base FP32": run.folder / "base" / "fp32.onnx", **made}
        else:  # such a run delivers none
            models = {"base FP32": run.base, "compressed FP32": run.weights()}
            onnx = {k: export_onnx(run.load(m)[0], Path(tmp) / f"{k}.onnx", run.imgsz) for k, m in models.items()}
        beside = {r["name"]: run.folder / r["file"] for r in run.rows("compare") if r.get("file")}
        times = bench(onnx | beside, run.imgsz, threads=1, rounds=rounds, seconds=seconds)
    ratios = {name: speedup(times["base FP32"], times[name]) for name in list(onnx)[1:]}
    if run.quant:
        torch = {"base torch": run.base, "compressed torch": run.weights()}
        times.update(bench(torch, run.imgsz, threads=1, rounds=100, seconds=15))
        ratios = {"compressed torch": speedup(*(times[name] for name in torch)), **ratios}
        threads = os.cpu_count() or 1
        wide = bench(onnx, run.imgsz, threads=threads, rounds=100, seconds=10) if threads > 1 else {}
        times.update({f"{name}, {threads} threads": found for name, found in wide.items()})
    rows = [{"name": k, **{f: v[f] for f in ("median", "p10", "p90", "n")}} for k, v in times.items()]
    said = ", ".join(f"{name} {r['words']}" for name, r in ratios.items())
    return Record(said=f"against the base, 1 thread: {said}", rows=rows, ratios=ratios)


@dataclass(frozen=True)
class Stage:
    """One stage: its name and folder, what does it, when a run wants it, whether it trains or is only an extra."""

    name: str
    work: Callable[[Run], Record]
    wanted: Callable[[Run], Any] = lambda run: True
    trains: bool = False
    extra: bool = False


STAGES = (  # in this order
    Stage("base", base),
    Stage("sparsify", sparsify, lambda run: run.sparsity, trains=True),
    Stage("prune", prune, lambda run: run.prune and not run.prunes_later),
    Stage("finetune", finetune, lambda run: run.epochs > 0 and (run.prune or run.distill), trains=True),
    Stage("compare", compare, lambda run: run.prune and run.cuts and run.prune.compare, extra=True),
    Stage("ptq", ptq, lambda run: run.quant),
    Stage("qat", qat, lambda run: run.quant and run.quant.mode != "ptq", trains=True),
    Stage("verify", verify, lambda run: run.quant),
    Stage("latency", latency, lambda run: run.quant or run.cuts, extra=True),
)


def finish(run: Run) -> dict[str, Any]:
    """Write weights/best.pt, summary.json and the report, print the table, and return the summary."""
    stages = {name: dict(d.metrics) for name, d in run.done.items() if d.metrics}
    last = run.quantized()[0] if run.quant else list(stages)[-1]
    before, after, proved = stages["base"], stages[last], contract(run, last)
    if "latency" in run.done:
        times = {r["name"]: r["median"] for r in run.rows("latency")}
        for figures, names in zip((before, after), LATENCIES):
            figures["latency_ms"] = {k: times.get(name) for k, name in names.items()}
        ratios = run.done["latency"].ratios or {}
        after["latency_ratio"] = {k: ratios.get(name) for k, name in LATENCIES[1].items()}
    if run.weights() != run.base:
        atomic_write(run.folder / "weights" / "best.pt", run.weights().read_bytes())
    result = {**after, "size_mb": runs.size_mb(run.weights())}  # the float one, whose budgets the trials have held
    speed = (after.get("latency_ratio") or {}).get("ort")
    checks = [c for d in run.done.values() for c in d.checks or []]
    checks += budget_checks(run.prune, before, result, speed, run.max_drop, run.confidence, proved.get("changes", ()))
    checks += proved.get("checks", [])
    summary = write_summary(run.folder, before, after, stages, checks=checks, contract=proved, **_told(run))
    if proved:
        LOGGER.info(f"{colorstr('bold', 'contract: ')}{proved['verdict']}.")
    drawn = _extra(run, "The comparison of pictures", partial(pictures, run, last, proved))
    LOGGER.info(f"Report: {write_report(run.folder, contents(run, summary, drawn or []))}")
    conclude(run.folder, summary)
    return {**summary, "run_dir": str(run.folder)}


def _told(run: Run) -> dict[str, Any]:
    """Return what the summary tells besides figures: settings, seconds by stage, and what was done."""
    settings = {"model": run.base.name, "data": Path(run.data).name, "imgsz": run.imgsz, **run.native}
    seconds = {name: d.seconds for name, d in run.done.items()}
    layers = next((d.layers for d in run.done.values() if d.layers), [])
    wide, file = sum(r["before"] for r in layers), "onnx/int8.onnx" if run.quant else "weights/best.pt"
    use = f"predict source=images compare={run.base}" if run.quant else f"quantize data={run.data or 'data.yaml'}"
    how = {
        "sparsity": run.sparsity and run.sparsity.method,
        "prune": run.prune and (manifest(run.load()[0]).prune.get("config", {}).get("method") or run.prune.kind),
        "distill": run.distill and run.distill.teacher,
        "quant": run.quant and run.quantized()[0],
    }
    return {
        "settings": settings | changes(run.configs), "seconds": seconds,
        "deploy": file if run.quant or run.weights() != run.base else None,
        "next": f"yolo-ext {use} model={run.folder / file}",
        "epochs": run.epochs if run.prune or run.distill else None,
        "qat": run.quant.epochs if run.quant and "qat" in run.done and not run.done["qat"].skipped else None,
        "method": ", ".join(f"{technique} {what}" for technique, what in how.items() if what),
        "ratio": round(1 - sum(r["after"] for r in layers) / wide, 4) if wide else None,
        "training_s": sum(seconds[s.name] or 0.0 for s in STAGES if s.trains and s.name in seconds),
    }  # fmt: skip
