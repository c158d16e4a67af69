# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Before | After | Delta: wording, comparisons, what happens where a figure is absent, and the verdict of a run."""

from __future__ import annotations

import json
import re
from html import unescape

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.reporting.pages import write_report
from yolo_ext.reporting.tables import (
    FIELDS,
    align,
    compare,
    comparison_rows,
    comparison_table,
    figure,
    headline,
    judged,
    note,
    speed,
    stage_rows,
    write_summary,
)


def ratio(median: float, low: float, high: float, significant: bool = True) -> dict:
    return {"ratio": median, "p10": low, "p90": high, "significant": significant}


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
    "latency_ratio": {"torch": ratio(0.8, 0.78, 0.83), "ort": ratio(1.3, 1.2, 1.4), "ort_int8": ratio(2.6, 2.4, 2.8)},
    "imgsz": 192,
    "images": 72,
}
CONTRACT = {"changes": [
    {"name": "map", "low": -0.0312, "high": -0.0088, "verdict": "worse"},
    {"name": "map.person", "low": -0.2, "high": 0.1, "verdict": "undecided"},
]}  # fmt: skip
EXPECTED = {  # key: before, after, delta, verdict
    "params": ("3,011,043", "1,505,521", "-50.0%", "better"),
    "gflops": ("8.20", "4.10", "-50.0%", "better"),
    "size_mb": ("6.20", "6.20", "0.0%", "same"),
    "map50": ("0.9000", "0.9100", "+0.0100", ""),  # without an interval a change decides nothing
    "map": ("0.6000", "0.5912", "-0.0088", ""),
    "map_onnx.fp32": ("0.6000", "0.5900", "-0.0100", ""),
    "map_onnx.int8": ("0.6000", "0.5800", "-0.0200 (-0.0312 to -0.0088: worse)", "worse"),  # of the file to deploy
    "latency_ms.torch": ("20.00", "25.00", "0.80x as fast (0.78 to 0.83)", "worse"),
    "latency_ms.ort": ("10.00", "8.00", "1.30x faster (1.20 to 1.40)", "better"),
    "latency_ms.ort_int8": ("10.00", "4.00", "2.60x faster (2.40 to 2.80)", "better"),
    "convs": ("64", "64", "0", ""),
    "int8_convs": ("0", "61", "+61", ""),
}


@pytest.mark.parametrize("key", EXPECTED)
def test_row_of_every_figure(key: str) -> None:
    row = next(r for r in comparison_rows(BEFORE, AFTER, CONTRACT) if r.key == key)
    assert (row.before, row.after, row.delta, row.verdict) == EXPECTED[key]


def test_every_field_is_expected_once_and_in_order() -> None:
    assert [r.key for r in comparison_rows(BEFORE, AFTER)] == list(EXPECTED)
    others = ("map_mask", "map_pose", "top1", "top5")  # of other tasks
    assert list(EXPECTED) == [f.key for f in FIELDS if not f.key.startswith(others)]


def test_int8_names_the_base_figure_it_is_compared_with() -> None:
    labels = {r.key: r.label for r in comparison_rows(BEFORE, AFTER)}
    assert labels["latency_ms.ort_int8"] == "Latency ORT INT8 (ms), before: ORT FP32"
    assert labels["map_onnx.int8"] == "mAP50-95 ONNX INT8, before: ONNX FP32"


def test_int8_of_the_base_is_used_where_it_was_measured() -> None:
    before = {"latency_ms": {"ort": 10.0, "ort_int8": 5.0}}
    after = {"latency_ms": {"ort_int8": 4.0}, "latency_ratio": {"ort_int8": ratio(1.2, 1.1, 1.3)}}
    (ort, int8) = comparison_rows(before, after)
    assert (ort.after, ort.delta) == ("-", "-")
    assert (int8.label, int8.delta) == ("Latency ORT INT8 (ms)", "1.20x faster (1.10 to 1.30)")


def test_table_is_aligned_and_marks_worse_results() -> None:
    lines = comparison_table({**BEFORE, "size_mb": 3.0}, AFTER, CONTRACT).splitlines()
    assert lines[0] == f"{'':39} | {'Before':>9} | {'After':>9} | {'Delta':>35}"
    assert len({line.index("|") for line in [lines[0], *lines[2:]]}) == 1
    assert lines[4] == f"{'File size (MB)':39} |      3.00 |      6.20 |                     +106.7% (worse)"
    assert lines[8].endswith("| -0.0200 (-0.0312 to -0.0088: worse)")
    assert "0.80x as fast" in lines[9] and "(worse)" not in lines[9]


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


