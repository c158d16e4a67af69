# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization through the command line: sensitivity, mixed precision, proof, strict, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolo_ext.pipeline import int8
from yolo_ext.pipeline import run as of_runs

D = "data=shapes/data.yaml imgsz=64"
Q = "quant.calib=8"
SENSITIVITY = f"sensitivity kind=quant model=tiny.pt {D} {Q} images=8"
QUANTIZE = f"quantize model=tiny.pt {D} {Q} quant.mode=ptq quant.profile=ort-x86"


def losing(monkeypatch, loss):
    """Make INT8 files lose as much mAP as a function of the number of layers in them says."""
    import onnx

    measured = of_runs.accuracy

    def measure(model, *args, **options):
        graph = onnx.load(model).graph.node if isinstance(model, Path) else ()
        nodes = [n for n in graph if n.op_type == "DequantizeLinear" and "weight" in n.name]
        found = measured(model, *args, **options)
        return {**found, "map": found["map"] - (loss(len(nodes)) if nodes else 0.0)}

    monkeypatch.setattr(of_runs, "accuracy", measure)
    return measure


# Sensitivity ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("by", ["layer", "block"])
def test_sensitivity_ranks_layers_with_errors_and_times(run, by):
    status, folder, _ = run(f"{SENSITIVITY} by={by}")
    assert status == 0
    found = json.loads((folder / "quant_sensitivity.json").read_text())
    assert found["by"] == by and found["images"] == 8 and found["profile"].startswith("ort")
    assert len(found["groups"]) > 8 and all("ms" in g and "error_per_ms" in g for g in found["groups"])
    assert (folder / "quant_sensitivity.csv").read_text().startswith("name,layers,error,box_mean")
    assert (folder / "quant_sensitivity.png").exists()


@pytest.mark.slow
def test_sensitivity_in_map_and_for_another_runtime(run):
    status, folder, _ = run(f"{SENSITIVITY} by=block map=True quant.profile=tensorrt")
    found = json.loads((folder / "quant_sensitivity.json").read_text())
    assert status == 0 and found["base"]["map"] is not None
    assert all("map_drop" in g and "ms" not in g for g in found["groups"])


# Quantize ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_record_and_report_hold_the_proof(run, place, quick):
    status, folder, _ = run(f"{QUANTIZE} quant.max_drop=1.0")
    assert status == 0
    record = json.loads((folder / "ptq" / "stage.json").read_text())
    assert record["calibration"]["images"] == 8 and len(record["calibration"]["hash"]) == 16
    assert record["accidents"] == {} and record["planned"] == record["metrics"]["int8_convs"] > 8
    assert set(record["f1"]["int8"]) == {"f1", "f1_conf"}
    quant = json.loads((folder / "ptq" / "quant.json").read_text())
    assert quant["profile"] == "ort-x86" and set(quant["state"]) & set(quant["float"]) == set()
    assert all(quant["float"].values())
    checks = json.loads((folder / "verify" / "verify.json").read_text())["checks"]
    assert len([c for c in checks if "simulation" in c["name"]]) == 4
    report = json.loads((folder / "report.json").read_text())
    assert set(report["quantization"]["parity"]) == {"torch", "rounding", "simulation", "float"}
    page = (folder / "report.html").read_text()
    assert all(text in page for text in ("8 images of 64 px", "Fake-quantized PyTorch", "Best F1 at confidence"))
    names = [r["name"] for r in report["latency"]["rows"]]
    assert {"base FP32", "compressed INT8"} <= set(names)
    assert not (folder / "weights").exists() and (folder / "ptq" / "weights" / "ptq.pt").exists()


@pytest.mark.slow
def test_adaround_delivers_the_weights_that_it_changed(run, quick):
    from yolo_ext.checkpoint import manifest
    from yolo_ext.stock.load import load_model

    status, folder, _ = run(f"{QUANTIZE} quant.max_drop=1.0 quant.adaround=5")
    assert status == 0
    delivered = load_model(folder / "weights" / "best.pt")[0]
    assert manifest(delivered).quant["state"]
    base = load_model("tiny.pt")[0].state_dict()
    assert any(not v.float().equal(base[k].float()) for k, v in delivered.state_dict().items())
    checks = {c["name"]: c for c in json.loads((folder / "verify" / "verify.json").read_text())["checks"]}
    assert all(c["passed"] for name, c in checks.items() if name.startswith("FP32 ONNX"))


@pytest.mark.slow
def test_fewest_layers_stay_float_when_ptq_misses_the_budget(run, quick, monkeypatch):
    losing(monkeypatch, lambda layers: 0.02 if layers > 14 else 0.001)
    status, folder, _ = run(f"{QUANTIZE} quant.max_drop=0.01")
    found = json.loads((folder / "ptq" / "mixed.json").read_text())
    record = json.loads((folder / "ptq" / "stage.json").read_text())
    entries = json.loads((folder / "ptq" / "config_list.json").read_text())
    quant = json.loads((folder / "ptq" / "quant.json").read_text())
    assert status == 0 and found["drop"] == pytest.approx(0.001)
    assert entries == [{"op_names": found["excluded"], "exclude": True}]
    assert len(quant["state"]) == 14 and not set(found["excluded"]) & set(quant["state"])
    assert all("quant.max_drop" in quant["float"][p] and "quant.max_drop" in record["float"][p]
               for p in found["excluded"])  # fmt: skip
    assert record["metrics"]["map_onnx"]["int8"] == pytest.approx(-0.001)
    assert any("stay float" in n for n in record["notes"])
    assert {c["float"] for c in found["trace"]} >= {0, len(found["excluded"]), len(found["excluded"]) - 1}


