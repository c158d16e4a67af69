# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The whole path through the house: files, figures, checks, resume."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_ext.checkpoint import manifest
from yolo_ext.core.errors import UsageError
from yolo_ext.pipeline import compress, stages
from yolo_ext.reporting.tables import comparison_rows
from yolo_ext.runs import METRICS, Record
from yolo_ext.stock.load import load_model

pytestmark = pytest.mark.slow  # whole runs of `compress`

CONTRACT = (
    "compress.yaml", "args.yaml", "summary.json", "report.html", "report.json", "weights/best.pt", "onnx/fp32.onnx",
    "onnx/int8.onnx", "prune/plan.json", "prune/weights/pruned.pt", "finetune/results.csv", "ptq/int8.onnx",
    "ptq/quant.json",
    "ptq/weights/ptq.pt", "qat/int8.onnx", "verify/verify.json", "plots/detections_0.png",
    *(f"{stage}/evidence.npz" for stage in ("base", "prune", "finetune", "ptq", "qat")),
)  # fmt: skip
FIGURES = set(METRICS)


@pytest.fixture
def folder(compressed: dict[str, Any]) -> Path:
    return Path(compressed["run_dir"])


@pytest.mark.parametrize("name", CONTRACT)
def test_run_folder_holds_what_is_promised(folder, name):
    assert (folder / name).stat().st_size > 0


def test_summary_has_every_figure_and_null_where_nothing_was_measured(folder, compressed):
    summary = json.loads((folder / "summary.json").read_text())
    told = {"headline", "passed", "contract", "checks", "deploy", "next", "settings", "seconds", "comparison"}
    assert set(summary) == {"before", "after", "stages", "env", "command", *told}
    assert summary["deploy"] == "onnx/int8.onnx" and summary["passed"] is all(c["passed"] for c in summary["checks"])
    assert list(summary["seconds"]) == [s.name for s in stages.STAGES if s.name in summary["seconds"]]
    row = summary["comparison"]
    assert row["training_s"] == pytest.approx(sum(summary["seconds"][k] for k in ("finetune", "qat")))
    assert row["training_s"] > 0
    assert row["params"] == summary["after"]["params"] and row["accuracy"] == round(
        summary["after"]["map_onnx"]["int8"], 4
    )
    assert 0.2 < row["ratio"] < 0.8 and row["method"].startswith("prune taylor, distill self, quant ")
    assert "prune.speedup=2.0" in row["settings"] and "quant.mode=qat" in row["settings"]
    assert row["conclusion"] == summary["headline"]
    assert (
        summary["after"]["latency_ratio"]["ort_int8"]["p10"] <= summary["after"]["latency_ratio"]["ort_int8"]["ratio"]
    )
    for m in (summary["before"], summary["after"], *summary["stages"].values()):
        assert set(m) == FIGURES
    assert list(summary["stages"]) == ["base", "prune", "finetune", "ptq", "qat"]
    assert summary["stages"]["prune"]["int8_convs"] is None
    assert summary["before"]["latency_ms"]["ort_int8"] is None
    assert summary["after"]["latency_ms"]["ort_int8"] > 0
    assert summary["stages"]["base"] == summary["before"]  # latencies too, though they are measured at the end
    assert summary["after"] in (summary["stages"]["ptq"], summary["stages"]["qat"])


def test_one_run_has_one_number_for_each_figure(folder, compressed):
    """Console, summary.json, report.html and report.md of one run say the same."""
    summary = json.loads((folder / "summary.json").read_text())
    texts = {f: re.sub(r"<[^>]+>", " ", (folder / f).read_text()) for f in ("compress.log", "report.html", "report.md")}
    for row in comparison_rows(summary["before"], summary["after"]):
        for place, text in texts.items():
            for shown in {row.before, row.after, row.delta.partition(" (")[0]} - {"-"}:
                assert shown in text, (place, row)
    assert all(summary["headline"] in html.unescape(text) for text in texts.values())
    log = re.sub(r".*PTQ start.*", "", texts["compress.log"])  # as Ultralytics validates each epoch
    assert log.splitlines()[-1].endswith(f"{folder}/onnx/int8.onnx. Next: {summary['next']}")
    for name in summary["seconds"]:
        (line,) = re.findall(rf"^\S+ \S+ {name}: (.*) \d+ s$", log, re.MULTILINE)
        assert f"{(summary['stages'].get(name) or {}).get('map') or 0:.4f}".replace("0.0000", "") in line
    measured = [*summary["stages"].values(), summary["before"]]
    maps = {f"{v:.4f}" for m in measured for v in (m["map"], *m["map_onnx"].values()) if v is not None}
    assert set(re.findall(r"mAP50-95(?: ONNX \w+)? (?:\S+ -> )?(\d\.\d{4})", log)) <= maps
    ratios = {f"{r['ratio']:.2f}" for r in summary["after"]["latency_ratio"].values() if r}
    assert set(re.findall(r"(\d+\.\d\d)x (?:faster|as fast)", "".join(texts.values()))) <= ratios


