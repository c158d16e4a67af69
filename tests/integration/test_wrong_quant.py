# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Wrong input to quantization: one message that says what to do, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ultralytics.utils import SETTINGS, YAML, torch_utils

from yolo_ext import cli
from yolo_ext.checkpoint import save_model
from yolo_ext.quantization.fake_quant import insert_fake_quant
from yolo_ext.quantization.spec import resolve_profile
from yolo_ext.stock.load import load_model

B = "model=tiny.pt data=shapes/data.yaml imgsz=64"
X = "export model=tiny.pt int8=True data=shapes/data.yaml imgsz=64"
L = "quant.config_list"
Q, T, S = f"quantize {B} quant.mode=ptq", f"train {B} epochs=1 device=cpu", f"sensitivity kind=quant {B}"


@pytest.fixture(scope="module")
def made(tiny, shapes, tmp_path_factory) -> Path:
    """Return a folder with models that cannot be quantized, data without what is needed, and lists of entries."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(tiny, folder / "tiny.pt")
    shutil.copytree(shapes.parent, folder / "shapes", ignore=shutil.ignore_patterns("*.cache"))
    data = {**YAML.load(shapes), "path": str(folder / "shapes")}
    for name, change in {
        "shapes/data.yaml": {},
        "notrain.yaml": {"train": None},
        "notrain_val.yaml": {"train": "images/val"},
    }.items():
        YAML.save(folder / name, {k: v for k, v in {**data, **change}.items() if v is not None})
    for name in ("void", "black"):
        (folder / name).mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / "black" / f"{i}.png"), np.zeros((64, 64, 3), np.uint8))
    _models(folder)
    (folder / "word.yaml").write_text("just words\n")
    (folder / "numbers.yaml").write_text("- 1\n- 2\n")
    (folder / "broken.yaml").write_text("- {op_types: [Conv2d\n")
    (folder / "bits.yaml").write_text("- {op_types: [Conv2d], quant_bits: 17}\n")
    return folder


def _models(folder: Path) -> None:
    (folder / "tiny_int8.onnx").write_bytes(b"an INT8 file is refused by its name already")
    model, ckpt = load_model(folder / "tiny.pt")
    modelopt = {
        "modelopt": {"modelopt_state_dict": []},
        "ranges": {"model.1.conv.input_quantizer._amax": torch.ones(())},
    }
    torch.save({**ckpt, "model": model.half(), "ema": None, "modelopt": modelopt}, folder / "modelopt.pt")
    model.float()
    with torch.no_grad():
        model.model[1].conv.weight[0, 0, 0, 0] = torch.inf
    save_model(model, folder / "inf.pt")
    model, ckpt = load_model(folder / "tiny.pt")
    insert_fake_quant(model, resolve_profile("ort-x86"))
    torch.save({**ckpt, "model": model}, folder / "fake.pt")


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """Work in a folder that links to what was made."""
    for item in made.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    monkeypatch.setattr("ultralytics.cfg.TESTS_RUNNING", False)  # it would send run folders elsewhere
    return tmp_path


CASES = {
    # images
    "no calibration images": (f"{Q} quant.source=void", ["void", "No calibration images", "jpg"]),
    "no calibration images for train": (f"{T} quant.mode=qat quant.source=void", ["void", "No calibration images"]),
    "no calibration images for sensitivity": (f"{S} quant.source=void", ["void", "No calibration images"]),
    "source gone": (f"{Q} quant.source=gone", ["Cannot find", "'gone'"]),
    "source gone for train": (f"{T} quant.mode=qat quant.source=gone", ["Cannot find", "'gone'"]),
    "fewer images than asked": (f"{Q} quant.calib=500", ["500", "has 8", "Ask for 8 or fewer"]),
    "black images": (f"{Q} quant.source=black", ["3 calibration images", "single value", "real"]),
    "black images for train": (f"{T} quant.mode=qat quant.source=black", ["single value"]),
    "black images for export": (f"{X} quant.source=black", ["single value"]),
    "no train split": (f"{Q} data=notrain.yaml", ["notrain.yaml", "train"]),
    "train is val": (f"{Q} data=notrain_val.yaml", ["validation images"]),
    # models
    "an INT8 file": (f"{Q} model=tiny_int8.onnx", ["tiny_int8.onnx", "written from"]),
    "an INT8 file in train": (f"{T} quant.mode=qat model=tiny_int8.onnx", ["tiny_int8.onnx", ".pt"]),
    "fake quantizers": (f"{Q} model=fake.pt", ["fake.pt", "layers.QuantConv2d"]),
    "fake quantizers in train": (f"{T} quant.mode=qat model=fake.pt", ["fake.pt", "layers.QuantConv2d"]),
    "Ultralytics' QAT": (f"{Q} model=modelopt.pt", ["modelopt.pt", "yolo-ext export"]),
    "Ultralytics' QAT in train": (f"{T} quant.mode=qat model=modelopt.pt", ["modelopt.pt", "yolo-ext export"]),
    "weights with infinity": (f"{Q} model=inf.pt", ["model.1.conv.weight", "infinite"]),
    "weights with infinity in train": (f"{T} quant.mode=qat model=inf.pt", ["model.1.conv.weight", "infinite"]),
    # layers
    "bits 1": (f"{Q} {L}=[{{'op_types':['Conv2d'],'quant_bits':1}}]", ["Entry 1", "quant_bits=1 is", "2 to 16"]),
    "bits 17 from a file": (f"{Q} {L}=bits.yaml", ["Entry 1", "17", "2 to 16"]),
    "bits a": (f"{Q} {L}=[{{'op_types':['Conv2d'],'quant_bits':'a'}}]", ["Entry 1", "'a'", "2 to 16"]),
    "name matches nothing": (f"{Q} {L}=[{{'op_names':['model.99'],'quant_bits':4}}]", ["Entry 1", "model.99'"]),
    "pattern matches nothing": (f"{T} quant.mode=qat {L}=[{{'op_names_re':['zz'],'quant_bits':4}}]", ["re:zz'"]),
    "pattern no expression": (f"{Q} quant.exclude=['(']", ["quant.exclude=('", "regular expression"]),
    "unknown key": (f"{Q} {L}=[{{'op_type':['Conv2d'],'quant_bits':4}}]", ["'op_type'", "'op_types'"]),
    "list gone": (f"{Q} {L}=gone.yaml", ["gone.yaml", "no file"]),
    "list of words": (f"{Q} {L}=word.yaml", ["word.yaml", "list of dicts"]),
    "list of numbers": (f"{Q} {L}=numbers.yaml", ["numbers.yaml", "list of dicts"]),
    "list broken": (f"{Q} {L}=broken.yaml", ["broken.yaml", "not valid YAML"]),
    "nothing left": (f"{Q} quant.exclude=['re:.']", ["nothing", "quant.exclude"]),
    "nothing left of a list": (f"{Q} {L}=[{{'op_types':['default'],'exclude':True}}]", ["nothing", "config_list"]),
    "nothing left in train": (f"{T} quant.mode=qat quant.exclude=['re:.']", ["nothing"]),
    # methods
    "profile": (f"{Q} quant.profile=ort-arm64", ["'ort-arm64'", "'ort-arm'"]),
    "profile for export": (f"{X} quant.profile=ort", ["'ort'", "auto"]),
    "profile for sensitivity": (f"{S} quant.profile=ort", ["'ort'", "auto"]),
    "observer": (f"{Q} quant.observer=msee", ["'msee'", "'mse'"]),
    "observer of an entry": (f"{Q} {L}=[{{'op_types':['Conv2d'],'observer':'maxmin'}}]", ["maxmin", "minmax"]),
    "weight observer": (f"{Q} quant.weight_observer=mse2", ["'mse2'", "'mse'"]),
    "mode": (f"{Q} quant.mode=qta", ["quant.mode=qta", "'qat'"]),
    "PTQ in train": (f"{T} quant.mode=ptq", ["quant.mode=ptq", "yolo-ext quantize", "qat"]),
    "labels that are not there": (f"{T} quant.mode=qat quant.supervision=features distill.alpha=1", ["alpha=1"]),
    "two quantizations": (f"{T} quant.mode=qat quantize=8", ["quantize=8", "leave quantize out"]),
    # export
    "INT8 without data": ("export model=tiny.pt int8=True", ["int8=True", "data=data.yaml"]),
    "INT8 and FP16": (f"export {B} int8=True half=True", ["half=True", "int8=True"]),
    "options of quantization for a float file": ("export model=tiny.pt quant.profile=openvino", ["int8=True"]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "fragments"), CASES.values(), ids=CASES)
def test_wrong_input_to_quantization(place, made, capsys, words, fragments):
    if "modelopt.pt" in words and not hasattr(torch_utils, "restore_qat"):
        pytest.skip("this Ultralytics has no QAT and loads such a file as the float model that it holds")
    before = set(place.rglob("*")), set(made.rglob("*"))
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("yolo-ext: ") and "Traceback" not in err
    missing = [f for f in fragments if f not in err]
    assert not missing, f"{missing} not in: {err}"
    assert len(err) < 700
    assert (set(place.rglob("*")), set(made.rglob("*"))) == before, "wrong input must not leave anything behind"
