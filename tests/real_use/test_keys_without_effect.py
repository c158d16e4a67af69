# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every key of every command is read, refused, or named in one warning: none is taken and forgotten."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import ultralytics
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_ext import cli
from yolo_ext.commands import BOTH, COMMANDS, EXPORTS, NEITHER, PLACE, PREDICTS, needed, takes_native

ROOT = Path(ultralytics.__file__).parent
TRAINING = ["engine/trainer.py", "engine/validator.py", "engine/model.py", "utils/loss.py", "utils/torch_utils.py",
            *(str(p.relative_to(ROOT)) for room in ("data", "models/yolo") for p in (ROOT / room).rglob("*.py")
              if p.name != "predict.py")]  # fmt: skip
PREDICTION = ["engine/predictor.py", "engine/model.py", "engine/results.py", "models/yolo/segment/predict.py"]
UNREAD = {*PREDICTS, *EXPORTS, *NEITHER}  # by a training
D = "data=shapes/data.yaml"
PRUNE = "prune model=tiny.pt imgsz=65 epochs=0 prune.speedup=1.2"  # which is refused, behind the warnings


def reads(key: str, files: list[str]) -> bool:
    """Tell whether Ultralytics takes an argument of this name in one of these files."""
    pattern = re.compile(rf"(?:args|hyp|cfg|\bh)\.{key}\b|(?:args|overrides|cfg|kwargs)(?:\.get\(|\[)\"{key}\"")
    return any(pattern.search((ROOT / file).read_text(encoding="utf-8")) for file in files)


@pytest.mark.parametrize("key", sorted(set(DEFAULT_CFG_DICT) - {"mode", "task"}))
def test_the_tables_say_what_ultralytics_reads(key):
    """A key that an Ultralytics of tomorrow brings, or no longer reads, has to be sorted in."""
    if key in UNREAD:
        assert not reads(key, [f for f in TRAINING if f != "engine/model.py"])
    if key not in (*PREDICTS, *BOTH, *PLACE):
        assert key == "embed" or not reads(key, PREDICTION[:1])
    if key in PREDICTS:
        assert reads(key, PREDICTION)


@pytest.mark.parametrize("command", [n for n in COMMANDS.names() if takes_native(COMMANDS[n].fn) and n != "export"])
@pytest.mark.parametrize("key", sorted({*EXPORTS, *PREDICTS, *NEITHER, "epochs", "lr0"}))
def test_a_key_of_another_command_is_refused_before_anything_is_done(command, key, tmp_path, monkeypatch, capsys):
    reads_it = {"predict": PREDICTS, "quantize": EXPORTS, "compress": EXPORTS}
    if key in reads_it.get(command, ()) or (key in ("epochs", "lr0") and command != "predict"):
        return  # quantize and compress say themselves which of them their files cannot have
    monkeypatch.chdir(tmp_path)
    given = " ".join(f"{k}=x.pt" for k in needed(COMMANDS[command].fn))
    value = not default if isinstance(default := DEFAULT_CFG_DICT[key], bool) else 1
    value = 2 if value == default else value
    assert cli.main([*f"{command} {given} data=d.yaml {key}={value}".split()]) == 2
    err = capsys.readouterr().err
    assert f"does not read {key} of Ultralytics" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (f"{PRUNE} lr0=0.1 mosaic=0", ["lr0, mosaic (nothing is trained)"]),
        (f"{PRUNE} prune.runtime=torch", ["prune.runtime (only with prune.latency)"]),
        (f"{PRUNE} {D} prune.method=l1 distill.alpha=2", ["distill.alpha (no training to distill in)"]),
        (PRUNE, []),
    ],
    ids=["training", "option", "distillation", "nothing"],
)
def test_one_warning_names_all_that_does_nothing(run, caplog, words, idle):
    status, _, said = run(words)
    assert status == 2 and "imgsz=65" in said
    warned = [r.getMessage() for r in caplog.records if "Without effect here" in r.getMessage()]
    assert len(warned) == bool(idle) and all(part in warned[0] for part in idle)


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("label model=gone.pt source=x out=o format=voc save_conf=True", "save_conf (only YOLO labels hold it)"),
        ("label model=gone.pt source=x out=o beside=True files=copy", "files (the labels lie where the images are)"),
        ("convert source=gone out=o format=coco difficult=skip", "difficult (only VOC marks"),
        ("convert source=gone out=o seed=3", "seed (only with ratio or folds)"),
        ("convert source=gone out=o to=coco task=segment", "task (only with to=yolo)"),
        ("sensitivity model=gone.pt data=d.yaml prune.every=2", "prune.every"),
        ("sensitivity model=gone.pt data=d.yaml kind=quant quant.strict=True", "quant.strict"),
    ],
)
def test_the_commands_around_warn_too(words, idle, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    assert f"Without effect here: {idle}" in caplog.text


@pytest.mark.parametrize("key", ["by=block", "images=8", "map=True", "quant.calib=8"])
def test_keys_of_the_other_kind_of_sensitivity_are_refused(key, capsys):
    assert cli.main(["sensitivity", "model=gone.pt", "data=d.yaml", key]) == 2
    assert f"'{key.split('=')[0].split('.')[0]}' does not go with kind=prune" in capsys.readouterr().err


def test_a_recipe_that_holds_all_defaults_is_fine(run):
    """As an args.yaml of Ultralytics does."""
    words = " ".join(f"{k}={v}" for k, v in DEFAULT_CFG_DICT.items() if k in UNREAD and v is not None and k != "mode")
    assert "imgsz=65" in run(f"{PRUNE} {words}")[2]


def test_every_key_of_a_command_is_used_by_its_function():
    """A parameter that its function never mentions would be taken and forgotten."""
    for row in COMMANDS:
        body = inspect.getsource(inspect.unwrap(row.fn)).partition('"""')[2].partition('"""')[2]
        forgotten = [k for k in inspect.signature(row.fn).parameters if not re.search(rf"\b{k}\b", body)]
        assert "locals()" in body or not forgotten, f"{row.name}: {forgotten}"
