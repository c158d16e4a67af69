# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The command line: words, recipes, help, and what is handed on to Ultralytics."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from ultralytics import YOLO
from ultralytics.utils import SETTINGS, YAML

import yolo_ext
from yolo_ext import cli
from yolo_ext.core.config import CONFIGS, cfg_dir, parse
from yolo_ext.stock.load import load_model

B = ["model=m.pt", "data=d.yaml"]


def parsed(*words: str) -> dict:
    return cli.parse_args(["train", *B, *words])[1]


# Words -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", itertools.permutations(["train", "model=m.pt", "prune.speedup=2"]))
def test_the_order_of_words_does_not_matter(order):
    assert cli.parse_args(list(order)) == ("train", {"model": "m.pt", "prune": {"speedup": 2}})


@pytest.mark.parametrize(
    "words",
    [
        ["prune.speedup=2", "prune.method=l1"],
        ["prune={'speedup': 2, 'method': 'l1'}"],
        ["prune={'speedup': 2}", "prune.method=l1"],
        ["prune.speedup", "=", "2", "prune.method=", "l1"],
        ["--prune.speedup=2,", "--prune.method=l1"],
        ["prune.speedup=3", "prune.speedup=2", "prune.method=l1"],
        ["prune=None", "prune.speedup=2", "prune.method=l1"],
    ],
    ids=["dotted", "nested", "mixed", "spaces", "dashes and commas", "last one counts", "off, then on"],
)
def test_equal_ways_to_write_options(words):
    assert parsed(*words)["prune"] == {"speedup": 2, "method": "l1"}


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [("save", "save", True), ("segment", "task", "segment"), ("epochs=3", "epochs", 3), ("lr0=1e-3", "lr0", 1e-3),
     ("cos_lr=True", "cos_lr", True), ("prune=False", "prune", False), ("name=007", "name", "007"),
     ("prune.exclude=['a','b']", "prune", {"exclude": ["a", "b"]})],
)  # fmt: skip
def test_values_are_read_as_ultralytics_reads_them(word, key, value):
    assert parsed(word)[key] == value


FORMS = ["{}={}", "--{} {}", "--{}={}", "-{} {}", "-{}={}", "{} {}", "{} = {}", "--{} = {}", "--{}= {}"]


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_understood_as_other_programs_write_them(form):
    given = {"model": "x.pt", "data": "d.yaml", "epochs": "3", "prune.speedup": "2", "name": "prune", "save": "True"}
    words = " ".join(form.format(key, value) for key, value in given.items()).split()
    expected = {**given, "epochs": 3, "prune": {"speedup": 2}, "save": True}
    del expected["prune.speedup"]
    assert cli.parse_args(["compress", *words]) == ("compress", expected)
    if form != "{} {}":  # a bare `data` is the command
        assert cli.parse_args([*words, "compress"]) == ("compress", expected)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("label --overwrite --model m.pt", {"overwrite": True, "model": "m.pt"}),
        ("label overwrite model m.pt", {"overwrite": True, "model": "m.pt"}),
        ("train --save --model m.pt", {"save": True, "model": "m.pt"}),
        ("train --resume runs/last.pt", {"resume": "runs/last.pt"}),
        ("train --resume False segment", {"resume": False, "task": "segment"}),
        ("train --lr0 -1 --task segment", {"lr0": -1, "task": "segment"}),
        ("predict --source rtsp://host?a=b", {"source": "rtsp://host?a=b"}),
        ("data --check data", {"check": "data"}),
        ("bench --models a.pt,b.onnx, threads=1", {"models": "a.pt,b.onnx", "threads": 1}),
        ("export --imgsz [480, 640]", {"imgsz": [480, 640]}),
        ("compress --modle x.pt", {"modle": "x.pt"}),  # refused later, with the nearest key
    ],
)
def test_switches_and_unusual_values(words, options):
    assert cli.parse_args(words.split())[1] == options


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("compress best.pt data.yaml", ["Did you mean 'model=best.pt'?", "Did you mean 'data=data.yaml'?"]),
        ("bench a.pt", ["'a.pt' is no key=value pair. Did you mean 'models=a.pt'?"]),
        ("data data.yaml", ["Did you mean 'check=data.yaml'?"]),
        ("val best.pt", ["Did you mean 'model=best.pt'?"]),
        ("best.pt", ["Did you mean 'model=best.pt'?"]),
        ("train --model a.pt --data", ["'data' has no value. Write data=..."]),
        ("train --model --data d.yaml", ["'model' has no value. Write model=..."]),
        ("compres model=a.pt", ["Did you mean 'compress'?"]),
        ("compress --modle x.pt", ["Unknown key 'modle' for 'compress'. Did you mean 'model'?"]),
        ("compress", ["Missing: model=...", "Example: yolo-ext compress model=best.pt data=data.yaml"]),
        ("distill model=a.pt", ["Missing: data=...", "Example: yolo-ext distill model=yolov8n.pt data=data.yaml"]),
        ("verify model=a.pt", ["Missing: onnx=...", "Example: yolo-ext verify model=best.pt onnx=best.onnx"]),
    ],
)
def test_wrong_words_are_answered_with_the_right_form(capsys, words, answer):
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert [part for part in answer if part not in error] == [] and "See `yolo-ext help" in error


