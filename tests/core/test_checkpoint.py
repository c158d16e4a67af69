# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import os
import stat
import sys
from copy import deepcopy
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

import yolo_ext
from yolo_ext.checkpoint import (
    MANIFEST,
    SCHEMA,
    TRIPWIRE,
    Manifest,
    atomic_write,
    finalize,
    fingerprint,
    hand_on,
    is_pruned,
    manifest,
    note,
    save_model,
    set_tripwire,
)
from yolo_ext.stock.load import load_model

PLAIN = {"prune": {"kept": {"model.0.conv": {"out": [0, 2]}}, "gap": 1e-16}, "note": "text", "none": None}


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()


# Atomic writes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("data", "expected"), [(b"\x00\xff", b"\x00\xff"), ("größe", "größe".encode()), ("", b"")])
def test_writes_all_of_it(tmp_path, data, expected):
    file = tmp_path / "new" / "folder" / "a.bin"
    atomic_write(file, data)
    assert file.read_bytes() == expected
    assert [p.name for p in file.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=["disk-full", "killed"])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails, error):
    file = tmp_path / "a.pt"
    file.write_bytes(b"old")

    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), stop)
    with pytest.raises(error):
        atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_reader_sees_the_old_file_until_the_end(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(file.read_text()), fsync(fd)))
    atomic_write(file, "new")
    assert seen == ["old"] and file.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_the_file_is_an_ordinary_one(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("")
    atomic_write(ours, "")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# Manifest ------------------------------------------------------------------------------------------------------------
def test_manifest_is_read_only_and_copied_with_the_model(model):
    net = deepcopy(model)
    assert manifest(net) == Manifest() and not is_pruned(net)
    note(net, prune={"kept": {}})
    assert is_pruned(net) and is_pruned(deepcopy(net)) and not is_pruned(model)
    with pytest.raises(FrozenInstanceError):
        manifest(net).prune = {}


def test_note_writes_plain_data_with_schema_and_version(model):
    net = deepcopy(model)
    note(net, prune=None, dense={})
    assert not hasattr(net, MANIFEST)  # nothing to say about a stock model
    note(net, prune=PLAIN["prune"], parent="abc")
    assert getattr(net, MANIFEST) == {
        "prune": PLAIN["prune"], "parent": "abc", "schema": SCHEMA, "version": yolo_ext.__version__
    }  # fmt: skip
    before = getattr(net, MANIFEST)
    note(net, prune=None)
    assert manifest(net).prune == {} and manifest(net).parent == "abc" and "prune" in before
    with pytest.raises(TypeError, match="no fields \\['prunes'\\]"):
        note(net, prunes={})


def test_fields_of_a_newer_schema_are_kept_with_a_warning(model, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: said.append(str(text)))
    net = deepcopy(model)
    setattr(net, MANIFEST, {"schema": SCHEMA + 1, "version": "9.9", "prune": {"gap": 0.0}, "novel": {"a": 1}})
    assert manifest(net).other == {"novel": {"a": 1}} and is_pruned(net)
    note(net, parent="abc")
    loaded, ckpt = load_model(save_model(net, tmp_path / "a.pt"))
    assert manifest(loaded).other == {"novel": {"a": 1}}
    assert ckpt[MANIFEST]["schema"] == SCHEMA + 1 and manifest(loaded).parent == "abc"
    assert len(said) == 1 and "yolo_ext 9.9" in said[0] and "pip install --upgrade" in said[0]


@pytest.mark.slow
def test_a_rebuilt_model_gets_the_manifest_as_a_copy(model):
    source, target = deepcopy(model), deepcopy(model)
    hand_on(source, target)
    assert not hasattr(target, MANIFEST)
    note(source, prune={"kept": {}})
    hand_on(source, target)
    assert manifest(target) == manifest(source) and manifest(target).prune is not manifest(source).prune


def test_is_pruned_does_not_write(model):
    net = deepcopy(model)
    is_pruned(net)
    assert not hasattr(net, MANIFEST)


def test_fingerprint_survives_half_precision_but_not_a_change(model):
    net = deepcopy(model)
    assert fingerprint(net) == fingerprint(deepcopy(net).half()) == fingerprint(deepcopy(net).half().float())
    with torch.no_grad():
        net.model[0].conv.weight[0, 0, 0, 0] += 1
    assert fingerprint(net) != fingerprint(model)


def test_tripwire_keeps_the_dense_yaml(model):
    net = deepcopy(model)
    set_tripwire(net)
    set_tripwire(net)  # of a model that was pruned twice
    assert net.yaml["backbone"][0][2] == TRIPWIRE
    assert manifest(net).yaml == model.yaml and model.yaml["backbone"][0][2] == "Conv"
    with pytest.raises(KeyError, match=TRIPWIRE):
        DetectionModel(net.yaml, verbose=False)


# Save and load -------------------------------------------------------------------------------------------------------
def test_manifest_survives(model, tmp_path):
    net = deepcopy(model)
    setattr(net, MANIFEST, deepcopy(PLAIN))
    loaded, ckpt = load_model(save_model(net, tmp_path / "a.pt", train_metrics={"map": 0.5}))
    assert getattr(loaded, MANIFEST) == PLAIN == ckpt[MANIFEST]
    assert manifest(loaded).prune == PLAIN["prune"] and manifest(loaded).other == {"note": "text", "none": None}
    assert ckpt["train_metrics"] == {"map": 0.5} and ckpt["optimizer"] is None
    assert not loaded.training and all(p.requires_grad and p.dtype is torch.float32 for p in loaded.parameters())
    assert fingerprint(loaded) == fingerprint(net)


def test_saving_does_not_change_the_model(model, tmp_path):
    net = deepcopy(model).train()
    net.criterion = lambda: None  # not even picklable
    save_model(net, tmp_path / "a.pt")
    assert net.training and net.criterion is not None
    assert all(
        p.requires_grad == q.requires_grad and p.dtype is q.dtype for p, q in zip(net.parameters(), model.parameters())
    )


@pytest.mark.parametrize("key", ["model", "ema"])
def test_finalize_repeats_the_manifest(model, tmp_path, key):
    net = deepcopy(model)
    setattr(net, MANIFEST, deepcopy(PLAIN))
    other = {"model": "ema", "ema": "model"}[key]
    torch.save({key: net, other: None, "epoch": 3}, tmp_path / "last.pt")
    finalize(tmp_path / "last.pt")
    ckpt = torch.load(tmp_path / "last.pt", weights_only=False)
    assert ckpt[MANIFEST] == PLAIN and ckpt["epoch"] == 3


def test_foreign_classes_are_refused_and_nothing_is_written(model, tmp_path):
    net = deepcopy(model)
    net.model[0].act = type("Ours", (nn.Module,), {"__module__": "yolo_ext.somewhere"})()
    with pytest.raises(ValueError, match=r"classes of yolo_ext: \['Ours'\]"):
        save_model(net, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
