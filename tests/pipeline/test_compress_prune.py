# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning inside `compress`: measured targets, while training, masks with INT8, comparison, runs that were killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yolo_ext.checkpoint import manifest
from yolo_ext.pipeline import compress
from yolo_ext.pruning.masks import sparsity
from yolo_ext.stock.load import load_model
from yolo_ext.training.trainer import CompressionMixin

pytestmark = pytest.mark.slow  # whole runs of `compress`

SMALL: dict[str, Any] = {"imgsz": 64, "batch": 16, "nbs": 16, "device": "cpu", "workers": 0, "plots": False}
FEW = {"images": 16, "recalibrate": 16}
INT8 = {"mode": "ptq", "calib": 16, "max_drop": 1.0}


def record(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / stage / "stage.json").read_text())


# Targets -------------------------------------------------------------------------------------------------------------
def test_max_drop_holds_against_the_base_as_it_is(base, data, tmp_path):
    folder = tmp_path / "run"
    options = {"max_drop": 0.01, **FEW, "recalibrate": 0}  # of about 0.03
    summary = compress(base, data, epochs=0, prune=options, save_dir=str(folder), **SMALL)
    lost = summary["before"]["map"] - summary["after"]["map"]
    assert lost <= 0.01 + 1e-6
    (check,) = [c for c in summary["checks"] if "prune.max_drop" in c["name"]]
    assert check["passed"] and check["value"] == pytest.approx(lost) and check["limit"] == 0.01
    assert any(r["after"] < r["before"] for r in record(folder, "prune")["layers"])


def test_a_drop_beside_another_target_is_checked(base, data, tmp_path):
    options = {"speedup": 2.0, "max_drop": 0.001, **FEW}
    summary = compress(base, data, epochs=0, prune=options, max_drop=0.9, save_dir=str(tmp_path / "run"), **SMALL)
    assert summary["before"]["gflops"] / summary["after"]["gflops"] == pytest.approx(2.0, rel=0.02)
    lost = summary["before"]["map"] - summary["after"]["map"]
    assert [c["passed"] for c in summary["checks"] if "max_drop" in c["name"]] == [True, lost <= 0.001]
    assert summary["passed"] is (lost <= 0.001) and "Nothing was fine-tuned." in summary["headline"]
    assert f"fell by {lost:.3f}"[:-1] in summary["headline"] and "epochs=30" in summary["headline"]


@pytest.mark.parametrize("runtime", ["ort", "torch"])
def test_latency_target_is_met_or_the_user_is_told(base, tmp_path, caplog, runtime):
    folder = tmp_path / "run"
    summary = compress(base, epochs=0, imgsz=64, prune={"latency": 1.3, "runtime": runtime}, save_dir=str(folder))
    trials = [float(line.split("latency ")[1].split()[0]) for line in caplog.text.splitlines() if "trial" in line]
    assert min(abs(t / 1.3 - 1) for t in trials) <= 0.05 or "instead of 1.3: the measurements spread" in caplog.text
    assert summary["after"]["gflops"] < summary["before"]["gflops"]


# While training ------------------------------------------------------------------------------------------------------
LATER = {"epochs": 3, "prune": {"speedup": 1.5, "steps": 2, "every": 1, **FEW}}


@pytest.fixture(scope="module")
def later(base, data, tmp_path_factory) -> dict[str, Any]:
    """Return a run that prunes before its first two epochs and was not killed."""
    return compress(base, data, save_dir=str(tmp_path_factory.mktemp("later") / "run"), **LATER, **SMALL)


def test_pruning_while_fine_tuning_has_no_stage_of_its_own(later):
    folder = Path(later["run_dir"])
    assert list(later["stages"]) == ["base", "finetune"] and not (folder / "prune").exists()
    assert later["before"]["gflops"] / later["after"]["gflops"] == pytest.approx(1.5, rel=0.02)
    found = record(folder, "finetune")
    assert any(r["after"] < r["before"] for r in found["layers"])
    gate = next(c for c in later["checks"] if c["name"] == "Pruned model equals the masked dense one")
    assert gate["passed"] and gate["value"] <= gate["limit"] == 1e-9
    plan = json.loads((folder / "finetune" / "plan.json").read_text())
    assert [s["epoch"] for s in plan["steps"]] == [0, 1] and plan["kept"]
    report = json.loads((folder / "report.json").read_text())
    assert report["layers"] == found["layers"] and gate in report["checks"]


@pytest.mark.parametrize(
    "after",
    [pytest.param(1, id="between the steps"), pytest.param(2, id="after the last step")],
)
def test_a_run_killed_while_pruning_ends_with_the_same_weights(base, data, tmp_path, monkeypatch, later, after):
    options = {**LATER, **SMALL, "save_dir": str(tmp_path / "run")}
    save = CompressionMixin.save_model
    saved = []

    def killed(self):
        done = save(self)
        saved.append(self.epoch)
        if self.epoch + 1 == after and saved.count(self.epoch) == 1:
            raise RuntimeError("power cut")
        return done

    with monkeypatch.context() as m:
        m.setattr(CompressionMixin, "save_model", killed)
        with pytest.raises(RuntimeError, match="power cut"):
            compress(base, data, **options)
    assert not (tmp_path / "run" / "finetune" / "stage.json").exists()
    again = compress(base, data, resume=True, **options)
    one, other = (load_model(Path(r["run_dir"]) / "weights" / "best.pt")[0] for r in (later, again))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert manifest(one).prune["kept"] == manifest(other).prune["kept"]


