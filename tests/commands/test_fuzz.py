# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Hostile command lines: every command and key with values and files of all wrong kinds; never a traceback."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from ultralytics.utils import DEFAULT_CFG_DICT, SETTINGS, YAML

from yolo_ext import cli
from yolo_ext.commands import COMMANDS, keys, needed, takes_native
from yolo_ext.core.config import option_names
from yolo_ext.deployment.export import export_onnx
from yolo_ext.stock.load import load_model

TRAININGS = ("compress", "train", "prune", "distill", "quantize", "demo")  # which never get data that are whole
VALUES = [
    "", "0", "1", "-1", "2", "2.5", "64", "007", "1e9", "1000000000", "1" + "0" * 30, "nan", "inf", "-inf", "1e999",
    "None", "True", "False", "no", "off", "YES", "On", "x", "é☃\U0001f600", "a b", "x" * 5000, "[]", "[1]", "[[1]]",
    "['a','b']", "[None]", "()", "(1,2)", "{}", "{'a': 1}", "{'a': {'b': []}}", "{1: 2}", "{'speedup': 'x'}",
    "[" * 300 + "]" * 300, "[" * 40, "'", '"', "=", "a=b", ",", "1,2", "0.5,x", "-", "--", "%s", "{x}", "\\", "\n",
    "b'x'", "1j", "math.nan", "auto", "self", "onnx", "cpu", "0,1", "cuda:0", "*", "re:(", "a:b", "os:getcwd",
]  # fmt: skip
FILES = [
    "gone.pt", "empty.pt", "text.pt", "linear.pt", "dict.pt", "cut.pt", "tiny.pt", "empty.yaml", "broken.yaml",
    "binary.yaml", "list.yaml", "scalar.yaml", "numbers.yaml", "deep.yaml", "data.yaml", "recipe.yaml", "empty.onnx",
    "text.onnx", "strange.onnx", "plain.onnx", "empty.npz", "other.npz", "text.json", "list.json", "text.txt",
    "empty.txt", "broken.jpg", "image.jpg", "folder", "empty_openvino_model", "strange_openvino_model",
    "runs/broken", "/dev/null", "/", ".",
    "/proc/none", "folder/../tiny.pt", "é.yaml", "TINY.PT",
]  # fmt: skip
GOOD = {
    "model": "tiny.pt", "models": "tiny.pt", "other": "tiny.pt", "onnx": "good.onnx", "data": "whole.yaml",
    "source": "image.jpg", "check": "whole.yaml", "out": "new", "imgsz": "32", "rounds": "1", "memory": "False",
    "resamples": "2", "images": "1", "device": "cpu", "overwrite": "True", "exist_ok": "True", "name": "run",
    "profile": "False",
}  # fmt: skip
BESIDE = ("imgsz", "rounds", "memory", "resamples", "device", "exist_ok", "name")  # keep what is legal short
UNKNOWN = ["epocs", "prune.", ".x", "prune.spedup", "quant.x.y", "modle", "", "é", "task", "mode", "recipe", "tracker"]


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory) -> Path:
    """Return the tiny model as ONNX."""
    return export_onnx(load_model(tiny)[0], tmp_path_factory.mktemp("good") / "good.onnx", 32)


