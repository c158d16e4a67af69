# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A guest in the user's process: Ultralytics, torch, Pillow, Matplotlib and the environment stay as they were."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext.data.check import check_data
from yolo_ext.deployment import Detector
from yolo_ext.deployment.export import export_onnx
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.load import labelled_dataset, load_model
from yolo_ext.training.trainer import DetectionTrainer

SEEN = r"""
import gc, importlib, inspect, logging, multiprocessing, os, pathlib, pkgutil, random, signal, sys, tempfile, threading
import warnings
import PIL.Image, cv2, matplotlib, numpy, torch, ultralytics
from ultralytics.utils import LOGGER, SETTINGS

OTHERS = {"__warningregistry__", "__annotations__", "__abstractmethods__", "manual_seed",
          "_initialized", "default_callbacks",  # set by Python, torch._dynamo, Pillow and each training of Ultralytics
          "_registry",  # what Ultralytics' safe loader knows, made at its first use
          # of Ultralytics, set by each model or the last training, and removed by the next one
          "variable PYTHONHASHSEED", "variable CUBLAS_WORKSPACE_CONFIG"}
OWN = ("matplotlib", "onnxruntime", "/.ses")  # files that a library keeps open; the last one is ONNX Runtime's, too

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
    found |= {f"signal {s.name}": signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    found |= {f"loggers of {n}": (*v.handlers, v.level, v.propagate, v.disabled)
              for n, v in logging.root.manager.loggerDict.items() if isinstance(v, logging.Logger)}
    return found | {
        "folder": os.getcwd(), "handlers": [*LOGGER.handlers, *logging.root.handlers], "level": LOGGER.level,
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "hook": sys.excepthook,
        "gradients": torch.is_grad_enabled(), "backend": matplotlib.get_backend(),
        "parameters of Matplotlib": dict(matplotlib.rcParams), "warnings": list(warnings.filters),
        "settings": dict(SETTINGS), "threads of OpenCV": cv2.getNumThreads(), "words": list(sys.argv),
        "path": list(sys.path), "threads between operations": torch.get_num_interop_threads(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(),
                          torch.utils.deterministic.fill_uninitialized_memory),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "precision": torch.get_float32_matmul_precision(), "oneDNN": torch.backends.mkldnn.enabled,
        "hooks of Python": (sys.displayhook, sys.unraisablehook, threading.excepthook, sys.stdout, sys.stderr),
        "parameters of NumPy": (numpy.geterr(), numpy.get_printoptions()),
        "start of processes": multiprocessing.get_start_method(),
    }

def left():
    "What a finished step has left behind."
    gc.collect()
    files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    files = {f for f in files if f.startswith("/") and not f.startswith(("/dev", "/proc"))}
    files |= {str(p) for p in pathlib.Path(tempfile.gettempdir()).glob("*")}
    return {*multiprocessing.active_children(), *(t.name for t in threading.enumerate()),
            *(f for f in files if not any(own in f for own in OWN))}

def chance():
    "The states of the random generators of the process."
    return {"random": random.getstate(), "random of NumPy": repr(numpy.random.get_state()),
            "random of torch": bytes(torch.get_rng_state().numpy())}
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
    # Ultralytics makes torch deterministic when a trainer is made, and unmakes it when it has trained.
    options = {"model": "a.yaml", "data": str(data), "save_dir": str(tmp_path), "deterministic": False}
    trainer = DetectionTrainer(overrides=options)
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


STOCK = """
import hashlib

options = dict(data="shapes/data.yaml", epochs=1, imgsz=64, batch=4, device="cpu", workers=0, plots=False)

def stock():
    "Train as a user of Ultralytics does; return a hash of the result."
    yolo = ultralytics.YOLO("tiny.pt")
    yolo.train(save_dir="stock", exist_ok=True, **options)
    digest = hashlib.sha256(repr(yolo.trainer.metrics).encode())
    for name, v in ultralytics.YOLO("stock/weights/last.pt").model.state_dict().items():
        digest.update(name.encode() + v.numpy().tobytes())
    return digest.hexdigest()
"""
WHOLE = """
load(ultralytics)
print("BITS without:", stock())  # this sets variables, callbacks and filters of warnings for ever
if sys.argv[1:]:
    raise SystemExit
before, there, drawn = seen(), left(), chance()
import yolo_ext
from yolo_ext import cli, deployment
[getattr(yolo_ext, name) for name in yolo_ext.__all__]
sys.path.insert(0, "") if "" not in sys.path else None
before["path"] = list(sys.path)
for line in ["import: None", *sys.stdin.read().splitlines()]:
    name, words = line.split(": ")
    if words == "trainer":
        prune = {"ratio": 0.3, "round_to": 1}
        ultralytics.YOLO("tiny.pt").train(trainer=yolo_ext.DetectionTrainer, prune=prune, **options)
    elif words == "detector":
        for _ in range(2):
            yolo_ext.deployment.Detector("run/onnx/int8.onnx")("shapes/images/val/00000.jpg")
    elif words != "None":
        assert cli.main(words.split()) < 2, name  # 1: a check of the result failed, as it may
    after, now = seen(), left()
    print(f"CHANGED {name}:", changed(before, after))
    print(f"LEFT {name}:", [*now - there])
    print(f"DRAWN {name}:", changed(drawn, chance()))
    print(f"BITS {name}:", stock())
    before |= {k: after.get(k) for k in before}
    there, drawn = left(), chance()
