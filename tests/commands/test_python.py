# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands as functions: the same keys, defaults, errors and words as on the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import cli
from yolo_ext.checkpoint import file_of
from yolo_ext.commands import COMMANDS, _as_files, keys, needed
from yolo_ext.core.errors import UsageError
from yolo_ext.reporting.result import Result


def said(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command line says of wrong words."""
    capsys.readouterr()
    assert cli.main(words.split()) == 2
    return capsys.readouterr().err


def refused(function, options: dict) -> str:
    """Return what a function says of wrong options, as the command line would print it."""
    with pytest.raises(UsageError) as e:
        function(**options)
    return f"yolo-ext: {e.value}\n"


@pytest.mark.parametrize("name", [n for n in COMMANDS.names() if n != "help"])  # which answers whatever it is asked
def test_unknown_keys_are_refused_alike(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict.fromkeys(needed(COMMANDS[name].fn), "gone.pt")
    words = " ".join(f"{k}={v}" for k, v in {name: "", **given, "epocs": 3, "fractoin": 0.5}.items())
    message = refused(COMMANDS[name].fn, {**given, "epocs": 3, "fractoin": 0.5})
    assert said(words.replace(f"{name}=", name, 1), capsys) == message
    assert f"Unknown key 'epocs' for '{name}'." in message and "Unknown key 'fractoin'" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "options", "part"),
    [
        pytest.param("compress model=a.pt prun=1", {"prun": 1}, "Did you mean 'prune'?", id="technique"),
        pytest.param("train model=a.pt data=b fractoin=0.5", {"data": "b", "fractoin": 0.5}, "'fraction'", id="native"),
        pytest.param("compress model=a.pt prune.speedup=0.5", {"prune": {"speedup": 0.5}}, "above 1.0", id="range"),
        pytest.param("prune model=a.pt prune.metod=l1", {"prune": {"metod": "l1"}}, "'prune.method'?", id="option"),
        pytest.param("quantize model=a.pt quant=3", {"quant": 3}, "'quant=3' is illegal", id="no options"),
        pytest.param("compress model=a.pt epochs=-1", {"epochs": -1}, "at least 0", id="value"),
        pytest.param("train model=a.pt", {}, "Missing: data=...", id="missing"),
        pytest.param("export model=gone.pt format=onx", {"format": "onx"}, "Did you mean 'onnx'?", id="choice"),
    ],
)
def test_wrong_values_are_refused_alike(words, options, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, model, *_ = words.split()
    message = refused(getattr(yolo_ext, name), {"model": model.removeprefix("model="), **options})
    assert said(words, capsys) == message and part in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("compress", True),
        ("prune", {}),
        ("quantize", {"kind": "structured"}),
        ("prune", yolo_ext.PruneConfig(round_to=4)),
    ],
    ids=["default", "empty", "kind", "dataclass"],
)
def test_a_target_that_nobody_gave_is_told(name, given, caplog):
    refused(getattr(yolo_ext, name), {"model": "gone.pt", "prune": given})
    assert "no target given: prune.speedup=2" in caplog.text


@pytest.mark.parametrize(
    "given",
    [{"ratio": 0.3}, {"ratios": {"model.2": 0.5}}, {"kind": "2:4"}, yolo_ext.PruneConfig(params=2)],
)
def test_a_target_that_the_user_gave_stays(given, caplog):
    refused(yolo_ext.prune, {"model": "gone.pt", "prune": given})
    assert "no target" not in caplog.text


@pytest.mark.parametrize("name", ["train", "distill"])
def test_where_no_target_is_taken_one_is_asked_for(name, caplog):
    message = refused(getattr(yolo_ext, name), {"model": "gone.pt", "data": "gone.yaml", "prune": True})
    assert "Pruning needs a target" in message and "no target given" not in caplog.text


@pytest.mark.slow
def test_a_call_without_options_is_the_command_without_options(run, tiny, tmp_path):
    status, folder, _ = run("prune model=tiny.pt epochs=0 imgsz=64")
    found = yolo_ext.prune("tiny.pt", epochs=0, imgsz=64, project=str(tmp_path / "out"), name="python")
    assert status == 0 and found.passed and found.run_dir == tmp_path / "out" / "python"
    assert YAML.load(folder / "compress.yaml") == YAML.load(found.run_dir / "compress.yaml")
    for key in ("params", "gflops"):
        assert 0 < found.metrics[key] < found["before"][key]
    assert YOLO(found.best).model is not None and found.onnx is None and found.report.name == "report.html"
    assert f"best: {found.best}" in repr(found) and "Before" in repr(found)


@pytest.mark.parametrize("name", [n for n in COMMANDS.names() if "modules" in keys(COMMANDS[n].fn)])
def test_modules_are_a_key_of_all_that_load_models(name):
    given = dict.fromkeys(needed(COMMANDS[name].fn), "gone.pt")
    assert "Cannot import 'modules=gone_package'" in refused(COMMANDS[name].fn, {**given, "modules": "gone_package"})


# YOLO objects --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", [False, True], ids=["as loaded", "fused by predict or val"])
def test_an_untouched_yolo_stands_for_its_file(tiny, fused):
    model = YOLO(tiny)
    if fused:
        model.fuse()
    assert str(file_of(model)) == str(file_of(model.model)) == str(tiny)


def test_other_weights_are_written_to_a_file(tiny, tiny_yaml, caplog):
    model, new = YOLO(tiny), YOLO(tiny_yaml)
    with torch.no_grad():
        model.model.model[0].conv.weight[0] *= 1.5
    for yolo in (model, new):
        file = file_of(yolo)
        assert file.name.endswith("_in_memory.pt") and str(file) in caplog.text
        again = YOLO(file).model.state_dict()
        assert all(torch.equal(again[k].half(), v.half()) for k, v in yolo.model.state_dict().items())
    model.fuse()
    with pytest.raises(UsageError, match="is fused"):
        file_of(model)


def test_an_exported_yolo_is_its_path(tmp_path):
    (tmp_path / "a.onnx").touch()
    assert file_of(YOLO(tmp_path / "a.onnx", task="detect")) == str(tmp_path / "a.onnx")


@pytest.mark.parametrize("thing", [torch.nn.Conv2d(3, 8, 3), len], ids=["another module", "a function"])
def test_what_is_no_yolo_is_refused(thing):
    with pytest.raises(UsageError, match="is no model"):
        yolo_ext.analyze(thing)


def test_yolos_are_found_in_lists_and_options(tiny):
    model = YOLO(tiny)
    given = [model, {"teacher": [model.model, "b.pt"], "layers": ("neck",)}, Path("c.pt"), None, 3]
    assert _as_files(given) == [str(tiny), {"teacher": [str(tiny), "b.pt"], "layers": ["neck"]}, Path("c.pt"), None, 3]


def test_a_command_takes_a_yolo_and_returns_a_result(tiny, tmp_path):
    found = yolo_ext.analyze(YOLO(tiny), imgsz=64, save_dir=str(tmp_path / "run"))
    assert isinstance(found, Result) and found["rows"] and found.run_dir == tmp_path / "run"


# What tools see ------------------------------------------------------------------------------------------------------
def test_signatures_say_what_a_function_takes_and_returns():
    for name in set(COMMANDS.names()) & set(yolo_ext.__all__):
        function = getattr(yolo_ext, name)
        assert function is COMMANDS[name].fn and inspect.signature(function).return_annotation == "Result"
        assert (inspect.getdoc(function) or "").count(".")
    printing, room = {"cfg", "version", "help", "recipes"}, {"data"}  # yolo_ext.data is the package
    assert set(COMMANDS.names()) - set(yolo_ext.__all__) == printing | room


@pytest.mark.slow
def test_a_type_checker_sees_the_functions(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\n"
        "import yolo_ext\n"
        'found: yolo_ext.Result = yolo_ext.compress("a.pt", "b.yaml", epochs=3, prune={"speedup": 2})\n'
        "best: Path | None = found.best\n"
        'yolo_ext.verify("a.pt", "a.onnx").checks.append(1)  # line 5\n'
        'yolo_ext.bench("a.pt", rounds="many")  # line 6\n'
        "yolo_ext.PruneConfig(metod=1)  # line 7\n"
    )
    words = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    ran = subprocess.run([*words, "script.py"], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    lines = [line.split(":")[1] for line in ran.stdout.splitlines() if ": error:" in line]
    assert lines == ["5", "6", "7"], ran.stdout + ran.stderr
