# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The report: complete, honest about what is missing or worse, escaped, and self-contained."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from copy import deepcopy
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from yolo_ext.pipeline.report import curves
from yolo_ext.reporting.figures import imwrite
from yolo_ext.reporting.pages import TEMPLATES, _data_url, render_review, write_report

SECTIONS = ("Contract", "Before and after", "Notes", "Stages", "Accuracy against latency", "Checks",
            "Images that changed most", "Latency", "For comparison", "Channels per layer", "Quantization",
            "Training curves", "Options", "Reproduce")  # fmt: skip
BEFORE = {
    **{"params": 3_000_000, "gflops": 8.2, "size_mb": 6.2, "map50": 0.9, "map": 0.6, "convs": 64, "int8_convs": 0},
    **{"latency_ms": {"torch": 20.0, "ort": 10.0, "ort_int8": None}, "map_onnx": {"fp32": 0.6, "int8": None}},
}
AFTER = {
    **{"params": 1_500_000, "gflops": 4.1, "size_mb": 3.1, "map50": 0.9, "map": 0.5912, "convs": 64, "int8_convs": 61},
    **{"latency_ms": {"torch": 25.0, "ort": 8.0, "ort_int8": 4.0}, "map_onnx": {"fp32": 0.59, "int8": 0.58}},
    "latency_ratio": {"ort_int8": {"ratio": 2.5, "p10": 2.4, "p90": 2.6, "significant": True}},
}
CHANGES = {  # by figure: before, after, low, high, verdict
    "map": (0.6, 0.5912, -0.02, 0.005, "undecided"), "map.cell": (0.61, 0.6, -0.03, 0.01, "undecided"),
    "map.rare": (0.2, 0.25, 0.01, 0.09, "better"), "size.small": (0.3, 0.28, -0.05, 0.01, "undecided"),
    "recall": (0.8, 0.8, -0.004, 0.004, "same"), "recall.rare": (0.7, 0.4, -0.4, -0.2, "worse"),
    "precision.rare": (0.7, 0.7, -0.01, 0.01, "undecided"),
}  # fmt: skip
CONTRACT = {
    "verdict": "mAP50-95 -0.0088, not decidable", "images": 40, "conf": 0.287, "same_recall": 0.265,
    "calibration": {"before": 0.031, "after": 0.045},
    "changes": [{"name": name, "before": before, "after": after, "change": after - before, "low": low, "high": high,
                 "verdict": verdict} for name, (before, after, low, high, verdict) in CHANGES.items()],
    "checks": [{"name": "contract map", "value": 0.005, "limit": -0.02, "passed": True},
               {"name": "contract recall.rare", "value": -0.2, "limit": -0.05, "passed": False}],
}  # fmt: skip
VOID = {"meta", "img", "circle", "line", "polyline", "rect", "path"}
HOSTILE = "<script>alert(1)</script>\"'&"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Collects what a page refers to and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "xlink:href")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""


def render(report: dict, folder: Path) -> str:
    return write_report(folder, report).read_text(encoding="utf-8")