@pytest.mark.slow
def test_a_config_list_leaves_the_same_layers_float(run, quick, place):
    Path("list.yaml").write_text("- {op_names: [model.2.cv1, model.4.cv1.conv], exclude: true}\n")
    status, folder, _ = run(f"{QUANTIZE} quant.max_drop=1.0 quant.config_list=list.yaml")
    quant = json.loads((folder / "ptq" / "quant.json").read_text())
    assert status == 0 and not {"model.2.cv1.conv", "model.4.cv1.conv"} & set(quant["state"])
    assert "config_list" in quant["float"]["model.2.cv1.conv"]


@pytest.mark.slow
def test_strict_fails_when_map_collapses(run, quick, monkeypatch):
    losing(monkeypatch, lambda layers: 0.2)
    status, folder, err = run(f"{QUANTIZE} quant.max_drop=0.01 quant.mixed=False quant.strict=True")
    assert status == 1 and "INT8 loses 0.2000 mAP50-95 (limit 0.05)" in err and not (folder / "report.html").exists()


@pytest.mark.slow
def test_without_strict_a_collapse_is_a_warning_and_the_budget_fails(run, quick, monkeypatch):
    losing(monkeypatch, lambda layers: 0.2)
    status, folder, _ = run(f"{QUANTIZE} quant.max_drop=0.01 quant.mixed=False")
    record = json.loads((folder / "ptq" / "stage.json").read_text())
    assert status == 1 and any("INT8 loses 0.2" in n for n in record["notes"]) and (folder / "report.html").exists()
    assert "(quant.max_drop) 0.2 (limit 0.01)" in (folder / "compress.log").read_text()
    assert not (folder / "ptq" / "mixed.json").exists()


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["strict", "lax"])
def test_a_convolution_that_is_float_by_accident_is_named(run, quick, monkeypatch, strict):
    report = int8.conv_report

    def spoiled(path):
        found = report(path)
        if not found["int8_convs"]:
            return found
        return {**found, "int8_convs": found["int8_convs"] - 1,
                "float_convs": {**found["float_convs"], "/model.2/cv1/conv/Conv": "no Q on the output"}}  # fmt: skip

    monkeypatch.setattr(int8, "conv_report", spoiled)
    status, folder, err = run(f"{QUANTIZE} quant.max_drop=1.0 quant.strict={strict}")
    assert status == 1
    if strict:
        assert "'model.2.cv1.conv': no Q on the output" in err and not (folder / "report.html").exists()
    else:
        assert int8.PLANNED in json.loads((folder / "summary.json").read_text())["headline"]
        assert json.loads((folder / "ptq" / "stage.json").read_text())["accidents"]


@pytest.mark.parametrize(
    "profile",
    [pytest.param(p, marks=pytest.mark.slow) for p in ("ort-x86-full", "ort-arm", "openvino", "tensorrt")],
)
def test_other_profiles_go_through(run, quick, profile):
    status, folder, err = run(f"{QUANTIZE} quant.max_drop=1.0".replace("ort-x86", profile))
    record = json.loads((folder / "ptq" / "stage.json").read_text())
    assert record["profile"] == profile
    assert bool(record.get("planned")) == profile.startswith("ort")  # elsewhere the other runtime alone can count
    assert status == 0 or profile == "ort-arm", err  # x86 has no integer kernels for signed activations


# Wrong input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "texts"),
    [
        pytest.param(f"sensitivity kind=both model=tiny.pt {D}", ["kind=both", "prune, quant"], id="kind"),
        pytest.param(f"{SENSITIVITY} by=neck", ["by=neck", "layer, block"], id="by"),
        pytest.param(f"{SENSITIVITY} ratios=0.5", ["ratios", "kind=quant"], id="ratios"),
        pytest.param(f"sensitivity model=tiny.pt {D} quant.calib=8", ["'quant'", "kind=prune"], id="quant for prune"),
        pytest.param(f"{SENSITIVITY} quant.profile=tpu", ["tpu", "ort-x86"], id="profile"),
        pytest.param(f"{SENSITIVITY} quant.exclude=zzz", ["zzz"], id="exclude"),
        pytest.param(SENSITIVITY.replace("images=8", "images=0"), ["images=0"], id="images"),
        pytest.param(SENSITIVITY.replace("tiny.pt", "gone.pt"), ["gone.pt"], id="model"),
        pytest.param(SENSITIVITY.replace("imgsz=64", "imgsz=65"), ["imgsz=65"], id="imgsz"),
    ],
)
def test_wrong_input(run, words, texts):
    status, folder, err = run(words)
    assert status == 2 and all(t in err for t in texts), err
    assert len(err.strip().splitlines()) <= 3 and not folder.exists()
