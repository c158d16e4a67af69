# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What each distillation loss brings: the same student and recipe, with no teacher, Ultralytics' loss and each of ours.

    python benchmarks/distillation.py kind=pruned model=best.pt data=data.yaml imgsz=192 speedup=3 epochs=15 \
        seeds=0,1,2 out=results runs=none,builtin,losses,default,stack
    python benchmarks/distillation.py kind=scratch student=yolov8n.yaml teacher=yolov8s.pt ... epochs=60 runs=all

`pruned` prunes `model` once to `speedup` x fewer FLOPs and fine-tunes that student as `compress` does; its teacher is
`model`, or `teacher`. `scratch` trains `student` from random weights. A run is

- `none`: no teacher;
- `builtin`: `distill_model` of Ultralytics, with `builtin*0.5` at half of its weight. A pruned student, which it cannot
  train, gets its real `DistillationModel` through our trainer, which keeps the pruned widths;
- `default`: our default stack; the name of one loss, alone; or several such as `bckd*0.5+cwd`, with weights.

`losses` stands for each loss alone, `stack` for a few stacks, `all` for everything. `time=equal` trains without a
teacher for as long as the best run of ours took (`none@time`), when the file has the others. Each result is one line of
`out`/`kind`_..._`epochs`.jsonl; those that are there are not repeated, so that several processes (`shard=0/2`,
`shard=1/2`) share the work and a stopped benchmark goes on. `limit=1500` starts no run that might end after so many
seconds. At the end the table is printed; with `runs=` nothing else is done.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from ultralytics import YOLO

from yolo_ext.checkpoint import save_model
from yolo_ext.core.options import PruneConfig
from yolo_ext.data.check import check_data
from yolo_ext.distillation.terms import TABLES
from yolo_ext.pipeline.run import FINETUNE
from yolo_ext.pruning.prune import prune_model
from yolo_ext.reporting.tables import align
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.context import recalibrate
from yolo_ext.stock.load import load_model
from yolo_ext.training.prune import make_probes
from yolo_ext.training.trainer import trainer_for

LOSSES = [row.name for table in TABLES.values() for row in table]
STACKS = ["bckd+cwd", "bckd+pkd", "bckd*0.5+cwd", "kl_binary+ld+cwd", "kl_binary+pkd"]
GROUPS = {"losses": LOSSES, "stack": STACKS, "all": ["none", "builtin", *LOSSES, "default", *STACKS]}
SCRATCH = {"optimizer": "AdamW", "lr0": 0.002, "cos_lr": True, "warmup_epochs": 3.0, "batch": 8, "nbs": 16}
Result = dict[str, Any]


def options_of(run: str, teacher: str) -> dict[str, Any]:
    """Return the training options that make up a run, such as ``bckd*0.5+cwd``, with this teacher."""
    if run in ("none", "none@time"):
        return {}
    parts = [part.partition("*") for part in run.split("+")]
    if len(parts) == 1 and parts[0][0] == "builtin":
        return {"distill_model": teacher, **({"dis": 6.0 * float(parts[0][2])} if parts[0][2] else {})}
    common = {"teacher": teacher, "preflight": False}
    if run == "default":
        return {"distill": common}
    found: dict[str, Any] = {kind: [] for kind in TABLES}
    for name, _, weight in parts:
        kinds = [kind for kind, table in TABLES.items() if name in table.names()]
        if not kinds:
            raise SystemExit(f"Unknown run '{run}'. Legal: none, builtin, default, and of {', '.join(LOSSES)}.")
        found[kinds[0]].append({"name": name, "weight": float(weight or 1.0)})
    return {"distill": {**common, **{kind: stack or None for kind, stack in found.items()}}}


def student_of(args: dict[str, str], out: Path) -> str:
    """Return the student that all runs start from; a pruned one is made by whichever process comes first."""
    if args["kind"] == "scratch":
        return args["student"]
    file, imgsz = out / f"pruned_{args['speedup']}x.pt", int(args["imgsz"])
    if not file.exists():
        dense, ckpt = load_model(args["model"])
        cfg = PruneConfig(speedup=float(args["speedup"]))
        probes = make_probes(check_data(args["data"]), imgsz, cfg, "detect", dense)
        pruned = prune_model(dense, cfg, imgsz, probes)
        recalibrate(pruned, probes.images())
        pruned.args = dict(ckpt.get("train_args") or {})
        made = save_model(pruned, out / f"{file.stem}_{os.getpid()}.pt")
        with suppress(FileExistsError):  # another process was faster, and its student is in use already
            os.link(made, file)
        made.unlink()
    return str(file)