@pytest.fixture
def report(tmp_path: Path) -> dict:
    imwrite(tmp_path / "side.jpg", np.zeros((8, 8, 3), np.uint8))
    return {
        "title": "YOLOv8n, twice as fast",
        "command": "yolo-ext compress model=base.pt prune.speedup=2",
        "summary": {
            "before": deepcopy(BEFORE),
            "after": deepcopy(AFTER),
            "contract": deepcopy(CONTRACT),
            "stages": {
                "prune": {"map": 0.2, "gflops": 4.1},
                "finetune": {"map": 0.5912, "gflops": 4.1},
                "quantize": {},
            },
            "env": {"device": "CPU", "threads": 1},
        },
        "layers": [
            {"name": "model.0.conv", "before": 16, "after": 8, "reason": None},
            {"name": "model.22.cv3", "before": 64, "after": 64, "reason": "Detect output"},
        ],
        "checks": [
            {"name": "max abs difference", "value": 2e-6, "limit": 1e-5, "passed": True},
            {"name": "mAP drop", "value": 0.02, "limit": 0.01, "passed": False},
        ],
        "pictures": [{"path": "side.jpg", "caption": "1 missed"}, {"path": "gone.jpg", "caption": "lost"}],
        "about": {"Model": "base.pt (detect, 2 classes)", "Images": "160 train, 40 val", "Image size": "192 px"},
        "files": {"before": "base/fp32.onnx", "after": "ptq/int8.onnx", "prune": "prune/pruned.pt"},
        "curves": [{"name": "finetune", "columns": {"train/box_loss": [2.0, 1.5], "metrics/mAP50(B)": [0.0, 0.5]}}],
        "latency": {
            "rows": [
                {"name": "base FP32", "median": 10.0, "p10": 9.0, "p90": 12.0},
                {"name": "compressed FP32", "median": 12.0, "p10": 9.0, "p90": 13.0},
                {"name": "compressed INT8", "median": 4.0, "p10": 3.5, "p90": 4.5},
                {"name": "int8", "median": None},
            ],
            "note": "1 thread, 200 runs",
        },
        "quantization": {
            "convs": 64,
            "int8_convs": 61,
            "float": {"model.22.dfl.conv": "constant weights"},
            "profile": "ort-x86",
            "calibration": {
                "images": 292,
                "hash": "ef53",
                "observer": "mse",
                "seed": 0,
                "weights": "max",
                "imgsz": 192,
            },
            "f1": {"fp32": {"f1": 0.835, "f1_conf": 0.287}, "int8": {"f1": 0.834, "f1_conf": None}},
            "parity": {"torch": {"box_mean": 0.1077, "score_max": 0.0368}, "simulation": {"box_max": 0.3826}},
        },
        "options": {"prune.speedup": [2.0, None], "prune.at": [[1, 5], []], "epochs": [20, 30]},
        "notes": ["PTQ missed the budget, so QAT ran."],
        "comparison": [
            {"name": "pruned", "params": 1_500_000, "gflops": 4.1, "map": 0.5912, "ort": 8.0},
            {"name": "yolov8n width 0.16", "params": 1_300_000, "gflops": 4.1, "map": None, "ort": 8.51},
        ],
    }


def test_full_report_has_every_section_and_figure(report: dict, tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    assert page.tags.count("section") == len(SECTIONS)
    for text in (
        *SECTIONS,
        *("yolov8n width 0.16", "8.51", "1,300,000"),
        *("YOLOv8n, twice as fast", "-50.0%", "-0.0088", "2.50x faster", "Latency ORT INT8 (ms), before: ORT FP32"),
        *("model.22.cv3", "Detect output", "1 of 2 layers pruned, 80 → 72 output channels", "[1, 5]"),
        *("base.pt (detect, 2 classes)", "160 train, 40 val", "File sizes are of base/fp32.onnx and ptq/int8.onnx"),
        *("rare", "+0.0500", "prune.speedup", "train/box_loss", "epoch 1: 2"),
        *("run in INT8: 61 of 64", "constant weights", "1 thread, 200 runs", "PTQ missed the budget"),
        *("ort-x86", "292 images of 192 px, seed 0, hash ef53", "mse; of weights max"),
        *("0.835 at 0.287 (FP32), 0.834 at not measured (INT8)", "Fake-quantized PyTorch", "0.108", "0.037", "0.383"),
        *("yolo-ext compress model=base.pt", "lost: picture gone.jpg not found"),
    ):
        assert text in page.text, text
    bars, curves = 4 + 2 + len(CHANGES) - 1, 2  # bars of latency, channels and changes
    assert page.tags.count("svg") == bars + curves + 3  # accuracy against latency, and GFLOPs and mAP by stage


def test_markdown_has_the_same_sections_and_figures(report: dict, tmp_path: Path) -> None:
    report["summary"] |= {"seconds": {"finetune": 61.25}, "comparison": {"method": "prune taylor", "ratio": 0.5}}
    report["notes"].append("a | b <c>\nd")
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    sections = [*SECTIONS[:-1], "In a table of runs", SECTIONS[-1]]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == sections
    for figure in (
        "1,500,000",
        "-50.0%",
        "-0.0088",
        "2.50x faster",
        "61 of 64",
        "61.2",
        "prune taylor",
        "Detect output",
    ):
        assert figure in text and figure in page.text, figure
    assert "![1 missed](side.jpg)" in text and "- a \\| b &lt;c> d" in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) >= 7
    for table in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table}) == 1, table


