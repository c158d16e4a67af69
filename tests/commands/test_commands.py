# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A command is a function: its annotations are checked and its docstring explains its keys, from Python as well."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from yolo_ext.commands import COMMANDS, PLACE, keys, needed
from yolo_ext.commands.compress import compress, train
from yolo_ext.commands.data import convert, data, split
from yolo_ext.commands.help import documented
from yolo_ext.commands.label import label, predict
from yolo_ext.commands.measure import _figures, bench, sensitivity
from yolo_ext.core.errors import UsageError
from yolo_ext.data.shapes import make_shapes


@pytest.mark.parametrize("name", COMMANDS.names())
def test_docstring_explains_every_parameter_and_no_other(name):
    function = COMMANDS[name].fn
    assert function.__name__ == name and COMMANDS[name].summary
    assert list(inspect.signature(function).parameters) == [
        p for p in inspect.signature(function).parameters if documented(function).get(p)
    ]
    own = documented(inspect.unwrap(function))
    assert set(own) <= set(inspect.signature(function).parameters)


def test_keys_and_needed_keys_come_from_the_signature():
    assert needed(COMMANDS["verify"].fn) == ["model", "onnx"] and needed(COMMANDS["label"].fn)[2] == "out"
    assert needed(COMMANDS["data"].fn) == ["check"] and needed(COMMANDS["demo"].fn) == []
    assert set(PLACE) <= set(keys(COMMANDS["bench"].fn)) and "place" not in keys(COMMANDS["bench"].fn)
    assert set(PLACE) <= set(keys(COMMANDS["train"].fn)) and "native" not in keys(COMMANDS["train"].fn)
    assert not set(PLACE) & set(keys(COMMANDS["convert"].fn))
    assert keys(COMMANDS["quantize"].fn)["epochs"].default == 0


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (bench, {"models": "a.pt", "rounds": 0}, "'rounds=0' is illegal. Legal: a whole number of at least 1."),
        (bench, {"models": "a.pt", "imgsz": 1.5}, "'imgsz=1.5' is illegal. Legal: a whole number of at least 1."),
        (bench, {"models": "a.pt", "memory": "no"}, "'memory=no' is illegal. Legal: True or False."),
        (label, {"model": "a.pt", "source": "b", "out": "c", "conf": 1.1}, "'conf=1.1' is illegal. Legal: a number"),
        (label, {"model": "a.pt", "source": "b", "out": "c", "iou": True}, "'iou=True' is illegal. Legal: a number"),
        (label, {"model": "a.pt", "source": "b", "out": "c", "files": "lnk"}, "Did you mean 'link'? Legal: link, copy"),
        (label, {"model": "a.pt", "source": "b", "out": "c", "review": -1}, "'review=-1' is illegal. Legal: a whole"),
        (
            convert,
            {"source": "a", "out": "b", "folds": 1},
            "'folds=1' is illegal. Legal: a whole number of at least 2.",
        ),
        (
            split,
            {"source": "a", "out": "b", "seed": True},
            "'seed=True' is illegal. Legal: a whole number of at least 0.",
        ),
        (data, {"check": "a", "near": -1}, "'near=-1' is illegal. Legal: a whole number of at least 0."),
        (sensitivity, {"model": "a.pt", "data": "b", "kind": "prun"}, "Did you mean 'prune'? Legal: prune, quant."),
        (compress, {"model": "a.pt", "epochs": -1}, "'epochs=-1' is illegal. Legal: a whole number of at least 0."),
        (
            train,
            {"model": "a.pt", "data": "b", "epochs": 0},
            "'epochs=0' is illegal. Legal: a whole number of at least",
        ),
        (train, {"model": "a.pt", "data": "b", "lr0": -1}, "lr0=-1"),
        (train, {"model": "a.pt"}, "Missing: data=..."),
        (train, {"model": "a.pt", "data": "b", "optimizer": "AdmW"}, "Did you mean 'AdamW'?"),
        (predict, {"model": "gone.pt", "compare": "a.pt", "source": "b"}, "'gone.pt' does not exist"),
    ],
)
def test_values_are_checked_in_python_as_on_the_command_line(function, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e:
        function(**options)
    assert isinstance(e.value, UsageError) and message in str(e.value)
    assert not list(tmp_path.iterdir())


def test_too_many_or_doubled_arguments_are_pythons_own_error():
    with pytest.raises(TypeError, match="too many positional"):
        compress("a", "b", 64)
    with pytest.raises(TypeError, match="multiple values"):
        bench("a", models="b")


def test_commands_return_what_they_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = make_shapes(tmp_path / "shapes", train=8, val=4, imgsz=64)
    found = data(shapes, project=str(tmp_path), name="run")
    assert found["passed"] is True and Path("run/data.json").is_file()
    done = split(Path(shapes), Path("anew"), folds=2, stratify=True)
    assert [p.name for p in done["data"]] == ["fold1.yaml", "fold2.yaml"]


def test_latency_at_batch_32_has_a_place_of_its_own():
    settings = [(t, b, m) for t in (1, 2) for b in (1, 32) for m in "ab"]
    rows = [
        {
            "model": m,
            "runtime": "ort",
            "threads": t,
            "batch": b,
            "median": 10.0 * t + b,
            "significant": m == "a",
            "speedup": 2.0,
            "speedup_p10": 1.9,
            "speedup_p90": t,
        }
        for t, b, m in settings
    ]
    found = _figures(rows, {"a": {"int8_convs": 3}, "b": {"size_mb": 2.0}})
    assert found["a"]["latency_ms"] == {"ort_int8": 11.0}  # of the first setting
    assert found["b"]["latency_ms"] == {"ort": 11.0} and found["b"]["size_mb"] == 2.0
    ratio = {"ratio": 2.0, "p10": 1.9, "p90": 1, "significant": False}
    assert found["b"]["latency_ratio"] == {"ort": ratio}
    assert found["b"]["latency_batch32_ms"]["ort"] == 42.0
    assert "latency_ms" not in _figures(rows[2:4], {"a": {}, "b": {}})["a"]
