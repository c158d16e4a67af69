# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A guest in the user's process: Ultralytics, torch, Pillow, Matplotlib and the environment stay as they were."""

import inspect
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import yolo_ext
from yolo_ext.data.check import check_data
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import labelled_dataset
from yolo_ext.training.trainer import DetectionTrainer

SEEN = r"""
import importlib, inspect, logging, os, pkgutil, sys, warnings
import PIL.Image, cv2, matplotlib, torch, ultralytics
from ultralytics.utils import LOGGER, SETTINGS

OTHERS = {"__warningregistry__", "__annotations__", "__abstractmethods__", "manual_seed",
          "_initialized", "default_callbacks",  # set by Python, torch._dynamo, Pillow and each training of Ultralytics
          "variable PYTHONHASHSEED"}  # the seed of the last training, by init_seeds of Ultralytics

def load(package):
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if found.name.split(".")[1] in {"cfg", "data", "engine", "models", "nn", "utils"}:
            try:
                module = importlib.import_module(found.name)
            except Exception:  # of an optional package
                continue
            if found.ispkg:
                load(module)

def changed(before, after):
    return [k for k, v in before.items() if k.rpartition(".")[2] not in OTHERS and after.get(k) != v]

def seen():
    owners = {n: m for n, m in sys.modules.items() if n.startswith("ultralytics") or n in ("PIL.Image", "cv2", "torch")}
    owners |= {f"{n}.{k}": v for n, m in [*owners.items()] if n.startswith("ultralytics")
               for k, v in vars(m).items() if inspect.isclass(v) and v.__module__.startswith("ultralytics")}
    found = {f"{n}.{k}": id(v) for n, o in owners.items() for k, v in [*vars(o).items()] if not inspect.ismodule(v)}
    found |= {f"variable {k}": v for k, v in os.environ.items() if "PYTEST" not in k}
    return found | {
        "folder": os.getcwd(), "handlers": [*LOGGER.handlers, *logging.root.handlers], "level": LOGGER.level,
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "hook": sys.excepthook,
        "gradients": torch.is_grad_enabled(), "backend": matplotlib.get_backend(),
        "parameters of Matplotlib": dict(matplotlib.rcParams), "warnings": list(warnings.filters),
        "settings": dict(SETTINGS), "threads of OpenCV": cv2.getNumThreads(), "words": list(sys.argv),
    }
"""


def ours() -> list[str]:
    """Return what in Ultralytics is of this package, or is a function that sees other globals than its module's."""
    found = []
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "ultralytics":
            inside = [v for v in vars(module).values() if isinstance(v, type)]
            for owner in (module, *inside):
                found += [f"{owner.__name__}.{k}" for k, v in [*vars(owner).items()] if foreign(v)]
    return found


def foreign(value: Any) -> bool:
    home = getattr(value, "__module__", None) or ""
    if not isinstance(home, str):
        return False
    rebuilt = isinstance(value, types.FunctionType) and home.startswith("ultralytics.")
    return home.startswith("yolo_ext") or (rebuilt and inspect.unwrap(value).__globals__ is not vars(sys.modules[home]))


def built(data: Path, tmp_path: Path) -> None:
    trainer = DetectionTrainer(overrides={"model": "a.yaml", "data": str(data), "save_dir": str(tmp_path)})
    trainer.model = SimpleNamespace(stride=torch.tensor([32]))
    assert len(trainer.build_dataset(trainer.data["val"], "val", 2)) == 4


CALLS: dict[str, Callable[..., Any]] = {
    "import": lambda *_: [getattr(yolo_ext, name) for name in yolo_ext.__all__],
    "check": lambda data, *_: check_data(data),
    "dataset": lambda data, *_: labelled_dataset(check_data(data), "detect", 64, 2),
    "accuracy": lambda data, _, tiny: accuracy(tiny, data, 64),
    "dataset of a trainer": lambda data, tmp_path, _: built(data, tmp_path),
}


@pytest.fixture
def snapshot() -> Iterator[dict[str, Any]]:
    """Compare what a process holds before and behind a test."""
    space: dict[str, Any] = {}
    exec(SEEN, space)
    before = space["seen"]()
    yield before
    assert space["changed"](before, space["seen"]()) == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_of_ultralytics_is_changed(snapshot, shapes, tmp_path, tiny, call):
    call(shapes, tmp_path, tiny)
    assert ours() == []


WHOLE = """
load(ultralytics)
options = dict(data="shapes/data.yaml", epochs=1, imgsz=64, batch=4, device="cpu", workers=0, plots=False)
ultralytics.YOLO("tiny.pt").train(**options)  # which sets variables, callbacks and filters of warnings for ever
before = seen()
import yolo_ext
from yolo_ext import cli
[getattr(yolo_ext, name) for name in yolo_ext.__all__]
steps = {"import": None, **dict(line.split(": ") for line in sys.stdin.read().splitlines())}
for name, words in steps.items():
    if words == "trainer":
        prune = {"ratio": 0.3, "round_to": 1}
        ultralytics.YOLO("tiny.pt").train(trainer=yolo_ext.DetectionTrainer, prune=prune, **options)
    elif words:
        sys.path.insert(0, "") if "" not in sys.path else None
        assert cli.main(words.split()) < 2, name  # 1: a check of the result failed, as it may
    after = seen()
    print("CHANGED", name, changed(before, after))
    before |= {k: after.get(k) for k in before}
"""
STEPS = """check: data check=shapes/data.yaml
trainer: trainer
compress: compress model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=0 device=cpu prune.ratio=0.2 prune.round_to=1 \
quant.mode=ptq quant.calib=4 quant.max_drop=1
val, which is Ultralytics' own: val model=tiny.pt data=shapes/data.yaml imgsz=64 device=cpu workers=0 plots=False"""


@pytest.mark.slow
def test_nothing_is_changed_from_the_import_on(place):
    words = [sys.executable, "-c", SEEN + WHOLE]
    said = subprocess.run(words, input=STEPS, text=True, capture_output=True, check=False)
    found = [line for line in said.stdout.splitlines() if line.startswith("CHANGED")]
    assert len(found) == 5, said.stderr[-2000:]
    assert [line for line in found if not line.endswith("[]")] == []
