# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A run that was killed (SIGKILL) and resumed gives the numbers of one that was never stopped, bit by bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

import yolo_ext
from yolo_ext.checkpoint import save_model
from yolo_ext.stock.load import load_model
from yolo_ext.stock.trainer import whole_final_files
from yolo_ext.training.resume import SIDECAR, _forget_later_rows

PRUNE, QUANT = {"speedup": 1.5}, {"mode": "qat", "calib": 4, "profile": "ort-x86", "observe_epochs": 3}
EPOCHS, DONE = 4, 2  # of all, and before the kill

KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from ultralytics import YOLO
import yolo_ext, yolo_ext.training.trainer
model, moment, epoch, options = json.loads(sys.argv[1])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
yolo = YOLO(model)
if moment == "write":  # the state and the row of this epoch are there, its checkpoint is not
    def write(trainer):
        if trainer.epoch == epoch:
            yolo_ext.training.trainer.atomic_write = die
    yolo.add_callback("on_train_epoch_end", write)
else:
    yolo.add_callback(moment, lambda t: t.epoch == epoch and die())
yolo.train(trainer=yolo_ext.trainer_for(yolo.task), **options)
"""


def kill(model: Path, moment: str, epoch: int, **options: Any) -> None:
    """Train in a process that kills itself in this epoch, counted from 0."""
    job = json.dumps([str(model), moment, epoch, options])
    done = subprocess.run([sys.executable, "-c", KILLED, job], capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr[-2000:]


def same(a: Any, b: Any, where: str = "") -> None:
    """Compare nested containers of tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where}: {(a.double() - b.double()).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    else:
        assert a == b, f"{where}: {a} {b}"


@pytest.fixture
def keep_state():
    """Return a function that makes a model copy its state of the last epoch before that is removed."""

    def keep(yolo: YOLO, to: Path) -> YOLO:
        def copy(trainer):
            if trainer.epoch == trainer.epochs - 1:
                shutil.copy(trainer.wdir / SIDECAR.format(trainer.epoch), to)

        yolo.add_callback("on_model_save", copy)
        return yolo

    return keep


@pytest.fixture
def check(settings, shapes, tmp_path, keep_state):
    """Return a function that trains without a stop, and with kills and resumes, and compares all there is."""

    def run(model: Path, moment: str = "on_model_save", kills: int = 1, done: int = DONE, **options: Any) -> None:
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        options = {"epochs": EPOCHS, "close_mosaic": 1, **options}
        epochs = options["epochs"]
        kill(model, "on_model_save", epochs - 1, **{**settings(shapes, whole), **options})  # only its last breath
        shutil.copy(whole / "weights" / SIDECAR.format(epochs - 1), tmp_path / "whole.pt")
        first = done - 1 if moment == "on_model_save" else done
        kill(model, moment, first, **{**settings(shapes, cut), **options})
        last = cut / "weights/last.pt"
        for i in range(1, kills):
            kill(last, moment, first + i, resume=True)
        yolo = keep_state(YOLO(str(last)), tmp_path / "cut.pt")
        yolo.train(trainer=yolo_ext.trainer_for(yolo.task), resume=True)

        same(*(torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "cut")))
        for name in ("last.pt", "best.pt"):  # those of the run without a stop have not been stripped
            same(*(load_model(d / "weights" / name)[0].state_dict() for d in (whole, cut)), name)
        tables = [polars.read_csv(d / "results.csv").drop("time") for d in (whole, cut)]
        assert tables[0].equals(tables[1]) and tables[0].height == epochs
        assert sorted(p.name for p in (cut / "weights").iterdir()) == ["best.pt", "last.pt"]

    return run


SLIM, CUT, KD = {"method": "slim", "warmup": 0}, {"speedup": 2.0, "at": [2], "images": 4}, {"teacher": "self"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"prune": PRUNE, "distill": {"teacher": "wide"}},
    "all": {"prune": PRUNE, "distill": KD, "quant": QUANT},
    "sparsity": {"sparsity": SLIM},
    "while training": {"prune": CUT},
    "distillation": {"distill": KD},
    "QAT": {"quant": QUANT},
    "sparsity, distillation": {"sparsity": SLIM, "distill": KD},
    "sparsity, while training": {"sparsity": SLIM, "prune": CUT},
    "sparsity, while training, distillation": {"sparsity": SLIM, "prune": CUT, "distill": KD},
    "distillation, QAT": {"distill": KD, "quant": QUANT},
    "masks, distillation, QAT": {"prune": {"kind": "unstructured", "ratio": 0.5}, "distill": KD, "quant": QUANT},
}


def options_of(name: str, wide: Path) -> dict[str, Any]:
    given = TECHNIQUES[name]
    return {**given, "distill": {"teacher": str(wide)}} if name == "wide" else given


@pytest.mark.slow
def test_killed_pruning_with_distillation_resumes_exactly(check, tiny):
    check(tiny, prune=PRUNE, distill=KD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "at"),
    [
        pytest.param("on_model_save", [1], id="killed after"),
        pytest.param("on_model_save", [3], id="killed before"),
        pytest.param("on_train_batch_end", [2], marks=pytest.mark.matrix, id="killed in the epoch that prunes"),
        pytest.param("on_train_epoch_end", [1, 2, 3], id="killed between"),
    ],
)
@pytest.mark.parametrize("teacher", ["self", pytest.param("wide", marks=pytest.mark.matrix)])
def test_pruning_while_training_resumes_exactly(check, tiny, wide, moment, at, teacher):
    teacher = "self" if teacher == "self" else str(wide)
    check(tiny, moment, prune={"speedup": 2.0, "at": at, "images": 4}, distill={"teacher": teacher})


