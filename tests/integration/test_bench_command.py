# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The command bench on the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from yolo_ext import cli
from yolo_ext.deployment.export import export_onnx


@pytest.fixture
def place(tiny, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, "tiny.pt")
    export_onnx("tiny.pt", "tiny.onnx", 64, dynamic=True)
    return tmp_path


@pytest.mark.slow
def test_bench_writes_all_it_measures(place, shapes):
    words = ["models=tiny.onnx,tiny.pt", "threads=1,2", "batch=1,2", "rounds=3", f"data={shapes}", "profile=True"]
    assert cli.main(["bench", *words, "imgsz=64", "save_dir=run"]) == 0
    folder = place / "run"
    found = json.loads((folder / "bench.json").read_text())
    assert [(r["threads"], r["batch"]) for r in found["rows"]][::2] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(0 < r["p10"] <= r["median"] <= r["p90"] for r in found["rows"])
    assert not found["rows"][0]["significant"]  # three rounds prove nothing
    for about in found["models"].values():
        assert about["peak_mb"] > about["runtime_mb"] > 0 and about["pre_ms"] > 0 and 0 <= about["map"] <= 1
    assert {"cpu", "governor", "load", "onnxruntime", "torch"} <= set(found["env"])
    assert set(found["profile"]) == {"tiny.onnx"} and found["profile"]["tiny.onnx"]["ops"][0]["ms"] > 0
    table = list(csv.DictReader((folder / "bench.csv").open()))
    assert len(table) == 8 and {"model", "median", "speedup", "size_mb", "peak_mb", "map"} <= set(table[0])
    assert (folder / "tradeoff.png").stat().st_size > 10_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["latency_ms"]["ort"] == found["rows"][0]["median"]


@pytest.mark.slow
def test_size_comes_from_the_file_and_extras_can_be_left_out(place):
    assert cli.main(["bench", "models=tiny.onnx", "rounds=2", "memory=False", "save_dir=run"]) == 0
    found = json.loads((place / "run/bench.json").read_text())
    assert found["imgsz"] == 64 and "noise" in found["image"]
    assert "profile" not in found and "peak_mb" not in found["models"]["tiny.onnx"]
    assert not (place / "run/tradeoff.png").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("threads=0", "threads=0", id="no-threads"),
        pytest.param("threads=1,x", "threads=1,x", id="threads-no-number"),
        pytest.param("batch=1.5", "batch=1.5", id="half-a-batch"),
        pytest.param("models=tiny.pt,gone.onnx", "gone.onnx", id="missing"),
        pytest.param("models=runs.txt", "runs.txt", id="other-kind"),
        pytest.param("source=gone.jpg", "gone.jpg", id="image"),
    ],
)
def test_wrong_options_of_bench(words, text, place, capfd):
    Path("runs.txt").write_text("")
    before = set(place.rglob("*"))
    assert cli.main(["bench", "models=tiny.onnx", "rounds=2", *words.split(), "save_dir=run"]) == 2
    assert text in capfd.readouterr().err
    assert set(place.rglob("*")) == before
