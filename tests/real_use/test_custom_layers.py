# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A model YAML that names layers of the user, from the command line: `modules=mypkg.layers`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ultralytics.nn import tasks
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import stock
from yolo_ext.commands.help import help_text
from yolo_ext.core.errors import UsageError
from yolo_ext.stock.load import load_model

LAYERS = """
import torch
from torch import nn
from ultralytics.nn.modules import Conv  # is Ultralytics', not ours


class {name}(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(c, c // 2, 1), nn.ReLU(), nn.Conv2d(c // 2, c, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).expand_as(x)
"""


@pytest.fixture
def package(place: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Write a package with one layer, of a name of its own in each test, and a model YAML that names it."""
    name = f"Gate{abs(hash(request.node.name)) % 10**8}"
    monkeypatch.syspath_prepend(str(place))
    for module in (m for m in list(sys.modules) if m.startswith("mypkg")):
        monkeypatch.delitem(sys.modules, module)
    (place / "mypkg").mkdir()
    (place / "mypkg" / "__init__.py").write_text("")
    (place / "mypkg" / "layers.py").write_text(LAYERS.format(name=name))
    backbone = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, name, [32]]]
    backbone += [[-1, 1, "C2f", [32, True]], [-1, 1, "Conv", [64, 3, 2]]]
    YAML.save(place / "custom.yaml", {"nc": 3, "backbone": backbone, "head": [[[3, 4], 1, "Detect", ["nc"]]]})
    yield name
    for home in (tasks, *(sys.modules[f"ultralytics.nn.modules.{m}"] for m in ("block", "conv", "head"))):
        monkeypatch.delattr(home, name, raising=False)


@pytest.mark.slow
def test_a_yaml_with_own_layers_is_pruned_and_goes_on(package, run):
    words = "prune model=custom.yaml epochs=0 imgsz=64 prune.speedup=1.5 prune.scope=local prune.min_channels=4"
    status, folder, said = run(words)
    assert status == 2 and package in said  # Ultralytics does not know the name
    status, folder, said = run(f"{words} modules=mypkg.layers")
    assert status == 0, said
    assert YAML.load(folder / "compress.yaml")["modules"] == "mypkg.layers"
    before = json.loads((folder / "summary.json").read_text())["before"]["gflops"]
    pruned = load_model(folder / "weights/best.pt")[0]
    assert type(pruned.model[2]).__name__ == package and pruned.model[2].fc[0].in_channels < 32
    assert before / stock.gflops(pruned, 64) == pytest.approx(1.5, rel=0.01)
    for again in (f"{words} modules=mypkg.layers resume=True", f"{words} resume=True", "prune resume=True"):
        assert run(again)[0] == 0


@pytest.mark.slow
def test_a_new_process_finds_them_too(package, place):
    words = [sys.executable, "-m", "yolo_ext", "analyze", "model=custom.yaml", "modules=mypkg.layers", "imgsz=64"]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=place, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "model.2.fc.0" in ran.stdout + ran.stderr


@pytest.mark.slow
def test_trainings_carry_them(package, run):
    words = "imgsz=64 device=cpu workers=0 plots=False modules=mypkg.layers data=shapes/data.yaml"
    status, folder, said = run(
        f"train model=custom.yaml {words} epochs=2 batch=8 prune.speedup=1.3 prune.min_channels=4"
    )
    assert status == 0, said
    assert YAML.load(folder / "args.yaml")["modules"] == "mypkg.layers"
    assert type(load_model(folder / "weights/best.pt")[0].model[2]).__name__ == package
    assert run(f"val model={folder / 'weights/best.pt'} {words}", "val")[0] == 0
    delattr(tasks, package)  # what a process of another GPU, or of a run that goes on, knows at first
    yolo_ext.DetectionTrainer(overrides={**YAML.load(folder / "args.yaml"), "save_dir": str(folder / "again")})
    assert hasattr(tasks, package)


def test_a_pickle_of_a_fork_finds_its_layer(package, place):
    """Forks put their layers into Ultralytics' own files, and pickles name the place."""
    stock.register_layers(["mypkg.layers"])
    stock.register_layers("mypkg.layers")  # a second time does no harm
    from ultralytics.nn.modules import block

    assert getattr(block, package) is getattr(tasks, package)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        pytest.param(
            "", "mypkg.nothing", r"Cannot import 'modules=mypkg\.nothing' \(ModuleNotFoundError", id="missing"
        ),
        pytest.param("1 / 0", "mypkg.own", r"Cannot import 'modules=mypkg\.own' \(ZeroDivisionError", id="broken"),
        pytest.param("from torch.nn import Conv2d", "mypkg.own", r"defines no torch\.nn\.Module", id="no-layers"),
        pytest.param(
            "from torch import nn\nclass C2f(nn.Module): pass",
            "mypkg.own",
            "defines C2f, which is a layer of",
            id="taken",
        ),
    ],
)
def test_what_is_refused(text, given, message, package, place):
    (place / "mypkg" / "own.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        stock.register_layers(given)


def test_help_names_the_key(run):
    assert all("modules" in help_text(topic) for topic in ("analyze", "compress", "bench"))
    assert "Unknown key 'modules'" in run("data check=shapes/data.yaml modules=mypkg.layers")[2]  # it loads no model