def test_worse_results_and_failed_checks_stand_out(report: dict, tmp_path: Path) -> None:
    report["summary"]["contract"]["changes"][0] |= {"low": -0.02, "high": -0.001, "verdict": "worse"}
    page = Page(render(report, tmp_path))
    assert page.text.count("✗ 1 of 2 checks did not pass: mAP drop") == 2  # there is no headline, so it is that, too
    assert "▼\xa0-0.0200 (-0.0200 to -0.0010: worse)" in page.text and "✓ pass" in page.text and "✗ fail" in page.text


@pytest.mark.parametrize(
    ("told", "after", "tone"),
    [
        pytest.param({"passed": True}, {"map": 0.61}, "", id="good"),
        pytest.param({"passed": True}, {"map": 0.5}, "warn", id="accuracy fell"),
        pytest.param({"passed": True, "settings": {"epochs": 0}}, {"map": 0.61}, "warn", id="not fine-tuned"),
        pytest.param({"passed": False}, {"map": 0.61}, "bad", id="a check failed"),
    ],
)
def test_there_is_one_headline(told: dict, after: dict, tone: str, report: dict, tmp_path: Path) -> None:
    report["summary"] |= {"headline": "2.5x faster. Deploy onnx/int8.onnx.", **told}
    report["summary"]["after"] = BEFORE | after
    report["summary"]["contract"]["changes"][0]["verdict"] = "worse" if after["map"] < 0.6 else "same"
    html = render(report, tmp_path)
    assert html.count("Deploy onnx/int8.onnx") == html.count('class="verdict') == 1
    assert f'<p class="verdict {tone}">' in html
    assert html.count("checks did not pass") == 1  # with the checks


def test_the_contract_comes_first_and_says_what_broke(report: dict, tmp_path: Path) -> None:
    html = render(report, tmp_path)
    page, markdown = Page(html), (tmp_path / "report.md").read_text()
    assert html.index('id="contract"') < html.index('id="before-and-after"')
    titles = ["Overall and by size", "mAP50-95 by class", "Recall by class"]
    assert re.findall("<h3>(.*?)</h3>", html)[:3] == re.findall("### (.*)", markdown) == titles
    for text in (page.text, markdown):
        assert "confidence 0.287" in text and "as much at 0.265" in text and "0.031 before, 0.045 after" in text
    assert page.text.count("limit -0.05") >= 1 and "below the limit -0.05" in markdown
    assert page.text.index("Small objects") > page.text.index("-0.0088"), "sizes come behind what is overall"
    assert html.count('class="spread"') >= len(CHANGES) - 1 and "▲ better" in page.text


def test_a_better_model_is_not_called_worse(report: dict, tmp_path: Path) -> None:
    report["summary"]["after"] = report["summary"]["before"] | {"map": 0.7}
    del report["summary"]["contract"]
    report["checks"].pop()
    text = Page(render(report, tmp_path)).text
    assert "worse" not in text.lower() and "✓ 1 of 1 checks passed" in text


