# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A model whose masks or keypoints are broken while its boxes are as before fails the contract."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from yolo_ext import cli
from yolo_ext.checkpoint import save_model
from yolo_ext.deployment.export import export_onnx
from yolo_ext.pipeline import int8
from yolo_ext.stock.evidence import Evidence
from yolo_ext.stock.load import load_model

BRANCHES = {"segment": ("yolov8n", "mask"), "pose": ("yolo11n", "pose")}


def mix_channels(model: torch.nn.Module) -> torch.nn.Module:
    """Put the channels of masks or keypoints into another order, as a wrong cut would."""
    for branch in model.model[-1].cv4:
        for p in branch[-1].parameters():
            p.data = p.data.roll(2, 0)
    return model


def failed(file: Path) -> set[str]:
    return {c["name"] for c in json.loads(file.read_text())["checks"] if not c["passed"]}


@pytest.fixture(params=BRANCHES)
def pair(request, learned, tmp_path) -> tuple[Path, Path, Path, str]:
    """Return a trained model, one with a broken branch, their data, and the kind of the branch."""
    family, kind = BRANCHES[request.param]
    base, data = learned(request.param, family)
    model, _ = load_model(base)
    return base, save_model(mix_channels(model), tmp_path / "broken.pt"), data, kind


@pytest.mark.slow
def test_compare_names_the_broken_branch(pair, run, caplog):
    base, broken, data, kind = pair
    status, folder, said = run(f"compare model={base} other={broken} data={data} imgsz=64 resamples=200")
    assert status == 1, said
    found = {c["name"]: c for c in json.loads((folder / "compare.json").read_text())["changes"]}
    assert found["map"]["change"] == 0 and found["map"]["verdict"] == "same"
    assert found[f"map_{kind}"]["verdict"] == "worse" and found[f"map_{kind}"]["high"] < -0.02
    names = failed(folder / "compare.json")
    assert f"contract map_{kind}" in names and f"contract map_{kind}" in caplog.text
    assert all(name.startswith(f"contract map_{kind}") for name in names)


@pytest.mark.slow
def test_an_own_limit_on_the_branch_is_broken_by_its_damage_alone(pair, run):
    base, broken, data, kind = pair
    words = f"compare model={base} data={data} imgsz=64 resamples=50 contract.map=-0.01 contract.map_{kind}=-0.01"
    status, folder, _ = run(f"{words} other={broken}")
    assert status == 1 and failed(folder / "compare.json") == {f"contract map_{kind}"}
    assert run(f"{words} other={base}", "same")[0] == 0
    assert run(f"{words} other={broken} contract.map_{kind}=-1", "allowed")[0] == 0


@pytest.mark.slow
def test_bench_and_verify_name_the_broken_branch(pair, run):
    base, broken, data, kind = pair
    words = f"data={data} imgsz=64"
    status, folder, said = run(f"bench models={base},{broken} {words} rounds=3 memory=False")
    assert status == 1, said
    assert any(name.endswith(f"broken.pt: contract map_{kind}") for name in failed(folder / "bench.json"))
    onnx = export_onnx(load_model(broken)[0], broken.with_suffix(".onnx"), 64)
    status, folder, said = run(f"verify model={base} onnx={onnx} {words}", "verify")
    assert status == 1 and f"contract map_{kind}" in failed(folder / "verify.json"), said


@pytest.mark.slow
def test_a_stage_of_a_run_that_breaks_the_branch(pair, run, quick, monkeypatch):
    """Calibration leaves channels in another order, and the run ends with the broken contract."""
    base, _, data, kind = pair
    prepare = int8.prepare
    monkeypatch.setattr(int8, "prepare", lambda model, *rest: prepare(mix_channels(model), *rest))
    status, folder, said = run(f"quantize model={base} data={data} imgsz=64 quant.calib=8 quant.mixed=False device=cpu")
    assert status == 1, said
    names = failed(folder / "summary.json")
    assert f"contract map_{kind}" in names and "contract map" not in names
    assert f"{kind}" in json.loads((folder / "summary.json").read_text())["headline"].replace("keypoint", "pose")


@pytest.fixture(params=[kind for _, kind in BRANCHES.values()])
def kept(request, tmp_path) -> tuple[str, str]:
    """Return words that compare the evidence of a model with one whose branch hits nothing, and the branch."""
    kind, rng = request.param, np.random.default_rng(0)
    image, cls = np.repeat(np.arange(60, dtype=np.int32), 4), rng.integers(0, 2, 240, dtype=np.int32)
    area, conf = np.full(240, 5000, np.float32), rng.random(240).astype(np.float32)
    about = {"task": "segment" if kind == "mask" else "pose", "names": {0: "a", 1: "b"}, "images_hash": "i",
             "labels_hash": "l"}  # fmt: skip
    hits = {k: np.repeat(rng.random((240, 1)) < 0.9, 10, axis=1) for k in ("box", kind)}
    base = Evidence(about, [f"{i}.jpg" for i in range(60)], image, cls, conf, area, image, cls, area, hits)
    (tmp_path / "base.npz").write_bytes(base.data())
    of_b = hits[kind] & (cls == 0)[:, None]
    (tmp_path / "new.npz").write_bytes(replace(base, hits={**hits, kind: of_b}).data())
    return f"compare model={tmp_path}/base.npz other={tmp_path}/new.npz save_dir={tmp_path}/run resamples=50", kind


def test_a_branch_broken_for_one_class_is_named_with_the_class(kept, tmp_path):
    words, kind = kept
    assert cli.main(words.split()) == 1
    assert failed(tmp_path / "run" / "compare.json") == {f"contract map_{kind}", f"contract map_{kind}.b"}
