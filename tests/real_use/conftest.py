# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Commands run as a user runs them, and data of more or fewer channels than three."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML

from yolo_ext import cli
from yolo_ext.checkpoint import save_model
from yolo_ext.data.shapes import NAMES


@pytest.fixture
def call(capsys, caplog) -> Callable[[str], tuple[int, str]]:
    """Return a function that runs a command line and returns its exit status and all that it has said."""

    def main(words: str) -> tuple[int, str]:
        caplog.clear()
        status = cli.main(words.split())
        said = capsys.readouterr()
        return status, said.out + said.err + caplog.text

    return main


@pytest.fixture
def channelled(place, tiny_yaml, randomise) -> Callable[[int], str]:
    """Return a function that writes `n.pt` and a dataset `n/data.yaml` of images with n channels, as `model= data=`."""

    def make(n: int) -> str:
        torch.manual_seed(0)
        model = randomise(DetectionModel(str(tiny_yaml), ch=n, nc=3, verbose=False))
        model.names = dict(enumerate(NAMES))
        save_model(model, Path(f"{n}.pt"))
        shutil.copytree("shapes", str(n))
        for file in Path(str(n)).rglob("*.jpg") if n == 4 else ():
            image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2BGRA)
            image[..., 3] = image[..., :3].mean(2)
            cv2.imwrite(str(file.with_suffix(".png")), image)
            file.unlink()
        YAML.save(f"{n}/data.yaml", {**YAML.load(f"{n}/data.yaml"), "path": str(place / str(n)), "channels": n})
        return f"model={n}.pt data={n}/data.yaml"

    return make