"""
STEPS = """check: data check=shapes/data.yaml
label: label model=tiny.pt source=shapes/images/val out=labelled imgsz=64 device=cpu
prune: prune model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=0 device=cpu prune.ratio=0.2 prune.round_to=1
trainer: trainer
compress: compress model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=0 device=cpu prune.ratio=0.2 prune.round_to=1 \
quant.mode=ptq quant.calib=4 quant.max_drop=1 save_dir=run
detector: detector
val of Ultralytics: val model=tiny.pt data=shapes/data.yaml imgsz=64 device=cpu workers=0 plots=False"""
NOT_DRAWN = ("import", "check", "label", "detector")  # steps that leave the generators of the process alone


@pytest.fixture(scope="module")
def told(tiny, shapes, tmp_path_factory) -> dict[str, dict[str, str]]:
    """Return what the steps of `WHOLE` say, by kind and step, and under "never" those of a process without yolo_ext."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in ("CHANGED", "LEFT", "DRAWN", "BITS", "never")}
    for never in ([], ["never"]):
        folder = tmp_path_factory.mktemp("process")
        shutil.copy(tiny, folder / "tiny.pt")
        shutil.copytree(shapes.parent, folder / "shapes")
        YAML.save(folder / "shapes/data.yaml", {**YAML.load(shapes), "path": str(folder / "shapes")})
        (folder / "temporary").mkdir()
        words, env = [sys.executable, "-c", SEEN + STOCK + WHOLE, *never], {"TMPDIR": str(folder / "temporary")}
        said = subprocess.run(words, input=STEPS, text=True, capture_output=True, check=False, cwd=folder,
                              env={**os.environ, **env})  # fmt: skip
        assert not said.returncode, said.stderr[-3000:]
        for line in said.stdout.splitlines():
            kind, _, rest = line.partition(" ")
            if kind in found:
                found["never" if never else kind].update([rest.split(": ", 1)])
    return found


@pytest.mark.slow
def test_ultralytics_trains_to_the_same_bits_behind_each_step(told, record_property):
    (never,) = told["never"].values()
    equal = [step for step, bits in told["BITS"].items() if bits == never]
    record_property("reliability", f"the same bits behind {len(equal)} of {len(told['BITS'])} steps")
    assert len(equal) == len(told["BITS"]) == STEPS.count("\n") + 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CHANGED", "LEFT"])
def test_nothing_is_changed_or_left_behind_from_the_import_on(told, kind, record_property):
    clean = [step for step, found in told[kind].items() if found == "[]"]
    what = {"CHANGED": "nothing changed", "LEFT": "no file, thread or process left"}[kind]
    record_property("reliability", f"{what} behind {len(clean)} of {len(told[kind])} steps")
    assert len(clean) == STEPS.count("\n") + 2, told[kind]


@pytest.mark.slow
def test_random_generators_are_left_alone_where_nothing_is_trained_or_measured(told):
    assert {told["DRAWN"][step] for step in NOT_DRAWN} == {"[]"}


# Models side by side --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def detectors(tiny, wide, tmp_path_factory) -> list[Detector]:
    folder = tmp_path_factory.mktemp("onnx")
    files = [export_onnx(load_model(file)[0], folder / f"{file.stem}.onnx", 64) for file in (tiny, wide)]
    return [Detector(file, conf=0.0, threads=1) for file in files]


def rows(found: Any) -> tuple[bytes, bytes]:
    return found.boxes.tobytes(), found.scores.tobytes()


@pytest.mark.slow
def test_two_detectors_in_eight_threads_find_what_each_finds_alone(detectors, shapes, record_property):
    images = sorted(shapes.parent.rglob("*.jpg"))
    jobs = [(detector, image) for image in images for detector in detectors] * 4
    alone = [rows(detector(image)) for detector, image in jobs]
    with ThreadPool(8) as pool:
        together = pool.starmap(lambda detector, image: rows(detector(image)), jobs)
    assert len({*alone}) > len(images)
    equal = sum(a == b for a, b in zip(alone, together, strict=True))
    record_property(
        "reliability", f"{equal} of {len(jobs)} results of 2 detectors in 8 threads equal those of one thread"
    )
    assert equal == len(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_detector_works_in_other_processes(detectors, shapes, start, record_property):
    images = sorted(shapes.parent.rglob("*.jpg"))
    alone = [rows(detectors[0](image)) for image in images]
    with multiprocessing.get_context(start).Pool(2) as pool:
        found = pool.map_async(detectors[0], images).get(300)
    equal = sum(a == rows(b) for a, b in zip(alone, found, strict=True))
    record_property("reliability", f"{start}: {equal} of {len(images)} results equal")
    assert equal == len(images)


@pytest.mark.slow
def test_two_models_that_are_trained_in_turns_do_not_mix(fit, tiny, wide, tmp_path, record_property):
    options = {tiny: {"prune": {"ratio": 0.3, "round_to": 1}}, wide: {"sparsity": {"coefficient": 0.1, "warmup": 0}}}

    def trained(model: YOLO, name: str) -> bytes:
        fit(model, name=name, epochs=1)
        state = load_model(tmp_path / name / "weights/last.pt")[0].state_dict()
        return b"".join(v.numpy().tobytes() for v in state.values())

    def attached(file: Path) -> YOLO:
        return yolo_ext.attach(YOLO(str(file)), **options[file])

    alone = [trained(attached(file), file.stem) for file in options]
    models = [attached(file) for file in options]
    together = [trained(model, f"{i}") for i, model in reversed([*enumerate(models)])]
    record_property("reliability", "two attached models trained in turns: the bits of each alone")
    assert alone == together[::-1] and alone[0] != alone[1]
