# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Settings of the whole session, in place before Ultralytics is imported, and model and data for tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONFIG = tempfile.mkdtemp(prefix="yolo_ext_tests_")
atexit.register(shutil.rmtree, _CONFIG, ignore_errors=True)
os.environ.update(YOLO_CONFIG_DIR=_CONFIG, YOLO_AUTOINSTALL="false", YOLO_OFFLINE="1", MPLBACKEND="Agg",
                  ORT_DISABLE_TELEMETRY="1")  # fmt: skip

import torch  # noqa: E402  the variables above count when Ultralytics is imported

torch.set_num_threads(1)  # many small convolutions: more threads spin on shared cores

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from torch import nn  # noqa: E402
from ultralytics import YOLO  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402
from ultralytics.utils import SETTINGS, YAML  # noqa: E402

from yolo_ext import cli  # noqa: E402
from yolo_ext.checkpoint import save_model  # noqa: E402
from yolo_ext.data.shapes import NAMES, make_shapes  # noqa: E402

# A run of CI finds the same as the next one; others look elsewhere each time.
hypothesis.settings.register_profile("tests", max_examples=50, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("tests")

TINY = {
    "nc": 3,
    "scales": {"n": [0.33, 0.125, 512]},
    "backbone": [
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 1, "C2f", [128, True]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 1, "C2f", [256, True]],
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 1, "SPPF", [512, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 1, "C2f", [256]],
        [-1, 1, "Conv", [256, 3, 2]],
        [[-1, 6], 1, "Concat", [1]],
        [-1, 1, "C2f", [512]],
        [[9, 12], 1, "Detect", ["nc"]],
    ],
}


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm weights and statistics that are not trivial."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    return model


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data.yaml of a small generated set."""
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=8, val=4, imgsz=64)


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "yolov8n-tiny.yaml"
    YAML.save(file, TINY)
    return file


@pytest.fixture(scope="session")
def tiny(tiny_yaml: Path) -> Path:
    """Return a checkpoint of the tiny detector."""
    torch.manual_seed(0)
    model = randomise_(DetectionModel(str(tiny_yaml), nc=3, verbose=False))
    model.names = dict(enumerate(NAMES))
    return save_model(model, tiny_yaml.with_name("tiny.pt"))


@pytest.fixture(scope="session")
def wide(tiny_yaml: Path) -> Path:
    """Return a checkpoint of a detector that is twice as wide, whose classes come in another order."""
    torch.manual_seed(1)
    wider = YAML.load(tiny_yaml)
    wider["scales"]["n"][1] *= 2
    YAML.save(tiny_yaml.with_name("yolov8n-wide.yaml"), wider)
    model = randomise_(DetectionModel(str(tiny_yaml.with_name("yolov8n-wide.yaml")), nc=3, verbose=False), seed=1)
    model.names = dict(enumerate(reversed(NAMES)))
    return save_model(model, tiny_yaml.with_name("wide.pt"))


@pytest.fixture(scope="session")
def settings() -> Callable[[Path, Path], dict[str, Any]]:
    return settings_


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    return randomise_


@pytest.fixture
def place(tiny, shapes, tmp_path, monkeypatch) -> Path:
    """Work in a folder with a model and a dataset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    shutil.copy(tiny, "tiny.pt")
    shutil.copytree(shapes.parent, "shapes")
    YAML.save("shapes/data.yaml", {**YAML.load("shapes/data.yaml"), "path": str(tmp_path / "shapes")})
    return tmp_path


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Path, str]]:
    """Return a function that runs a command line in a folder of its own and returns status, folder and messages."""

    def main(words: str, name: str = "run") -> tuple[int, Path, str]:
        status = cli.main([*words.split(), f"project={place / 'out'}", f"name={name}"])
        said = capsys.readouterr()
        failed = (line for line in said.out.splitlines() if "checks failed" in line)
        return status, place / "out" / name, said.err + "".join(failed)

    return main


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the measurement of latency out."""
    from yolo_ext.pipeline import stages

    entry = {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 10, "samples": [1.0] * 10}
    monkeypatch.setattr(stages, "bench", lambda files, imgsz, **options: {name: entry for name in files})


@pytest.fixture
def fit(shapes: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that trains a model in a folder of its own and returns the trainer."""

    def run(model: Path | YOLO, trainer: type | None = None, name: str = "run", **options: Any) -> Any:
        yolo = model if isinstance(model, YOLO) else YOLO(str(model))
        yolo.train(trainer=trainer, **{**settings_(shapes, tmp_path / name), **options})
        return yolo.trainer

    return run


def settings_(data: Path, folder: Path) -> dict[str, Any]:
    """Return the arguments of a short training on the CPU."""
    return {"data": str(data), "imgsz": 64, "epochs": 2, "batch": 4, "nbs": 4, "device": "cpu", "workers": 0,
            "plots": False, "optimizer": "AdamW", "lr0": 0.001, "warmup_epochs": 0.0, "seed": 3,
            "save_dir": str(folder), "exist_ok": True}  # fmt: skip
