# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Each file of examples/ runs, on small data and with short trainings."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from ultralytics import YOLO
from ultralytics.nn import tasks

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import cfg_dir
from yolo_ext.deployment import Detector

EXAMPLES = cfg_dir().parent / "examples"
SHORTER = {r"epochs=[1-9]\d*": "epochs=1", r"EPOCHS = 192, 40": "EPOCHS = 64, 1", r"imgsz=320": "imgsz=64",
           r'"speedup": 2': '"speedup": 1.3'}  # fmt: skip
ORT = Path(os.environ.get("ORT", "/usr/local"))  # headers and library of ONNX Runtime: include/, lib/


def cells(file: str = "own_dataset.py") -> list[tuple[str, str]]:
    """Return kind and text of the cells of a script in percent format."""
    parts = re.split(r"^# %%(.*)\n", (EXAMPLES / file).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    kinds = ["markdown" if "markdown" in kind else "code" for kind in parts[::2]]
    texts = [re.sub(r"^# ?", "", t, flags=re.MULTILINE) if k == "markdown" else t for k, t in zip(kinds, parts[1::2])]
    return [*zip(kinds, texts)]


def notebook() -> dict[str, object]:
    """Return the notebook with the cells of the script; `python tests/docs/test_examples.py` writes it."""
    made = [
        {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.strip().splitlines(keepends=True)}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for i, (kind, text) in enumerate(cells())
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def shortened(text: str) -> str:
    for long, short in SHORTER.items():
        text = re.sub(long, short, text)
    return text


def run_script(name: str, place: Path, *words: object) -> None:
    """Run a copy of a script with short trainings in a process like a user's."""
    copy = place / Path(name).name
    copy.write_text(shortened((EXAMPLES / name).read_text(encoding="utf-8")))
    argv, path = sys.argv, [*sys.path]
    sys.argv, sys.path[:0] = [str(copy), *map(str, words)], [str(copy.parent)]
    try:
        runpy.run_path(str(copy), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def test_the_notebook_has_the_cells_of_the_script():
    assert json.loads((EXAMPLES / "own_dataset.ipynb").read_text(encoding="utf-8")) == notebook()


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.rglob("*.*") if "__pycache__" not in p.parts}
    helpers = {"README.md", "custom_module/fork.py", "custom_module/fork.yaml"}
    assert {file for file in files - helpers if f"({file})" not in listed} == set()


@pytest.mark.slow
def test_the_notebook_runs(own_place, quick, capsys):
    space: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "own_dataset.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(shortened("".join(cell["source"])), "cell", "exec"), space)
    assert Path(space["small"].report).is_file() and "Detections(" in capsys.readouterr().out


@pytest.mark.slow
def test_four_lines_prune_an_existing_training(own_place, furnished, capsys):
    run_script("existing_training.py", own_place, "best.pt", furnished / "data.yaml")
    before = sum(p.numel() for p in YOLO("best.pt").model.parameters())
    assert int(capsys.readouterr().out.split()[-1]) < 0.9 * before


@pytest.mark.slow
def test_a_block_of_ones_own_is_pruned(own_place, quick, monkeypatch):
    for name in ("fork.py", "fork.yaml"):
        shutil.copy(EXAMPLES / "custom_module" / name, name)
    monkeypatch.setattr(tasks, "Fork", None, raising=False)
    monkeypatch.delattr(tasks, "Fork")  # where the name is registered, and is taken out again
    monkeypatch.delitem(sys.modules, "fork", raising=False)
    monkeypatch.syspath_prepend(str(own_place))
    run_script("custom_module/prune.py", own_place)
    pruned = YOLO("runs/detect/prune/weights/best.pt").model
    assert type(pruned.model[2]).__name__ == "Fork" and manifest(pruned).prune


def told(words: list[str]) -> list[list[str]]:
    """Return the words of each line that a program prints."""
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return [line.split() for line in said.splitlines()]


@pytest.mark.slow
def test_a_device_needs_no_torch(furnished):
    file, picture = str(furnished / "int8.onnx"), str(furnished / "shot.jpg")
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'ultralytics', 'yolo_ext')))\n"
    script = blocked + (EXAMPLES / "detect_onnxruntime.py").read_text(encoding="utf-8")
    found = told([sys.executable, "-c", script, file, picture, "0.001"])
    wanted = Detector(file, conf=0.001)(picture)
    assert len(found) == len(wanted) > 0
    assert [row[0] for row in found[:5]] == [row["name"] for row in wanted[:5].summary()]


@pytest.mark.slow
def test_the_cpp_detector_finds_the_same(furnished, tmp_path):
    if not shutil.which("g++") or not (ORT / "include" / "onnxruntime_cxx_api.h").is_file():
        pytest.skip("needs g++, and ORT=<folder of a release of ONNX Runtime>")
    words = ["g++", "-O2", "-std=c++17", str(EXAMPLES / "cpp/detect.cpp"), f"-I{ORT}/include", f"-L{ORT}/lib",
             f"-Wl,-rpath,{ORT}/lib", "-lonnxruntime", "-o", str(tmp_path / "detect")]  # fmt: skip
    subprocess.run(words, check=True)
    image = cv2.imread(str(furnished / "shot.jpg"))
    header = b"P6 %d %d 255\n" % image.shape[1::-1]
    (tmp_path / "shot.ppm").write_bytes(header + image[..., ::-1].tobytes())
    file = str(furnished / "fp32.onnx")
    found = told([str(tmp_path / "detect"), file, str(tmp_path / "shot.ppm"), "0.001"])
    wanted = Detector(file, conf=0.001)(image)
    assert len(found) == len(wanted) > 0 and [int(row[0]) for row in found[:5]] == wanted.classes[:5].tolist()


if __name__ == "__main__":
    (EXAMPLES / "own_dataset.ipynb").write_text(json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n")