@pytest.mark.slow
def test_pruned_at_5_of_10_and_killed_at_7(check, tiny):
    check(tiny, done=7, epochs=10, prune={"speedup": 2.0, "at": [5]})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at"), [("unstructured", [1, 3]), pytest.param("2:4", [], marks=pytest.mark.matrix)])
def test_masked_training_resumes_exactly(check, tiny, kind, at):
    check(tiny, prune={"kind": kind, "at": at, **({"ratio": 0.5} if kind == "unstructured" else {})})


@pytest.mark.slow
@pytest.mark.parametrize("name", TECHNIQUES)
def test_killed_run_resumes_exactly(check, tiny, wide, record_property, name):
    record_property("reliability", f"{len(TECHNIQUES)} combinations of techniques, difference 0.0")
    check(tiny, **options_of(name, wide))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_train_epoch_end", "write"])
def test_the_moment_of_the_kill_does_not_matter(check, tiny, wide, moment):
    check(tiny, moment, **options_of("wide", wide))


@pytest.mark.slow
def test_killed_twice_resumes_exactly(check, tiny, wide):
    check(tiny, kills=2, nbs=20, **options_of("wide", wide))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"nbs": 12},
        {"nbs": 12, "warmup_epochs": 2.6},
        {"warmup_epochs": 3.0, "optimizer": "MuSGD"},
        {"batch": 3, "optimizer": "SGD", "momentum": 0.9},
        {"workers": 2},
        {"close_mosaic": 2},
        {"close_mosaic": 3},
        {"multi_scale": 0.5, "mixup": 0.5, "copy_paste": 0.5},
    ],
    ids=["accumulate", "accumulate in warmup", "MuSGD in warmup", "odd batch", "workers on a CPU",
         "mosaic closes at resume", "mosaic closed before", "more augmentation"],
)  # fmt: skip
def test_kinds_of_training_resume_exactly(check, tiny, options):
    check(tiny, **options)


@pytest.mark.slow
def test_classification_resumes_exactly(check, shapes, tmp_path, randomise):
    for i, image in enumerate(sorted(shapes.parent.rglob("*.jpg"))):
        for split in ("train", "val"):
            folder = tmp_path / "classes" / split / f"c{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder)
    torch.manual_seed(0)
    model = randomise(ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False))
    model.task = "classify"
    check(save_model(model, tmp_path / "yolov8n-cls.pt"), data=str(tmp_path / "classes"), nbs=8, erasing=0.4)


@pytest.mark.slow
def test_end_to_end_head_resumes_exactly(check, tmp_path, randomise):
    torch.manual_seed(0)
    check(save_model(randomise(DetectionModel("yolo26n.yaml", nc=3, verbose=False)), tmp_path / "yolo26n.pt"))


def of_other_weights(state: dict[str, Any]) -> None:
    state["ema"] = {k: v + 1 for k, v in state["ema"].items()}
    state["model"] = {k: torch.full_like(v, torch.nan) for k, v in state["model"].items() if v.is_floating_point()}


def of_another_loader(state: dict[str, Any]) -> None:
    state["random"]["orders"] = [None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"), [(of_other_weights, "not of this checkpoint"), (of_another_loader, "The dataloader of")]
)
def test_a_state_that_does_not_fit_is_left_out_with_a_warning(fit, tiny, tmp_path, caplog, monkeypatch, change, words):
    class Stopped(Exception):
        pass

    def stop(trainer):
        raise Stopped

    monkeypatch.setattr("yolo_ext.training.resume.LOGGER.propagate", True)
    yolo = YOLO(str(tiny))
    yolo.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        fit(yolo, yolo_ext.DetectionTrainer)
    weights = tmp_path / "run/weights"
    path = weights / SIDECAR.format(0)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    YOLO(str(weights / "last.pt")).train(trainer=yolo_ext.DetectionTrainer, resume=True)
    assert words in caplog.text
    assert all(torch.isfinite(v).all() for v in load_model(weights / "last.pt")[0].state_dict().values())


def test_rows_of_epochs_to_repeat_are_dropped(tmp_path):
    csv = tmp_path / "results.csv"
    csv.write_text("epoch,time,x\n1,0.5,3\n2,1,4\n3,1.5,5\n4,2")
    _forget_later_rows(csv, 2)
    assert csv.read_text() == "epoch,time,x\n1,0.5,3\n2,1,4\n"


def test_a_kill_while_final_files_are_written_leaves_the_old_ones(tiny, tmp_path):
    from ultralytics.engine import trainer as engine

    last = Path(shutil.copy(tiny, tmp_path / "last.pt"))
    before = last.read_bytes()

    def killed(path):
        raise KeyboardInterrupt

    stock = engine.strip_optimizer
    with pytest.raises(KeyboardInterrupt), whole_final_files(killed):
        engine.strip_optimizer(last)
    assert last.read_bytes() == before and engine.strip_optimizer is stock
