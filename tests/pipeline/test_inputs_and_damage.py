# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A run goes on only with what it began with; what is damaged or gone is made again, or named."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import cli, runs
from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import LOGGER
from yolo_ext.pipeline.report import curves
from yolo_ext.runs import Record
from yolo_ext.training.resume import _forget_later_rows, _state

DAMAGED = {
    "empty": "",
    "half": '{"metrics": {"map": 0.5',
    "a list": "[1]",
    "null": "null",
    "figures are a list": '{"metrics": [1]}',
    "a name is a number": '{"weights": 7, "said": "done"}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_counts_as_none(tmp_path, text):
    file = tmp_path / "prune" / "stage.json"
    file.parent.mkdir()
    file.write_text(text)
    assert Record.read(file) == Record()
    again: list[str] = []
    assert runs.stage(tmp_path, "prune", lambda: Record(said="anew"), "", again).said == "anew" and again == ["prune"]


CHANGES = {
    "nothing": (lambda f: None, "", False, True),
    "a picture is gone": (lambda f: (f / "plot.png").unlink(), "", False, True),
    "last.pt is gone, which nothing reads": (lambda f: (f / "last.pt").unlink(), "", False, True),
    "evidence is gone": (lambda f: (f / "evidence.npz").unlink(), r"evidence.npz is gone or changed", False, True),
    "weights are changed": (lambda f: (f / "best.pt").write_text("x"), r"best.pt is gone or changed", False, False),
    "it began with other weights": (lambda f: None, "it began with other weights", True, False),
}


@pytest.mark.parametrize(("change", "why", "moved", "kept"), CHANGES.values(), ids=CHANGES)
def test_a_stage_is_done_again_where_its_files_are_not_its_own(tmp_path, caplog, monkeypatch, change, why, moved, kept):
    monkeypatch.setattr(LOGGER, "propagate", True)
    calls: list[list[str]] = []
    folder = tmp_path / "finetune"

    def work() -> Record:
        calls.append(sorted(p.name for p in folder.glob("*.pt")))
        for name in ("plot.png", "last.pt", "best.pt", "evidence.npz"):
            (folder / name).write_text(name)
        return Record(said="done")

    folder.mkdir()
    runs.stage(tmp_path, "finetune", work, "a", [])
    runs.stage(tmp_path, "verify", lambda: Record(said="old"), "a", [])
    change(folder)
    again: list[str] = []
    runs.stage(tmp_path, "finetune", work, "b" if moved else "a", again)
    later = runs.stage(tmp_path, "verify", lambda: Record(said="new"), "a", again)
    assert len(calls) == 1 + bool(why) and again == (["finetune", "verify"] if why else [])
    assert later.said == ("new" if why else "old") and why in caplog.text
    assert not why or ("best.pt" in calls[1]) is kept  # what a training would take for its own end


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "7"], ids=["empty", "a list", "half", "a number"])
@pytest.mark.parametrize("command", ["compress", "train", "label"])
def test_damaged_options_of_a_run_are_named(tmp_path, command, text):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "last.pt").touch()
    file = tmp_path / runs.OPTIONS.get(command, "compress.yaml")
    file.write_text(text)
    with pytest.raises(UsageError, match=f"{file}' is damaged.*start over"):
        runs.resumed(command, {"resume": str(tmp_path)})


HEAD, ROW = "epoch,time,train/box_loss,metrics/mAP50(B)\n", "{},1.5,0.5,0.25\n"
TABLES = {
    "whole": (HEAD + ROW.format(1) + ROW.format(2), HEAD + ROW.format(1) + ROW.format(2)),
    "behind the checkpoint": (HEAD + ROW.format(1) + ROW.format(3), HEAD + ROW.format(1)),
    "half a row": (HEAD + ROW.format(1) + "2,1.5,0", HEAD + ROW.format(1)),
    "a row of another table": (HEAD + ROW.format(1) + "2,1\n", HEAD + ROW.format(1)),
    "a row without epoch": (HEAD + "x,1.5,0.5,0.25\n" + ROW.format(2), HEAD + ROW.format(2)),
    "empty": ("", None),
    "no header": (ROW.format(1), None),
}


