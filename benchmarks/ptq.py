# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the options of PTQ are worth: errors of the fake-quantized model against its float self, and its mAP.

    python benchmarks/ptq.py model=best.pt data=data.yaml imgsz=192 [bits=4] [calib=128] [profile=ort-x86-vnni] \
        [runs=plain,adaround=100] [images=32]

A run is `plain`, or options of `quant` joined by `+`. `bits` are those of the weights. Box and score errors are means
over the anchors of `images` val images whose float score is above 0.25; mAP50-95 is that of the whole val split.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ultralytics.cfg import smart_value

from yolo_ext.core.config import parse
from yolo_ext.data.check import check_data, letterbox_batches
from yolo_ext.deployment.compare import compare, summary
from yolo_ext.deployment.runtime import describe, predictor
from yolo_ext.quantization.qat import prepare
from yolo_ext.reporting.tables import align
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import load_model

RUNS = "plain,adaround=100"
CONFIDENT = 0.25


def main() -> None:
    args = {"bits": "8", "calib": "128", "profile": "ort-x86-vnni", "runs": RUNS, "images": "32",
            **dict(a.split("=", 1) for a in sys.argv[1:])}  # fmt: skip
    imgsz, info = int(args["imgsz"]), check_data(args["data"])
    images = [Path(p) for p in info["images"]["val"][: int(args["images"])]]
    batches = [b.numpy() for b in letterbox_batches(images, imgsz, batch=1)]
    base = load_model(args["model"])[0]
    rows = [["float", "", "", f"{accuracy(base, args['data'], imgsz)['map']:.4f}"]]
    for run in args["runs"].split(","):
        given = dict(o.split("=", 1) for o in run.split("+") if o != "plain")
        options = {
            "mode": "ptq", "profile": args["profile"], "calib": int(args["calib"]),
            "config_list": [{"op_types": ["Conv2d"], "quant_bits": {"weight": int(args["bits"])}}],
            **{k: smart_value(v) for k, v in given.items()},
        }  # fmt: skip
        net = load_model(args["model"])[0]
        prepare(net, parse({"quant": options})["quant"], info, imgsz)
        found = compare(predictor(base), predictor(net), batches, describe(base))["rows"]
        errors = summary(found[found[:, 2] > CONFIDENT])
        score = accuracy(net, args["data"], imgsz)["map"]
        rows.append([run, f"{errors['box_mean']:.3f}", f"{errors['score_mean']:.4f}", f"{score:.4f}"])
    print(align(rows, ["PTQ", "Mean box error px", "Mean score error", "mAP50-95"]))


if __name__ == "__main__":
    main()
