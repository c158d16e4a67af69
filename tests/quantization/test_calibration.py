# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv

from yolo_ext.data.calibration import calibration_images, letterbox_batches, list_hash
from yolo_ext.errors import UsageError
from yolo_ext.quantization.calibration import calibrate
from yolo_ext.quantization.fake_quant import get_ranges, insert_fake_quant, set_mode
from yolo_ext.quantization.observers import observers
from yolo_ext.quantization.profiles import PROFILES

PROFILE = dataclasses.replace(PROFILES["ort-x86-vnni"], float_stem=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            cv2.imwrite(str(tmp_path / split / f"{i}.png"), rng.integers(0, 256, (30, 60, 3), np.uint8))
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    (tmp_path / "list.txt").write_text("./train/0.png\n./train/3.png\n")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda f: {"train": str(f / "train"), "val": str(f / "val")}, 6),
        (lambda f: {"train": [str(f / "train"), str(f / "list.txt")]}, 6),
        (lambda f: f / "train", 6),
        (lambda f: f"{f}/train/[0-2].png", 3),
        (lambda f: str(f / "list.txt"), 2),
        (lambda f: [f / "train" / "1.png", f / "val"], 4),
    ],
    ids=["dict", "dict of lists", "folder", "glob", "txt", "list"],
)
def test_sources(folder, make, count):
    files = calibration_images(make(folder), 100)
    assert len(files) == count and files == sorted(files) and all(p.is_file() for p in files)


def test_choice_depends_on_the_seed_only(folder):
    a, b = (calibration_images(folder / "train", 3, seed=s) for s in (0, 0))
    assert a == b and len(a) == 3
    assert any(calibration_images(folder / "train", 3, seed=s) != a for s in range(1, 6))


def test_val_images_are_never_used(folder):
    data = {"train": [str(folder / "train"), str(folder / "val")], "val": str(folder / "val")}
    assert {p.parent.name for p in calibration_images(data, 100)} == {"train"}
    with pytest.raises(UsageError, match="validation images"):
        calibration_images({"train": str(folder / "val"), "val": str(folder / "val")}, 2)


@pytest.mark.parametrize(
    ("data", "n", "message"),
    [
        ("/nowhere", 5, "Cannot find"),
        ({"val": "x"}, 5, "no train split"),
        ([], 5, "no train split"),
        (".", 0, "at least 1"),
    ],
    ids=["missing", "no train", "empty", "count"],
)
def test_bad_sources(data, n, message):
    with pytest.raises(UsageError, match=message):
        calibration_images(data, n)


def test_letterbox_is_that_of_deployment(folder):
    image = np.zeros((30, 60, 3), np.uint8)
    image[..., 2] = 255  # BGR: red
    path = folder / "red.png"
    cv2.imwrite(str(path), image)
    (batch,) = letterbox_batches([path], 64)
    assert batch.shape == (1, 3, 64, 64) and batch.dtype == torch.float32
    assert batch[0, :, 32, 32].tolist() == [1, 0, 0]
    assert batch[0, :, 0, 0].tolist() == pytest.approx([114 / 255] * 3)


def test_unreadable_images_are_skipped(folder):
    bad = folder / "bad.jpg"
    bad.write_bytes(b"no image")
    files = sorted((folder / "train").glob("*.png"))
    assert [len(b) for b in letterbox_batches([bad, *files], 32, batch=4)] == [4, 2]
    with pytest.raises(UsageError, match="can be read"):
        list(letterbox_batches([bad], 32))


@pytest.mark.parametrize("observer", observers.names())
def test_calibrate_sets_ranges_and_restores_modes(build, images, observer):
    net = build("yolov8n.yaml").train()
    net.model[3].eval()
    insert_fake_quant(net, PROFILE)
    ranges = calibrate(net, [images[:2], images[2:]], observer)
    assert ranges == get_ranges(net) and len(ranges) == 57
    assert ranges["model.0.conv"]["input"] == [0.0, 1.0]
    assert all(lo <= 0 <= hi and hi > lo for r in ranges.values() for lo, hi in r.values())
    assert all(r["output"][0] >= -6 for r in ranges.values())
    assert net.training and net.model[2].training and not net.model[3].training
    assert all(q.histogram is None for q in net.modules() if hasattr(q, "histogram"))


def test_better_calibration_means_less_error(build, images):
    def error(observer: str) -> float:
        net = build("yolov8n.yaml")
        insert_fake_quant(net, PROFILE)
        calibrate(net, [images], observer)
        with torch.no_grad():
            quantized = net.model[:4](images)
            set_mode(net, "float")
            return float((quantized - net.model[:4](images)).square().mean())

    assert error("mse") <= error("minmax") * 1.02


@pytest.mark.parametrize(
    ("net", "batches", "observer", "message"),
    [
        (nn.Sequential(Conv(3, 4)), [torch.rand(1, 3, 8, 8)], "mse", "no fake quantizers"),
        (None, [], "mse", "no images"),
        (None, [], "mes", "Did you mean 'mse'"),
    ],
    ids=["not inserted", "no batches", "observer"],
)
def test_usage_errors(net, batches, observer, message):
    if net is None:
        net = nn.Sequential(Conv(3, 4))
        insert_fake_quant(net, PROFILE)
    with pytest.raises(UsageError, match=message):
        calibrate(net, batches, observer)


def test_list_hash_follows_content(folder):
    files = sorted((folder / "train").glob("*.png"))
    before = list_hash(files)
    assert before == list_hash(files) != list_hash(files[1:])
    files[0].write_bytes(b"changed")
    assert list_hash(files) != before
