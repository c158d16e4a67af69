# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Time of a training step with each technique against a plain step, side by side in one process.

    python benchmarks/overhead.py model=best.pt data=data.yaml imgsz=192 batch=16 rounds=30 runs=slim,group_sl

Every run is a real trainer with its own model and optimizer on the same batch; a round does one step of each, in random
order. A step is forward, loss, backward, unscale, clip, optimizer, EMA and what the technique does around them. Prints
the median, 10 to 90 % of the rounds, and the median of the paired ratios to the plain step.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from ultralytics import YOLO

from yolo_ext.reporting.tables import align
from yolo_ext.sparsity.penalties import penalties
from yolo_ext.trainers import trainer_for

OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, **{r.name: {"sparsity": {"method": r.name}} for r in penalties}}


class Stop(Exception):
    """Raised when a trainer is ready and its first batch is at hand."""


def ready(options: dict[str, Any], args: dict[str, str], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a trainer that is about to do its first step, and the batch."""
    yolo, found = YOLO(args["model"]), []

    def stop(trainer: Any) -> None:
        found.append(trainer)
        raise Stop

    yolo.add_callback("on_train_batch_start", stop)
    fixed = {
        "epochs": 100,
        "workers": 0,
        "plots": False,
        "optimizer": "AdamW",
        "lr0": 1e-3,
        "warmup_epochs": 0,
        "seed": 0,
    }
    sizes = {"imgsz": int(args["imgsz"]), "batch": int(args["batch"]), "nbs": int(args["batch"])}
    place = {"save_dir": str(folder), "exist_ok": True, "device": args.get("device", "cpu")}
    with suppress(Stop):
        yolo.train(trainer=trainer_for(yolo.task), data=args["data"], **fixed, **sizes, **place, **options)
    trainer = found[0]
    return trainer, trainer.preprocess_batch(next(iter(trainer.train_loader)))


def step(trainer: Any, batch: dict[str, Any]) -> float:
    """Do one training step and return its seconds."""
    began = time.perf_counter()
    trainer.cadence.waiting = 1
    loss, _ = trainer.model(batch)
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    args = {"batch": "16", "rounds": "30", **dict(a.split("=", 1) for a in sys.argv[1:])}
    torch.set_num_threads(int(args.get("threads", torch.get_num_threads())))
    names = ["plain", *(r for r in args.get("runs", ",".join(OPTIONS)).split(",") if r != "plain")]
    with tempfile.TemporaryDirectory() as tmp:
        made = {n: ready(OPTIONS[n], args, Path(tmp) / n) for n in names}
        batch = made["plain"][1]
        times: dict[str, list[float]] = {n: [] for n in names}
        for i in range(int(args["rounds"]) + 3):
            for n in random.Random(i).sample(names, len(names)):
                seconds = step(made[n][0], batch)
                if i >= 3:
                    times[n].append(seconds)
    rows = []
    for n in names:
        ratios = [a / b for a, b in zip(times[n], times["plain"])]
        low, *_, high = quantiles(times[n], n=10)
        rows.append(
            [n, f"{1e3 * median(times[n]):.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}", f"{median(ratios):.3f}"]
        )
    print(align(rows, ["Step", "Median ms", "p10 to p90", "Ratio"]))


if __name__ == "__main__":
    main()
