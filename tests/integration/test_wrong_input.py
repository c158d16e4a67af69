# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Wrong input: one clear message, exit status 2, no traceback, and nothing is created."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ultralytics.utils import YAML

from yolo_ext import cli
from yolo_ext.core.config import CONFIGS
from yolo_ext.core.errors import UsageError
from yolo_ext.training.trainer import TRAINERS

B = "model=tiny.pt data=shapes/data.yaml"


@pytest.fixture
def place(place, tmp_path, monkeypatch) -> Path:
    """Work in a folder with a model, a dataset and all kinds of broken files."""
    monkeypatch.setattr("ultralytics.cfg.TESTS_RUNNING", False)  # it would send run folders elsewhere
    for cache in Path("shapes").rglob("*.cache"):
        cache.unlink()
    data = YAML.load("shapes/data.yaml")
    for name, change in {
        "noval.yaml": {"val": None},
        "nowhere.yaml": {"path": str(tmp_path / "gone")},
        "empty.yaml": {"train": str(tmp_path / "void")},
        "two.yaml": {"names": {0: "circle", 1: "square"}},
        "fruit.yaml": {"names": {0: "apple", 1: "pear", 2: "fig"}},
        "corrupt.yaml": {"path": str(tmp_path / "corrupt")},
    }.items():
        YAML.save(name, {k: v for k, v in {**data, **change}.items() if v is not None})
    Path("void").mkdir()
    for split in ("train", "val"):
        for folder, suffix, content in (("images", "jpg", b"no image"), ("labels", "txt", b"0 .5 .5 .1 .1\n")):
            file = Path("corrupt", folder, split, f"0.{suffix}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    Path("broken.yaml").write_text("names: [a\n path: :")
    Path("junk.pt").write_bytes(b"junk")
    Path("none.pt").touch()
    torch.save({"model": torch.nn.Linear(1, 1)}, "linear.pt")
    Path("cut.pt").write_bytes(Path("tiny.pt").read_bytes()[:50_000])
    Path("list.yaml").write_text("- 1\n- 2\n")
    return tmp_path


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


CASES = {
    # words
    "unknown command": ("trian " + B, ["'trian'", "'train'"]),
    "no command": (B, ["command is missing", "compress"]),
    "no equals sign": ("train tiny.pt", ["'tiny.pt'", "Did you mean 'model=tiny.pt'?"]),
    "no value": (f"train {B} epochs=", ["epochs"]),
    "wrong task word": (f"segment train {B}", ["'detect' model", "'segment'"]),
    "wrong task key": (f"compress {B} task=pose", ["'detect' model", "'pose'"]),
    "help on nothing": ("help prun", ["'prun'", "'prune'"]),
    # missing
    "no model": ("train data=shapes/data.yaml", ["model=..."]),
    "no data": ("train model=tiny.pt", ["data=..."]),
    "no data for compress": ("compress model=tiny.pt", ["data"]),
    "nothing": ("compress", ["model=..."]),
    "verify without onnx": ("verify model=tiny.pt", ["onnx=..."]),
    "bench without models": ("bench", ["models=..."]),
    "convert without out": ("convert source=x", ["out=..."]),
    # keys
    "unknown key": (f"train {B} epoch=3", ["'epoch'", "'epochs'"]),
    "unknown option": (f"train {B} prune.spedup=2", ["prune.spedup", "prune.speedup"]),
    "unknown technique": (f"train {B} prun.speedup=2", ["prun", "prune"]),
    "two problems at once": (f"train {B} prune.spedup=2 distill.feature=cwd", ["prune.speedup", "distill.features"]),
    "key of another command": ("demo epochs=3", ["'epochs'", "seed"]),
    # values
    "speedup no number": (f"train {B} prune.speedup=fast", ["prune.speedup=fast", "number"]),
    "speedup too low": (f"train {B} prune.speedup=0.5", ["prune.speedup=0.5", "above 1"]),
    "speedup out of reach": (f"train {B} prune.speedup=50", ["prune.speedup=50", "at most", "prune.max_ratio"]),
    "speedup out of reach in compress": (f"compress {B} prune.speedup=50", ["prune.speedup=50", "at most"]),
    "two targets": (f"train {B} prune.speedup=2 prune.ratio=0.3", ["prune.speedup", "prune.ratio", "give one of them"]),
    "no target": (f"train {B} prune.method=l1", ["prune.speedup"]),
    "technique is a number": (f"train {B} quant=3", ["quant=3", "options by dotted key"]),
    "unknown criterion": (f"train {B} prune.speedup=1.5 prune.method=lmp", ["'lmp'", "'lamp'"]),
    "unknown module": (
        f"train {B} prune.speedup=1.5 prune.method=no.such:fn",
        ["no.such:fn", "package.module:function"],
    ),
    "unknown feature loss": (f"train {B} distill.features=cvd", ["'cvd'", "'cwd'"]),
    "unknown logit loss": (f"train {B} distill.logits=bkd", ["'bkd'", "'bckd'"]),
    "unknown schedule": (f"train {B} distill.schedule=cos", ["cos", "cosine"]),
    "unknown observer": (f"train {B} quant.observer=msee", ["'msee'", "'mse'"]),
    "unknown profile": (f"train {B} quant.profile=ort-86", ["'ort-86'", "'ort-x86'"]),
    "excluded layer missing": (f"train {B} quant.exclude=['zzz']", ["zzz", "matches no layer"]),
    "both losses off": (f"train {B} distill.features=None distill.logits=None", ["both off"]),
    "teacher missing": (f"train {B} distill.teacher=gone.pt", ["gone.pt", "does not exist"]),
    "teacher of other classes": ("distill model=tiny.pt data=fruit.yaml distill.teacher=tiny.pt", ["apple", "circle"]),
    "two distillations": (f"train {B} distill.teacher=self distill_model=tiny.pt", ["distill_model", "distill."]),
    "epochs negative": (f"train {B} epochs=-1", ["epochs=-1"]),
    "epochs zero": (f"train {B} epochs=0", ["epochs=0"]),
    "epochs no number": (f"compress {B} epochs=few", ["epochs=few"]),
    "imgsz negative": (f"train {B} imgsz=-64", ["imgsz=-64"]),
    "imgsz off the grid": (f"compress {B} imgsz=65", ["imgsz=65", "64"]),
    "lr no rate": (f"train {B} lr0=-1", ["lr0=-1"]),
    "device missing": (f"train {B} device=77", ["device=77"]),
    "device unknown": (f"compress {B} device=abacus", ["abacus"]),
    "optimizer unknown": (f"train {B} optimizer=AdamX", ["'AdamX'", "'Adam'", "AdamW"]),
    "bench imgsz": ("bench models=tiny.pt imgsz=x", ["imgsz=x"]),
    "bench rounds": ("bench models=tiny.pt rounds=0", ["rounds=0"]),
    "export imgsz": ("export model=tiny.pt imgsz=big", ["imgsz=big"]),
    "export opset": ("export model=tiny.pt opset=x", ["opset=x"]),
    "export format": ("export model=tiny.pt format=onx", ["'onx'", "'onnx'"]),
    "convert format": ("convert format=xml source=shapes out=o", ["'format=xml'", "voc"]),
    # files
    "model gone": ("train model=gone.pt data=shapes/data.yaml", ["gone.pt", "does not exist"]),
    "model junk": (f"train {B} model=junk.pt", ["junk.pt", "not a YOLO checkpoint"]),
    "model empty": (f"compress {B} model=none.pt", ["none.pt", "not a YOLO checkpoint"]),
    "model cut off": (f"compress {B} model=cut.pt", ["cut.pt", "not a YOLO checkpoint"]),
    "model no YOLO": (f"train {B} model=linear.pt", ["Linear", "not a YOLO"]),
    "model a folder": (f"train {B} model=shapes", ["shapes", ".pt"]),
    "model yaml gone": (f"train {B} model=gone.yaml", ["gone.yaml"]),
    "model yaml no model": (f"train {B} model=list.yaml", ["list.yaml"]),
    "data gone": ("train model=tiny.pt data=gone.yaml", ["gone.yaml", "does not exist"]),
    "data without val": ("train model=tiny.pt data=noval.yaml", ["noval.yaml", "lacks val"]),
    "data broken": ("train model=tiny.pt data=broken.yaml", ["broken.yaml", "not valid YAML"]),
    "data elsewhere": ("compress model=tiny.pt data=nowhere.yaml", ["gone"]),
    "data without images": ("train model=tiny.pt data=empty.yaml", ["train", "no images"]),
    "data of other classes": ("compress model=tiny.pt data=two.yaml", ["class"]),
    "images corrupt": ("train model=tiny.pt data=corrupt.yaml", ["No image", "can be read"]),
    "recipe gone": (f"train {B} recipe=prune2x", ["'prune2x'", "prune2x_kd"]),
    "recipe no dict": (f"train {B} recipe=list.yaml", ["Recipe 'list.yaml'", "no options"]),
    "cfg gone": (f"train {B} cfg=gone.yaml", ["gone.yaml"]),
    "onnx gone": ("verify model=tiny.pt onnx=gone.onnx source=shapes", ["gone.onnx", "does not exist"]),
    "bench gone": ("bench models=tiny.pt,gone.pt", ["gone.pt"]),
    "nothing to resume": ("train resume=True model=tiny.pt", ["tiny.pt", "nothing to resume"]),
    "no run to resume": (f"compress {B} resume=True name=gone prune.speedup=1.5", ["Nothing to resume", "gone"]),
    "voc source no VOC": ("convert format=voc source=shapes out=o", ["No VOC annotations", "annotations=FOLDER"]),
    "predict without model": ("predict model=gone.pt source=shapes", ["gone.pt"]),
    "val without data": ("val model=tiny.pt data=gone.yaml", ["gone.yaml"]),
    "predict key": ("predict modle=tiny.pt", ["modle"]),
}


@pytest.mark.parametrize(("words", "fragments"), CASES.values(), ids=CASES)
def test_wrong_input(place, capsys, words, fragments):
    before = files(place)
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("yolo-ext: ") and "Traceback" not in err
    missing = [f for f in fragments if f not in err]
    assert not missing, f"{missing} not in: {err}"
    assert len(err) < 1200
    left = {f for f in files(place) - before if not (words.startswith("val") and f.is_dir())}  # folder of `yolo val`
    assert not left and before <= files(place), "wrong input must not leave anything behind"


@pytest.mark.slow
@pytest.mark.parametrize("kept", [[], ["note.txt"]], ids=["new folder", "folder in use"])
def test_a_training_that_is_refused_late_takes_its_folder_along(place, capsys, kept):
    run = place / "mine"
    for name in kept:
        run.mkdir()
        (run / name).write_text("of the user")
    words = f"train {B} imgsz=64 epochs=1 device=cpu prune.size_mb=0.001 save_dir={run}".split()
    assert cli.main(words) == 2
    assert "'prune.size_mb=0.001' cannot be reached" in capsys.readouterr().err
    assert run.exists() == bool(kept) and all((run / name).read_text() == "of the user" for name in kept)


def test_wrong_input_is_answered_with_the_same_words_in_python(place):
    from yolo_ext.training import train

    before = files(place)
    with pytest.raises(UsageError, match="cannot be reached"):
        train("tiny.pt", data="shapes/data.yaml", prune={"speedup": 50})
    assert files(place) == before


def test_a_folder_that_cannot_be_made_is_a_message(place, capsys):
    assert cli.main([*f"train {B} epochs=1 imgsz=64 device=cpu".split(), "project=/proc/none"]) == 2
    assert "/proc/none" in capsys.readouterr().err


def test_a_command_that_is_terminated_stops_as_by_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr("yolo_ext.stock.cpu_info", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["checks"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_what_a_command_forks_ends_without_a_word_and_the_handler_goes(monkeypatch, capfd):
    before = signal.getsignal(signal.SIGTERM)

    def forked() -> None:
        with multiprocessing.get_context("fork").Pool(2) as pool:  # whose end is a SIGTERM
            pool.map(abs, range(4))
        raise UsageError("enough")

    monkeypatch.setattr("yolo_ext.stock.cpu_info", forked)
    cli.main(["checks"])
    assert signal.getsignal(signal.SIGTERM) is before and "KeyboardInterrupt" not in capfd.readouterr().err


# Fuzz --------------------------------------------------------------------------------------------------------------
HARMLESS = {"version", "help", "cfg", "checks", "demo", "recipes", "-h", "--help", "--version", "-v"}
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [*cli.COMMANDS.names(), *TRAINERS, "prune.speedup=2", "model=", "=", "==", "a=b", "recipe=", "resume", "save"]
    ),
    st.builds(
        "{}={}".format,
        st.sampled_from([*CONFIGS, "prune.speedup", "epochs", "data", "task", "recipe"]),
        st.text(max_size=8),
    ),
)


@pytest.mark.slow
@given(words=st.lists(WORDS, min_size=1, max_size=5))
@example(words=["train", "prune=None", "prune.speedup=2"])
@example(words=["train", "prune.=1"])
@example(words=["train", ".=1"])
@example(words=["compress", "model=\x00"])
@example(words=["compress", "recipe=\x00"])
@example(words=["train", "task=", "epochs=["])
@example(words=["--", "-"])
@example(words=["[", "="])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_words_are_never_a_traceback(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if HARMLESS & {w.rstrip(",").removeprefix("--") for w in words} | HARMLESS & set(words):
        return  # these do something else than complain
    assert cli.main(words) == 2
    assert not list(tmp_path.iterdir())
