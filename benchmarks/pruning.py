# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every pruning criterion at the same FLOPs and the same fine-tuning, next to what one would do without yolo_ext.

    python benchmarks/pruning.py model=best.pt data=data.yaml imgsz=192 epochs=30 speedups=2,3 out=results \
        runs=all smaller=90
    python benchmarks/pruning.py model=best.pt ... runs=lamp,tp:LAMPImportance,pruner:lamp seeds=0,1,2 epochs=12

A run is `CRITERION`, `CRITERION+kd` (distilled from the unpruned model), `pruner:CRITERION` (a pruner of torch-pruning
on our graph, its ratio raised to the target) or `smaller` (the same family built with as few FLOPs, trained from
scratch for `smaller` epochs). A criterion is whatever `prune.method` takes, such as `tp:LAMPImportance`.
Each result is one line of `out/results.jsonl`; those that are there are not repeated, so that several processes
(`shard=0/2`, `shard=1/2`) share the work and a stopped benchmark goes on. At the end the table is printed and drawn.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from ultralytics import YOLO
from ultralytics.utils import YAML
from ultralytics.utils.ops import make_divisible

import yolo_ext
from yolo_ext import stock
from yolo_ext.checkpoint import manifest, save_model
from yolo_ext.pipeline.run import FINETUNE
from yolo_ext.pruning.criteria import criteria
from yolo_ext.reporting.tables import align
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import load_model
from yolo_ext.training.trainer import trainer_for

STEP = 8 / 1024  # between two multiples of this no layer of up to 1024 channels changes
# Positions of channel counts that Ultralytics does not multiply by the width.
UNSCALED = {"RepNCSPELAN4": (1, 2), "ELAN1": (1, 2), "SPPELAN": (1,), "CBLinear": (0,),
            "HGStem": (0, 1), "HGBlock": (0, 1)}  # fmt: skip
SCRATCH = {"optimizer": "AdamW", "lr0": 0.002, "cos_lr": True, "warmup_epochs": 3.0, "batch": 8, "nbs": 16}


