# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""INT8 side by side: every way to quantize one model, the same calibration images, one process, interleaved latency.

    python benchmarks/quantization.py model=best.pt data=data.yaml imgsz=192 [qat=qat.pt] [threads=1,all] \
        [rounds=300] [runs=fp32,builtin,ort-x86] [calib=300] [json=out.json]

Rows: `fp32` (ONNX), `order` (FP32 with our node order), `builtin` (Ultralytics `quantize=8`), `static`
(`quantize_static` of ONNX Runtime as one who knows it would call it), any profile of ours (PTQ), `openvino` (FP32,
behind `order` also in our node order, Ultralytics' NNCF INT8 and our `openvino` profile in OpenVINO, which needs
openvino and nncf), and of `qat`, a file of our QAT, its INT8 ONNX. With the runtimes of avx2.py first on PYTHONPATH
all of it is run as on an AVX2 CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("YOLO_AUTOINSTALL", "false")

import numpy as np
import onnx
import onnxruntime
from ultralytics import YOLO

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import QuantConfig
from yolo_ext.data.check import calibration_images, check_data, letterbox_batches
from yolo_ext.deployment.export import SUFFIX, export_onnx, export_openvino
from yolo_ext.deployment.latency import bench, speedup
from yolo_ext.deployment.runtime import conv_report
from yolo_ext.quantization.fake_quant import get_state
from yolo_ext.quantization.qat import prepare
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import has_vnni, resolve_profile
from yolo_ext.reporting.tables import align
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.context import cpu_info
from yolo_ext.stock.load import load_model

RUNS = "fp32,order,builtin,static,ort-x86,ort-x86-vnni,ort-x86-full,ort-x86-full-vnni,openvino"


class Reader:
    """Calibration images for ONNX Runtime, one by one."""

    def __init__(self, name: str, images: list[Path], imgsz: int) -> None:
        self.name, self.batches = name, letterbox_batches(images, imgsz, batch=1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def ours(model: Path, info: dict, imgsz: int, fp32: Path, profile: str, calib: int | None, out: Path) -> Path:
    net, _ = load_model(model)
    prepare(net, QuantConfig(profile=profile, calib=calib), info, imgsz)
    write_qdq(fp32, out, get_state(net), resolve_profile(profile))
    return out


def built_in(model: Path, data: str, imgsz: int, folder: Path, format: str) -> Path:
    copy = folder / f"{format}_model.pt"
    shutil.copyfile(model, copy)
    args = {"data": data, "split": "train", "fraction": 1.0, "imgsz": imgsz}
    return Path(
        YOLO(copy).export(format=format, quantize=8, **args, **({"simplify": False} if format == "onnx" else {}))
    )


def masked() -> bool:
    """Return whether ONNX Runtime is a copy made by avx2.py, which sees no VNNI."""
    return (Path(onnxruntime.__file__).parents[1] / "cpuid.so").exists()


def static(fp32: Path, images: list[Path], imgsz: int, out: Path) -> Path:
    """Quantize as ONNX Runtime's documentation advises for x86-64, with head outputs and box decode in float."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = out.with_suffix(".pre.onnx")
    quant_pre_process(str(fp32), str(ready))
    graph = onnx.load(ready).graph
    last = max(int(n.name.split("/")[1].split(".")[1]) for n in graph.node if n.name.startswith("/model."))
    stems = (".0/", ".1/")  # of the branches of the head
    kept = [n.name for n in graph.node if n.name.startswith(f"/model.{last}/")
            and not (n.name.count("/") > 4 and any(s in n.name for s in stems))]  # fmt: skip
    quantize_static(
        str(ready), str(out), Reader(graph.input[0].name, images, imgsz), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=kept,
        reduce_range=masked() or not has_vnni(),
    )  # fmt: skip
    return out


def main() -> None:
    args = {"runs": RUNS, "threads": "1", "rounds": "300", **dict(a.split("=", 1) for a in sys.argv[1:])}
    model, data, imgsz = Path(args["model"]), args["data"], int(args.get("imgsz", 640))
    calib = int(args["calib"]) if "calib" in args else None
    info, runs = check_data(data), args["runs"].split(",")
    images = calibration_images(info, calib)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        fp32 = export_onnx(model, folder / "fp32.onnx", imgsz)
        files: dict[str, Path] = {}
        for run in runs:
            if run == "fp32":
                files["FP32"] = fp32
            elif run == "order":  # no INT8, only the DFL rewrite
                files["FP32, our node order"] = folder / "reordered.onnx"
                write_qdq(fp32, files["FP32, our node order"], {}, resolve_profile("ort-x86"))
            elif run == "builtin":
                files["Ultralytics quantize=8"] = built_in(model, data, imgsz, folder, "onnx")
            elif run == "static":
                files["quantize_static"] = static(fp32, images, imgsz, folder / "static.onnx")
            elif run == "openvino":
                files["OpenVINO FP32"] = export_openvino(fp32, folder / f"fp32{SUFFIX}")
                if reordered := files.get("FP32, our node order"):
                    files["OpenVINO, our node order"] = export_openvino(reordered, folder / f"reordered{SUFFIX}")
                files["OpenVINO, Ultralytics NNCF"] = built_in(model, data, imgsz, folder, "openvino")
                out = ours(model, info, imgsz, fp32, "openvino", calib, folder / "ov.onnx")
                files["OpenVINO, yolo_ext"] = export_openvino(out, folder / f"ours_int8{SUFFIX}")
            else:
                files[f"yolo_ext {run}"] = ours(model, info, imgsz, fp32, run, calib, folder / f"{run}.onnx")
        if "qat" in args:
            record = manifest(load_model(args["qat"])[0]).quant
            trained = export_onnx(args["qat"], folder / "qat_fp32.onnx", imgsz)
            out = folder / "qat_int8.onnx"
            write_qdq(trained, out, record["state"], resolve_profile(record["profile"]))
            files["yolo_ext QAT FP32"], files[f"yolo_ext QAT {record['profile']}"] = trained, out
        figures = {}
        for name, file in files.items():
            counts = {} if file.is_dir() else conv_report(file)
            size = sum(f.stat().st_size for f in file.rglob("*")) if file.is_dir() else file.stat().st_size
            figures[name] = {**accuracy(file, data, imgsz), "mb": size / 1e6, **counts}
        for given in args["threads"].split(","):
            threads = (os.cpu_count() or 1) if given == "all" else int(given)
            times = bench(files, imgsz, threads=threads, rounds=int(args["rounds"]))
            base, rows = times[next(iter(files))], []
            for name, f in figures.items():
                t, r = times[name], speedup(base, times[name])
                convs = f"{f['int8_convs']}/{f['convs']}" if "convs" in f else "-"
                f[f"ms_{threads}"], f[f"ratio_{threads}"] = t["median"], r["ratio"]
                rows.append([
                    name, f"{f['map']:.4f}", f"{f['f1_conf']:.3f}", convs, f"{f['mb']:.2f}",
                    f"{t['median']:.2f} ({t['p10']:.2f}-{t['p90']:.2f})",
                    f"{r['ratio']:.2f} ({r['p10']:.2f}-{r['p90']:.2f})",
                ])  # fmt: skip
            print(f"threads={threads}, rounds={base['n']}")
            print(
                align(rows, ["File", "mAP50-95", "F1 conf", "INT8 convs", "MB", "ms median (p10-p90)", "x first row"])
            )
        print({**cpu_info(), "imgsz": imgsz, "calibration": len(images), "avx2.py": masked()})
        if "json" in args:
            Path(args["json"]).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
