# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A run that was stopped goes on with the options of its own folder, and what is not of a run stays as it is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from yolo_ext import runs
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import LOGGER, logged, resumes

STAGES = ("prune", "finetune", "compare")
ASKED = {"model": "tiny.pt", "data": "", "imgsz": 64, "lr0": 0.01, "workers": 0, "verbose": True, "freeze": [1, 2],
         "prune": {"speedup": 2.0, "exclude": ["head"]}, "distill": None,
         "quant": {"config_list": "list.yaml"}}  # fmt: skip
PRUNE = "epochs=0 imgsz=64 prune.ratio=0.3"


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> Path:
    """Return the folder of a stopped run of `compress`."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.pt", "list.yaml"):
        Path(name).touch()
    folder = tmp_path / "out" / "stopped"
    runs.record(folder / "compress.yaml", ASKED)
    return folder


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {}),
        (ASKED, {}),
        ({"model": "./tiny.pt", "lr0": 1e-2, "freeze": (1, 2)}, {}),
        ({"verbose": False, "device": "cpu", "task": "detect"}, {"verbose": False, "device": "cpu", "task": "detect"}),
        ({"prune": {"speedup": 2}, "quant": {"config_list": "./list.yaml"}, "distill": None}, {}),
        ({"prune": True, "distill": False}, {}),
        ({"prune": {"speedup": 3}}, "prune changed"),
        ({"prune": False, "lr0": 0.1, "optimizer": "SGD"}, "lr0, optimizer, prune changed"),
        ({"distill": {}, "model": "list.yaml"}, "model changed"),
    ],
    ids=["nothing", "the same", "the same in other words", "what may change", "some of a technique", "on and off",
         "another target", "off, other, new", "another model"],
)  # fmt: skip
def test_options_come_from_the_folder(stopped, given, found):
    call = {**given, "resume": "out/stopped"}
    if isinstance(found, str):
        with pytest.raises(UsageError, match=found):
            runs.resumed("compress", call)
        return
    again = runs.resumed("compress", call)
    assert again.pop("resume") is True and again.pop("save_dir") == str(stopped)
    expected = {
        **ASKED,
        "model": str(Path("tiny.pt").resolve()),
        "quant": {"config_list": str(Path("list.yaml").resolve())},
    }
    assert again == {**expected, **found}


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ({"resume": True, "project": "out", "name": "stopped"}, True),
        ({"resume": True, "save_dir": "out/stopped"}, True),
        ({"resume": Path("out/stopped")}, True),
        ({"resume": True, "project": "out"}, False),
        ({"resume": "out"}, False),
    ],
    ids=["name", "save_dir", "folder", "no name", "no run"],
)
def test_the_folder_to_go_on_in(stopped, place, there):
    place = {**place, **({"project": str(stopped.parent)} if "project" in place else {})}
    if there:
        assert runs.resumed("compress", place)["save_dir"] == str(stopped)
    else:
        with pytest.raises(UsageError, match="Nothing to resume"):
            runs.resumed("compress", place)


def test_a_training_goes_on_from_its_last_checkpoint(tmp_path):
    runs.record(tmp_path / "args.yaml", {"lr0": 0.01, "modules": ["layers"], "prune": {"speedup": 2.0}})
    with pytest.raises(UsageError, match="Nothing to resume"):  # killed in its first epoch
        runs.resumed("train", {"resume": tmp_path})
    last = tmp_path / "weights" / "last.pt"
    last.parent.mkdir()
    last.touch()
    found = {"model": str(last), "resume": str(last), "save_dir": str(tmp_path), "modules": ["layers"], "batch": 2}
    call = {"resume": True, "save_dir": tmp_path, "model": "base.pt", "batch": 2, "prune": {"speedup": 2}}
    assert runs.resumed("train", call) == found
    assert runs.resumed("distill", found) == found
    with pytest.raises(UsageError, match="prune changed"):
        runs.resumed("train", {**call, "prune": {"speedup": 3}})
    assert runs.resumed("train", {"resume": True, "model": "a/last.pt"})["resume"] == "a/last.pt"


@pytest.mark.parametrize(
    ("there", "error", "told"),
    [(True, KeyboardInterrupt, True), (True, UsageError, True), (False, ValueError, False)],
    ids=["stopped", "an error", "nothing to go on with"],
)
def test_what_stops_says_how_it_goes_on(tmp_path, monkeypatch, caplog, there, error, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LOGGER, "propagate", True)
    folder = tmp_path / "my run"
    folder.mkdir()
    with pytest.raises(error), logged():
        resumes("compress", folder, "*.yaml")
        resumes("train", folder / "finetune", "*")  # a part of it
        if there:
            (folder / "compress.yaml").touch()
        raise error
    assert ("Go on with: yolo-ext compress resume='my run'" in caplog.text) is told


def run_in(root: Path) -> Path:
    """Write what a run that was killed in its last stage left, and files of the user beside it."""
    runs.record(root / "compress.yaml", {})
    for name in ("prune/weights/pruned.pt", "finetune/weights/last.pt", "summary.json", "notes.txt", "prune/notes.txt",
                 "finetune/notes.txt", "plots/stages.png", "compare/random/weights/best.pt"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    runs.Record(files=["weights/pruned.pt", "../../theirs.txt"]).write(root / "prune" / "stage.json")
    (root.parent / "theirs.txt").touch()
    return root


@pytest.mark.parametrize(
    ("made", "again", "words"),
    [
        pytest.param(lambda root: None, False, None, id="there is none"),
        pytest.param(lambda root: (root / "weights").mkdir(parents=True), False, None, id="an empty one"),
        pytest.param(lambda root: (root / "finetune").mkdir(parents=True), False, "not those", id="of the user"),
        pytest.param(lambda root: (root / "finetune").mkdir(parents=True), True, "not those", id="theirs, again"),
        pytest.param(run_in, False, "resume=True", id="with a run"),
        pytest.param(run_in, True, None, id="with a run that starts over"),
    ],
)
def test_only_what_a_run_wrote_is_removed(tmp_path, made, again, words):
    root = tmp_path / "run"
    made(root)
    before = sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))
    if words:
        with pytest.raises(UsageError, match=words):
            runs.make_way(root, STAGES, again)
    else:
        with logged():
            runs.make_way(root, STAGES, again)
    after = sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))
    kept = ["compress.yaml", "finetune", "finetune/notes.txt", "notes.txt", "plots", "prune", "prune/notes.txt"]
    assert after == (kept if made is run_in and again else before)
    assert made is not run_in or (tmp_path / "theirs.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["Ctrl-C", "an error"])
def test_a_stopped_run_prints_the_words_that_finish_it(place, call, monkeypatch, caplog, error):
    from yolo_ext.pipeline import stages

    def fail(*_, **__):
        raise error("no more")

    with monkeypatch.context() as m:
        m.setattr(stages, "finish", fail)
        with suppress(RuntimeError):
            call(f"prune model=tiny.pt {PRUNE} save_dir=run verbose=False")
    words = caplog.text.partition("Go on with: yolo-ext ")[2].splitlines()[0]
    assert words == "prune resume=run"
    stamp = Path("run/prune/stage.json").stat().st_mtime_ns
    assert call(words)[0] == 0
    assert Path("run/prune/stage.json").stat().st_mtime_ns == stamp and Path("run/summary.json").exists()
    status, text = call(f"prune model=tiny.pt {PRUNE} save_dir=run")
    assert status == 2 and "exist_ok=True" in text