def test_result_is_smaller_and_integer(compressed):
    before, after = compressed["before"], compressed["after"]
    assert after["gflops"] / before["gflops"] == pytest.approx(0.5, rel=0.03)
    assert after["params"] < 0.6 * before["params"]
    assert after["size_mb"] < 0.2 * before["size_mb"]
    planned = next(c for c in compressed["checks"] if c["name"] == "INT8 convolutions as planned")
    assert planned["passed"] and planned["value"] == after["int8_convs"] > 40


def test_fp32_onnx_is_the_float_model(compressed):
    checks = {c["name"]: c for c in compressed["checks"]}
    fp32 = [c for name, c in checks.items() if name.startswith("ONNX against PyTorch")]
    assert len(fp32) == 5 and all(c["passed"] for c in fp32)


def test_torch_simulation_and_int8_are_one_model(folder, compressed):
    checks = {c["name"]: c for c in compressed["checks"]}
    parity = [c for name, c in checks.items() if "simulation" in name]
    assert len(parity) == 4 and all(c["passed"] for c in parity), parity
    stage = "qat" if json.loads((folder / "qat" / "stage.json").read_text())["better"] else "ptq"
    quant = json.loads((folder / stage / "quant.json").read_text())
    record = json.loads((folder / stage / "stage.json").read_text())
    assert len([s for s in quant["state"].values() if "weight" in s]) == record["planned"]
    assert record["calibration"]["images"] == 32 and 0 <= record["f1"]["int8"]["f1_conf"] <= 1
    rows = json.loads((folder / "latency" / "stage.json").read_text())["rows"]
    threads = {r["name"].partition(", ")[2] for r in rows}
    assert threads == ({"", f"{os.cpu_count()} threads"} if os.cpu_count() > 1 else {""})


def test_delivered_files_work_with_plain_ultralytics(folder, data):
    image = next((data.parent / "images" / "val").iterdir())
    for file in ("weights/best.pt", "onnx/fp32.onnx", "onnx/int8.onnx"):
        result = YOLO(str(folder / file), task="detect").predict(str(image), imgsz=64, device="cpu", verbose=False)
        assert result[0].boxes is not None
    model, ckpt = load_model(folder / "weights" / "best.pt")
    assert not [m for m in model.modules() if type(m).__module__.startswith("yolo_ext")]
    assert ckpt["yolo_ext"]["prune"]["kept"] == manifest(model).prune["kept"]


def test_models_are_read_once_and_handed_on(folder, base, compressed, loaded):
    """Teachers and the latency in PyTorch come on top, which read the files for themselves."""
    assert loaded.count(str(base)) <= 7 and len(loaded) <= 12
    for stage in ("prune/weights/pruned.pt", "finetune/weights/best.pt", "qat/weights/best.pt"):
        assert loaded.count(str(folder / stage)) <= 2, stage


def test_losses_of_the_teacher_are_logged(folder):
    header = (folder / "finetune" / "results.csv").read_text().splitlines()[0]
    assert {"train/kd_cls_loss", "train/kd_box_loss", "train/kd_feat_loss"} <= {h.strip() for h in header.split(",")}


def test_report_names_the_float_convolutions_with_reasons(folder):
    report = json.loads((folder / "report.json").read_text())
    kept = report["quantization"]["float"]
    assert len(kept) == report["quantization"]["convs"] - report["quantization"]["int8_convs"]
    assert all(kept.values())


def test_finished_run_is_not_repeated_on_resume(folder, base, data, monkeypatch, compressed):
    def refuse(run):
        raise AssertionError("a stage was repeated")

    monkeypatch.setattr(stages, "STAGES", [replace(stage, work=refuse) for stage in stages.STAGES])
    options = YAML.load(folder / "compress.yaml")
    model, yaml = options.pop("model"), options.pop("data")
    again = compress(model, yaml, resume=True, save_dir=str(folder), **options)
    assert again["after"] == compressed["after"]


def test_run_of_another_version_is_gone_on_with(folder, tmp_path, compressed):
    shutil.copytree(folder, tmp_path / "run")
    options = YAML.load(folder / "compress.yaml")
    told = {**options, "quant": {**options["quant"], "gone": True}, "prune": {"speedup": 2.0}}
    YAML.save(tmp_path / "run" / "compress.yaml", told)
    file = tmp_path / "run" / "ptq" / "stage.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gone": 1}))
    model, data = options.pop("model"), options.pop("data")
    again = compress(model, data, resume=True, save_dir=str(tmp_path / "run"), **options)
    assert again["after"] == compressed["after"]


