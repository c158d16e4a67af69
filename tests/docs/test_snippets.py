# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Each command and each block of Python in README, docs and examples: legal in the fast tier, run in the slow one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_pruning as tp
from ultralytics import YOLO

import yolo_ext
from yolo_ext import cli
from yolo_ext.commands import COMMANDS, check_keys, keys
from yolo_ext.commands.help import STOCK
from yolo_ext.core.config import CONFIGS, cfg_dir, parse
from yolo_ext.core.registry import Table

ROOT = cfg_dir().parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SKILL.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILES = [*PAGES, *sorted((ROOT / "examples").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path, inline: bool = True) -> list[tuple[str, ...]]:
    """Return the words of each command on a page, without those that it leaves out."""
    lines = re.sub(r"\\\n\s*", "", "".join(blocks(page, "bash"))).splitlines()
    found = [part for line in lines for part in line.split(" && ") if part.startswith("yolo-ext ")]
    text = " ".join(page.read_text(encoding="utf-8").split())
    found += re.findall(r"`(yolo-ext [a-z]+ [^`]*=[^`]*)`", text) if inline else []
    return [*dict.fromkeys(tuple(shlex.split(line, comments=True)[1:]) for line in found)]


LINES = {words: page.stem for page in reversed(FILES) for words in commands(page)}
BLOCKS = [pytest.param(text, id=f"{page.stem}: {i}") for page in FILES for i, text in enumerate(blocks(page, "python"))]


def name(words: tuple[str, ...]) -> str:
    return f"{LINES[words]}: {' '.join(words)[:60]}"


# Legal ---------------------------------------------------------------------------------------------------------------
def take(words: Sequence[str]) -> None:
    """Read a command and check its keys and options as the command line does."""
    command, options = cli.parse_args([word for word in words if word != "..."])
    if command not in STOCK:
        check_keys(command, options)
    if command != "sensitivity":  # which needs no target
        parse({t: options[t] for t in CONFIGS if isinstance(options.get(t), dict)})


@pytest.mark.parametrize("words", [pytest.param(words, id=name(words)) for words in LINES])
def test_commands_of_pages_are_legal(words):
    take(words)


@pytest.mark.parametrize("text", BLOCKS)
def test_python_of_pages_compiles(text):
    compile(text, "page", "exec")


def test_every_page_is_read_and_has_its_commands():
    assert len(LINES) > 80 and len(BLOCKS) > 8
    assert not [page for page in FILES if page.read_text(encoding="utf-8").count("```") % 2]


# Run -----------------------------------------------------------------------------------------------------------------
SMALLER = {"imgsz": "64", "epochs": "1", "rounds": "5", "quant.epochs": "1", "quant.calib": "8",
           "quant.adaround": "2", "prune.latency": "1.01", "prune.images": "8", "resamples": "50",
           "prune.ratios": "{'model.9.cv2': 0.3}"}  # fmt: skip
WHILE_TRAINING = {"prune.at": "[1]", "prune.every": "1", "prune.steps": "1", "prune.end": "1", "epochs": "2"}
MILD = {"prune.speedup": "1.3", "prune.params": "1.3", "prune.ratio": "0.2"}  # of a model that is narrow already
TRAINS = {"epochs": "1", "batch": "8", "workers": "0", "plots": "False"}
RECIPES_WHILE_TRAINING = ("kd_before_prune", "kd_while_pruning")
RUN = "runs/detect/quantize"
ABSENT = {  # files that a test cannot make in a moment, and machines
    "that.pt": "a checkpoint of Ultralytics' own QAT",
    "video.mp4": "a video",
    "coco8.yaml": "a set that Ultralytics downloads",
    "images=/disk": "a second disk",
    "device=0,1": "GPUs",
    "demo": "minutes; tests/pipeline has it",
}


def small(command: str, *words: str, folder: Path) -> list[str]:
    """Return a command for a small set, that writes what it makes anew into a folder of its own."""
    given = dict(word.partition("=")[::2] for word in words if word != "...")
    change = {**SMALLER, **MILD, "out": str(folder / given.get("out", ""))}
    if (WHILE_TRAINING.keys() - {"epochs"}) & given.keys() or given.get("recipe") in RECIPES_WHILE_TRAINING:
        change |= WHILE_TRAINING
    if given.get("epochs") == "0":
        change["epochs"] = "0"
    needed = {"model": "best.pt", "data": "data.yaml"} if "..." in words else {}
    given = {key: change.get(key, value).replace("<run>", RUN) for key, value in {**needed, **given}.items()}
    return [command, *(f"{key}={value}" for key, value in {**_also(command, given), **given}.items())]


def _also(command: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return the keys that make a command fast and that it does not give itself."""
    if command not in COMMANDS.names() or "resume" in given:
        return {}
    function = COMMANDS[command].fn
    trains = "epochs" in keys(function) and given.get("epochs") != "0"
    sized = "imgsz" in keys(function) and command not in ("compare", "bench")  # which take the size of their files
    return {**({"imgsz": "64"} if sized else {}), **(TRAINS if trains else {})}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [pytest.param(words, id=name(words)) for words, page in LINES.items() if page != TUTORIAL.stem]
)
def test_commands_of_pages_run(words, furnished_place, quick, tmp_path):
    for what, why in ABSENT.items():
        if what in " ".join(words):
            pytest.skip(why)
    if "format=openvino" in words:
        pytest.importorskip("openvino")
    assert cli.main(small(*words, folder=tmp_path)) in (0, 1)


@pytest.mark.slow
def test_the_tutorial_runs_from_start_to_end(own_place, quick):
    lines = commands(TUTORIAL, inline=False)
    assert len(lines) > 7
    for words in lines:
        assert cli.main(small(*words, folder=Path())) in (0, 1), words
    assert (own_place / "runs/detect/small/report.html").is_file()
    assert (own_place / "runs/detect/small/ptq/weights/ptq_int8.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("text", BLOCKS)
def test_python_of_pages_runs(text, furnished_place, quick):
    text = re.sub(r"epochs=[1-9]\d*", "epochs=1", text).replace("640", "64").replace("speedup=2", "speedup=1.3")
    text = re.sub(r'"speedup": \d', '"speedup": 1.3', text)
    names = {"YOLO": YOLO, "torch": torch, "tp": tp, "np": np, "yolo_ext": yolo_ext, "model": YOLO("best.pt").model,
             "x": torch.rand(1, 3, 64, 64), "loader": [0], "optimizer": SimpleNamespace(step=lambda: None),
             "loss": SimpleNamespace(backward=lambda: None), "criteria": Table("pruning criterion")}  # fmt: skip
    with suppress(ImportError):
        import cv2

        names["cv2"] = cv2
    exec(compile(text, "page", "exec"), names)
