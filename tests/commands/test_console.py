# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What each command says, as in console/NAME.txt: without numbers, and lines that differ in them alone only once.

After a change that is meant: SNAPSHOTS=write pytest tests/commands/test_console.py -m "slow or not slow"; read it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from ultralytics.utils import LOGGER

from yolo_ext import cli, stock
from yolo_ext.checkpoint import save_model
from yolo_ext.commands import COMMANDS, compress, keys
from yolo_ext.data import shapes
from yolo_ext.pruning import analyze
from yolo_ext.stock.load import load_model

CONSOLE = Path(__file__).parent / "console"
TRAIN = "data=shapes/data.yaml imgsz=64 epochs=1 batch=4 device=cpu workers=0 plots=False verbose=False"
MASKS = [  # in this order
    (r"\x1b\[[\d;]*[A-Za-z]", ""),
    (r".*The machine is busy.*\n", ""),
    (r"(?s)\nUltralytics \d.*?\n(?=compress: stage)", "\nThe base model is trained by Ultralytics.\n"),
    (r"(?m)^cpu .*$", "cpu ..., versions"),
    (r"(?m): (100% )?━+ .*$", ": full bar"),
    (r"(?m): \d+% [━╸─]+ .*$", ": bar that stops"),
    (r"(?m)^(\w+) {2,}[^|\n]*$", r"\1 ..."),
    (r"(?m)^ *\d+-\d+ +\d+ #*$", "# to # #####"),
    (r"PLACE/out/run-\d", "PLACE/out/run"),
    (r"model=tiny\w*.onnx imgsz", "model=FASTEST imgsz"),
    (r"(speed )?(same|unclear|[\d.]+x faster|([\d.]+x )?as fast( as the base)?) \([\d.]+ to [\d.]+x?\)", "SPEED"),
    (r"\bmodel\.\d[\w.]*(\[\d+:\d+\])?( \+\d+)?", "LAYER"),
    (r"about \d+ (s|min)", "about # s"),
    (r"\| +exact +\|", "| 0 |"),
    (r"ort-x86\w*(-\w+)*", "PROFILE"),
    (r"(?<![\w.-])[-+]?\d([\d.,]*\d)?(e[-+]?\d+)?", "#"),
    (r" *\| *", " | "),
    (r"-+(\+-+)+", "---"),
    (r"(?m) +$", ""),
]
FAST = {  # name of the file: words
    "export": "export model=tiny.pt imgsz=64",
    "analyze": "analyze model=tiny.pt imgsz=64",
    "data": "data check=shapes/data.yaml",
    "split": "split source=shapes/data.yaml out=new",
    "convert": "convert source=shapes/data.yaml out=voc to=voc",
}
SLOW = {
    "export_int8": "export model=tiny.pt imgsz=64 int8=True data=shapes/data.yaml",
    "verify": "verify model=tiny.pt onnx=tiny.onnx int8=tiny_int8.onnx data=shapes/data.yaml",
    "verify_failed": "verify model=tiny.pt onnx=other.onnx source=shapes/images/val",
    "bench": "bench models=tiny.pt,tiny.onnx,tiny_int8.onnx rounds=10 imgsz=64 data=shapes/data.yaml memory=False",
    "sensitivity": "sensitivity model=tiny.pt data=shapes/data.yaml imgsz=64 ratios=0.5 prune.include=model.2",
    "sensitivity_quant": "sensitivity model=tiny.pt data=shapes/data.yaml imgsz=64 kind=quant by=block",
    "compare": "compare model=tiny.pt other=tiny.pt data=shapes/data.yaml imgsz=64 resamples=20",
    "label": "label model=tiny.pt source=shapes/images/val out=labels conf=0.0001",
    "predict": "predict model=tiny.pt compare=tiny.pt source=shapes/images/val imgsz=64",
    "train": f"train model=tiny.pt {TRAIN} sparsity.method=slim",
    "distill": f"distill model=tiny.pt {TRAIN} distill.teacher=wide.pt",
    "prune": "prune model=tiny.pt imgsz=64 epochs=0 prune.speedup=1.5",
    "quantize": "quantize model=tiny.pt data=shapes/data.yaml imgsz=64 quant.mode=ptq",
    "compress": f"compress model=tiny.pt {TRAIN} prune.speedup=1.5 quant=None",  # random weights fail the proof of INT8
    "demo": "demo",
}


def masked(text: str, place: Path) -> str:
    """Return a text with the last frame of each bar, without paths and numbers, lines that repeat once."""
    text = "\n".join(line.rpartition("\r")[2] for line in text.replace(str(place), "PLACE").split("\n"))
    for pattern, stands_for in MASKS:
        text = re.sub(pattern, stands_for, text)
    return "\n".join(line for line, _ in groupby(text.splitlines()) if line) + "\n"


@pytest.fixture
def console(place, wide, capsys, monkeypatch):
    """Return a function that runs a command line and returns what a terminal then shows, masked."""
    shutil.copy(wide, "wide.pt")
    handler = next(h for h in LOGGER.handlers if type(h) is logging.StreamHandler)
    monkeypatch.setattr(LOGGER, "level", logging.INFO)

    def times(model, imgsz, runs):  # a real clock would now and then find noise
        return [{"": 1.0, **dict.fromkeys(stock.deployed_layers(model), 0.01)}] * runs

    monkeypatch.setattr(analyze, "layer_times", times)

    def run(words: str) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(handler, "stream", sys.stdout)
        placed = "project" in keys(COMMANDS[words.split()[0]].fn)
        status = cli.main([*words.split(), *([f"project={place / 'out'}", "name=run"] if placed else [])])
        said = capsys.readouterr()
        return status, masked(said.out + said.err, place)

    return run


def compare(name: str, said: str) -> None:
    file = CONSOLE / f"{name}.txt"
    if os.environ.get("SNAPSHOTS") == "write":
        file.write_text(said, encoding="utf-8")
    assert said == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAST)
def test_fast_commands(console, name):
    status, said = console(FAST[name])
    assert status == 0
    compare(name, said)


@pytest.fixture
def tiny_demo(monkeypatch):
    """Have the demo train for an epoch on a few images, and leave INT8 out, as above."""
    whole, small = compress.compress, {"epochs": 1, "imgsz": 64, "workers": 0, "verbose": False}
    monkeypatch.setattr(shapes, "make_shapes", partial(shapes.make_shapes, train=8, val=4, imgsz=64))
    monkeypatch.setattr(compress, "BASE", {**compress.BASE, **small})
    monkeypatch.setattr(compress, "compress", lambda *a, **given: whole(*a, **{**given, **small, "quant": None}))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_commands(console, name, place, tiny_demo):
    if "onnx" in SLOW[name]:
        console(SLOW["export_int8"])
    if name == "verify_failed":
        model, _ = load_model("tiny.pt")
        with torch.no_grad():
            model.model[3].conv.weight.mul_(1.1)
        save_model(model, place / "other.pt")
        console("export model=other.pt imgsz=64")
    status, said = console(SLOW[name])
    assert status == (name == "verify_failed")
    compare(name, said)


def test_every_command_that_does_something_has_its_snapshot():
    snapshots = {words.split()[0] for words in {**FAST, **SLOW}.values()}
    assert {*COMMANDS.names()} - snapshots == {"checks", "help", "cfg", "version", "recipes"}  # test_checks.py