@given(st.floats(0.01, 1e4, allow_nan=False), st.floats(0.01, 1e4, allow_nan=False))
def test_swapping_the_sides_swaps_the_verdict(a: float, b: float) -> None:
    verdicts = {compare(a, b, "share")[1], compare(b, a, "share")[1]}
    assert verdicts == {"better", "worse"} or "same" in verdicts  # one close to 0 % can round away in one direction


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


SPEEDS = {
    "none": (None, "-", ""),
    "faster": (ratio(2.74, 2.58, 2.98), "2.74x faster (2.58 to 2.98)", "better"),
    "slower": (ratio(0.61, 0.58, 0.65), "0.61x as fast (0.58 to 0.65)", "worse"),
    "within the spread": (ratio(1.03, 0.98, 1.2, False), "same (0.98 to 1.20x)", "same"),
    "a spread that shows nothing": (ratio(1.9, 0.98, 3.1, False), "unclear (0.98 to 3.10x)", "same"),
    "no more than its rounding": (ratio(1.004, 1.001, 1.01), "same (1.00 to 1.01x)", "same"),
}


@pytest.mark.parametrize(("found", "words", "verdict"), SPEEDS.values(), ids=SPEEDS)
def test_a_speed_up_claims_no_more_than_its_rounds(found, words, verdict):
    assert speed(found) == (words, verdict)


def test_medians_are_never_divided():
    before, after = {"latency_ms": {"ort": 10.0}}, {"latency_ms": {"ort": 5.0, "torch": 3.0}}
    for ratios, delta in (
        (None, "-"),
        ({"ort": None}, "-"),
        ({"ort": ratio(1.9, 1.8, 2), "torch": ratio(9, 8, 10)}, "1.90x"),
    ):
        rows = {r.key: r for r in comparison_rows(before, {**after, "latency_ratio": ratios})}
        assert rows["latency_ms.ort"].delta.startswith(delta) and rows["latency_ms.ort"].after == "5.00"
        assert rows["latency_ms.torch"].delta == "-", "the base was not measured there"


VERDICTS = {
    "same": (-0.003, 0.003, "-0.0030 (-0.0030 to +0.0030: same)"),
    "worse": (-0.02, -0.001, "-0.0030 (-0.0200 to -0.0010: worse)"),
    "better": (0.001, 0.02, "-0.0030 (+0.0010 to +0.0200: better)"),
    "undecided": (-0.01, 0.004, "-0.0030 (-0.0100 to +0.0040: not decidable)"),
    "": (None, None, "-0.0030"),
}


@pytest.mark.parametrize(("verdict", "low", "high", "delta"), [(k, *v) for k, v in VERDICTS.items()], ids=VERDICTS)
@pytest.mark.parametrize("key", ["map", "map_mask", "map_pose", "top1", "top5"])
def test_an_accuracy_is_what_its_interval_says(key, verdict, low, high, delta):
    contract = {"changes": [{"name": key, "low": low, "high": high, "verdict": verdict}] if verdict else []}
    (row,) = comparison_rows({key: 0.55}, {key: 0.547}, contract)
    assert (row.delta, row.verdict) == (delta, verdict)
    model, int8 = comparison_rows({key: 0.55}, {key: 0.55, f"{key}_onnx": {"int8": 0.547}}, contract)
    assert (model.delta, model.verdict) == ("0.0000", "") and (int8.delta, int8.verdict) == (delta, verdict)


@pytest.mark.parametrize(("after", "verdict"), [(3.94, "same"), (3.96, "worse"), (3.0, "better")])
def test_notes_beside_the_weights_are_no_growth(after, verdict):
    assert comparison_rows({"size_mb": 3.91}, {"size_mb": after, "images": 72})[0].verdict == verdict


def test_note_says_what_was_measured():
    assert note(AFTER) == "Measured at 192 px (square images) on 72 images."
    assert note({"gflops": 1.0, "imgsz": 64}) == "Measured at 64 px (square images)." and note({}) == note(None) == ""
    assert note({}, CONTRACT) == "In brackets: what an accuracy may change by on other images like these."


COUNTS = {
    "of the INT8 file": ({"map": 0.5, "map_onnx": {"int8": 0.4}}, "map_onnx.int8"),
    "of the model": ({"map": 0.5, "map_onnx": {"int8": None}}, "map"),
    "masks lost more": ({"map": 0.59, "map_mask": 0.3}, "map_mask"),
    "boxes lost more": ({"map": 0.3, "map_mask": 0.39}, "map"),
    "masks of the INT8 file": (
        {"map": 0.1, "map_onnx": {"int8": 0.6}, "map_mask": 0.4, "map_mask_onnx": {"int8": 0.3}}, "map_mask_onnx.int8",
    ),
    "keypoints": ({"map": 0.6, "map_pose": 0.2}, "map_pose"),
    "top-1": ({"top1": 0.5, "top5": 1.0}, "top1"),
    "top-5": ({"top1": 0.9, "top5": 0.9}, "top5"),
    "none": ({}, None),
}  # fmt: skip


