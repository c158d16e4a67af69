# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import gc
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment import latency
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.latency import bench, measure, speedup


def test_every_model_runs_once_per_round_in_changing_order():
    calls: list[str] = []
    found = measure({n: partial(calls.append, n) for n in "abc"}, rounds=40, warmup=2)
    timed = calls[6:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len(set(rounds)) == 6  # no model always follows the same other one
    assert {e["n"] for e in found.values()} == {40}


def test_times_are_milliseconds():
    entry = measure({"nap": lambda: time.sleep(0.005)}, rounds=10, warmup=0)["nap"]
    assert 5 <= entry["p10"] <= entry["median"] <= entry["p90"] < 500


def test_time_limit_keeps_ten_rounds_and_ends_the_bar(capsys):
    found = measure({"nap": lambda: time.sleep(0.001)}, rounds=500, warmup=0, seconds=0.0, name="Naps")
    assert found["nap"]["n"] == 10 and "Naps: 100%" in capsys.readouterr().out


def test_collector_is_restored_after_a_failure():
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        measure({"bad": fail}, rounds=1, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(("runners", "rounds"), [({}, 5), ({"a": int}, 0)], ids=["nothing", "no-rounds"])
def test_nothing_to_measure(runners, rounds):
    with pytest.raises(UsageError, match="Cannot measure"):
        measure(runners, rounds=rounds)


@pytest.mark.parametrize(
    ("before", "after", "ratio", "significant"),
    [
        pytest.param([2.0] * 20, [1.0] * 20, 2.0, True, id="faster"),
        pytest.param([1.0] * 20, [2.0] * 20, 0.5, True, id="slower"),
        pytest.param([1.0, 2.0] * 10, [1.5] * 20, 1.0, False, id="inside-the-noise"),
        pytest.param([2.0] * 15 + [1.0] * 5, [1.5] * 20, 4 / 3, False, id="three-in-four-rounds"),
        pytest.param([2.0] * 9, [1.0] * 9, 2.0, False, id="too-few-rounds"),
        pytest.param([1.0, 9.0] * 10, [0.5, 4.5] * 10, 2.0, True, id="common-load-cancels"),
    ],
)
def test_speedup(before, after, ratio, significant):
    found = speedup({"samples": before}, {"samples": after})
    assert found["ratio"] == pytest.approx(ratio)
    assert bool(found["significant"]) is significant


@given(st.lists(st.floats(0.1, 100.0), min_size=10, max_size=40))
def test_a_model_is_never_faster_than_itself(samples):
    assert not speedup({"samples": samples}, {"samples": samples})["significant"]


def test_unpaired_runs_are_refused():
    with pytest.raises(UsageError, match="cannot be paired"):
        speedup({"samples": [1.0] * 10}, {"samples": [1.0] * 11})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    torch.save({"model": model}, folder / "m.pt")
    return {"torch": folder / "m.pt", "ort": export_onnx(model, folder / "m.onnx", 64)}


@pytest.mark.slow
def test_bench_opens_a_session_more_behind_the_others(files, monkeypatch):
    opened = []
    stock = latency.RUNNERS["ort"]
    monkeypatch.setitem(latency.RUNNERS, "ort", lambda path, *args: opened.append(path) or stock(path, *args))
    onnx, pt = files["ort"], files["torch"]
    assert list(bench({"a": onnx, "b": onnx, "c": pt}, 64, rounds=2)) == ["a", "b", "c"]
    assert opened == [onnx] * 3  # the one that is opened last is faster than copies of it
    bench({"c": pt}, 64, rounds=2)
    assert len(opened) == 3


@pytest.mark.slow
def test_bench_both_runtimes(files):
    threads = torch.get_num_threads()
    found = bench(files, 64, rounds=3, threads=1)
    assert {n: e["runtime"] for n, e in found.items()} == {"torch": "torch", "ort": "ort"}
    assert all(e["median"] > 0 and e["threads"] == 1 and e["batch"] == 1 and e["imgsz"] == 64 for e in found.values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"imgsz": 96}, "static graph", id="imgsz"),
        pytest.param({"imgsz": 64, "batch": 2}, "static graph", id="batch"),
    ],
)
def test_bench_refuses_what_a_static_graph_cannot_run(change, text, files):
    with pytest.raises(UsageError, match=text):
        bench({"ort": files["ort"]}, **change)


@pytest.mark.parametrize("name", ["m.txt", "absent.onnx", "absent.pt"])
def test_bench_wrong_file(name, tmp_path):
    with pytest.raises(UsageError, match=name):
        bench({"x": tmp_path / name}, 64)