@pytest.fixture
def place(tiny, good, shapes, tmp_path, monkeypatch) -> Path:
    """Work in a folder with broken files of each kind and some whole ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.cfg.TESTS_RUNNING", False)  # it would send run folders elsewhere
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folder"))  # for the logs of what Ultralytics fails with
    for name in (n for n in FILES if n.startswith(("empty.", "é"))):
        Path(name).touch()
    for name in (n for n in FILES if n.startswith("text.")):
        Path(name).write_text("what it says\n")
    for name, text in {
        "broken.yaml": "names: [a\n path: :", "list.yaml": "- 1\n- 2\n", "scalar.yaml": "3\n", "numbers.yaml": "1: 2\n",
        "deep.yaml": "path: {a: [1]}\ntrain: {b: 1}\nval: 7\nnames: 9\n", "recipe.yaml": "prune: {speedup: 2}\n",
        "list.json": "[1, 2]",
    }.items():  # fmt: skip
        Path(name).write_text(text)
    Path("binary.yaml").write_bytes(bytes(range(256)))
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    shutil.copy(tiny, "tiny.pt")
    shutil.copy(shapes, "whole.yaml")
    shutil.copy(good, "good.onnx")
    Path("cut.pt").write_bytes(tiny.read_bytes()[:50_000])
    torch.save({"model": torch.nn.Linear(1, 1)}, "linear.pt")
    torch.save({"a": 1}, "dict.pt")
    np.savez("other.npz", a=np.zeros(3))
    for name, words in {
        "plain": {},
        "strange": {"task": "detect", "names": "no literal", "imgsz": "{", "stride": "x"},
    }.items():
        _onnx(Path(f"{name}.onnx"), words)
    Path("folder", "sub").mkdir(parents=True)
    Path("empty_openvino_model").mkdir()
    Path("strange_openvino_model").mkdir()
    Path("strange_openvino_model", "metadata.yaml").write_text("names: 3")
    run = Path("runs", "broken")
    (run / "weights").mkdir(parents=True)
    for name in ("compress.yaml", "args.yaml", "detections.jsonl", "sensitivity.json", "weights/last.pt"):
        (run / name).write_text("{")
    import cv2

    cv2.imwrite("image.jpg", np.full((64, 64, 3), 99, np.uint8))
    YAML.save("data.yaml", {"path": "gone", "train": "images", "val": "images", "names": {0: "a", 1: "b", 2: "c"}})
    return tmp_path


def _onnx(file: Path, words: dict[str, str]) -> None:
    """Write an ONNX model of one node with metadata."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 32, 32]) for name in "xy"]
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:]),
                              opset_imports=[helper.make_opsetid("", 17)], ir_version=8)  # fmt: skip
    helper.set_model_props(model, words)
    onnx.save(model, file)


def lines(seed: int, n: int) -> Iterator[list[str]]:
    """Yield command lines: a command, most of the keys that it needs, and a few others, keys and values at random."""
    rng = random.Random(seed)
    paths = ("model", "models", "other", "compare", "onnx", "int8", "data", "source", "check", "recipe", "cfg",
             "contract", "resume", "distill.teacher", "out", "sensitivity", "annotations", "images")  # fmt: skip
    commands = [c for c in (*COMMANDS.names(), *cli.FORWARDED) if c != "benchmark"]  # which would export what is whole
    for _ in range(n):
        command = rng.choice(commands)
        own = [*keys(COMMANDS[command].fn)] if command in COMMANDS.names() else []
        trains, stock = command in TRAININGS, not own or command == "predict"
        legal = own + [o for o in option_names() if o.split(".")[0] in own]
        legal += DEFAULT_CFG_DICT if stock or takes_native(COMMANDS[command].fn) else []
        must = ["model", "data", "source"] if stock else [*needed(COMMANDS[command].fn), *(["data"] if trains else [])]
        alone = rng.random() < 0.5  # one hostile value, and nothing else is wrong
        wrong = rng.choices([*legal, *must, "x"], k=1 if alone else rng.randint(0, 4)) + rng.choices(
            UNKNOWN, k=not alone
        )
        given = {k: GOOD[k] for k in [*must, *BESIDE] if k in legal and k in GOOD and (alone or rng.random() < 0.8)}
        given |= {"data": "gone.yaml"} if trains else {}
        given |= {"ratios": "0.5", "prune.include": "model.0"} if command == "sensitivity" else {}
        if command == "predict" and rng.random() < 0.5:
            given["compare"] = "tiny.pt"
        given |= {k: rng.choice(FILES if rng.random() < (0.7 if k in paths else 0.1) else VALUES) for k in wrong}
        if trains and given["data"] in ("", "None"):
            given["data"] = "gone.yaml"
        words = [command, *(f"{key}={value}" for key, value in given.items())]
        if not alone and rng.random() < 0.2:
            words.insert(rng.randrange(len(words) + 1), rng.choice([*VALUES, *FILES, "segment", "-h", "--model"]))
        yield words


@pytest.mark.parametrize(("seed", "n"), [(0, 100), pytest.param(1, 2000, marks=pytest.mark.slow)], ids=["some", "many"])
def test_no_line_is_a_traceback(place, capfd, record_property, seed, n):
    found, broken = Counter[int](), list[str]()
    for words in lines(seed, n):
        status = cli.main(words)
        said = "".join(capfd.readouterr())
        found[status] += 1
        wrong = "Traceback" in said or status not in (0, 1, 2)
        broken += [f"{words}\n{said[-600:]}"] if wrong else []
    figures = ", ".join(f"{number} with status {status}" for status, number in sorted(found.items()))
    record_property("reliability", f"{n:,} lines without a traceback: {figures}")
    assert not broken, "\n".join([f"{len(broken)} of {n}", *broken[:10]])
