# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before | After | Delta: wording, comparisons and what happens where a figure is absent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.reporting.tables import (
    FIELDS,
    align,
    compare,
    comparison,
    comparison_rows,
    comparison_table,
    figure,
    stage_rows,
)

BEFORE = {
    "params": 3_011_043,
    "gflops": 8.2,
    "size_mb": 6.2,
    "map50": 0.9,
    "map": 0.6,
    "latency_ms": {"torch": 20.0, "ort": 10.0, "ort_int8": None},
    "map_onnx": {"fp32": 0.6, "int8": None},
    "convs": 64,
    "int8_convs": 0,
}
AFTER = {
    "params": 1_505_521,
    "gflops": 4.1,
    "size_mb": 6.2,
    "map50": 0.91,
    "map": 0.5912,
    "latency_ms": {"torch": 25.0, "ort": 8.0, "ort_int8": 4.0},
    "map_onnx": {"fp32": 0.59, "int8": 0.58},
    "convs": 64,
    "int8_convs": 61,
}
EXPECTED = {  # key: before, after, delta, verdict
    "params": ("3,011,043", "1,505,521", "-50.0%", "better"),
    "gflops": ("8.20", "4.10", "-50.0%", "better"),
    "size_mb": ("6.20", "6.20", "0.0%", "same"),
    "map50": ("0.9000", "0.9100", "+0.0100", "better"),
    "map": ("0.6000", "0.5912", "-0.0088", "worse"),
    "map_onnx.fp32": ("0.6000", "0.5900", "-0.0100", "worse"),
    "map_onnx.int8": ("0.6000", "0.5800", "-0.0200", "worse"),
    "latency_ms.torch": ("20.00", "25.00", "1.25x slower", "worse"),
    "latency_ms.ort": ("10.00", "8.00", "1.25x faster", "better"),
    "latency_ms.ort_int8": ("10.00", "4.00", "2.50x faster", "better"),
    "convs": ("64", "64", "0", ""),
    "int8_convs": ("0", "61", "+61", ""),
}


@pytest.mark.parametrize("key", EXPECTED)
def test_row_of_every_figure(key: str) -> None:
    row = next(r for r in comparison_rows(BEFORE, AFTER) if r.key == key)
    assert (row.before, row.after, row.delta, row.verdict) == EXPECTED[key]


def test_every_field_is_expected_once_and_in_order() -> None:
    assert [r.key for r in comparison_rows(BEFORE, AFTER)] == list(EXPECTED)
    assert list(EXPECTED) == [f.key for f in FIELDS if f.key != "top1"]  # that of classifiers, which have no mAP


def test_int8_names_the_base_figure_it_is_compared_with() -> None:
    labels = {r.key: r.label for r in comparison_rows(BEFORE, AFTER)}
    assert labels["latency_ms.ort_int8"] == "Latency ORT INT8 (ms), before: ORT FP32"
    assert labels["map_onnx.int8"] == "mAP50-95 ONNX INT8, before: ONNX FP32"


def test_int8_of_the_base_is_used_where_it_was_measured() -> None:
    before = {"latency_ms": {"ort": 10.0, "ort_int8": 5.0}}
    (ort, int8) = comparison_rows(before, {"latency_ms": {"ort_int8": 4.0}})
    assert (ort.after, ort.delta) == ("-", "-")
    assert (int8.label, int8.delta) == ("Latency ORT INT8 (ms)", "1.25x faster")


def test_table_is_aligned_and_marks_worse_results() -> None:
    lines = comparison_table(BEFORE, AFTER).splitlines()
    assert lines[0] == f"{'':39} | {'Before':>9} | {'After':>9} | {'Delta':>15}"
    assert len({line.index("|") for line in [lines[0], *lines[2:]]}) == 1
    assert lines[6] == f"{'mAP50-95':39} |    0.6000 |    0.5912 | -0.0088 (worse)"
    assert "1.25x slower" in lines[9] and "(worse)" not in lines[9]


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [
        pytest.param({}, {}, 0, id="empty"),
        pytest.param(None, None, 0, id="none"),
        pytest.param({"params": 5}, None, 1, id="only before"),
        pytest.param({"map": None, "latency_ms": None}, {"map": None, "latency_ms": {}}, 0, id="nulls"),
        pytest.param({"map": float("nan")}, {"map": float("inf")}, 0, id="not finite"),
        pytest.param({"gflops": 0.0}, {"gflops": 4.0}, 1, id="zero base has no ratio"),
    ],
)
def test_absent_figures_are_dashes_and_never_compared(before: dict | None, after: dict | None, rows: int) -> None:
    got = comparison_rows(before, after)
    assert len(got) == rows
    assert all(r.delta == "-" and r.verdict == "" for r in got)
    assert len(comparison_table(before, after).splitlines()) == 2 + rows


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int64(3)], ids=lambda v: type(v).__name__)
def test_figure_reads_any_real_number(value: object) -> None:
    assert figure({"latency_ms": {"ort": value}}, "latency_ms.ort") == 3.0


