# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files of others are read, and nothing in them is run: models, run folders, caches, YAMLs, ONNX."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.data import dataset
from ultralytics.engine import trainer as engine
from ultralytics.nn import tasks
from ultralytics.utils import YAML, checks, patches

import yolo_ext
from yolo_ext import checkpoint, cli, stock
from yolo_ext.commands import COMMANDS, keys
from yolo_ext.core.errors import UsageError
from yolo_ext.core.plain_yaml import plain_yaml
from yolo_ext.data.check import check_data
from yolo_ext.pipeline.run import train
from yolo_ext.stock.load import load_model, raw_checkpoint
from yolo_ext.stock.safety import VARIABLE, safely
from yolo_ext.stock.trainer import whole_final_files
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


@pytest.mark.parametrize("name", ["last.pt", "resume_epoch0.pt"])
def test_a_run_folder_holds_no_code(name, evil, capsys):
    """The run of an older version, which was stopped behind its first epoch, in which somebody put something."""
    import shutil

    shutil.copytree(Path(__file__).parents[1] / "fixtures/v0_1/stopped", "old")
    poisoned(Path("tiny.pt"), f"old/weights/{name}")
    cli.main(["train", "resume=old", "data=shapes/data.yaml", "device=cpu", "workers=0"])
    assert "Traceback" not in capsys.readouterr().err


def test_the_best_of_a_run_folder_is_not_run(evil):
    with whole_final_files(checkpoint.finalize, keep_optimizer=False), safely():
        assert engine.strip_optimizer(evil) == {}


def test_a_stage_that_goes_on_loads_no_code(evil):
    folder = Path("run/finetune/weights")
    folder.mkdir(parents=True)
    poisoned(Path("tiny.pt"), str(folder / "last.pt"))
    with pytest.raises(UsageError, match=r"posix\.system"):
        train(SimpleNamespace(folder=Path("run")), "finetune", {}, {})


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


@pytest.mark.parametrize("route", [pytest.param("val", marks=pytest.mark.slow), "train", "labels"])
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


# What is written ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words",
    [
        *(f"convert source=shapes/list.yaml to={to}" for to in ("voc", "yolo", "coco")),
        "split source=shapes/list.yaml ratio=0.5,0.5",
        pytest.param("label model=tiny.pt source=shapes/train.txt imgsz=64", marks=pytest.mark.slow),
    ],
)
def test_a_list_of_images_leads_nowhere_else(words, place):
    images = sorted(p.name for p in Path("shapes/images/train").iterdir())
    names = [f"./images/train/{images[0]}", *(f"./images/val/../../images/../images/train/{n}" for n in images[1:3])]
    (Path("far")).mkdir()
    Path(f"shapes/images/train/{images[3]}").rename("far/c.jpg")
    Path("shapes/train.txt").write_text("\n".join([*names, "./images/../../far/c.jpg"]))
    own = YAML.load("shapes/data.yaml")
    val = next(Path("shapes/images/val").iterdir())
    YAML.save("shapes/list.yaml", {**own, "train": "train.txt", "val": str(val.relative_to("shapes"))})
    before = {*Path().rglob("*")}
    assert cli.main([*words.split(), "out=deep/er/out"]) == 0
    made = {p for p in Path().rglob("*") if p not in before and not p.is_relative_to("deep/er/out")}
    assert made == {Path("deep"), Path("deep/er")}


@pytest.mark.parametrize("name", ["../../gone", "/gone", "a/../../gone", "..\\..\\gone"])
@pytest.mark.parametrize("to", ["yolo", "voc"])
def test_a_name_in_a_coco_file_leads_nowhere_else(name, to, place, monkeypatch):
    import json
    import shutil

    Path("coco").mkdir()
    shutil.copy(next(Path("shapes/images/train").iterdir()), "coco/gone.jpg")
    images = [{"id": i, "file_name": f"{name if i else 'gone'}.jpg", "width": 64, "height": 64} for i in (0, 1)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in (0, 1)]
    found = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "../../x"}]}
    Path("coco/instances.json").write_text(json.dumps(found))
    before = {*Path().rglob("*")}
    cli.main(["convert", "source=coco", "out=deep/er/out", f"to={to}", "broken=skip", "ratio=0.5,0.5"])
    made = {p for p in Path().rglob("*") if p not in before and not p.is_relative_to("deep/er/out")}
    assert made <= {Path("deep"), Path("deep/er")}


