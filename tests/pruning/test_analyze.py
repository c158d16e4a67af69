# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from ultralytics.nn.tasks import ClassificationModel

from yolo_ext import stock
from yolo_ext.core.config import PruneConfig
from yolo_ext.pruning import analyze
from yolo_ext.pruning.analyze import analyze_model, group_shares, layer_times, table
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.solve import layer_flops

FAMILIES = ["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"]


@pytest.fixture(scope="module", autouse=True)
def own_time():
    """Read the clock of this thread, which stands still while others have the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "time", SimpleNamespace(perf_counter=time.thread_time))
        yield


@pytest.fixture(scope="module")
def rows(yolo, own_time):
    return analyze_model(yolo("yolov8n"), 64, runs=3)


@pytest.mark.slow
def test_every_group_has_a_row_with_its_cost(yolo, rows) -> None:
    assert [r["name"] for r in rows] == [g.name for g in build_graph(yolo("yolov8n"), 64).groups]
    assert sum(r["flops_share"] for r in rows) == pytest.approx(1.0)
    assert 0.3 < sum(r["latency_share"] or 0 for r in rows) < 1.0
    assert all(r["latency_share"] is None or 0 < r["latency_share"] < 1 for r in rows)
    assert all(r["flops_share"] > 0 for r in rows)
    assert len({(r["name"], r["part"]) for r in rows}) == len(rows)


def test_members_and_reasons(rows) -> None:
    found = {(r["name"], r["part"]): r for r in rows}
    second = found["model.2.cv1.conv", "16:32"]  # the residual of the C2f block
    assert second["layers"] == ["model.2.cv1.conv", "model.2.m.0.cv2.conv"]
    assert second["readers"] == ["model.2.cv2.conv", "model.2.m.0.cv1.conv"] and second["prunable"]
    output = found["model.22.cv2.0.2", ""]
    assert not output["prunable"] and "head output" in output["reason"]


def test_table(rows) -> None:
    rows = [{**r, "latency_share": 0.01} for r in rows]
    text = table(rows, 64).splitlines()
    assert text[0].split() == ["Group", "|", "Channels", "|", "FLOPs", "|", "Latency", "|", "Prunable"]
    assert len(text) == len(rows) + 3
    assert any(line.startswith("model.2.cv1.conv[16:32] +1 ") for line in text)
    n = sum(r["prunable"] for r in rows)
    assert text[-1].startswith(f"{n} of {len(rows)} groups can be pruned: ")
    assert text[-1].endswith(f" of the FLOPs, {n}% of the latency (torch, 1 thread, 64 px)")


def test_what_differs_from_pass_to_pass_by_more_than_it_is_is_no_share(yolo, monkeypatch) -> None:
    def times(model, imgsz, runs):  # of the stem all passes say the same, of the others none
        return [{"": 10.0, **dict.fromkeys(stock.deployed_layers(model), i), "model.0.conv": 2.0} for i in range(runs)]

    monkeypatch.setattr(analyze, "layer_times", times)
    found = analyze_model(yolo("yolov8n"), 64, 5)
    assert [r["latency_share"] for r in found] == [0.2, *[None] * (len(found) - 1)]
    *_, noise, last = table(found, 64).splitlines()
    assert noise.startswith(f"- The latency of these {len(found) - 1} groups is not known") and "at least 20%" in last
    nothing = table(found[1:], 64)
    assert "Latency |" not in nothing and "The latency of no group is known" in nothing
    assert nothing.endswith("of the FLOPs at 64 px")


def test_the_model_is_not_changed(yolo) -> None:
    model = yolo("yolov8n")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads, training = torch.get_num_threads(), model.training
    analyze_model(model, 64, runs=1)
    assert not model.is_fused() and model.training == training and torch.get_num_threads() == threads
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_classifier() -> None:
    rows = analyze_model(ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False), 64, runs=1)
    assert sum(r["flops_share"] for r in rows) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name",
    [
        "yolov8n",
        "yolo11n",
        *(pytest.param(f, marks=pytest.mark.matrix) for f in FAMILIES if f not in ("yolov8n", "yolo11n")),
    ],
)
def test_figures_of_a_family(yolo, name: str) -> None:
    model = yolo(name)
    graph = build_graph(model, 64)
    costs = layer_flops(model, graph)
    assert sum(costs.values()) == pytest.approx(stock.gflops(model, 64) * 1e9, rel=0.03)  # which counts norms and pools
    times = layer_times(model, 64, runs=2)[-1]
    whole = times.pop("")
    assert set(costs) <= set(times) <= stock.deployed_layers(model)
    assert 0.2 < sum(times.values()) / whole < 1.0
    assert (
        0.95 < sum(group_shares(graph, costs, sum(costs.values()))) <= 1.0 + 1e-9
    )  # query and key rows are in no group
    names = [b.name for b in tied_groups(model, graph, PruneConfig())]
    assert len(set(names)) == len(names)
