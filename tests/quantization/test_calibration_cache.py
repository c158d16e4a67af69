# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.utils import USER_CONFIG_DIR

from yolo_ext.core.config import QuantConfig
from yolo_ext.quantization import cache
from yolo_ext.quantization.fake_quant import insert_plan
from yolo_ext.quantization.spec import Spec

STATE = {"0.conv": {"input": {**Spec().as_dict(), "lo": -0.1, "hi": 0.3}}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "made" / "calibration")
    return tmp_path / "made" / "calibration"


@pytest.fixture
def images(tmp_path) -> list[Path]:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for f in files:
        f.write_bytes(f.name.encode())
    return files


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Conv(3, 4), Conv(4, 4)).eval()


def plan(bits: int = 8, observer: str | None = None) -> dict:
    return {"0.conv": {"input": Spec(bits, observer=observer), "weight": Spec(7, True, True)}}


def test_it_is_in_the_user_folder(monkeypatch):
    monkeypatch.undo()
    assert Path(USER_CONFIG_DIR) / "yolo_ext" / "calibration" == cache.FOLDER


def test_what_was_remembered_comes_back_exactly(images):
    key = cache.key(net(), plan(), images, 64, QuantConfig())
    assert cache.cached(key) is None
    cache.remember(key, STATE)
    assert cache.cached(key) == STATE
    assert cache.key(net(), plan(), images, 64, QuantConfig()) == key


@pytest.mark.parametrize(
    "other",
    [
        lambda i: (net(1), plan(), i, 64, QuantConfig()),
        lambda i: (net(), plan(7), i, 64, QuantConfig()),
        lambda i: (net(), plan(observer="minmax"), i, 64, QuantConfig()),
        lambda i: (net(), plan(), i[:1], 64, QuantConfig()),
        lambda i: (net(), plan(), i, 96, QuantConfig()),
        lambda i: (net(), plan(), i, 64, QuantConfig(observer="entropy")),
        lambda i: (net(), plan(), i, 64, QuantConfig(weight_observer="mse")),
    ],
    ids=["weights", "bits", "observer of a tensor", "images", "imgsz", "observer", "weight observer"],
)
def test_all_that_ranges_depend_on_is_in_the_key(images, other):
    assert cache.key(*other(images)) != cache.key(net(), plan(), images, 64, QuantConfig())


def test_bn_statistics_count_and_quantizers_do_not(images):
    a, b, c = net(), net(), net()
    b[0].bn.running_mean += 1
    insert_plan(c, plan())
    keys = [cache.key(m, plan(), images, 64, QuantConfig()) for m in (a, b, c)]
    assert keys[0] != keys[1] and keys[0] == keys[2]


@pytest.mark.parametrize("option", [{"bn": True}, {"bias_correction": True}, {"adaround": 5}], ids=str)
def test_changed_weights_are_not_cached(images, folder, option):
    key = cache.key(net(), plan(), images, 64, QuantConfig(**option))
    cache.remember(key, STATE)
    assert key == "" and cache.cached(key) is None and not folder.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", "{}", '{"a": 1}', '{"a": {"input": {"bits": 99}}}', '{"a": {"input": 3}}', "\xff\xfe"],
)
def test_a_broken_file_is_ignored_and_rewritten(folder, text):
    folder.mkdir(parents=True)
    (folder / "k.json").write_bytes(text.encode("latin1"))
    assert cache.cached("k") is None
    cache.remember("k", STATE)
    assert cache.cached("k") == STATE


def test_the_newest_are_kept(folder, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 3)
    for i in range(5):
        cache.remember(f"k{i}", STATE)
        os.utime(folder / f"k{i}.json", (i, i))
    cache.remember("k5", STATE)
    assert {f.name for f in folder.iterdir()} == {"k3.json", "k4.json", "k5.json"}
    assert json.loads((folder / "k5.json").read_text()) == STATE


def test_without_a_place_to_write_nothing_happens(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "file" / "calibration")
    cache.remember("k", STATE)
    assert cache.cached("k") is None
