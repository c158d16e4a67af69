# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""INT8 ONNX side by side: FP32, Ultralytics' built-in PTQ and ours, same model, same calibration images, one process.

    python benchmarks/int8.py model=best.pt data=data.yaml imgsz=640 [threads=1] [rounds=200]

Prints mAP50-95 on val, integer convolutions after ONNX Runtime's optimization, file size, and latency medians with
spread from interleaved rounds.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("YOLO_AUTOINSTALL", "false")

from ultralytics import YOLO

from yolo_ext.checkpoint import load_model
from yolo_ext.config import QuantConfig
from yolo_ext.data.check import check_data
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.latency import bench, speedup
from yolo_ext.deployment.runtime import conv_report, cpu_info
from yolo_ext.deployment.verify import map_onnx
from yolo_ext.quantization.fake_quant import get_ranges
from yolo_ext.quantization.profiles import resolve_profile
from yolo_ext.quantization.qat import prepare
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.reporting.tables import align


def ours(model: Path, info: dict, imgsz: int, fp32: Path, profile: str, out: Path) -> Path:
    net, _ = load_model(model)
    prepare(net, QuantConfig(profile=profile), info, imgsz)
    write_qdq(fp32, out, get_ranges(net), resolve_profile(profile))
    return out


def built_in(model: Path, data: str, imgsz: int, folder: Path) -> Path:
    copy = folder / "model.pt"
    shutil.copyfile(model, copy)
    file = YOLO(copy).export(
        format="onnx", quantize=8, data=data, split="train", fraction=1.0, imgsz=imgsz, simplify=False
    )
    return Path(file)


def main() -> None:
    args = dict(a.split("=", 1) for a in sys.argv[1:])
    model, data, imgsz = Path(args["model"]), args["data"], int(args.get("imgsz", 640))
    threads, rounds = int(args.get("threads", 1)), int(args.get("rounds", 200))
    info = check_data(data)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        fp32 = export_onnx(model, folder / "fp32.onnx", imgsz)
        files = {"FP32": fp32, "FP32, our node order": folder / "reordered.onnx"}
        write_qdq(fp32, files["FP32, our node order"], {}, resolve_profile("ort-x86"))  # no INT8, only the DFL rewrite
        files["Ultralytics quantize=8"] = built_in(model, data, imgsz, folder)
        for name in ("ort-x86", "ort-x86-vnni"):
            files[f"yolo_ext {name}"] = ours(model, info, imgsz, fp32, name, folder / f"{name}.onnx")
        times = bench(files, imgsz, threads=threads, rounds=rounds, seconds=60)
        rows = []
        for name, file in files.items():
            t, r, c = times[name], speedup(times["FP32"], times[name]), conv_report(file)
            rows.append([
                name, f"{map_onnx(file, data, imgsz)['map']:.4f}", f"{c['int8_convs']}/{c['convs']}",
                f"{file.stat().st_size / 1e6:.2f}", f"{t['median']:.2f} ({t['p10']:.2f}-{t['p90']:.2f})",
                f"{r['ratio']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})",
            ])  # fmt: skip
        print(align(rows, ["File", "mAP50-95", "INT8 convs", "MB", "ms median (p10-p90)", "x FP32"]))
        print({**cpu_info(), "imgsz": imgsz, "threads": threads, "rounds": times["FP32"]["n"]})


if __name__ == "__main__":
    main()
