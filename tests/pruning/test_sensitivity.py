# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.analyze import losses_table, measure_sensitivity, write
from yolo_ext.pruning.evidence import Probes
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.plan import by_sensitivity, read_sensitivity
from yolo_ext.reporting.figures import drops, plot_sensitivity

CFG = PruneConfig(method="l1", include=["model.0", "model.1", "model.2"])
LOSSES = {"box_loss", "cls_loss", "dfl_loss"}


def batch() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.4, 0.6, 0.5, 0.3]])
    labels = {"cls": torch.zeros(2, 1), "bboxes": boxes, "batch_idx": torch.tensor([0.0, 1.0])}
    return [{"img": torch.rand(2, 3, 64, 64, generator=generator), **labels}]


def probes(fail_after: int = 10**6, calls: list | None = None) -> Probes:
    """Return probes whose score is the share of parameters left, and that die after some scores."""
    calls = [] if calls is None else calls

    def score(model) -> float:
        if len(calls) == fail_after:
            raise KeyboardInterrupt
        calls.append(1)
        return sum(p.numel() for p in model.parameters()) / 4e6

    return Probes(batches=batch, images=lambda: (b["img"] for b in batch()), accuracy=lambda m: {"map": score(m)})


@pytest.fixture(scope="module")
def found(yolo):
    model = yolo("yolov8n")
    return measure_sensitivity(model, build_graph(model), CFG, probes(), (0.75, 0.25))


@pytest.mark.slow
def test_curves(yolo, found) -> None:
    assert found["complete"] and found["metric"] == "mAP50-95" and found["ratios"] == [0.25, 0.75]
    names = [g["name"] for g in found["groups"]]
    assert names == ["model.0.conv", "model.1.conv", "model.2.cv1.conv", "model.2.cv2.conv", "model.2.m.0.cv1.conv"]
    block = found["groups"][2]
    assert block["layers"] == ["model.2.cv1.conv", "model.2.m.0.cv2.conv"] and block["channels"] == 32
    assert [p["channels"] for p in block["curve"]] == [24, 8]
    assert [p["ratio"] for p in block["curve"]] == [0.25, 0.75]
    for group in found["groups"]:
        maps = [found["base"]["map"], *(p["map"] for p in group["curve"])]
        assert maps == sorted(maps, reverse=True) and len(set(maps)) == 3
        assert set(group["curve"][0]) == {"wanted", "ratio", "channels", "map", *LOSSES}
        assert 0 < group["flops_share"] < 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_base_is_recalibrated_like_all_others(yolo, found) -> None:
    from yolo_ext.pruning.evidence import task_losses

    assert found["trained"] == found["base"]["map"]  # this score does not look at BatchNorm
    as_trained = task_losses(yolo("yolov8n"), batch())
    assert any(abs(found["base"][k] - v) > 1e-6 for k, v in as_trained.items())
    model = yolo("yolov8n")
    cfg = replace(CFG, recalibrate=0, include=["model.0"])
    without = measure_sensitivity(model, build_graph(model), cfg, probes(), (0.5,))
    assert {k: without["base"][k] for k in LOSSES} == pytest.approx(as_trained)


def test_ratios_that_round_to_one_width_give_one_point(yolo) -> None:
    model = yolo("yolov8n")
    cfg = replace(CFG, include=["model.0"])
    found = measure_sensitivity(model, build_graph(model), cfg, probes(), (0.01, 0.49, 0.5, 0.51))
    points = found["groups"][0]["curve"]
    assert [(p["wanted"], p["channels"]) for p in points] == [(0.49, 8)]


@pytest.mark.slow
def test_importances_of_torch_pruning_rank_here_too(yolo) -> None:
    model, cfg = yolo("yolov8n"), replace(CFG, method="tp:LAMPImportance", include=["model.1"], recalibrate=0)
    found = measure_sensitivity(model, build_graph(model), cfg, probes(), (0.5,))
    assert [p["channels"] for p in found["groups"][0]["curve"]] == [16] and found["key"]["method"] == cfg.method


