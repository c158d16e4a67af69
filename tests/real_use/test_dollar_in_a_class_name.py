# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Matplotlib takes what is between two $ for a formula, and fails where it is none: names are shown as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ultralytics.utils import YAML
from ultralytics.utils.metrics import ConfusionMatrix, plot_pr_curve

from yolo_ext.reporting.figures import plot_boxes, plot_tradeoff
from yolo_ext.reporting.pages import write_report
from yolo_ext.stock.trainer import plain_labels

NAME = r"US$ and \frac{$"
POINT = {"name": NAME, "median": 1.0, "p10": 0.9, "p90": 1.1, "map": 0.5}
COUNTS = {"classes": {NAME: {"train": 3}}, "sizes": {"8": 3}, "splits": {"train": {}}}


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda path: plot_tradeoff([POINT], path, NAME, "mAP50-95"), id="tradeoff"),
        pytest.param(lambda path: plot_boxes(COUNTS, path), id="boxes"),
    ],
)
def test_pictures_of_ours(draw, tmp_path):
    draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_pictures_of_a_training(tmp_path):
    with plain_labels():
        ConfusionMatrix(names={0: NAME, 1: "b"}, task="detect").plot(save_dir=tmp_path)
        x = np.linspace(0, 1, 10)
        plot_pr_curve(x, [x, x], np.array([[0.5], [0.5]]), tmp_path / "pr.png", {0: NAME, 1: "b"})
    assert len(list(tmp_path.glob("*.png"))) >= 2


@pytest.mark.slow
def test_a_whole_run(run, place, tiny_yaml):
    YAML.save("shapes/data.yaml", {**YAML.load("shapes/data.yaml"), "names": {0: NAME, 1: "$", 2: "c$$"}})
    status, folder, said = run(
        f"train model={tiny_yaml} data=shapes/data.yaml imgsz=64 epochs=1 batch=4 device=cpu workers=0"
    )
    assert status == 0, said
    assert list((folder).glob("*.png"))


def test_reports_take_any_name(tmp_path):
    odd = [NAME, "{{ 7 * 7 }}", "{% raise %}", "</td>", "a|b", "items", "None", "\udcff", "\x00", "", 7]
    layers = [{"name": n, "before": 8, "after": 4, "reason": n, "coupled": [n]} for n in odd]
    options = {str(n): [n, n] for n in odd}
    report = {"title": NAME, "layers": layers, "options": options, "about": options,
              "notes": [str(n) for n in odd], "command": NAME,
              "checks": [{"name": n, "value": n, "limit": n, "passed": True} for n in odd],
              "comparison": [{"name": n, "params": 1} for n in odd],
              "quantization": {"convs": 1, "int8_convs": 1, "float": {str(n): n for n in odd}},
              "summary": {"before": {"map": 0.5}, "after": {"map": 0.5}, "stages": {str(n): {"map": 0.5} for n in odd},
                          "comparison": {"settings": NAME, "ratio": None}}}  # fmt: skip
    page = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert NAME in page and "{{ 7 * 7 }}" in page and "49" not in page.split("</style>")[1]
    assert NAME in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["title"] == NAME