@pytest.mark.parametrize(("text", "kept"), TABLES.values(), ids=TABLES)
def test_damaged_rows_of_a_table_are_dropped(tmp_path, text, kept):
    file = tmp_path / "results.csv"
    file.write_text(text)
    curves(file)
    _forget_later_rows(file, 2)
    assert (file.read_text() if file.exists() else None) == kept


def test_curves_leave_a_damaged_row_out(tmp_path):
    (tmp_path / "results.csv").write_text(HEAD + ROW.format(1) + "2,1.5,oops,0.5\n" + ROW.format(3))
    found = {"train/box_loss": [0.5, 0.5], "metrics/mAP50(B)": [0.25, 0.25]}
    assert curves(tmp_path / "results.csv") == found


@pytest.mark.parametrize("what", ["gone", "empty", "half", "foreign", "of another model", "a part is missing"])
def test_a_damaged_state_of_a_training_is_left_alone(tmp_path, what):
    net, file = torch.nn.Conv2d(1, 1, 1), tmp_path / "resume_epoch1.pt"
    parts = ("model", "optimizer", "gradients", "waiting", "stopper", "random")
    good = {"ema": net.state_dict(), **dict.fromkeys(parts, 0)}
    torch.save(good, file)
    assert _state(file, net, ()) == good
    made = {
        "of another model": {**good, "ema": {"x": torch.zeros(1)}},
        "foreign": [1],
        "a part is missing": {"ema": good["ema"]},
    }
    if what in made:
        torch.save(made[what], file)
    elif what == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if what == "empty" else 300])
    assert _state(file, net, ()) == {}


@pytest.fixture
def data(tmp_path) -> dict[str, list[Path]]:
    """Return the images of two splits with labels."""
    for split, n in (("train", 6), ("val", 3)):
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            for i in range(n):
                (folder / f"{i}.{suffix}").write_text(f"{i} 0.5 0.5 0.1 0.1\n")
    (tmp_path / "teacher.pt").write_text("teacher")
    return {split: sorted((tmp_path / "images" / split).iterdir()) for split in ("train", "val")}


OTHERS = {
    "half of the images": (lambda root, images, names: images["train"].__delitem__(slice(3)), "images of train"),
    "an image": (lambda root, images, names: images["val"][0].write_text("another"), "images of val"),
    "a label": (
        lambda root, images, names: (root / "labels/train/1.txt").write_text("0 0.1 0.1 0.1 0.1\n"),
        "labels of tr",
    ),
    "a label less": (lambda root, images, names: (root / "labels/train/1.txt").unlink(), "labels of train"),
    "a class": (lambda root, images, names: names.update({1: "dog"}), "classes"),
    "the teacher": (lambda root, images, names: (root / "teacher.pt").write_text("other"), "teacher teacher.pt"),
    "nothing": (lambda root, images, names: None, ""),
}


@pytest.mark.parametrize(("change", "told"), OTHERS.values(), ids=OTHERS)
def test_other_inputs_are_refused_by_name(tmp_path, data, change, told):
    names, options = {0: "cat", 1: "cow"}, {"distill": {"teacher": str(tmp_path / "teacher.pt")}, "epochs": 3}
    before = runs.inputs(options, data, names)
    change(tmp_path, data, names)
    now = runs.inputs(options, data, names)
    if told:
        with pytest.raises(UsageError, match=f"{told}.* then, .* now.*start over"):
            runs.refuse_others(tmp_path, before, now)
    else:
        runs.refuse_others(tmp_path, before, now)


def test_the_same_inputs_elsewhere_are_the_same(tmp_path, data, monkeypatch):
    options = {"teacher": str(tmp_path / "teacher.pt"), "config_list": None}
    before = runs.inputs(options, data, {0: "a"})
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "images", moved / "images")
    shutil.copytree(tmp_path / "labels", moved / "labels")
    monkeypatch.chdir(tmp_path)
    there = {split: sorted((moved / "images" / split).iterdir(), reverse=True) for split in data}
    assert runs.inputs({**options, "teacher": "teacher.pt"}, there, {0: "a"}) == before