def test_files_on_the_front_and_beaten_ones(report: dict, tmp_path: Path) -> None:
    html = render(report, tmp_path)
    chart = html[html.index('class="wide"') : html.index("</svg>", html.index('class="wide"'))]
    assert re.findall(r'<circle class="(\w*)"', chart) == ["", "beaten", ""]
    assert re.search(r'<path class="front" d="M[\d. V]+ H[\d.]+ V[\d.]+ H624"/>', chart)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="empty"),
        pytest.param({"summary": None, "layers": None, "latency": None, "options": None, "notes": None}, id="nulls"),
        pytest.param({"summary": {"before": None, "after": {}, "stages": {}, "env": None}, "layers": []}, id="hollow"),
        pytest.param({"summary": {"before": BEFORE}}, id="only before"),
        pytest.param({"summary": {"stages": {"prune": {"map": 0.5}}}, "quantization": {"convs": 3}}, id="one stage"),
        pytest.param({"latency": {"rows": [{"name": "a", "median": 0.0}]}, "checks": [{"name": "a"}]}, id="zeros"),
    ],
)
def test_what_was_not_measured_is_said_and_not_made_up(content: dict, tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "new" / "run", content).read_text(encoding="utf-8"))
    assert "None" not in (tmp_path / "new/run/report.md").read_text(encoding="utf-8")
    assert page.text.count("not measured") >= 5  # the five cards
    assert "nan" not in page.text.lower() and "None" not in page.text


def test_a_check_that_was_not_run_is_no_pass(tmp_path: Path) -> None:
    text = Page(render({"checks": [{"name": "mAP", "passed": None}]}, tmp_path)).text
    assert "not run" in text and "1 of 1 checks did not pass: mAP" in text and "✓" not in text


@pytest.mark.parametrize(
    ("latency", "int8", "expected"),
    [
        pytest.param({"ort": 8.0, "ort_int8": 4.0}, 0.58, "0.6000 → 0.5800", id="measured"),
        pytest.param({"ort": 8.0, "ort_int8": 4.0}, None, "; INT8 not measured", id="speed without accuracy"),
        pytest.param({"ort": 8.0}, None, None, id="no INT8"),
    ],
)
def test_int8_speed_is_never_shown_without_int8_accuracy(latency, int8, expected, tmp_path: Path) -> None:
    after = AFTER | {"latency_ms": latency, "map_onnx": {"fp32": 0.59, "int8": int8}}
    html = render({"summary": {"before": BEFORE, "after": after}}, tmp_path)
    cards = Page(html[html.index('<div class="cards">') : html.index("<section")]).text
    assert expected in cards if expected else "INT8" not in cards


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    def spoil(value: object) -> object:
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else HOSTILE if isinstance(value, str) else value

    hostile = spoil(
        {
            "title": "t",
            "command": "c",
            "summary": {"before": BEFORE, "after": AFTER, "env": {"device": "d"}},
            "layers": [{"name": "n", "before": 2, "after": 1, "reason": "r"}],
            "checks": [{"name": "n", "value": "v", "limit": "l", "passed": False}],
            "pictures": [{"path": "p", "caption": "c"}],
            "about": {"Model": "m"},
            "files": {"before": "b", "after": "a"},
            "curves": [{"name": "n", "columns": {"a": [1.0]}}],
            "latency": {"rows": [{"name": "n", "median": 1.0}], "note": "n"},
            "quantization": {
                "convs": "1",
                "int8_convs": "1",
                "float": {"a": "r"},
                "profile": "p",
                "calibration": {"images": "i", "hash": "h", "observer": "o", "weights": "w", "imgsz": "s", "seed": "s"},
                "f1": {"fp32": {"f1": "f"}},
                "parity": {"torch": {"box_mean": "b"}},
            },
            "notes": ["n"],
        }
    )
    assert isinstance(hostile, dict)
    hostile["about"] = hostile["summary"]["env"] = hostile["quantization"]["float"] = {HOSTILE: HOSTILE}
    hostile["options"] = {HOSTILE: [HOSTILE, HOSTILE]}
    change = {**CONTRACT["changes"][0], "name": f"map.{HOSTILE}"}
    hostile["summary"]["contract"] = {**CONTRACT, "verdict": HOSTILE, "changes": [change]}
    hostile["curves"][0]["columns"][HOSTILE] = [2.0]
    hostile["summary"]["stages"] = {HOSTILE: BEFORE, "b": AFTER}
    page = Page(render(hostile, tmp_path))
    assert page.tags.count("script") == 1  # ours
    assert page.text.count("alert(1)") > 15


