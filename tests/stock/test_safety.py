# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files of others are read, and nothing in them is run: models, run folders, caches, YAMLs, ONNX."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.data import dataset
from ultralytics.nn import tasks
from ultralytics.utils import YAML, checks, patches

import yolo_ext
from yolo_ext import checkpoint, cli, stock
from yolo_ext.commands import COMMANDS, keys
from yolo_ext.core.errors import UsageError
from yolo_ext.core.plain_yaml import plain_yaml
from yolo_ext.data.check import check_data
from yolo_ext.stock.load import load_model, raw_checkpoint
from yolo_ext.stock.safety import VARIABLE, safely
from yolo_ext.training.trainer import DetectionTrainer

FOREIGN = """
from torch import nn
class Sums:
    "A class of somebody's own, which does no harm."
class Thrice(nn.Module):
    def forward(self, x):
        return x * 3
"""


class Runs:
    """Runs a command when it is unpickled: it makes a file called `ran`."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def poisoned(model: Path, file: str = "evil.pt") -> str:
    """Write a checkpoint that is a whole YOLO, but for one thing inside it."""
    ckpt = torch.load(model, weights_only=False)
    ckpt["model"].extra = Runs()
    torch.save(ckpt, file)
    return file


@pytest.fixture
def evil(place: Path) -> Iterator[str]:
    """Work in a folder with a model, a dataset and a model that runs a command; it must not have run."""
    yield poisoned(place / "tiny.pt")
    assert not Path("ran").exists()


SHORT = "data=shapes/data.yaml imgsz=64 epochs=1 device=cpu workers=0"
ROUTES = {  # words of each command by the key that takes a model
    "compress model": f"compress model=evil.pt {SHORT} prune.speedup=1.5",
    "compress distill": f"compress model=tiny.pt {SHORT} prune.speedup=1.5 distill.teacher=evil.pt",
    "train model": f"train model=evil.pt {SHORT}",
    "train pretrained": f"train model=tiny.pt pretrained=evil.pt {SHORT}",
    "train distill": f"train model=tiny.pt {SHORT} distill.teacher=evil.pt",
    "train resume": "train resume=evil.pt",
    "prune model": f"prune model=evil.pt {SHORT} prune.speedup=1.5",
    "prune distill": f"prune model=tiny.pt {SHORT} prune.speedup=1.5 distill.teacher=evil.pt",
    "distill model": f"distill model=evil.pt {SHORT} distill.teacher=tiny.pt",
    "distill distill": f"distill model=tiny.pt {SHORT} distill.teacher=evil.pt",
    "quantize model": f"quantize model=evil.pt {SHORT}",
    "quantize distill": f"quantize model=tiny.pt {SHORT} quant.mode=qat distill.teacher=evil.pt",
    "compare model": "compare model=evil.pt other=tiny.pt data=shapes/data.yaml",
    "compare other": "compare model=tiny.pt other=evil.pt data=shapes/data.yaml imgsz=64 device=cpu",
    "export model": "export model=evil.pt format=onnx",
    "export model by Ultralytics": "export model=evil.pt format=torchscript",
    "verify model": "verify model=evil.pt onnx=a.onnx source=shapes",
    "label model": "label model=evil.pt source=shapes out=labels",
    "predict model": "predict model=evil.pt source=shapes/images/val",
    "predict compare": "predict model=tiny.pt compare=evil.pt source=shapes/images/val",
    "bench models": "bench models=evil.pt imgsz=64",
    "analyze model": "analyze model=evil.pt",
    "sensitivity model": "sensitivity model=evil.pt data=shapes/data.yaml",
    "val model": "val model=evil.pt data=shapes/data.yaml imgsz=64 device=cpu",
    "track model": "track model=evil.pt source=shapes/images/val",
    "benchmark model": "benchmark model=evil.pt data=shapes/data.yaml imgsz=64 device=cpu",
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_command_loads_no_code(route, evil, capsys):
    assert cli.main([*ROUTES[route].split(), *([] if "label" in route else ["project=out"])]) == 2
    said = capsys.readouterr().err
    assert said.count("yolo-ext:") == 1 and "Traceback" not in said
    assert "posix.system" in said and "trust=True" in said


def test_every_key_that_takes_a_model_is_a_route(record_property):
    takes = {f"{row.name} {key}" for row in COMMANDS for key in keys(row.fn) if key in ("model", "other", "distill")}
    assert takes <= {*ROUTES}
    assert all("trust" in keys(row.fn) for row in COMMANDS if {"model", "models"} & {*keys(row.fn)})
    record_property("reliability", f"a malicious pickle runs in 0 of {len(ROUTES)} routes of the command line")


def legacy(file: str) -> None:
    torch.save({"model": Runs()}, file, _use_new_zipfile_serialization=False)


def by_getattr(file: str) -> None:
    class Reaches:
        def __reduce__(self) -> Any:
            return getattr, (nn.Module, "__init__")

    torch.save({"model": Reaches()}, file)


def builds(file: str) -> None:
    class Builds:
        def __reduce__(self) -> Any:
            return tasks.DetectionModel, ("https://localhost/evil.yaml",)

    torch.save({"model": Builds()}, file)


@pytest.mark.parametrize(
    ("write", "named"),
    [
        pytest.param(lambda f: torch.save({"model": Runs()}, f), r"posix\.system", id="zip"),
        pytest.param(legacy, r"posix\.system", id="legacy"),
        pytest.param(lambda f: Path(f).write_bytes(pickle.dumps(Runs())), r"not a YOLO|types outside", id="pickle"),
        pytest.param(by_getattr, "getattr", id="getattr"),
        pytest.param(builds, "NoneType", id="model-of-a-url"),
    ],
)
@pytest.mark.parametrize("read", [load_model, raw_checkpoint, checkpoint.finalize])
def test_files_that_run_something_are_refused(read, write, named, evil):
    write("evil.pt")
    with pytest.raises((UsageError, TypeError), match=named):
        read(Path("evil.pt"))


@pytest.mark.parametrize("how", ["pretrained", "teacher", "attach", "resume"])
def test_trainers_load_no_code(how, evil, settings, shapes, tmp_path):
    given = {**settings(shapes, tmp_path / "run"), "epochs": 1}
    options = {
        "teacher": {"distill": {"teacher": evil}},
        "resume": {"resume": evil},
        "pretrained": {"pretrained": evil},
    }
    with pytest.raises((UsageError, FileNotFoundError)):  # the second is what Ultralytics makes of what is refused
        if how == "attach":
            yolo_ext.attach(model := YOLO("tiny.pt"), **options["teacher"])
            model.train(**given)
        else:
            DetectionTrainer(overrides={**given, "model": "tiny.pt", **options[how]}).train()


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "resume_epoch0.pt"])
def test_a_run_folder_holds_no_code(name, evil, capsys):
    """The run of an older version, which was stopped behind its first epoch, in which somebody put something."""
    import shutil

    shutil.copytree(Path(__file__).parents[1] / "fixtures/v0_1/stopped", "old")
    poisoned(Path("tiny.pt"), f"old/weights/{name}")
    cli.main(["train", "resume=old", "data=shapes/data.yaml", "device=cpu", "workers=0"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def foreign(place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a checkpoint with a class of somebody's own, and have its module at hand."""
    module = ModuleType("theirs")
    exec(FOREIGN, vars(module))
    for name in ("Sums", "Thrice"):
        getattr(module, name).__module__ = "theirs"
    monkeypatch.setitem(sys.modules, "theirs", module)
    ckpt = torch.load("tiny.pt", weights_only=False)
    ckpt["train_metrics"] = module.Sums()
    torch.save(ckpt, "foreign.pt")
    return "foreign.pt"