def test_a_full_disk_names_the_file(tmp_path, record_property):
    """The limit of the size of a file is a fault that the system itself raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"weights/best\.pt") as e:
            atomic_write(tmp_path / "weights" / "best.pt", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.errno == errno.EFBIG and not [*(tmp_path / "weights").iterdir()]
    record_property("reliability", "the file is named, nothing is left behind")


# Whole runs -----------------------------------------------------------------------------------------------------------
class Stopped(Exception):
    """What ends a training in these tests."""


@pytest.fixture
def call(place, capsys, caplog, monkeypatch) -> Callable[[str], tuple[int, str]]:
    """Return a function that runs a command line and returns its exit status and what was said."""
    monkeypatch.setattr(LOGGER, "propagate", True)

    def run(words: str) -> tuple[int, str]:
        caplog.clear()
        status = cli.main(words.split())
        return status, caplog.text + capsys.readouterr().err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("what", ["images of train", "classes", "nothing"])
def test_a_training_goes_on_with_its_own_data_only(place, tiny, settings, what):
    def stop(trainer):
        raise Stopped

    yolo = YOLO(str(tiny))
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        yolo.train(trainer=yolo_ext.DetectionTrainer, **settings(place / "shapes/data.yaml", place / "run"))
    assert not (place / "run" / ".yolo_ext.lock").exists()
    if what == "classes":
        YAML.save("shapes/data.yaml", {**YAML.load("shapes/data.yaml"), "names": ["a", "b", "c"]})
    for file in [*Path("shapes/images/train").iterdir()][: 4 * (what == "images of train")]:
        file.unlink()
    goes_on = YOLO(str(place / "run/weights/last.pt"))
    if what == "nothing":
        goes_on.train(trainer=yolo_ext.DetectionTrainer, resume=True)
    else:
        with pytest.raises(UsageError, match=f"{what}.* then, .* now"):
            goes_on.train(trainer=yolo_ext.DetectionTrainer, resume=True)


@pytest.mark.slow
def test_a_training_that_was_killed_before_its_summary_ends(place, call):
    words = "train model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=1 batch=4 device=cpu workers=0 plots=False"
    assert call(f"{words} save_dir=run")[0] == 0
    whole = json.loads(Path("run/summary.json").read_text())
    stamp = Path("run/weights/best.pt").stat().st_mtime_ns
    Path("run/summary.json").unlink()
    assert call("train resume=run")[0] == 0
    again = json.loads(Path("run/summary.json").read_text())
    assert again["after"] == whole["after"] and again["before"]["map"] == whole["before"]["map"]
    assert Path("run/weights/best.pt").stat().st_mtime_ns == stamp
    status, text = call("train resume=run")
    assert status == 2 and "nothing to resume" in text


@pytest.mark.slow
def test_a_run_knows_what_it_read_and_wrote(place, call, quick):
    words = "prune model=tiny.pt data=shapes/data.yaml imgsz=64 epochs=0 device=cpu prune.ratio=0.3 prune.round_to=1"
    assert call(f"{words} save_dir=run")[0] == 0
    for more in ("verbose=False", "plots=False", "model=./tiny.pt", f"data={place}/shapes/data.yaml"):
        assert call(f"prune resume=run {more}")[0] == 0, more
    pruned = Path("run/prune/weights/pruned.pt")
    Path("run/prune/stage.json").write_text("")
    pruned.write_bytes(pruned.read_bytes()[:1000])
    status, text = call("prune resume=run")
    assert status == 0 and "prune: done again, as its record is damaged" in text
    assert YOLO(str(pruned)).model
    pruned.unlink()
    status, text = call("prune resume=run")
    assert status == 0 and "pruned.pt is gone or changed" in text and "base: done already" in text
    label = sorted(Path("shapes/labels/val").glob("*.txt"))[0]
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    status, text = call("prune resume=run")
    assert status == 2 and "labels of val" in text
