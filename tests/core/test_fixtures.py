# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files that yolo_ext 0.1.0 wrote load today and give the same numbers; fixtures/v0_1/README.md says how they came."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO

import yolo_ext
from yolo_ext.checkpoint import MANIFEST, is_pruned, manifest
from yolo_ext.data.shapes import make_shapes
from yolo_ext.deployment.runtime import conv_report, predictor
from yolo_ext.distillation.teacher import kept_channels
from yolo_ext.pruning.masks import capture
from yolo_ext.quantization.fake_quant import get_state, insert_state
from yolo_ext.quantization.spec import convert, resolve_profile
from yolo_ext.stock.load import load_model

FILES = Path(__file__).parents[1] / "fixtures" / "v0_1"
EXPECTED = json.loads((FILES / "expected.json").read_text())
CHECKPOINTS = sorted(p.name for p in FILES.glob("*.pt"))
FIELDS = {
    "masked.pt": {"masks", "yaml"},
    "pruned.pt": {"prune", "yaml"},
    "pruned_qat.pt": {"prune", "yaml", "merged", "quant"},
    "qat.pt": {"merged", "yaml", "quant"},
    "sparse.pt": {"parent", "sparsity"},
}
RUN = {"imgsz": 64, "batch": 4, "nbs": 4, "device": "cpu", "workers": 0, "plots": False, "optimizer": "SGD",
       "lr0": 0.001, "warmup_epochs": 0.0, "seed": 3, "exist_ok": True, "val": False}  # fmt: skip
PLAIN = """
import sys
from ultralytics import YOLO
for file in sys.argv[1:]:
    assert YOLO(file).model.yolo_ext
print("yolo_ext" in sys.modules)
"""


def image() -> torch.Tensor:
    return torch.arange(3 * 32 * 32, dtype=torch.float32).mul(0.37).sin().mul(0.5).add(0.5).reshape(1, 3, 32, 32)


def close(found: list[Any], expected: list[list[float]], **tolerance: float) -> None:
    for y, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(y).ravel(), e, **tolerance)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return the set that the files were trained on."""
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=8, val=4, imgsz=64)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_manifest_is_read(name):
    model, ckpt = load_model(FILES / name)
    found = manifest(model)
    assert {k for k in getattr(model, MANIFEST) if getattr(found, k)} == FIELDS[name] and not found.other
    assert (found.schema, found.version) == (0, "") and getattr(model, MANIFEST) == ckpt[MANIFEST]
    assert is_pruned(model) == (name != "sparse.pt")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_same_outputs(name):
    close(predictor(load_model(FILES / name)[0])(image().numpy()), EXPECTED[name]["float"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_plain_ultralytics_loads_them_where_this_package_is_not_there(tmp_path):
    files = [str(FILES / name) for name in CHECKPOINTS]
    env = {**os.environ, "ULTRALYTICS_SAFE_LOAD": "1"}
    ran = subprocess.run([sys.executable, "-P", "-c", PLAIN, *files], capture_output=True, text=True, cwd=tmp_path,
                         env=env, timeout=120)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip().endswith("False")


@pytest.mark.parametrize("name", ["qat.pt", "pruned_qat.pt"])
def test_ranges_replay_and_convert(name):
    model = load_model(FILES / name)[0]
    record = manifest(model).quant
    source = resolve_profile(record["profile"])
    for target, state in EXPECTED[name]["converted"].items():
        assert json.loads(json.dumps(convert(record["state"], source, resolve_profile(target)))) == state
    insert_state(model, record["state"])
    with torch.no_grad():
        close([model.eval()(image())[0]], EXPECTED[name]["quantized"], rtol=1e-3, atol=5e-2)
    assert json.loads(json.dumps(get_state(model))) == json.loads(json.dumps(record["state"]))


def test_int8_file():
    big = nn.functional.interpolate(image(), 64).numpy()
    close(predictor(FILES / "int8.onnx", simulate=True)(big), EXPECTED["int8.onnx"], rtol=1e-3, atol=5e-2)
    assert conv_report(FILES / "int8.onnx")["int8_convs"] > 0


def test_masks_are_found():
    model = load_model(FILES / "masked.pt")[0]
    masks = capture(model)
    assert masks.kept.keys() == set(manifest(model).masks["layers"])
    zeros = sum(int((~k).sum()) for k in masks.kept.values()) / sum(k.numel() for k in masks.kept.values())
    assert zeros == pytest.approx(0.5, abs=0.01)


def test_a_pruned_model_knows_its_dense_self():
    model = load_model(FILES / "pruned.pt")[0]
    parent = manifest(model).prune["parent"]
    assert kept_channels(model, parent) is not None and kept_channels(model, "another") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_goes_on_with_the_same_widths(name, data, tmp_path):
    before = {n: p.shape for n, p in load_model(FILES / name)[0].named_parameters()}
    shutil.copy(FILES / name, tmp_path / name)
    YOLO(tmp_path / name).train(
        trainer=yolo_ext.DetectionTrainer, **{**RUN, "data": str(data), "epochs": 1, "save_dir": str(tmp_path / "run")}
    )
    after = load_model(tmp_path / "run" / "weights" / "last.pt")[0]
    assert {n: p.shape for n, p in after.named_parameters()} == before
    old, new = (manifest(m) for m in (load_model(FILES / name)[0], after))
    assert new.prune == old.prune and new.masks == old.masks and new.merged == old.merged


@pytest.mark.slow
def test_a_stopped_run_goes_on(data, tmp_path):
    """Ultralytics keeps absolute paths in a checkpoint, which have to be those of today here."""
    run = tmp_path / "stopped"
    shutil.copytree(FILES / "stopped", run)
    ckpt = torch.load(run / "weights" / "last.pt", weights_only=False)
    for args in (ckpt["train_args"], vars(ckpt["ema"].args)):
        args.update(data=str(data), save_dir=str(run), model=str(FILES / "pruned.pt"))
        args["distill"]["teacher"] = str(FILES / "pruned.pt")
    torch.save(ckpt, run / "weights" / "last.pt")
    yolo = YOLO(run / "weights" / "last.pt")
    yolo.train(trainer=yolo_ext.DetectionTrainer, resume=True)
    rows, expected = (list(csv.DictReader(p.open())) for p in (run / "results.csv", FILES / "resumed.csv"))
    assert [r["epoch"] for r in rows] == ["1", "2", "3"] and rows[0] == expected[0]
    for row, like in zip(rows, expected, strict=True):
        numbers = {k: float(v) for k, v in row.items() if k.startswith(("train/", "val/", "lr/"))}
        assert numbers == pytest.approx({k: float(like[k]) for k in numbers}, rel=5e-3, abs=1e-4)
    found = load_model(run / "weights" / "best.pt")[0]
    close(predictor(found)(image().numpy()), EXPECTED["pruned_qat.pt"]["float"], rtol=1e-2, atol=0.1)