@pytest.mark.parametrize("words", ["analyze imgsz=64", "predict source=shapes/images/val imgsz=64 project=out"])
def test_trust_is_a_key_of_every_call(words, foreign, capsys):
    line = [*words.split(), f"model={foreign}"]
    assert cli.main(line) == 2
    assert "holds theirs.Sums" in capsys.readouterr().err
    assert cli.main([*line, "trust=True"]) == 0
    assert cli.main(line) == 2  # of one call


def test_trust_of_python_is_the_environment(foreign, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    assert load_model(foreign)[0].task == "detect"
    with pytest.raises(UsageError, match="theirs"):
        yolo_ext.analyze(foreign, imgsz=64, trust=False)
    with pytest.raises(UsageError, match=r"'trust=yes' is illegal\. Legal: True or False"):
        yolo_ext.analyze(foreign, imgsz=64, trust="yes")


def test_layers_that_the_user_named_need_no_trust(foreign, monkeypatch):
    ckpt = torch.load("tiny.pt", weights_only=False)
    ckpt["model"].model[3].act = sys.modules["theirs"].Thrice()
    torch.save(ckpt, "own.pt")
    with pytest.raises(UsageError, match=r"theirs\.Thrice.*modules=package\.module"):
        load_model("own.pt")
    for home in (tasks, *(sys.modules[f"ultralytics.nn.modules.{m}"] for m in ("block", "conv", "head"))):
        monkeypatch.setattr(home, "Thrice", sys.modules["theirs"].Thrice, raising=False)
    stock.register_layers("theirs")
    assert type(load_model("own.pt")[0].model[3].act).__name__ == "Thrice"


def test_a_recipe_does_not_vouch(foreign, capsys):
    Path("recipe.yaml").write_text("trust: true\n")
    assert cli.main(["analyze", f"model={foreign}", "recipe=recipe.yaml"]) == 2
    assert "trust" in capsys.readouterr().err


def test_nothing_stays_behind(foreign, monkeypatch):
    monkeypatch.setattr(checks, "AUTOINSTALL", True)
    held = [(tasks, "SAFE_LOAD"), (patches, "torch"), (checks, "AUTOINSTALL"), (dataset, "load_dataset_cache_file")]
    held += [(YAML._get_instance(), "SafeLoader"), (dataset, "ClassificationDataset")]
    before, environment = [getattr(*h) for h in held], dict(os.environ)
    with pytest.raises(UsageError), safely(trust=True), safely(trust=False):
        assert checks.AUTOINSTALL is False and tasks.SAFE_LOAD and os.environ[VARIABLE] == "1"
        load_model(foreign)
    assert [getattr(*h) for h in held] == before and dict(os.environ) == environment


# Data -----------------------------------------------------------------------------------------------------------------
def write_cache(file: Path, content: Any) -> None:
    with file.open("wb") as f:
        np.save(f, content)


@pytest.mark.parametrize("route", ["val", "train", "labels"])
def test_a_cache_of_labels_is_data(route, evil, settings, tmp_path, capsys, record_property):
    data = Path("shapes/data.yaml")
    caches = [Path(f"shapes/labels/{split}.cache") for split in ("train", "val")]
    for cache in caches:
        write_cache(cache, {"version": dataset.DATASET_CACHE_VERSION, "hash": Runs()})
    if route == "val":
        assert cli.main(["val", "model=tiny.pt", "data=shapes/data.yaml", "imgsz=64", "device=cpu", "project=out"]) == 0
    elif route == "train":
        trainer = DetectionTrainer(overrides={**settings(data, tmp_path / "run"), "model": "tiny.pt"})
        trainer.model = load_model("tiny.pt")[0]
        assert len(trainer.build_dataset(trainer.data["train"], "train", 4)) == 8
    else:
        info = check_data(str(data), task="detect")
        assert len(stock.load.labelled_dataset(info, "detect", 64, 4)[1]) == 8
    record_property("reliability", "malicious label caches: 0 run")


def test_a_good_cache_is_used(place, monkeypatch):
    info = check_data("shapes/data.yaml", task="detect")
    made = [stock.load.labelled_dataset(info, "detect", 64, 4)[0]]
    monkeypatch.setattr(dataset.YOLODataset, "cache_labels", None)  # it is not called again
    made.append(stock.load.labelled_dataset(info, "detect", 64, 4)[0])
    assert all(np.array_equal(a["bboxes"], b["bboxes"]) for a, b in zip(made[0].labels, made[1].labels, strict=True))


@pytest.mark.parametrize("script", ["open('ran', 'w')", "bash touch ran", "https://localhost/a.zip", ["a"]])
def test_the_download_of_a_data_yaml_is_not_run(script, evil, capsys):
    YAML.save("gone.yaml", {"path": "gone", "train": "a", "val": "b", "names": ["x"], "download": script})
    assert cli.main(["val", "model=tiny.pt", "data=gone.yaml", "imgsz=64", "device=cpu", "project=out"]) == 2
    said = capsys.readouterr().err
    assert "'download:' is not run" in said or isinstance(script, list)
    with pytest.raises(RuntimeError, match=r"'download:' is not run|must be"):
        DetectionTrainer(overrides={"data": "gone.yaml", "model": "tiny.pt", "save_dir": "run"})


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
ITSELF = "names: &a [x, *a]\n"


@pytest.mark.parametrize("text", [BOMB, MERGES, ITSELF, BOMB + "\x00"], ids=["lists", "merges", "itself", "mended"])
@pytest.mark.parametrize(
    "words",
    ["data check=bomb.yaml", "analyze model=bomb.yaml", "analyze model=tiny.pt recipe=bomb.yaml",
     "train model=tiny.pt data=shapes/data.yaml cfg=bomb.yaml", "val model=tiny.pt data=bomb.yaml",
     "prune model=tiny.pt prune.ratio=0.5 quant.config_list=bomb.yaml"],
)  # fmt: skip
def test_aliases_are_bounded(text, words, place, capsys):
    Path("bomb.yaml").write_text(f"path: shapes\ntrain: images/train\nval: images/val\n{text}")
    assert cli.main([*words.split(), "project=out"]) == 2
    said = capsys.readouterr().err
    assert "aliases repeat" in said or ("\x00" in text and "control characters" in said)


def test_aliases_may_be_used():
    assert plain_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    with pytest.raises(yaml.YAMLError):
        plain_yaml("!!python/object/apply:os.system [touch ran]")


# Model YAMLs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("activation", "fits"),
    [
        pytest.param("nn.ReLU()", True, id="nn"),
        pytest.param("torch.nn.LeakyReLU(0.1, inplace=True)", True, id="torch.nn"),
        pytest.param("__import__('os').system('touch ran')", False, id="import"),
        pytest.param("nn.ReLU(__import__('os').system('touch ran'))", False, id="argument"),
        pytest.param("nn.modules.activation.os.system('touch ran')", False, id="attribute"),
        pytest.param("[x for x in (1,)]", False, id="comprehension"),
    ],
)
def test_an_activation_is_a_call_of_torch_nn(activation, fits, evil, tiny_yaml, capsys):
    YAML.save("yolov8n-act.yaml", {**YAML.load(tiny_yaml), "activation": activation})
    assert cli.main(["analyze", "model=yolov8n-act.yaml", "imgsz=64"]) == (0 if fits else 2)
    said = capsys.readouterr().err
    assert fits or "unsupported activation" in said


@pytest.mark.parametrize("name", ["nn.functional.relu", "nn.init", "ast", "YAML", "torchvision.ops.nms", "Path"])
def test_a_layer_is_a_module(name, place, tiny_yaml, capsys):
    content = deepcopy(YAML.load(tiny_yaml))
    content["backbone"][2] = [-1, 1, name, [32]]
    YAML.save("yolov8n-odd.yaml", content)
    assert cli.main(["analyze", "model=yolov8n-odd.yaml", "imgsz=64"]) == 2
    assert "Cannot build a model from" in capsys.readouterr().err
