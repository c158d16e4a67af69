# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What quantization-aware training wins back: fake-quantized mAP of PTQ and after QAT, by seed.

    python benchmarks/qat.py model=best.pt data=data.yaml imgsz=192 bits=4 epochs=3 seeds=0,1,2 out=results \
        [runs=kd,features,labels] [profile=ort-x86] [threads=1] [shard=0/2]

`bits` are those of the weights. A run is how QAT is supervised, `kd` for labels and, by the default losses, the float
self; `/0.5` lets BatchNorm follow in half of the epochs. `builtin` is
Ultralytics' own QAT in 8 bits, which needs nvidia-modelopt, with its defaults, and `builtin/ours` the same with our
rate, batch, augmentation and warm-up; their lines say how many convolutions of its ONNX export run as INT8. Each result
is a line of `out`/qat_`bits`_`epochs`.jsonl; those that are there are not repeated. Prints the share of the loss by PTQ
that is recovered.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from ultralytics import YOLO

from yolo_ext.core.config import parse
from yolo_ext.data.check import check_data
from yolo_ext.deployment.runtime import conv_report
from yolo_ext.pipeline.run import QAT
from yolo_ext.quantization.qat import prepare
from yolo_ext.reporting.tables import align
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import load_model
from yolo_ext.training.quant import quantized
from yolo_ext.training.trainer import trainer_for

RATES = {4: 1e-4}  # the fewer bits, the further weights have to move


def one(run: str, seed: int, args: dict[str, str], folder: Path) -> dict[str, Any]:
    bits, size = int(args["bits"]), int(args["imgsz"])
    name, _, variant = run.partition("/")
    common: dict[str, Any] = {
        "epochs": int(args["epochs"]), "data": args["data"], "imgsz": size, "seed": seed, "plots": False,
        "save_dir": str(folder), "exist_ok": True, "device": "cpu", "workers": 0, "verbose": False,
    }  # fmt: skip
    recipe = {**QAT, "lr0": float(args.get("lr0", RATES.get(bits, 5e-5))), "nbs": QAT["batch"]}
    start, _ = load_model(args["model"])
    base = accuracy(start, args["data"], size)["map"]
    if name == "builtin":
        same = {**recipe, "optimizer": "AdamW", "warmup_bias_lr": recipe["lr0"]} if variant == "ours" else {}
        model = YOLO(args["model"])
        model.train(**same, **common, quantize=8)
        found = model.trainer.metrics["metrics/mAP50-95(B)"]  # of best.pt, fake-quantized, by its last validation
        file = YOLO(folder / "weights" / "best.pt").export(format="onnx", imgsz=size, simplify=False)
        integer = conv_report(file)["int8_convs"]
        return {"run": run, "seed": seed, "float": base, "ptq": None, "map": found, "int8_convs": integer}
    quant = {
        "mode": "qat",
        "profile": args["profile"],
        "supervision": "labels" if name == "kd" else name,
        "freeze_bn": float(variant or 0),
        "config_list": [{"op_types": ["Conv2d"], "quant_bits": {"weight": bits}}],
    }
    if name == "kd":
        common["distill"] = {"teacher": "self", "schedule": "constant", "preflight": False}
    YOLO(args["model"]).train(trainer=trainer_for("detect"), **recipe, **common, quant=quant)
    best = folder / "weights" / "best.pt"
    prepare(start, parse({"quant": {**quant, "mode": "ptq"}})["quant"], check_data(args["data"]), size)
    ptq, after = (accuracy(m, args["data"], size)["map"] for m in (start, quantized(best)))
    return {"run": run, "seed": seed, "float": base, "ptq": ptq, "map": after, "lr0": recipe["lr0"]}


def main() -> None:
    args = {"bits": "4", "epochs": "3", "seeds": "0,1,2", "runs": "kd,features,labels", "profile": "ort-x86",
            **dict(a.split("=", 1) for a in sys.argv[1:])}  # fmt: skip
    torch.set_num_threads(int(args.get("threads", torch.get_num_threads())))
    log = Path(args["out"]) / f"qat_{args['bits']}_{args['epochs']}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    read = lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []  # noqa: E731
    shard, shards = (int(x) for x in args.get("shard", "0/1").split("/"))
    todo = [(r, int(s)) for s in args["seeds"].split(",") for r in args["runs"].split(",") if r]
    for run, seed in todo[shard::shards]:
        if any((r["run"], r["seed"]) == (run, seed) for r in read()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = one(run, seed, args, Path(folder))
        with log.open("a") as f:
            f.write(json.dumps(found) + "\n")
        print("RESULT", json.dumps(found), flush=True)
    rows = []
    for run in dict.fromkeys(r["run"] for r in read()):
        found = sorted((r for r in read() if r["run"] == run), key=lambda r: r["seed"])
        base, after = (mean(r[k] for r in found) for k in ("float", "map"))
        ptq = None if found[0]["ptq"] is None else mean(r["ptq"] for r in found)
        share = "-" if ptq is None or base <= ptq else f"{100 * (after - ptq) / (base - ptq):.0f} %"
        seeds = " ".join(f"{r['map']:.4f}" for r in found)
        rows.append([run, f"{base:.4f}", "-" if ptq is None else f"{ptq:.4f}", seeds, f"{after:.4f}", share])
    print(align(rows, ["QAT by", "Float", "PTQ", "Seeds", "Mean", "Loss recovered"]))


if __name__ == "__main__":
    main()