# Masks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prune", "share"),
    [
        pytest.param({"kind": "unstructured", "ratio": 0.6}, 0.6, id="60 %"),
        pytest.param({"kind": "2:4", "recalibrate": 16}, 0.5, id="2:4"),
    ],
)
def test_masks_go_through_fine_tuning_into_int8(base, data, tmp_path, prune, share):
    folder = tmp_path / "run"
    summary = compress(base, data, epochs=1, prune=prune, quant=INT8, save_dir=str(folder), **SMALL)
    assert list(summary["stages"]) == ["base", "prune", "finetune", "ptq"]
    assert sparsity(load_model(folder / "weights" / "best.pt")[0])["masked"] == pytest.approx(share, abs=0.002)
    assert summary["after"]["int8_convs"] > 40 and summary["after"]["params"] == summary["before"]["params"]
    assert zeros(folder / "onnx" / "int8.onnx") > 0.9 * share
    assert not (folder / "compare").exists() and (folder / "prune" / "masks.json").exists()


def zeros(file: Path) -> float:
    """Return the share of zeros in the large INT8 weights of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    made = [numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    large = [w for w in made if w.size > 1000]
    assert large
    return sum((w == 0).sum() for w in large) / sum(w.size for w in large)


def test_masks_hold_through_qat(base, data, tmp_path):
    quant = {**INT8, "mode": "qat", "epochs": 1}
    prune = {"kind": "2:4", "recalibrate": 16}
    compress(base, data, epochs=1, prune=prune, quant=quant, save_dir=str(tmp_path / "run"), **SMALL)
    model = load_model(tmp_path / "run" / "qat" / "weights" / "best.pt")[0]
    assert sparsity(model)["masked"] == pytest.approx(0.5, abs=0.002)


def test_masks_that_grow_while_training(base, data, tmp_path):
    prune = {"kind": "unstructured", "ratio": 0.8, "every": 1, "end": 1}
    summary = compress(base, data, epochs=2, prune=prune, save_dir=str(tmp_path / "run"), **SMALL)
    assert list(summary["stages"]) == ["base", "finetune"]
    model = load_model(tmp_path / "run" / "weights" / "best.pt")[0]
    assert sparsity(model)["masked"] == pytest.approx(0.8, abs=0.002)
    assert (tmp_path / "run" / "finetune" / "masks.json").exists()


# Comparison ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compared(base, data, tmp_path_factory) -> dict[str, Any]:
    """Return a run that was killed while the random baseline was trained, and then gone on with."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    options = {"epochs": 1, "prune": {"speedup": 1.5, "compare": True, **FEW}, "save_dir": str(folder), **SMALL}
    with pytest.MonkeyPatch.context() as m:

        def killed(*args, **kwargs):
            raise SystemExit("power cut")  # not an Exception: the comparison is an extra, whose errors are logged

        m.setattr("yolo_ext.pipeline.compare.export_onnx", killed)
        with pytest.raises(SystemExit, match="power cut"):
            compress(base, data, **options)
    stamp = (folder / "finetune" / "stage.json").stat().st_mtime_ns
    summary = compress(base, data, resume=True, **options)
    assert (folder / "finetune" / "stage.json").stat().st_mtime_ns == stamp
    return summary


def test_the_random_baseline_stands_beside_the_result(compared):
    folder = Path(compared["run_dir"])
    rows = {r["name"]: r for r in json.loads((folder / "report.json").read_text())["comparison"]}
    times = {r["name"]: r["median"] for r in record(folder, "latency")["rows"]}
    assert [r["ort"] for r in rows.values()] == [times[r["timed"]] for r in rows.values()], "each file is timed once"
    dense, pruned, random = rows.values()
    assert list(rows)[:2] == ["base", "pruned"] and "random" in random["name"]
    for row in (pruned, random):
        assert row["gflops"] / dense["gflops"] == pytest.approx(1 / 1.5, rel=0.02)
    assert all(0 <= r["map"] <= 1 for r in (dense, pruned, random)) and all(r["ort"] > 0 for r in rows.values())
    trained = load_model(folder / "compare" / "random" / "weights" / "best.pt")[0]
    assert manifest(trained).prune["config"]["method"] == "random"


def test_the_report_shows_the_comparison(compared):
    page = (Path(compared["run_dir"]) / "report.html").read_text()
    for row in record(Path(compared["run_dir"]), "compare")["rows"]:
        assert row["name"] in page and f"{row['params']:,}" in page
    for side in ("before", "after"):
        assert compared[side]["latency_ms"]["ort"] > 0
    assert compared["deploy"] == "weights/best.pt" and compared["headline"].partition(" ->")[0] in page