def test_page_refers_to_nothing_outside_itself(report: dict, tmp_path: Path) -> None:
    report["command"] += " # see https://example.com"
    html = render(report, tmp_path)
    page = Page(html)
    assert page.references
    assert all(ref.startswith(("#", "data:image/webp;base64,")) for ref in page.references)
    script = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256("".join(script).encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}'" in html
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "url(" not in html and "@import" not in html and "default-src 'none'" in html


def test_pictures_are_as_small_as_they_have_to_be(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    imwrite(tmp_path / "noise.png", noise)
    sizes = [len(_data_url(tmp_path / "noise.png", 400, limit)) for limit in (10**6, 40_000, 1)]
    assert sizes[0] > sizes[1] > sizes[2] > 1000 and sizes[1] < 4 / 3 * 40_000 + 50
    assert _data_url(tmp_path / "none.png", 400) == ""


def test_curves_are_what_was_computed(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    assert curves(file) == {}
    file.write_text("epoch,time,train/box_loss, val/kd_loss,metrics/mAP50(B),lr/pg0\n1,2,1.5,0,0,1\n2,3,1.25,0,0.5,1\n")
    assert curves(file) == {"train/box_loss": [1.5, 1.25], "metrics/mAP50(B)": [0.0, 0.5]}


def test_same_report_gives_the_same_bytes(report: dict, tmp_path: Path) -> None:
    first = write_report(tmp_path, report).read_bytes()
    assert write_report(tmp_path, report).read_bytes() == first


def test_json_is_strict_and_round_trips(report: dict, tmp_path: Path) -> None:
    report["summary"]["after"] = {"map": float("nan"), "params": np.int64(7), "gflops": np.float32(0.5)}
    report["options"] = {"prune.at": np.array([[1, 5], [0, 0]]), "quant.source": (Path("a"), None)}
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data["summary"]["after"] == {"map": None, "params": 7, "gflops": 0.5}
    assert data["options"] == {"prune.at": [[1, 5], [0, 0]], "quant.source": ["a", None]}
    assert data["layers"] == report["layers"] and "[1, 5]" in page.text


@pytest.mark.parametrize(("count", "folded"), [(16, False), (17, True)])
def test_long_lists_are_folded(count: int, folded: bool, tmp_path: Path) -> None:
    layers = [{"name": f"model.{i}", "before": 8, "after": 4} for i in range(count)]
    assert ("details" in Page(render({"layers": layers}, tmp_path)).tags) is folded


@pytest.fixture
def sheet(tmp_path: Path) -> str:
    """A review sheet."""
    imwrite(tmp_path / "a.jpg", np.zeros((48, 64, 3), np.uint8))
    found = [{"class": 0, "confidence": p, "box": [1.0, 2.0, 20.0, 30.0]} for p in (0.4, 0.9)]
    records = [{"image": "a.jpg", "size": [64, 48], "objects": o} for o in (found, [])]
    return render_review("Review", records, {"a.jpg": tmp_path / "a.jpg"}, {0: "cell"}, previews={"a.jpg": "p/a.jpg"})


# Accessibility -------------------------------------------------------------------------------------------------------
def test_what_a_screen_reader_needs_is_there(report: dict, sheet: str, tmp_path: Path) -> None:
    for html in (render(report, tmp_path), sheet):
        assert '<html lang="en">' in html
        assert [html.count(f"<{tag}") - html.count(f"<{tag}er") for tag in ("main", "h1")] == [1, 1]
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids)) and set(re.findall(r'(?:labelledby|for)="([^"]+)"', html)) <= set(ids)
        assert all('scope="' in th for th in re.findall(r"<th[ >][^>]*", html))
        assert html.count("<table") == html.count("<caption>") == html.count("<thead>") > 0
        assert all('alt="' in img for img in re.findall(r"<img[^>]*", html))
        assert all("aria-label=" in svg or "aria-hidden=" in svg for svg in re.findall(r"<svg[^>]*", html))
        levels = [int(n) for n in re.findall(r"<h(\d)", html)]
        assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
        labels = re.findall(r'role="region" aria-label="([^"]+)"', html) + re.findall(r"<h2[^>]*>([^<]+)", html)
        assert len(labels) == len(set(labels)), "landmarks are told apart by their names"