def test_record_keeps_what_a_stage_said_and_nothing_else(tmp_path):
    told = {"metrics": {"map": 0.5, "latency_ms": None}, "weights": "a/best.pt", "notes": [], "better": False}
    Record(**told).write(tmp_path / "stage.json")
    assert json.loads((tmp_path / "stage.json").read_text()) == told
    read = asdict(Record.read(tmp_path / "stage.json"))
    assert {k: v for k, v in read.items() if v is not None} == told


def test_stage_that_failed_is_the_only_one_done_again(base, data, tmp_path, monkeypatch):
    def fail(run):
        raise RuntimeError("power cut")

    options = {"epochs": 1, "prune": {"speedup": 1.5}, "save_dir": str(tmp_path / "run"), "imgsz": 64, "plots": False}
    options |= {"batch": 8, "device": "cpu"}
    with monkeypatch.context() as m:
        broken = [replace(stage, work=fail) if stage.name == "finetune" else stage for stage in stages.STAGES]
        m.setattr(stages, "STAGES", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            compress(base, data, **options)
    stamp = (tmp_path / "run" / "prune" / "stage.json").stat().st_mtime_ns
    summary = compress(base, data, resume=True, **options)
    assert (tmp_path / "run" / "prune" / "stage.json").stat().st_mtime_ns == stamp
    assert summary["stages"]["finetune"]["map"] is not None


def test_other_options_in_the_same_folder_are_refused(folder, base, data):
    with pytest.raises(UsageError, match=r"prune.* changed"):
        compress(base, data, resume=True, save_dir=str(folder), epochs=2, prune={"speedup": 3.0}, imgsz=64)


def test_pruning_alone_needs_no_data(base, tmp_path):
    summary = compress(base, epochs=0, imgsz=64, prune={"ratio": 0.3}, save_dir=str(tmp_path / "run"))
    assert summary["after"]["params"] < summary["before"]["params"]
    assert summary["after"]["map"] is None
    for side in ("before", "after"):
        assert summary[side]["latency_ms"]["ort"] > 0 and summary[side]["latency_ms"]["torch"] is None
    assert not (tmp_path / "run" / "compare").exists()  # prune.compare=True only
    assert YOLO(str(tmp_path / "run" / "weights" / "best.pt")).model is not None


def test_random_weights_are_pruned_from_yaml(tmp_path):
    summary = compress("yolov8n.yaml", epochs=0, imgsz=64, prune={"speedup": 2.0}, save_dir=str(tmp_path / "run"))
    assert summary["after"]["gflops"] / summary["before"]["gflops"] == pytest.approx(0.5, rel=0.03)
    assert summary["before"]["size_mb"] is None


def test_quantization_alone_keeps_the_weights(base, data, tmp_path):
    summary = compress(base, data, epochs=0, quant={"mode": "ptq", "calib": 32, "max_drop": 1.0}, imgsz=64,
                       save_dir=str(tmp_path / "run"))  # fmt: skip
    assert summary["after"]["params"] == summary["before"]["params"]
    assert summary["after"]["map"] == pytest.approx(summary["before"]["map"], abs=1e-6)
    assert not (tmp_path / "run" / "weights").exists()  # nothing new to deliver but the ONNX files


def test_input_is_checked_before_anything_is_written(base, data, tmp_path):
    place = {"save_dir": str(tmp_path / "run")}
    with pytest.raises(UsageError, match="cannot be reached"):
        compress(base, data, prune={"speedup": 500.0}, **place)
    with pytest.raises(UsageError, match="multiple of 32"):
        compress(base, data, prune={"speedup": 2.0}, imgsz=100, **place)
    with pytest.raises(UsageError, match="data"):
        compress(base, quant={}, **place)
    assert not (tmp_path / "run").exists()


def test_source_model_and_data_are_untouched(base, data, compressed):
    assert torch.load(base, weights_only=False).get("yolo_ext") is None
    assert not [p for p in data.parent.rglob("*") if p.suffix in {".onnx", ".pt"}]


def test_a_folder_that_may_be_written_again_starts_over(base, tmp_path):
    place = {"save_dir": str(tmp_path / "run"), "exist_ok": True, "epochs": 0, "imgsz": 64}
    first = compress(base, prune={"ratio": 0.1}, **place)
    second = compress(base, prune={"ratio": 0.4}, **place)
    assert second["after"]["params"] < first["after"]["params"]