def test_words_override_the_recipe_key_by_key(tmp_path):
    YAML.save(
        tmp_path / "r.yaml", {"prune": {"speedup": 2.0, "method": "lamp"}, "epochs": 5, "distill": {"teacher": "t.pt"}}
    )
    for words in (
        ["prune.method=l1", f"recipe={tmp_path / 'r.yaml'}"],
        [f"recipe={tmp_path / 'r.yaml'}", "prune.method=l1"],
    ):
        options = parsed(*words)
        assert options["prune"] == {"speedup": 2.0, "method": "l1"}
        assert options["epochs"] == 5 and options["distill"] == {"teacher": "t.pt"}


# Commands ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path / "runs"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt", "yaml"])
def test_prune_without_data_or_training(place, tiny, tiny_yaml, quick, kind):
    model = tiny if kind == "pt" else tiny_yaml
    words = ["prune", f"model={model}", "epochs=0", "prune.speedup=1.5", "imgsz=64", f"project={place}", "name=run"]
    assert cli.main(words) == 0
    before, after = (
        sum(p.numel() for p in load_model(m)[0].parameters()) for m in (model, place / "run/weights/best.pt")
    )
    assert after < before
    assert (place / "run/summary.json").is_file() and (place / "run/report.html").is_file()


@pytest.mark.parametrize(
    ("words", "techniques"),
    [
        (["compress"], {"prune": {"speedup": 2.0}, "distill": {}, "quant": {}}),
        (["compress", "quant=None"], {"prune": {"speedup": 2.0}, "distill": {}, "quant": None}),
        (["prune"], {"prune": {"speedup": 2.0}}),
        (["prune", "prune.ratio=0.3", "epochs=0"], {"prune": {"ratio": 0.3}}),
        (["prune", "distill=True"], {"prune": {"speedup": 2.0}, "distill": True}),
        (["quantize"], {"quant": {}}),
        (["quantize", "quant.mode=qat"], {"quant": {"mode": "qat"}}),
    ],
    ids=" ".join,
)
def test_commands_switch_their_techniques_on(monkeypatch, words, techniques):
    seen = {}
    monkeypatch.setattr("yolo_ext.pipeline.compress", lambda **o: seen.update(o) or {"checks": []})
    assert cli.main([*words, *B]) == 0
    assert parse({k: seen.get(k) for k in CONFIGS}) == parse(techniques)
    assert seen.get("epochs") == (0 if words[0] == "quantize" or "epochs=0" in words else None)
    assert seen["mode"] == words[0]


@pytest.mark.parametrize(("words", "distill"), [([], {}), (["distill.teacher=t.pt"], {"teacher": "t.pt"})], ids=str)
def test_distill_is_a_training_with_a_teacher(monkeypatch, words, distill):
    seen = {}
    monkeypatch.setattr("yolo_ext.training.train", lambda **o: seen.update(o))
    assert cli.main(["distill", *B, *words]) == 0
    assert parse({"distill": seen.pop("distill")}) == parse({"distill": distill})
    assert seen == {"name": "distill", "model": "m.pt", "data": "d.yaml"}


@pytest.mark.parametrize(("passed", "status"), [([True, False], 1), ([True, True], 0), ([], 0)])
def test_a_missed_budget_is_exit_status_1(monkeypatch, passed, status):
    checks = [{"name": "x", "value": 2, "limit": 1, "passed": p} for p in passed]
    monkeypatch.setattr("yolo_ext.pipeline.compress", lambda **o: {"checks": checks})
    assert cli.main(["compress", *B]) == status


@pytest.mark.parametrize("command", cli.STOCK)
def test_stock_commands_are_handed_on_word_by_word(monkeypatch, command):
    seen = []
    monkeypatch.setattr("yolo_ext.stock.context.yolo_entrypoint", lambda argv: seen.extend(argv))
    words = ["segment", command, "model=m.pt", "source=x", "conf=0.3"]
    assert cli.main(words) == 0
    assert seen == words


def test_stock_predict_runs_on_a_checkpoint_of_ours(place, tiny, shapes):
    argv = list(sys.argv)
    words = [
        "predict",
        f"model={tiny}",
        f"source={shapes.parent / 'images/val'}",
        "imgsz=64",
        f"project={place}",
        "name=p",
    ]
    assert cli.main([*words, "device=cpu"]) == 0
    assert len(list((place / "p").glob("*.jpg"))) == 4
    assert sys.argv == argv, "a later predict() in Python would take itself for the command line"
    assert len(YOLO(str(tiny)).predict(str(shapes.parent / "images/val"), imgsz=64, device="cpu", verbose=False)) == 4


def test_version_cfg(capsys):
    assert cli.main(["version"]) == 0 == cli.main(["--version"])
    assert capsys.readouterr().out.split() == [yolo_ext.__version__] * 2
    assert cli.main(["cfg"]) == 0
    out = capsys.readouterr().out
    assert out.strip() == (cfg_dir() / "default.yaml").read_text(encoding="utf-8").strip()
    assert list(YAML.load(cfg_dir() / "default.yaml")) == list(CONFIGS)


def test_help_is_light(tmp_path):
    heavy = "{'onnx', 'onnxruntime', 'matplotlib', 'torch', 'ultralytics'}"
    code = f"import sys; from yolo_ext import cli; cli.main(['compress', '-h']); print({heavy} & set(sys.modules))"
    root = Path(yolo_ext.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "set()", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cv2", "torch", "yaml", "json", "ultralytics", "yolo_ext"])
def test_no_file_of_the_working_folder_stands_in_for_a_package(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    program = Path(sys.executable).with_name("yolo-ext")
    done = subprocess.run([program, "version"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, yolo_ext.__version__, "")