def luminance(color: str) -> float:
    """Return the relative luminance of a colour of a style sheet, as WCAG 2 defines it."""
    digits = color.removeprefix("#")
    channels = [int(d * (6 // len(digits)), 16) / 255 for d in re.findall("." * (len(digits) // 3), digits)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXT = [(ink, paper) for ink in ("ink", "soft", "accent", "good", "bad") for paper in ("page", "card")]
TEXT += [("good", "good-bg"), ("bad", "bad-bg"), ("warn", "warn-bg"), ("on", "accent"), ("soft", "line")]
SHAPES = [(shape, paper) for shape in ("accent", "kept") for paper in ("page", "card")]


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_colours_can_be_told_apart(scheme: int) -> None:
    found = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css").read_text(), re.DOTALL)[scheme]
    light = {k: luminance(v) for k, v in re.findall(r"--([\w-]+): (#\w+)", found)}
    for pairs, least in ((TEXT, 4.5), (SHAPES, 3.0)):
        for pair in pairs:
            low, high = sorted(light[k] for k in pair)
            assert (high + 0.05) / (low + 0.05) >= least, pair


def axe() -> Path | None:
    """Return axe-core, https://github.com/dequelabs/axe-core, where it is installed; nothing is fetched."""
    places = [Path(os.environ.get("AXE_CORE", "axe.min.js"))]
    places += [folder / "node_modules/axe-core/axe.min.js" for folder in Path(__file__).resolve().parents]
    return next((file for file in places if file.is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None or axe() is None, reason="needs Chromium, and axe-core (npm) or AXE_CORE=its file")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "sheet"])
def test_axe_finds_no_violation(name: str, scheme: str, report: dict, sheet: str, tmp_path: Path) -> None:
    script = axe()
    assert script is not None
    html = {"report": render(report, tmp_path), "sheet": sheet}[name]
    html = html.replace("(prefers-color-scheme: dark)", "all") if scheme == "dark" else html
    html = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("<details>", "<details open>")
    found = "JSON.stringify(r.violations.map(v => [v.id, v.nodes[0].html]))"
    run = f"axe.run().then(r => document.body.dataset.axe = {found})"
    (tmp_path / "page.html").write_text(
        html.replace("</body>", f"<script>{script.read_text()}</script><script>{run}</script></body>")
    )
    dom = browse(tmp_path / "page.html", "--virtual-time-budget=60000").stdout
    told = re.search(r'<body data-axe="([^"]*)"', dom)
    assert told and json.loads(unescape(told[1])) == []


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess:
    """Open a page in a browser and return what it logged and what has become of the page."""
    assert BROWSER is not None
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command = [BROWSER, *common, "--enable-logging=stderr", *flags, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(BROWSER is None, reason="Chromium or Chrome is not installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_report_opens_in_a_browser(report: dict, tmp_path: Path, width: int) -> None:
    done = browse(write_report(tmp_path, report), f"--window-size={width},1600")
    page = Page(done.stdout)
    assert page.tags.count("section") == len(SECTIONS) and page.tags.count("img") == 1
    assert page.tags.count("button") > 20  # the script runs: columns can be sorted
    assert not re.search("CONSOLE.*(Refused|violates|ERR_)", done.stderr)


def test_a_classifier_is_judged_by_top_1(report, tmp_path):
    """Cards, stages and comparison: no mAP anywhere."""
    for part in (report["summary"]["before"], report["summary"]["after"], *report["summary"]["stages"].values()):
        part |= {"top1": 0.75, "map": None, "map50": None, "map_onnx": {}}
    report["comparison"] = [{"name": "base", "params": 3, "gflops": 8.2, "top1": 0.75, "ort": 1.0}]
    report["checks"], report["curves"] = [], []
    del report["summary"]["contract"]
    page = Page(render(report, tmp_path))
    assert "mAP" not in page.text
    assert page.text.count("Top-1 accuracy") >= 3 and "0.7500" in page.text