@pytest.mark.parametrize(("after", "key"), COUNTS.values(), ids=COUNTS)
def test_the_accuracy_that_counts_is_the_one_that_lost_most_in_the_file_to_deploy(after, key):
    before = {"map": 0.6, "map_mask": 0.4, "map_pose": 0.4, "top1": 0.8, "top5": 1.0}
    row = judged(comparison_rows(before, after))
    assert (row and row.key) == key


# The verdict of a run ------------------------------------------------------------------------------------------------
GOOD = {**AFTER, "map": 0.602, "map_onnx": {"fp32": 0.602, "int8": 0.603}}
FLOAT = {**AFTER, "map_onnx": {}, "latency_ms": {"ort": 8.0}}
PARITY = {"name": "INT8 boxes", "value": 2, "limit": 1, "passed": False}
SAME = {"low": -0.001, "high": 0.0049, "verdict": "same"}
BAD = {"name": "Accuracy lost in total (max_drop)", "value": 0.05, "limit": 0.01, "passed": False}
COMMAND = "yolo-ext compress model=a.pt data=d.yaml --epochs=30 resume=True"
HEADLINES = {
    "all is well": (
        GOOD, {"epochs": 30, "deploy": "onnx/int8.onnx"}, [],
        "2.60x faster (2.40 to 2.80) in ONNX Runtime INT8, 6.20 MB, mAP50-95 0.6000 -> 0.6030 at 192 px (+0.0030; "
        "-0.0010 to +0.0049: same). Deploy onnx/int8.onnx.",
    ),
    "lost by pruning": (
        FLOAT, {"epochs": 30, "deploy": "weights/best.pt"}, [],
        "1.30x faster (1.20 to 1.40) in ONNX Runtime, 6.20 MB, mAP50-95 fell by 0.0088 (0.6000 -> 0.5912 at 192 px; "
        "-0.0200 to -0.0060: worse). Fine-tune longer: yolo-ext compress model=a.pt data=d.yaml epochs=60",
    ),
    "lost by INT8": (
        {**GOOD, "map_onnx": {"int8": 0.5}}, {"epochs": 30}, [],
        "2.60x faster (2.40 to 2.80) in ONNX Runtime INT8, 6.20 MB, mAP50-95 fell by 0.1000 (0.6000 -> 0.5000 at 192 "
        "px; -0.0200 to -0.0060: worse). Train the INT8 model: yolo-ext compress model=a.pt data=d.yaml --epochs=30 "
        "quant.mode=qat quant.epochs=10",
    ),
    "lost by INT8 after QAT": (
        {**GOOD, "map_onnx": {"int8": 0.5}}, {"epochs": None, "qat": 8}, [],
        "Train the INT8 model longer: yolo-ext compress model=a.pt data=d.yaml --epochs=30 quant.mode=qat "
        "quant.epochs=16",
    ),
    "nothing measured, nothing trained": (
        {"params": 9, "gflops": 4.1, "imgsz": 64}, {"epochs": 0, "deploy": "weights/best.pt"}, [],
        "GFLOPs -50.0%, accuracy not measured. Nothing was fine-tuned. Fine-tune: yolo-ext compress model=a.pt "
        "data=data.yaml epochs=30",
    ),
    "a check failed": (
        GOOD, {"epochs": 30, "deploy": "onnx/int8.onnx"}, [PARITY],
        "1 of 1 checks failed: INT8 boxes 2 (limit 1). 2.60x faster (2.40 to 2.80) in ONNX Runtime INT8, 6.20 MB, "
        "mAP50-95 0.6000 -> 0.6030 at 192 px (+0.0030; -0.0010 to +0.0049: same).",
    ),
    "the budget in total failed": (
        FLOAT, {"epochs": 5}, [{**BAD, "passed": True}, BAD],
        "1 of 2 checks failed: Accuracy lost in total (max_drop) 0.05 (limit 0.01). 1.30x faster (1.20 to 1.40) in "
        "ONNX Runtime, 6.20 MB, mAP50-95 fell by 0.0088 (0.6000 -> 0.5912 at 192 px; -0.0200 to -0.0060: worse). "
        "Fine-tune longer: yolo-ext compress model=a.pt data=d.yaml epochs=10",
    ),
    "a broken contract": (
        GOOD, {"epochs": 30, "deploy": "onnx/int8.onnx"}, [{**BAD, "name": "contract recall.person"}],
        "1 of 1 checks failed: contract recall.person 0.05 (limit 0.01). 2.60x faster (2.40 to 2.80) in ONNX Runtime "
        "INT8, 6.20 MB, mAP50-95 0.6000 -> 0.6030 at 192 px (+0.0030; -0.0010 to +0.0049: same). Fine-tune longer: "
        "yolo-ext compress model=a.pt data=d.yaml epochs=60",
    ),
    "no faster, better, INT8 accuracy unknown": (
        {"map": 0.7, "latency_ms": {"ort_int8": 9.0}, "latency_ratio": {"ort_int8": ratio(1, 0.9, 1.1, False)}},
        {"deploy": "onnx/int8.onnx"}, [],
        "as fast (0.90 to 1.10x) in ONNX Runtime INT8, mAP50-95 0.6000 -> 0.7000 (+0.1000). The accuracy "
        "of the INT8 file was not measured. Deploy onnx/int8.onnx.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("after", "told", "checks", "expected"), HEADLINES.values(), ids=HEADLINES)
def test_headline(after, told, checks, expected):
    worse = {"low": -0.02, "high": -0.006, "verdict": "worse"}
    change = {"name": "map", **(worse if "fell by" in expected or told.get("qat") else SAME)}
    contract = {"changes": [change] if "images" in after else []}
    summary = {"before": BEFORE, "after": after, "checks": checks, "command": COMMAND, "contract": contract}
    said, following = headline(summary, {**told, "next": "yolo-ext quantize"})
    assert said.endswith(expected) if told.get("qat") else said == expected
    assert (following is not None) == ("Deploy" in said), "nothing is to be done with what is not good"
    assert "yolo-ext" not in headline({**summary, "command": "train.py epochs=30"}, told)[0]


def test_summary_of_a_run_and_its_row_in_a_table_of_runs(tmp_path, caplog):
    told = {"settings": {"imgsz": 64, "prune.speedup": 2.0}, "method": "prune taylor", "ratio": 0.4, "training_s": 12.5}
    told |= {"checks": [BAD], "deploy": "onnx/int8.onnx", "epochs": 3, "contract": CONTRACT}
    summary = write_summary(tmp_path, BEFORE, AFTER, **told)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["passed"] is False and summary["checks"] == [BAD] and summary["deploy"] == "onnx/int8.onnx"
    assert comparison_table(BEFORE, AFTER, CONTRACT) in caplog.text and note(AFTER, CONTRACT) in caplog.text
    assert summary["comparison"] == {
        "settings": "imgsz=64 prune.speedup=2.0",
        "method": "prune taylor",
        "ratio": 0.4,
        "params": 1_505_521,
        "params_change": "-50.0%",
        "gflops": 4.1,
        "gflops_change": "-50.0%",
        "size_mb": 6.2,
        "accuracy": 0.58,
        "accuracy_change": "-0.0200 (-0.0312 to -0.0088: worse)",
        "latency_ms": 4.0,
        "latency_batch32_ms": None,
        "training_s": 12.5,
        "conclusion": summary["headline"],
    }


def test_a_command_that_changes_nothing_shows_no_table(tmp_path, caplog):
    summary = write_summary(tmp_path, BEFORE, BEFORE, table=False)
    assert not caplog.text and summary["headline"] is None and summary["passed"] is True


def test_one_run_has_one_number_for_each_figure(tmp_path, caplog):
    """Console, summary.json, report.html and report.md say the same."""
    summary = write_summary(tmp_path, BEFORE, AFTER, {"ptq": AFTER}, deploy="onnx/int8.onnx", epochs=30)
    write_report(tmp_path, {"summary": summary})
    texts = {f: unescape(re.sub(r"<[^>]+>", " ", (tmp_path / f).read_text())) for f in ("report.html", "report.md")}
    texts |= {"console": caplog.text, "headline": summary["headline"]}
    for row in comparison_rows(summary["before"], summary["after"]):
        shown = {row.before, row.after, row.delta.partition(" (")[0]} - {"-"}
        for place in ("console", "report.html", "report.md"):
            assert all(text in texts[place] for text in shown), (place, row)
    assert all(summary["headline"] in texts[place] for place in ("report.html", "report.md"))
    for text in texts.values():
        found = set(re.findall(r"\b(\d+\.\d\d)x\b", text))
        assert found <= {"2.60", "1.30", "0.80"}, "no ratio but those of the rounds"
