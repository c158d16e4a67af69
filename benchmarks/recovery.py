# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What pruning criteria and distillation bring: the same target and epochs, several seeds, mAP50-95 after fine-tuning.

    python benchmarks/recovery.py model=best.pt data=data.yaml imgsz=192 epochs=30 speedup=2 seeds=0,1 \
        runs=lamp+kd,lamp,l2+kd,random+kd

Each run is one `compress` without quantization. Prints mAP50-95 (rect=False) of every seed, mean and spread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from yolo_ext.pipeline import compress
from yolo_ext.reporting.tables import align


def main() -> None:
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    seeds = [int(s) for s in args.get("seeds", "0").split(",")]
    rows, base = [], None
    for run in args.get("runs", "lamp+kd,lamp").split(","):
        method, kd = run.removesuffix("+kd"), run.endswith("+kd")
        scores = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as tmp:
                summary = compress(
                    args["model"], args["data"], imgsz=int(args["imgsz"]), epochs=int(args.get("epochs", 30)),
                    seed=seed,
                    save_dir=str(Path(tmp) / "run"), plots=False,
                    prune={"method": method, "speedup": float(args.get("speedup", 2)), "seed": seed},
                    distill={} if kd else None,
                )  # fmt: skip
            base = summary["before"]["map"]
            scores.append(summary["after"]["map"])
            print(f"RESULT {run} seed {seed}: {scores[-1]:.4f} (base {base:.4f})", flush=True)
        spread = max(scores) - min(scores)
        pruned = summary["stages"]["prune"]["map"]
        rows.append([run, f"{pruned:.4f}", " ".join(f"{s:.4f}" for s in scores), f"{statistics.mean(scores):.4f}",
                     f"{spread:.4f}", f"{statistics.mean(scores) - base:+.4f}"])  # fmt: skip
    print(align(rows, ["Run", "Before fine-tuning", "Seeds", "Mean", "Spread", "Against base"]))


if __name__ == "__main__":
    main()
