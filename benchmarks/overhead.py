# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Time of a training step with each technique against a plain step, side by side in one process.

    python benchmarks/overhead.py model=best.pt data=data.yaml imgsz=192 batch=16 rounds=30 runs=slim,group_sl
    python benchmarks/overhead.py model=n.pt teacher=s.pt ... runs=teacher,builtin,default,default/2,cwd,bckd+pkd
    python benchmarks/overhead.py model=best.pt data=data.yaml ... runs=qat,qat_moving,modelopt

Every run is a real trainer with its own model and optimizer on the same batch; a round does one step of each, in random
order. A step is forward, loss, backward, unscale, clip, optimizer, EMA and what the technique does around them. Runs
are sparsity penalties, or distillation from `teacher` (`model` itself when not given): `default`, losses and stacks as
in `distillation.py`, with `@float` for a teacher in float32 and `/2` to ask the teacher in every other step (the mean
of two is counted); `builtin` is the stock trainer with `distill_model`; `teacher` is the forward pass of the teacher
alone as we run it, and `forward` the same as `distill_model` runs it. `qat` is QAT behind the epochs in which ranges
and BatchNorm statistics move, `qat_moving` within them, and `modelopt` the stock
trainer with `quantize=8`, which needs nvidia-modelopt. Prints the median, 10 to 90 % of the rounds, and the medians of
the paired ratios to the plain step, to the plain step and either forward pass together, and to the built-in.
`clock=cpu` counts the time of this process, for a machine that others use too; give `threads=1` with it.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import distillation
import torch
from ultralytics import YOLO

from yolo_ext.reporting.tables import align
from yolo_ext.sparsity.penalties import penalties
from yolo_ext.training.trainer import trainer_for

PENALTIES = penalties.names()
FORWARD = {"teacher": "default", "forward": "builtin"}  # runs that are a forward pass only, of the teacher of which run
QAT = {
    "qat": {"observe_epochs": 0, "freeze_bn": 0.0},
    "qat_moving": {"freeze_bn": 1.0},
}
BUILTIN = {"modelopt": {"quantize": 8}}
DISTILLATION = [*FORWARD, "builtin", "default", "default/2"]


def options_of(run: str, args: dict[str, str]) -> dict[str, Any]:
    """Return the training options that make up a run."""
    if run == "plain" or run in PENALTIES:
        return {"sparsity": {"method": run}} if run in PENALTIES else {}
    if run in QAT or run in BUILTIN:
        return {"quant": {"mode": "qat", "calib": 32, **QAT[run]}} if run in QAT else BUILTIN[run]
    name, _, every = run.removesuffix("@float").partition("/")
    found = distillation.options_of(FORWARD.get(name, name), str(Path(args["teacher"]).resolve()))
    if every:
        found["distill"]["every"] = int(every)
    if run.endswith("@float"):
        found["distill"]["half"] = False
    return found


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
        trainer = None if {"distill_model", "quantize"} & set(options) else trainer_for(yolo.task)
        yolo.train(trainer=trainer, data=args["data"], **fixed, **sizes, **place, **options)
    trainer = found[0]
    return trainer, trainer.preprocess_batch(next(iter(trainer.train_loader)))


def step(trainer: Any, batch: dict[str, Any]) -> None:
    """Do one training step."""
    if hasattr(trainer, "exact"):
        trainer.exact.waiting = 1
    loss, _ = trainer.model(batch)
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()


def seconds(run: str, trainer: Any, batch: dict[str, Any], clock: Callable[[], float]) -> float:
    """Return the seconds of a step of this run, of several where not every one asks the teacher."""
    steps = int(run.partition("/")[2] or 1)
    began = clock()
    for _ in range(steps):
        if run == "teacher":
            trainer.technique("distill").distiller.guides[0].ask(batch["img"])
        elif run == "forward":
            with torch.no_grad():
                trainer.model.teacher_model(batch["img"])
        else:
            step(trainer, batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - began) / steps


def table(times: dict[str, list[float]]) -> str:
    """Return all times, with the medians of the ratios to other runs of the same round."""
    against = {"Ratio": times["plain"]}
    for run in FORWARD:
        if run in times:
            against[f"Plain + {run}"] = [a + b for a, b in zip(times["plain"], times[run])]
    for run in ("builtin", "modelopt"):
        if run in times:
            against["Built-in"] = times[run]
    rows = []
    for run, found in times.items():
        low, *_, high = quantiles(found, n=10)
        ratios = [f"{median(a / b for a, b in zip(found, base)):.3f}" for base in against.values()]
        rows.append([run, f"{1e3 * median(found):.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}", *ratios])
    return align(rows, ["Step", "Median ms", "p10 to p90", *against])


def main() -> None:
    args = {"batch": "16", "rounds": "30", **dict(a.split("=", 1) for a in sys.argv[1:])}
    args = {"teacher": args["model"], **args}
    torch.set_num_threads(int(args.get("threads", torch.get_num_threads())))
    clock = time.process_time if args.get("clock") == "cpu" else time.perf_counter
    runs = args.get("runs", ",".join([*PENALTIES, *DISTILLATION])).split(",")
    runs = ["plain", *(r for r in runs if r != "plain")]
    with tempfile.TemporaryDirectory() as tmp:
        made = {r: ready(options_of(r, args), args, Path(tmp) / str(i)) for i, r in enumerate(runs)}
        batch = made["plain"][1]
        times: dict[str, list[float]] = {r: [] for r in runs}
        for i in range(int(args["rounds"]) + 3):
            for r in random.Random(i).sample(runs, len(runs)):
                spent = seconds(r, made[r][0], batch, clock)
                if i >= 3:
                    times[r].append(spent)
    print(table(times))


if __name__ == "__main__":
    main()
