# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""All misspelt keys at once, and keys in environment variables."""

from __future__ import annotations

import json

import pytest
from ultralytics.utils import YAML

from yolo_ext import cli


def test_one_error_lists_misspelt_keys_of_every_kind(capsys):
    words = "epoch=3 prune.spedup=2 prune.config_list=[] quant.observr=x"
    assert cli.main(["train", "model=a.pt", "data=b.yaml", *words.split()]) == 2
    err = capsys.readouterr().err
    for part in (
        "Unknown key 'epoch' for 'train'. Did you mean 'epochs'?",
        "Unknown option 'prune.spedup'. Did you mean 'prune.speedup'?",
        "Unknown option 'prune.config_list'. Did you mean 'quant.config_list'?",
        "Unknown option 'quant.observr'. Did you mean 'quant.observer'?",
    ):
        assert part in err


@pytest.mark.parametrize(
    ("word", "near"),
    [("speedup=2", "'prune.speedup'"), ("calib=8", "'quant.calib'"), ("observer=mse", "'quant.observer'")],
)
def test_an_option_without_its_technique_is_recognised(capsys, word, near):
    assert cli.main(["compress", "model=a.pt", word]) == 2
    assert f"Did you mean {near}?" in capsys.readouterr().err


# Environment ---------------------------------------------------------------------------------------------------------
def given(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"YOLO_EXT_{name}", value)


@pytest.mark.slow
def test_the_environment_gives_keys_and_the_command_line_wins(run, quick, monkeypatch):
    given(monkeypatch, MODEL="tiny.pt", PRUNE__SPEEDUP="1.2", PRUNE__ROUND_TO="4", IMGSZ="64", MODELS="other.pt")
    status, folder, said = run("prune epochs=0 prune.round_to=2")
    assert status == 0, said
    saved = YAML.load(folder / "compress.yaml")
    assert saved["prune"]["speedup"] == 1.2 and saved["prune"]["round_to"] == 2 and saved["imgsz"] == 64
    row = json.loads((folder / "summary.json").read_text())["comparison"]
    assert "prune.speedup=1.2" in row["settings"] and row["method"] == "prune lamp" and 0 < row["ratio"] < 1


def test_a_recipe_wins_over_the_environment(monkeypatch, tmp_path):
    YAML.save(tmp_path / "r.yaml", {"prune": {"speedup": 3.0}, "epochs": 2})
    given(monkeypatch, RECIPE=str(tmp_path / "r.yaml"), PRUNE__SPEEDUP="1.5", PRUNE__METHOD="l1")
    options = cli.parse_args(["train", "model=a.pt", "data=b", "epochs=5"])[1]
    assert options["prune"] == {"speedup": 3.0, "method": "l1"} and options["epochs"] == 5


def test_what_is_for_other_commands_is_left_alone(monkeypatch):
    given(monkeypatch, PRUNE__SPEEDUP="2", ROUNDS="7")
    assert cli.parse_args(["bench", "models=a.pt"])[1] == {"models": "a.pt", "rounds": 7}
    assert cli.parse_args(["val", "model=a.pt"])[1] == {"model": "a.pt"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param("quantize", None, id="off by default"),
        pytest.param("train", None, id="none is on by default"),
        pytest.param("compress", {"speedup": 2}, id="on by default"),
        pytest.param("compress prune=False", False, id="switched off"),
        pytest.param("quantize prune.method=l1", {"speedup": 2, "method": "l1"}, id="switched on"),
    ],
)
def test_a_variable_does_not_switch_a_technique_on(monkeypatch, caplog, words, found):
    given(monkeypatch, PRUNE__SPEEDUP="2")
    assert cli.parse_args([*words.split(), "model=a.pt"])[1].get("prune") == found
    assert ("From the environment: YOLO_EXT_PRUNE__SPEEDUP" in caplog.text) == isinstance(found, dict)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PRUNE__SPEDUP", "2", "'YOLO_EXT_PRUNE__SPEDUP'. Did you mean 'YOLO_EXT_PRUNE__SPEEDUP'?"),
        ("IMGZS", "64", "'YOLO_EXT_IMGZS'. Did you mean 'YOLO_EXT_IMGSZ'?"),
        ("PRUNE__SPEEDUP", "", "YOLO_EXT_PRUNE__SPEEDUP: Cannot read"),
        ("PRUNE__SPEEDUP", "fast", "'prune.speedup=fast' is illegal"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, capsys, tmp_path, name, value, said):
    monkeypatch.chdir(tmp_path)
    given(monkeypatch, **{name: value})
    assert cli.main(["prune", "model=yolov8n.yaml", "epochs=0"]) == 2
    assert said in capsys.readouterr().err
    assert cli.main(["version"]) == 0