@pytest.mark.slow
def test_a_killed_analysis_goes_on(yolo, found, tmp_path: Path) -> None:
    model = yolo("yolov8n")
    with pytest.raises(KeyboardInterrupt):  # two scores before the first group, two for each group
        measure_sensitivity(model, build_graph(model), CFG, probes(fail_after=7), (0.25, 0.75), tmp_path)
    partial = json.loads((tmp_path / "sensitivity.json").read_text())
    assert len(partial["groups"]) == 2 and not partial["complete"]
    calls: list[int] = []
    again = measure_sensitivity(model, build_graph(model), CFG, probes(calls=calls), (0.25, 0.75), tmp_path)
    assert len(calls) == 2 + 3 * 2 and again == found
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda old: old["key"].update(method="l2"), id="criterion"),
        pytest.param(lambda old: old["key"].update(model="other"), id="model"),
        pytest.param(lambda old: old["base"].update(box_loss=99.0), id="data"),
        pytest.param(lambda old: old.update(ratios=[0.5]), id="ratios"),
        pytest.param(lambda old: old.clear(), id="not ours"),
    ],
)
def test_another_analysis_is_not_overwritten(yolo, found, tmp_path: Path, change) -> None:
    old = json.loads(json.dumps(found))
    change(old)
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(old))
    model = yolo("yolov8n")
    with pytest.raises(UsageError, match="belongs to another model, other options or other data"):
        measure_sensitivity(model, build_graph(model), CFG, probes(), (0.25, 0.75), tmp_path)
    assert json.loads(file.read_text()) == old


@pytest.mark.parametrize(
    ("given", "ratios", "message"),
    [
        pytest.param(Probes(), (0.5,), "Give data=", id="no data"),
        pytest.param(probes(), (), "at least one", id="no ratios"),
        pytest.param(probes(), (0.5, 1.0), "below 1", id="all channels"),
        pytest.param(probes(), (0.0,), "above 0", id="no channels"),
    ],
)
def test_wrong_input(yolo, given: Probes, ratios: tuple, message: str) -> None:
    model = yolo("yolov8n")
    with pytest.raises(UsageError, match=message):
        measure_sensitivity(model, build_graph(model), CFG, given, ratios)


@pytest.mark.slow
def test_files(yolo, found, tmp_path: Path) -> None:
    files = write(found, tmp_path / "out")
    assert [f.name for f in files] == ["sensitivity.json", "sensitivity.csv", "sensitivity.png"]
    rows = list(csv.DictReader(files[1].open()))
    assert len(rows) == 10 and set(rows[0]) >= LOSSES
    assert float(rows[0]["map_drop"]) == pytest.approx(found["base"]["map"] - found["groups"][0]["curve"][0]["map"])
    assert cv2.imread(str(files[2])).std() > 5
    model = yolo("yolov8n")
    made = tied_groups(model, build_graph(model), CFG)  # fresh graph: the groups of the same options
    steps = by_sensitivity(made, read_sensitivity(str(files[0])))
    assert steps(0.0) == [b.units for b in made] and sum(steps(1.0)) < sum(steps(0.0))


def curves(n: int) -> dict:
    groups = [
        {"name": f"model.{i}.conv", "curve": [{"wanted": 0.5, "ratio": 0.5, "map": 0.5 - 0.001 * i}]} for i in range(n)
    ]
    return {"metric": "mAP50-95", "ratios": [0.25, 0.5], "trained": 0.6, "base": {"map": 0.5}, "groups": groups}


def test_drops_leave_gaps() -> None:
    table = drops(curves(3))
    assert np.isnan(table[:, 0]).all() and table[:, 1] == pytest.approx([0.0, 0.001, 0.002])


def test_table_of_losses_shows_the_worst_first() -> None:
    found = curves(17)
    for group in found["groups"]:
        group.update(channels=8, flops_share=0.05)
    title, head, _, first, *_, last = losses_table(found, 64).splitlines()
    assert title == "mAP50-95 at 64 px that is lost with one group pruned alone, of 0.5000"
    assert head.endswith("25% pruned | 50% pruned")
    assert first.split(" | ") == ["model.16.conv", "       8", " 5.0%", "         -", "    0.0160"]
    assert last == "2 more groups with smaller losses"


@pytest.mark.parametrize("n", [1, 300], ids=["one", "many"])
def test_plot_of_any_number_of_layers(tmp_path: Path, n: int) -> None:
    image = cv2.imread(str(plot_sensitivity(curves(n), tmp_path / "deep" / "plot.png")))
    assert 500 < image.shape[0] < 4200 and image.shape[1] == 1800
