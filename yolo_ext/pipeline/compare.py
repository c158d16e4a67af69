# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What pruning has to beat at the same FLOPs and training: channels taken at random."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

from yolo_ext import runs, stock
from yolo_ext.core.options import PruneConfig
from yolo_ext.deployment.export import export_onnx
from yolo_ext.pipeline.run import Run, finetuning, measure, train
from yolo_ext.pruning.prune import prune_model
from yolo_ext.reporting.tables import cell
from yolo_ext.stock.accuracy import METRICS, score
from yolo_ext.training.prune import make_probes

RANDOM = "random criterion, same FLOPs and epochs"


def compare(run: Run) -> runs.Record:
    """Prune the base by the random criterion to the same FLOPs, train it as the delivered model was, and compare."""
    assert run.prune
    model, args = deepcopy(run.load(run.base))
    ratio = stock.gflops(model, run.imgsz) / stock.gflops(run.load()[0], run.imgsz)
    cfg = replace(PruneConfig(method="random", speedup=ratio), round_to=run.prune.round_to)
    made = prune_model(model, cfg, run.imgsz)
    if images := make_probes(run.info, run.imgsz, cfg, run.task).images:
        stock.recalibrate(made.to(run.device), images())
    file, delivered = run.save(made, args, "compare", "random.pt"), run.weights()
    if run.epochs:
        options = {"distill": run.teaching} if run.teaching else {}
        file = train(run, "compare/random", options, finetuning(run), file)
    onnx = export_onnx(file, run.folder / "compare" / "random.onnx", run.imgsz)
    models = ("base", "base FP32", run.base), ("pruned", "compressed FP32", delivered), (RANDOM, RANDOM, file)
    found: list[dict[str, Any]] = []
    for name, timed, weights in models:  # by the name under which the stage `latency` measures them
        figures = measure(run, weights)
        row = {k: figures.get(k) for k in ("params", "gflops", *METRICS[run.task])}
        found.append({"name": name, **row, "timed": timed})
    found[-1]["file"] = run.relative(onnx)
    worth = [f"{r['name']} {cell(score(r), '.4f')}" for r in found]
    return runs.Record(rows=found, said=f"{stock.metric(run.task)} at {run.imgsz} px: {', '.join(worth)}")