# ONNX -----------------------------------------------------------------------------------------------------------------
def onnx_file(file: Path, weight: Any, node: Any = None) -> None:
    """Write a small file with the metadata of Ultralytics, one weight and one operator."""
    import onnx
    from onnx import helper

    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, (1, 3, 8, 8)) for n in "xy")
    graph = helper.make_graph([node or helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("theirs", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    meta = {"task": "detect", "names": "{0: 'x'}", "stride": "32", "imgsz": "[8, 8]"}
    helper.set_model_props(model, meta)
    file.write_bytes(model.SerializeToString())


def weight(dims: tuple[int, ...] = (1,), **external: Any) -> Any:
    import onnx

    found = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=dims)
    if external:
        found.data_location = onnx.TensorProto.EXTERNAL
        found.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in external.items())
    else:
        found.raw_data = b"\0" * 4
    return found


def hostile(kind: str, file: Path) -> None:
    from onnx import helper

    Path("secret.bin").write_bytes(b"\0" * 4)
    if kind == "no ONNX":
        file.write_bytes(b"\x08" * 99)
    elif kind == "custom operator":
        onnx_file(file, weight(), helper.make_node("Runs", ["x", "w"], ["y"], domain="theirs"))
    else:
        outside = {
            "parent": {"location": "../secret.bin"},
            "absolute": {"location": Path("secret.bin").absolute()},
            "missing": {"location": "gone.bin"},
            "terabytes": {},
            "length": {"location": "in.bin", "length": 2**42},
        }
        (file.parent / "in.bin").write_bytes(b"\0" * 4)
        onnx_file(file, weight((2**40,) if kind in ("terabytes", "length") else (1,), **outside[kind]))


HOSTILE = ("no ONNX", "custom operator", "parent", "absolute", "missing", "terabytes", "length")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(
    "words",
    [
        "bench models=in/a.onnx imgsz=8 rounds=1",
        "label model=in/a.onnx source=shapes out=out",
        "verify model=tiny.pt onnx=in/a.onnx source=shapes",
        "val model=in/a.onnx data=shapes/data.yaml",
        "predict model=in/a.onnx source=shapes",
        "predict model=in/a.onnx compare=tiny.pt source=shapes",
    ],
)
def test_a_hostile_onnx_file_is_an_error(kind, words, place, capsys, record_property):
    Path("in").mkdir()
    hostile(kind, Path("in/a.onnx"))
    assert cli.main(words.split()) == 2
    assert "in/a.onnx" in capsys.readouterr().err
    record_property("reliability", f"{len(HOSTILE)} kinds of hostile ONNX files: one error each")


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_detector_refuses_a_hostile_onnx_file(kind, place):
    from yolo_ext.deployment import Detector

    Path("in").mkdir()
    hostile(kind, Path("in/a.onnx"))
    with pytest.raises(UsageError, match=r"in/a\.onnx"):
        Detector("in/a.onnx")


# What has to load -----------------------------------------------------------------------------------------------------
FIXTURES = Path(__file__).parents[1] / "fixtures/v0_1"
SHARED = Path(__file__).parents[3] / "shared/weights"  # of others, where they lie beside the checkout
WHOLE = [
    f for f in [*sorted(FIXTURES.rglob("*.pt")), *sorted(SHARED.rglob("*.pt"))] if f.stem not in ("yolov5n", "food")
]


@pytest.mark.parametrize("file", WHOLE, ids=[f.name for f in WHOLE])
def test_what_we_and_others_wrote_loads_safely(file, record_property):
    if file.stem.startswith("resume"):
        assert torch.load(file, weights_only=True)
    else:
        assert raw_checkpoint(file) and load_model(file)[0].task
    record_property(
        "reliability", f"{len(WHOLE)} of {len(WHOLE)} checkpoints of older versions and of others load safely"
    )


@pytest.mark.slow
def test_what_stock_trainings_of_each_kind_hold_loads_safely(tmp_path):
    """Heads and blocks of all families, as pickles of Ultralytics hold them."""
    names = (
        "yolov5n yolov8n-seg yolov8n-pose yolov8n-obb yolov9t yolov10n yolo11n-cls yolo12n yolo26n yolo26n-seg rtdetr-l"
    )
    for name in names.split():
        net, _ = load_model(f"{name}.yaml")
        checkpoint.save_model(net, tmp_path / f"{name}.pt")
        assert type(load_model(tmp_path / f"{name}.pt")[0]) is type(net)