def one(run: str, seed: int, epochs: int, args: dict[str, str], student: str, folder: Path) -> Result:
    """Do one run and return its figures; seconds are those of the epochs, without validation."""
    options = options_of(run, str(Path(args["teacher"]).resolve()))
    recipe = {**FINETUNE, "nbs": FINETUNE["batch"]} if args["kind"] == "pruned" else SCRATCH
    clocks, spent = (time.perf_counter, time.process_time), [0.0, 0.0]
    yolo = YOLO(student, task="detect")

    def tick(sign: int) -> Any:
        return lambda trainer: spent.__setitem__(slice(2), [s + sign * c() for s, c in zip(spent, clocks)])

    yolo.add_callback("on_train_epoch_start", tick(-1))
    yolo.add_callback("on_train_epoch_end", tick(1))
    # Where Ultralytics can train its own distillation, it does so with its own trainer.
    stock = "distill_model" in options and args["kind"] == "scratch"
    yolo.train(
        trainer=None if stock else trainer_for("detect"), **{**recipe, **options, "epochs": epochs},
        data=args["data"], imgsz=int(args["imgsz"]), seed=seed, close_mosaic=min(10, epochs // 3), plots=False,
        save_dir=str(folder), exist_ok=True, device=args["device"], workers=0, verbose=False,
    )  # fmt: skip
    maps = {w: accuracy(folder / "weights" / f"{w}.pt", args["data"], int(args["imgsz"]))["map"]
            for w in ("best", "last")}  # fmt: skip
    return {"run": run, "seed": seed, "epochs": epochs, "map": maps["best"], "last": maps["last"],
            "wall": round(spent[0], 2), "cpu": round(spent[1], 2), "device": args["device"]}  # fmt: skip


def pace(results: list[Result], run: str) -> float:
    """Return the seconds of an epoch of a run: of this process on the CPU, which other processes share."""
    found = [r["cpu" if r["device"] == "cpu" else "wall"] / r["epochs"] for r in results if r["run"] == run]
    return median(found) if found else float("nan")


def scores(results: list[Result]) -> dict[str, list[float]]:
    """Return mAP50-95 by run, in the order of the seeds, runs without a teacher first and then the best first."""
    found: dict[str, list[float]] = {}
    for r in sorted(results, key=lambda r: r["seed"]):
        found.setdefault(r["run"], []).append(r["map"])
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("none"), -mean(item[1]))))


def equal_time(results: list[Result], epochs: int) -> int:
    """Return the epochs that a run without a teacher has time for while our best run does its own."""
    ours = {run: values for run, values in scores(results).items() if not run.startswith(("none", "builtin"))}
    seeds = max(map(len, ours.values()), default=0)  # one lucky seed does not make the best run
    best = next((run for run, values in ours.items() if len(values) == seeds), None)
    if best is None or not any(r["run"] == "none" for r in results):
        raise SystemExit("'time=equal' needs results of 'none' and of a run with a teacher: do those first.")
    longer = round(epochs * pace(results, best) / pace(results, "none"))
    print(f"none@time: {longer} epochs in the time of {epochs} with {best}", flush=True)
    return longer


def table(results: list[Result], teacher: float) -> str:
    """Return all results, with the share of the distance between no teacher and the teacher that each run closes."""
    by_run, rows = scores(results), []
    base = mean(by_run["none"]) if "none" in by_run else float("nan")
    for run, values in by_run.items():
        found = [r for r in results if r["run"] == run]
        closed = f"{100 * (mean(values) - base) / (teacher - base):+.0f} %" if teacher > base else "-"
        rows.append([
            run, "/".join(str(e) for e in sorted({r["epochs"] for r in found})), " ".join(f"{v:.4f}" for v in values),
            f"{mean(values):.4f}", f"{max(values) - min(values):.4f}", closed,
            f"{mean(r['last'] for r in found):.4f}", f"{pace(results, run):.2f}",
            f"{pace(results, run) / pace(results, 'none'):.2f}",
        ])  # fmt: skip
    return align(rows, ["Run", "Epochs", "Seeds", "Mean", "Spread", "Gap closed", "Last epoch", "s/epoch", "Time"])


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    args = {"kind": "pruned", "speedup": "3", "device": "cpu", "runs": "all", **given}
    scratch = args["kind"] == "scratch"
    args = {"epochs": "60" if scratch else "15", "teacher": args.get("model", ""), **args}
    began, longest, epochs, out = time.monotonic(), 0.0, int(args["epochs"]), Path(args["out"])
    out.mkdir(parents=True, exist_ok=True)
    what = Path(args["student"]).stem if scratch else f"{args['speedup']}x"
    log = out / f"{args['kind']}_{what}_{epochs}.jsonl"
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []  # noqa: E731
    torch.set_num_threads(int(args.get("threads", torch.get_num_threads())))
    runs = [r for name in args["runs"].split(",") for r in GROUPS.get(name, [name] if name else [])]
    runs = ["none@time"] if args.get("time") == "equal" and runs else list(dict.fromkeys(runs))
    for run in runs:
        options_of(run, "")  # a wrong name is known before the first training
    longer = equal_time(read(), epochs) if "none@time" in runs else epochs
    shard, shards = (int(x) for x in args.get("shard", "0/1").split("/"))
    for run, seed in [(r, int(s)) for s in args.get("seeds", "0").split(",") for r in runs][shard::shards]:
        if any((r["run"], r["seed"]) == (run, seed) for r in read()):
            continue
        start = time.monotonic()
        if start - began + longest > float(args.get("limit", "inf")):
            print("The rest is left for another call: 'limit' would be exceeded.")
            break
        with tempfile.TemporaryDirectory() as tmp:
            length = longer if run == "none@time" else epochs
            found = one(run, seed, length, args, student_of(args, out), Path(tmp))
        with log.open("a") as f:
            f.write(json.dumps(found) + "\n")
        print("RESULT", json.dumps(found), flush=True)
        longest = max(longest, time.monotonic() - start)
    if results := read():
        teacher = accuracy(Path(args["teacher"]), args["data"], int(args["imgsz"]))["map"]
        print(f"teacher: {teacher:.4f}\n" + table(results, teacher))


if __name__ == "__main__":
    main()
