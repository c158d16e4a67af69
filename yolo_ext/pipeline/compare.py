# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What pruning has to beat at the same FLOPs: the same family built narrower, and channels taken at random."""

import logging
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils.ops import make_divisible

from yolo_ext import runs, stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import PruneConfig
from yolo_ext.deployment.export import export_onnx
from yolo_ext.pipeline.run import Run, finetuning, measure, train
from yolo_ext.pruning.prune import prune_model
from yolo_ext.reporting.tables import cell
from yolo_ext.stock.accuracy import METRICS, score
from yolo_ext.training.prune import make_probes

TIMED = {"base": "base FP32", "pruned": "compressed FP32"}  # files that the stage `latency` measures in any case
STEP = 8 / 1024  # between two multiples of this no layer of up to 1024 channels changes
# Positions of channel counts that Ultralytics does not multiply by the width.
UNSCALED = {"RepNCSPELAN4": (1, 2), "ELAN1": (1, 2), "SPPELAN": (1,), "CBLinear": (0,),
            "HGStem": (0, 1), "HGBlock": (0, 1)}  # fmt: skip


def compare(run: Run) -> runs.Record:
    """Put the pruned model beside a narrower one of the same family, which is not trained, and random pruning."""
    pruned = run.load()[0]
    width, narrow = smaller(pruned, stock.gflops(pruned, run.imgsz), run.imgsz)
    models = {"base": run.base, "pruned": run.weights(), width: narrow}
    models["random criterion, same FLOPs and epochs"] = _random_baseline(run, pruned)
    found: list[dict[str, Any]] = []
    for name, m in models.items():
        figures = measure(run, m) if isinstance(m, Path) else runs.model_figures(m, None, run.imgsz)
        row = {k: figures.get(k) for k in ("params", "gflops", *METRICS[run.task])}
        found.append({"name": name, **row, "timed": TIMED.get(name, name)})
        if name not in TIMED:
            file = export_onnx(m, run.folder / "compare" / f"{len(found)}.onnx", run.imgsz)
            found[-1]["file"] = run.relative(file)
    worth = [f"{r['name']} {cell(score(r), '.4f')}" for r in found]
    return runs.Record(rows=found, said=f"{stock.metric(run.task)} at {run.imgsz} px: {', '.join(worth)}")


def _random_baseline(run: Run, pruned: nn.Module) -> Path:
    """Prune the base by the random criterion to the same FLOPs and train it as the delivered model was."""
    assert run.prune
    model, args = deepcopy(run.load(run.base))
    ratio = stock.gflops(model, run.imgsz) / stock.gflops(pruned, run.imgsz)
    cfg = replace(PruneConfig(method="random", speedup=ratio), round_to=run.prune.round_to)
    made = prune_model(model, cfg, run.imgsz)
    if images := make_probes(run.info, run.imgsz, cfg, run.task).images:
        stock.recalibrate(made.to(run.device), images())
    file = run.save(made, args, "compare", "random.pt")
    options = {"distill": run.teaching} if run.teaching else {}
    return train(run, "compare/random", options, finetuning(run), file) if run.epochs else file


def smaller(model: nn.Module, target: float, imgsz: int) -> tuple[str, nn.Module]:
    """Build the model of `smaller_yaml` with random weights; return its name, such as ``yolov8n width 0.17``, too."""
    yaml = smaller_yaml(model, target, imgsz)
    width = yaml["scales"][yaml["scale"]][1]
    return f"{Path(str(yaml.get('yaml_file', 'model'))).stem} width {width:.2f}", _build(model, yaml)


def smaller_yaml(model: nn.Module, target: float, imgsz: int) -> dict[str, Any]:
    """Return the YAML of the same family and depth whose GFLOPs at `imgsz` pixels are nearest to `target`."""
    full: dict[str, Any] = dict(deepcopy(manifest(model).yaml or model.yaml))
    scales = full.get("scales") or {"n": [full.get("depth_multiple", 1.0), full.get("width_multiple", 1.0), math.inf]}
    scale = full.get("scale") if full.get("scale") in scales else next(iter(scales))
    full |= {"nc": len(model.names), "scale": scale, "scales": {scale: scales[scale]}}  # its nc may be out of date
    widest = scales[scale][1]
    widths = [*(k * STEP for k in range(1, math.ceil(widest / STEP))), widest]
    found: dict[float, float] = {}
    low, middle, high = -1, len(widths) - 1, len(widths) - 1
    while high - low > 1 or not found:
        width = widths[middle]
        try:
            found[width] = stock.gflops(_build(model, _scaled(full, width)), imgsz)
            low, high = (middle, high) if found[width] < target and width < widest else (low, middle)
        except Exception as e:  # whatever a custom YAML raises; heads of an attention block do not divide every width
            if width == widest:
                raise UsageError(f"Ultralytics cannot build the YAML of this model ({type(e).__name__}: {e}).") from e
            del widths[middle]
            high -= 1
        middle = (low + high) // 2
    return _scaled(full, min(found, key=lambda w: abs(found[w] - target)))


def _scaled(full: dict[str, Any], width: float) -> dict[str, Any]:
    """Return a copy of a model dict with another width multiple."""
    yaml = deepcopy(full)
    depth, widest, most = yaml["scales"][yaml["scale"]]
    yaml["scales"], share = {yaml["scale"]: [depth, width, most]}, width / widest
    for _, _, module, args in yaml["backbone"] + yaml["head"]:
        for i in UNSCALED.get(module, ()):
            narrow = [make_divisible(c * share, 8) for c in (args[i] if isinstance(args[i], list) else [args[i]])]
            args[i] = narrow if isinstance(args[i], list) else narrow[0]
        if module == "A2C2f" and share < 1:  # wants whole heads of 32 channels in half of its width
            wanted = max(64, int(min(args[0], most) * width / 64) * 64)
            args[0] = (wanted - 4) / width  # Ultralytics multiplies by the width and rounds up to 8
        if module == "TorchVision":
            args[2] = None  # its name of pretrained weights would be a download
    return yaml


def _build(model: nn.Module, yaml: dict[str, Any]) -> nn.Module:
    """Build a model of the same class without a trace in the log or in the global random generator."""
    with stock.quiet(logging.ERROR), torch.random.fork_rng(devices=[]):
        built = type(model)(deepcopy(yaml), ch=stock.input_channels(model), verbose=False)
    built.names = deepcopy(model.names)
    return built