@pytest.mark.parametrize("value", [None, "3", True, {}, [1]], ids=repr)
def test_figure_rejects_what_is_no_number(value: object) -> None:
    assert figure({"map": value}, "map") is None


@given(
    st.sampled_from(["share", "score", "latency"]),
    st.floats(0.01, 1e4, allow_nan=False),
    st.floats(0.01, 1e4, allow_nan=False),
)
def test_swapping_the_sides_swaps_the_verdict(kind: str, a: float, b: float) -> None:
    verdicts = {compare(a, b, kind)[1], compare(b, a, kind)[1]}
    # A share close to 0 % can round away in one direction only.
    assert verdicts in ({"better", "worse"}, {"same"}) or (kind == "share" and "same" in verdicts)


def test_stages_have_only_measured_columns() -> None:
    stages = {"prune": {"params": 100, "map": 0.5}, "export": {"latency_ms": {"ort": 2.5}}, "label": None}
    header, rows = stage_rows(stages)
    assert header == ["Stage", "Params", "mAP50-95", "ORT FP32 (ms)"]
    assert rows == [["prune", "100", "0.5000", "-"], ["export", "-", "-", "2.50"], ["label", "-", "-", "-"]]


@given(st.lists(st.tuples(st.text("ab |", max_size=6), st.integers(), st.none()), max_size=5))
def test_align_keeps_every_row_and_its_separators_in_line(rows: list) -> None:
    lines = align(rows, ("name", "n", "x")).splitlines()
    assert len(lines) == len(rows) + 2
    widths = [len(part) for part in lines[1].split("-+-")]
    assert all(line[widths[0] : widths[0] + 3] == " | " for line in [lines[0], *lines[2:]])
    assert all(line == line.rstrip() for line in lines)


def test_latency_whose_rounds_do_not_agree_is_no_difference():
    before, after = {"latency_ms": {"ort": 10.0}}, {"latency_ms": {"ort": 8.0, "ort_int8": 4.0, "torch": 3.0}}
    for unsure, int8 in (([], "2.50x faster"), (["ort_int8", "torch"], "about equal")):
        after["latency_ms"]["unsure"] = unsure
        rows = {r.key.partition(".")[2]: r for r in comparison_rows(before, after)}
        assert [rows[k].delta for k in ("ort", "ort_int8")] == ["1.25x faster", int8]
        assert (rows["torch"].delta, rows["torch"].verdict) == ("-", "") and rows["ort_int8"].after == "4.00"


@pytest.mark.parametrize("after", [97.0, 100.0, 104.0])
def test_latency_within_the_noise_is_no_difference(after):
    assert compare(100.0, after, "latency") == ("about equal", "same")


def test_row_of_a_run_in_a_table_of_runs() -> None:
    summary = {"before": BEFORE, "after": AFTER, "settings": {"imgsz": 64, "prune.speedup": 2.0}}
    row = comparison(summary, {"method": "prune taylor", "ratio": 0.4, "training_s": 12.5, "failed": ["mAP drop"]})
    assert row == {
        "settings": "imgsz=64 prune.speedup=2.0",
        "method": "prune taylor",
        "ratio": 0.4,
        "params": 1_505_521,
        "params_change": "-50.0%",
        "gflops": 4.1,
        "gflops_change": "-50.0%",
        "size_mb": 6.2,
        "accuracy": 0.58,
        "accuracy_change": "-0.0200",
        "latency_ms": 4.0,
        "latency_batch32_ms": None,
        "training_s": 12.5,
        "conclusion": "Parameters -50.0%; GFLOPs -50.0%; mAP50-95 ONNX INT8 -0.0200; "
        "Latency ORT INT8 2.50x faster; checks failed: mAP drop.",
    }


@pytest.mark.parametrize(("after", "conclusion"), [({}, None), ({"params": 3_011_043, "map": 0.6}, "mAP50-95 0.0000.")])
def test_a_run_that_changed_nothing_concludes_nothing(after: dict, conclusion: str | None) -> None:
    row = comparison({"before": BEFORE, "after": after, "settings": {}}, {})
    assert row["conclusion"] == conclusion and row["latency_ms"] is None