def train(model: str, args: dict[str, str], seed: int, epochs: int, folder: Path, **options: Any) -> Path:
    """Train and return best.pt."""
    yolo = YOLO(model, task="detect")
    yolo.train(
        trainer=trainer_for("detect"), data=args["data"], imgsz=int(args["imgsz"]), epochs=epochs, seed=seed,
        save_dir=str(folder), exist_ok=True, plots=False, workers=0, close_mosaic=min(10, epochs // 3), verbose=False,
        device=args.get("device", "cpu"), **options,
    )  # fmt: skip
    return folder / "weights" / "best.pt"


def one(run: str, speedup: float, seed: int, args: dict[str, str], folder: Path) -> dict[str, Any]:
    """Do one run and return its figures."""
    base, imgsz, epochs = args["model"], int(args["imgsz"]), int(args.get("epochs", 30))
    options: dict[str, Any] = {**FINETUNE, "nbs": FINETUNE["batch"]}
    del options["epochs"]
    before = None
    if run == "smaller":
        dense = load_model(base)[0]
        file = folder / "smaller.yaml"
        YAML.save(file, smaller_yaml(dense, stock.gflops(dense, imgsz) / speedup, imgsz))
        best = train(str(file), args, seed, int(args["smaller"]), folder, **SCRATCH)
    elif run.startswith("pruner:"):
        pruned = by_torch_pruning(base, run[7:], speedup, imgsz, folder)
        before = recalibrated(pruned, args)
        best = train(str(pruned), args, seed, epochs, folder, **options)
    else:
        if run.endswith("+kd"):
            options["distill"] = {}
        prune = {"method": run.removesuffix("+kd"), "speedup": speedup, "seed": seed}
        best = train(base, args, seed, epochs, folder, prune=prune, **options)
    model = load_model(best)[0]
    params = sum(p.numel() for p in stock.deployed(model).parameters())
    return {"params": params, "gflops": stock.gflops(model, imgsz), "before": before,
            "map": accuracy(best, args["data"], imgsz)["map"]}  # fmt: skip


def by_torch_pruning(base: str, method: str, speedup: float, imgsz: int, folder: Path) -> Path:
    """Prune with a pruner of torch-pruning on our graph, its ratio raised to the target."""
    importance = {
        "lamp": tp.importance.LAMPImportance(p=2),
        "l1": tp.importance.MagnitudeImportance(p=1),
        "group_norm": tp.importance.GroupMagnitudeImportance(p=2),
        "random": tp.importance.RandomImportance(),
    }[method]
    low, high, best = 0.0, 0.9, None
    for _ in range(10):  # bisection over the ratio, each time on a fresh model
        model = load_model(base)[0].float()
        start, ratio = stock.gflops(model, imgsz), (low + high) / 2
        with yolo_ext.on_yolo():
            pruner = tp.pruner.MagnitudePruner(
                model, torch.rand(1, 3, 64, 64), importance, global_pruning=True, pruning_ratio=ratio, round_to=8,
                max_pruning_ratio=0.8, in_channel_groups={}, out_channel_groups={}, num_heads={},
            )  # fmt: skip
        pruner.step()
        reached = start / stock.gflops(model, imgsz)
        if best is None or abs(reached - speedup) < abs(best[0] - speedup):
            best = (reached, pruner)
        low, high = (ratio, high) if reached < speedup else (low, ratio)
    return Path(yolo_ext.save_pruned(best[1], folder / "pruner.pt"))


def recalibrated(file: Path, args: dict[str, str]) -> float:
    """Give a pruned file the BatchNorm re-estimation that ours get, and return its mAP."""
    from yolo_ext.data.check import calibration_images, check_data, letterbox_batches
    from yolo_ext.stock.context import recalibrate

    model = load_model(file)[0]
    images = calibration_images(check_data(args["data"]), 128, 0)
    recalibrate(model, letterbox_batches(images, int(args["imgsz"])))
    save_model(model, file)
    return accuracy(file, args["data"], int(args["imgsz"]))["map"]


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
        except Exception:  # heads of an attention block do not divide every width
            if width == widest:
                raise
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


def table(results: list[dict[str, Any]], base: float, picture: Path) -> str:
    """Return the table of all results and draw it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cells: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        cells[r["run"]][r["speedup"]].append(r)
    speedups = sorted({r["speedup"] for r in results})
    order = sorted(cells, key=lambda run: -mean(r["map"] for v in cells[run].values() for r in v))
    rows = []
    for run in order:
        row = [run]
        for s in speedups:
            found = cells[run].get(s, [])
            scores = [r["map"] for r in found]
            text = f"{mean(scores):.4f}" if scores else "-"
            spread = f" ({min(scores):.4f} to {max(scores):.4f})" if len(scores) > 1 else ""
            row += [text + spread, f"{mean(r['params'] for r in found) / 1e6:.2f}" if found else "-"]
        rows.append(row)
    header = ["Run", *(h for s in speedups for h in (f"mAP {s:g}x", f"M params {s:g}x"))]
    fig, ax = plt.subplots(figsize=(9, 5))
    for i, run in enumerate(order):
        points = [(s, mean(r["map"] for r in cells[run][s])) for s in speedups if cells[run].get(s)]
        ax.plot(
            *zip(*points), marker="osD^v"[i % 5], lw=1.4, ls=("-", "--")[i // 10], color=plt.cm.tab10(i % 10), label=run
        )
    ax.axhline(base, color="black", ls="--", lw=1, label="unpruned")
    ax.set(xlabel="FLOPs before / after", ylabel="mAP50-95 after fine-tuning", xticks=speedups)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(picture, dpi=150)
    return align(rows, header)


def main() -> None:
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    out = Path(args["out"])
    out.mkdir(parents=True, exist_ok=True)
    log = out / "results.jsonl"
    torch.set_num_threads(int(args.get("threads", torch.get_num_threads())))
    runs = args.get("runs", "all").split(",")
    if "all" in runs:
        runs = [row.name for row in criteria] + [r for r in runs if r != "all"]
    if "smaller" in args and "smaller" not in runs:
        runs.append("smaller")
    jobs = [(r, float(s), int(seed)) for seed in args.get("seeds", "0").split(",")
            for s in args.get("speedups", "2,3").split(",") for r in runs]  # fmt: skip
    shard, shards = (int(x) for x in args.get("shard", "0/1").split("/"))
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []  # noqa: E731
    for run, speedup, seed in jobs[shard::shards]:
        if any((r["run"], r["speedup"], r["seed"]) == (run, speedup, seed) for r in read()):
            continue
        with tempfile.TemporaryDirectory() as tmp:
            found = {"run": run, "speedup": speedup, "seed": seed, **one(run, speedup, seed, args, Path(tmp))}
        with log.open("a") as f:
            f.write(json.dumps(found) + "\n")
        print("RESULT", json.dumps(found), flush=True)
    base = accuracy(Path(args["model"]), args["data"], int(args["imgsz"]))["map"]
    print(f"unpruned: {base:.4f}\n" + table(read(), base, out / "pruning.png"))


if __name__ == "__main__":
    main()
