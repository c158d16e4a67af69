# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What sparsity training brings: penalty for half of the epochs, pruning, fine-tuning, against fine-tuning throughout.

    python benchmarks/sparsity.py model=best.pt data=data.yaml imgsz=192 epochs=30 speedup=2 seeds=0,1 out=results \
        runs=slim,slim/adaptive=False,group_slim,group_sl,l1,lamp

A penalty gets epochs/2 of sparsity training and epochs/2 of fine-tuning, a plain criterion all epochs after pruning.
Behind slashes are options of sparsity training, as in `slim/coefficient=4/schedule=cosine`.
No distillation on either side. Each result is one line of `out/sparsity.jsonl`; those that are there are not repeated,
so that several processes (`shard=0/2`) share the work.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import mean

import torch
from ultralytics.cfg import parse_key_value_pair

from yolo_ext.pipeline import compress
from yolo_ext.reporting.tables import align
from yolo_ext.sparsity.penalties import penalties


def one(run: str, seed: int, args: dict[str, str], out: Path) -> dict:
    epochs, speedup = int(args.get("epochs", 30)), float(args.get("speedup", 2))
    method, *given = run.split("/")
    sparse = method in penalties.names()
    folder = out / f"{run.replace('/', ',')}_{seed}"
    penalty = {"method": method, "epochs": epochs // 2, **dict(map(parse_key_value_pair, given))}
    summary = compress(
        args["model"], args["data"], imgsz=int(args["imgsz"]), seed=seed, plots=False, workers=0,
        epochs=epochs // 2 if sparse else epochs, save_dir=str(folder), exist_ok=True,
        sparsity=penalty if sparse else None, prune={"method": method, "speedup": speedup, "force": True},
    )  # fmt: skip
    for name in ("base", "compare"):
        shutil.rmtree(folder / name, ignore_errors=True)
    stages = summary["stages"]
    history = folder / "sparsify" / "sparsity.json"
    last = json.loads(history.read_text())["epochs"][-1] if sparse else {}
    return {
        "run": run, "seed": seed, "sparse": (stages.get("sparsify") or {}).get("map"), "pruned": stages["prune"]["map"],
        "share": last.get("share"), "speedup": last.get("speedup"),
        "map": summary["after"]["map"], "params": summary["after"]["params"], "base": summary["before"]["map"],
    }  # fmt: skip


def main() -> None:
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    torch.set_num_threads(int(args.get("threads", torch.get_num_threads())))
    out = Path(args["out"])
    out.mkdir(parents=True, exist_ok=True)
    log = out / "sparsity.jsonl"
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []  # noqa: E731
    runs, seeds = args.get("runs", "slim,l1,lamp").split(","), args.get("seeds", "0").split(",")
    jobs = [(r, int(s)) for s in seeds for r in runs]
    shard, shards = (int(x) for x in args.get("shard", "0/1").split("/"))
    for run, seed in jobs[shard::shards]:
        if not any((r["run"], r["seed"]) == (run, seed) for r in read()):
            found = one(run, seed, args, out)
            with log.open("a") as f:
                f.write(json.dumps(found) + "\n")
            print("RESULT", json.dumps(found), flush=True)
    rows = []
    for run in dict.fromkeys(r["run"] for r in read()):
        found = [r for r in read() if r["run"] == run]
        scores, figure = [r["map"] for r in found], lambda v, d=4: "-" if v is None else f"{v:.{d}f}"
        rows.append([
            run, figure(found[0]["share"], 2), figure(found[0]["speedup"], 2), figure(found[0]["sparse"]),
            figure(found[0]["pruned"]), " ".join(map(figure, scores)),
            figure(mean(scores)), f"{mean(scores) - found[0]['base']:+.4f}", f"{found[0]['params'] / 1e6:.2f}",
        ])  # fmt: skip
    print(align(rows, ["Run", "Near zero", "FLOPs x", "Sparse", "Pruned", "Seeds", "Mean", "Against base", "M params"]))


if __name__ == "__main__":
    main()
