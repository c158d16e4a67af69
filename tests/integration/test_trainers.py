# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""One training run: every way in, what it keeps, what it writes and what it refuses."""

from __future__ import annotations

import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import polars
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, OBBModel, PoseModel, SegmentationModel, torch_safe_load
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import cli
from yolo_ext.checkpoint import MANIFEST, TRIPWIRE, atomic_write, save_model
from yolo_ext.core.config import DistillConfig, PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.criterion import DistillationLoss
from yolo_ext.stock.context import replaced
from yolo_ext.stock.load import load_model
from yolo_ext.training.resume import SIDECAR
from yolo_ext.training.trainer import TRAINERS

PRUNE, DISTILL = {"speedup": 1.5}, {"teacher": "self"}
KD = ["kd_cls_loss", "kd_box_loss", "kd_feat_loss"]


def widths(path: Path) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in load_model(path)[0].state_dict().items()}


def imported(path: Path) -> set[str]:
    """Return the modules of all classes and functions that unpickling a checkpoint would import."""
    with zipfile.ZipFile(path) as z:
        data = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))
    words = [(op.name, arg) for op, arg, _ in pickletools.genops(data)]
    assert not any(name == "STACK_GLOBAL" for name, _ in words)
    return {arg.split()[0] for name, arg in words if name == "GLOBAL"}


def is_stock(path: Path) -> bool:
    roots = {m.partition(".")[0] for m in imported(path)}
    return roots <= {"torch", "ultralytics", "torchvision", "collections", "__builtin__"}  # torchvision: classifiers


@pytest.fixture(scope="module")
def pruned(tiny, shapes, settings, tmp_path_factory) -> Path:
    """Return the result of one pruning run."""
    folder = tmp_path_factory.mktemp("pruned")
    yolo = YOLO(str(tiny))
    yolo.train(trainer=yolo_ext.DetectionTrainer, prune=PRUNE, **{**settings(shapes, folder), "epochs": 1})
    return folder / "weights" / "best.pt"


# Ways in -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["self", "wide"])
def test_three_ways_in_give_the_same_weights_and_losses(fit, tiny, wide, shapes, settings, tmp_path, teacher):
    distill = {"teacher": str(wide) if teacher == "wide" else "self"}
    fit(tiny, yolo_ext.DetectionTrainer, "trainer", prune=PRUNE, distill=distill)
    fit(yolo_ext.attach(YOLO(str(tiny)), prune=PRUNE, distill=distill), None, "attach")
    options = {**settings(shapes, tmp_path), "save_dir": None, "project": tmp_path, "name": "cli"}
    words = [f"{k}={v}" for k, v in options.items() if v is not None]
    words += ["prune.speedup=1.5", f"distill.teacher={distill['teacher']}"]
    assert cli.main(["train", f"model={tiny}", *words]) == 0

    runs = [tmp_path / name for name in ("trainer", "attach", "cli")]
    for file in ("best.pt", "last.pt"):
        first, *others = (load_model(run / "weights" / file)[0].state_dict() for run in runs)
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[k], other[k]) for k in first)
    tables = [polars.read_csv(run / "results.csv").drop("time") for run in runs]
    assert all(t.equals(tables[0]) for t in tables[1:])
    assert (tmp_path / "cli" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"prune": PruneConfig(speedup=1.5), "distill": DistillConfig()}, {"distill": True}]
)
def test_options_may_be_dataclasses_and_end_as_plain_dicts_in_args_yaml(fit, tiny, options, tmp_path):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=1, **options)
    saved = YAML.load(tmp_path / "run" / "args.yaml")
    assert saved["distill"]["features"] == "cwd"
    assert Path(saved["distill"]["teacher"]) == tiny.resolve()
    assert saved["quant"] is None
    assert (saved["prune"] or {}).get("speedup") == (1.5 if "prune" in options else None)
    assert vars(trainer.args)["distill"] == saved["distill"]


@pytest.mark.slow
def test_without_options_the_trainer_equals_the_stock_one(fit, tiny, tmp_path):
    fit(tiny, None, "stock")
    fit(tiny, yolo_ext.DetectionTrainer, "ours")
    a, b = (load_model(tmp_path / n / "weights/last.pt")[0].state_dict() for n in ("stock", "ours"))
    assert all(torch.equal(a[k], b[k]) for k in a)


# Pruned models -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_pruned_checkpoint_keeps_its_widths_without_options(fit, pruned, tiny, tmp_path):
    assert widths(pruned) != widths(tiny)
    fit(pruned, yolo_ext.DetectionTrainer, epochs=1)
    assert widths(tmp_path / "run/weights/best.pt") == widths(pruned)
    assert load_model(tmp_path / "run/weights/best.pt")[1][MANIFEST]["prune"]["config"]["speedup"] == 1.5


@pytest.mark.slow
def test_pruned_checkpoint_can_be_pruned_again(fit, pruned, tmp_path):
    fit(pruned, yolo_ext.DetectionTrainer, epochs=1, prune={"ratio": 0.2})
    again = widths(tmp_path / "run/weights/best.pt")
    assert sum(map(np.prod, again.values())) < sum(map(np.prod, widths(pruned).values()))


@pytest.mark.slow
def test_stock_training_of_a_pruned_checkpoint_trips(fit, pruned):
    with pytest.raises(KeyError, match=TRIPWIRE):
        fit(pruned, epochs=1)


@pytest.mark.slow
def test_pruned_checkpoint_predicts_and_validates_with_stock_code(pruned, shapes, tmp_path):
    yolo = YOLO(str(pruned))
    assert len(yolo.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, device="cpu", verbose=False)) == 1
    yolo.val(data=str(shapes), imgsz=64, device="cpu", plots=False, verbose=False, save_dir=str(tmp_path), workers=0)


@pytest.mark.slow
def test_recalibration_happens_before_training_and_can_be_switched_off(fit, tiny):
    seen = {}
    for count in (0, 8):
        yolo = YOLO(str(tiny))
        yolo.add_callback(
            "on_train_start",
            lambda t, count=count: seen.update(
                {count: [b.clone() for b in (*t.model.buffers(), *t.ema.ema.buffers())]}
            ),
        )
        fit(yolo, yolo_ext.DetectionTrainer, f"run{count}", epochs=1, prune={**PRUNE, "recalibrate": count})
    assert any(not torch.equal(a, b) for a, b in zip(seen[0], seen[8]))
    half = len(seen[8]) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[8][:half], seen[8][half:])), "EMA has other statistics"


@pytest.mark.slow
def test_imgsz_off_the_stride_grid_is_rounded_as_ultralytics_does(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, imgsz=70, prune=PRUNE, quant={"mode": "qat", "calib": 4})
    assert YAML.load(tmp_path / "run/args.yaml")["imgsz"] == 70
    assert (tmp_path / "run/weights/best.pt").is_file()


# What a run writes -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_kd_losses_are_logged_and_plotted(fit, tiny, tmp_path):
    fit(tiny, yolo_ext.DetectionTrainer, prune=PRUNE, distill=DISTILL, plots=True)
    table = polars.read_csv(tmp_path / "run/results.csv")
    for name in KD:
        column = table[f"train/{name}"]
        assert (column > 0).all()
    # Every loss has something to show, in a panel of results.png as in TensorBoard: the EMA has no losses of ours.
    losses = [c for c in table.columns if "loss" in c]
    assert all((table[c] > 0).any() for c in losses) and {f"train/{name}" for name in KD} < set(losses)
    assert (tmp_path / "run/results.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "MuSGD", "auto"])
def test_adapters_learn_with_every_optimizer(fit, tiny, wide, optimizer):
    seen = []
    yolo = YOLO(str(tiny))
    for event in ("on_train_start", "on_train_end"):
        yolo.add_callback(
            event,
            lambda t: seen.append([p.detach().clone() for p in t.technique("distill").distiller.adapters.parameters()]),
        )
    trainer = fit(yolo, yolo_ext.DetectionTrainer, optimizer=optimizer, distill={"teacher": str(wide)})
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    group = trainer.optimizer.param_groups[-1]
    assert group["param_group"] == "distill" and group["weight_decay"] == 0
    assert group["initial_lr"] == min(g["initial_lr"] for g in trainer.optimizer.param_groups)
    own = {id(p) for p in group["params"]}
    assert not own & {id(p) for p in (*trainer.model.parameters(), *trainer.ema.ema.parameters())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "columns"),
    [({"logits": None}, KD[2:]), ({"features": None}, KD[:2])],
    ids=["features only", "logits only"],
)
def test_columns_follow_the_losses_in_use(fit, tiny, tmp_path, options, columns):
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, distill={**DISTILL, **options}, prune=PRUNE)
    names = [c for c in polars.read_csv(tmp_path / "run/results.csv").columns if c.startswith("train/kd")]
    assert names == [f"train/{c}" for c in columns]


@pytest.mark.slow
def test_checkpoints_hold_stock_classes_only_during_and_after_training(fit, tiny, wide, tmp_path):
    during, states = [], []
    weights = tmp_path / "run" / "weights"
    yolo = YOLO(str(tiny))

    def check(trainer):
        during.extend(is_stock(weights / n) for n in ("last.pt", "best.pt", "epoch0.pt"))
        states.append([p.name for p in weights.glob(SIDECAR.format("*"))])

    yolo.add_callback("on_model_save", check)
    fit(yolo, yolo_ext.DetectionTrainer, prune=PRUNE, distill={"teacher": str(wide)}, quant={"mode": "qat", "calib": 4},
        save_period=1)  # fmt: skip
    assert during == [True] * 6 and states == [[SIDECAR.format(0)], [SIDECAR.format(1)]]
    for name in ("last.pt", "best.pt"):
        assert is_stock(weights / name)
        model, ckpt = load_model(weights / name)
        assert set(ckpt[MANIFEST]) >= {"prune", "quant"} and ckpt[MANIFEST] == getattr(model, MANIFEST)
        torch_safe_load(weights / name, safe_only=True)  # what ULTRALYTICS_SAFE_LOAD does
        assert ckpt["optimizer"] is None and ckpt["epoch"] == -1
    assert not list(weights.glob(SIDECAR.format("*")))


@pytest.mark.slow
def test_checkpoint_works_where_yolo_ext_is_missing(pruned, tmp_path):
    code = (
        "import sys; sys.modules['yolo_ext'] = None\n"
        "import numpy as np\nfrom ultralytics import YOLO\n"
        f"YOLO({str(pruned)!r}).predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, device='cpu')\n"
    )
    env = {**os.environ, "ULTRALYTICS_SAFE_LOAD": "1"}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, env=env, timeout=120)


def test_interrupted_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    file = tmp_path / "weights" / "last.pt"
    own = Path.write_bytes
    with replaced(Path, write_bytes=atomic_write):
        file.write_bytes(b"old")

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr("yolo_ext.checkpoint.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt), replaced(Path, write_bytes=atomic_write):
        file.write_bytes(b"new but never finished")
    assert Path.write_bytes is own
    assert file.read_bytes() == b"old"
    assert [p.name for p in file.parent.iterdir()] == ["last.pt"]


@pytest.mark.slow
def test_all_checkpoints_of_a_run_are_written_atomically(fit, tiny, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(
        "yolo_ext.training.trainer.atomic_write", lambda p, d: (names.append(p.name), atomic_write(p, d))
    )
    fit(tiny, yolo_ext.DetectionTrainer, epochs=1, save_period=1)
    assert set(names) == {"last.pt", "best.pt", "epoch0.pt"}


# The user's own code -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("way", ["trainer", "attach"])
def test_user_callbacks_fire(fit, tiny, way):
    fired = []
    yolo = YOLO(str(tiny))
    events = ["on_pretrain_routine_start", "on_pretrain_routine_end", "on_train_start", "on_train_epoch_start",
              "on_train_batch_end", "on_model_save", "on_fit_epoch_end", "on_train_end"]  # fmt: skip
    for event in events:
        yolo.add_callback(event, lambda t, event=event: fired.append(event))
    if way == "attach":
        yolo_ext.attach(yolo, prune=PRUNE, distill=DISTILL)
        fit(yolo, epochs=1)
    else:
        fit(yolo, yolo_ext.DetectionTrainer, epochs=1, prune=PRUNE, distill=DISTILL)
    assert set(events) == set(fired)


@pytest.mark.slow
def test_user_callback_sees_the_task_criterion_through_ours(fit, tiny):
    seen = []
    yolo = YOLO(str(tiny))
    yolo.add_callback(
        "on_train_start", lambda t: seen.append((t.model.criterion, getattr(t.ema.ema, "criterion", None)))
    )
    fit(yolo, yolo_ext.DetectionTrainer, epochs=1, distill=DISTILL)
    assert isinstance(seen[0][0], DistillationLoss) and seen[0][0].nc == 3
    assert not isinstance(seen[0][1], DistillationLoss)


# Refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune": {"speedup": 1.5, "ratio": 0.3}}, ["prune.speedup", "prune.ratio"]),
        ({"prune": {"speedup": 99.0}}, ["prune.speedup=99", "at most"]),
        ({"prune": {}}, ["target", "prune.speedup"]),
        ({"prune": {"spedup": 2}}, ["prune.spedup", "prune.speedup"]),
        ({"prune": 2}, ["prune=2"]),
        ({"distill": {"features": None, "logits": None}}, ["both off"]),
        ({"distill": {"teacher": "no/such.pt"}}, ["no/such.pt", "does not exist"]),
        ({"distill": {"features": "cvd"}}, ["cvd", "cwd"]),
        ({"distill": DISTILL, "distill_model": "yolov8s.pt"}, ["distill_model", "distill."]),
        ({"quant": {"profile": "ort-86"}}, ["ort-86", "ort-x86"]),
        ({"quant": {"observer": "msee"}}, ["msee", "mse"]),
        ({"quant": {"exclude": ["no_such_layer"]}}, ["no_such_layer"]),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_wrong_options_are_usage_errors(fit, tiny, options, words):
    with pytest.raises(UsageError) as e:
        fit(tiny, yolo_ext.DetectionTrainer, epochs=1, **options)
    assert all(w in str(e.value) for w in words), e.value


def test_self_teacher_needs_weights(fit, tiny_yaml):
    with pytest.raises(UsageError, match="has no weights"):
        fit(tiny_yaml, yolo_ext.DetectionTrainer, distill=DISTILL)


def test_other_classes_are_refused_for_a_pruned_model(fit, pruned, shapes, tmp_path):
    data = YAML.load(shapes)
    YAML.save(tmp_path / "four.yaml", {**data, "names": {**data["names"], 3: "star"}})
    with pytest.raises(UsageError, match=r"number of classes 3 of the model, 4 of the data"):
        fit(pruned, yolo_ext.DetectionTrainer, data=str(tmp_path / "four.yaml"))


def test_pretrained_false_is_refused_for_a_pruned_model(fit, pruned):
    with pytest.raises(UsageError, match="pretrained"):
        fit(pruned, yolo_ext.DetectionTrainer, pretrained=False)


@pytest.mark.parametrize("task", ["detekt", "", "semantic"])
def test_no_trainer_for_an_unknown_task(task):
    with pytest.raises(UsageError, match="detect, segment"):
        yolo_ext.trainer_for(task)


# Other tasks -------------------------------------------------------------------------------------------------------
def corners(line: str) -> list[str]:
    """Return the box of a label line as eight corner coordinates."""
    c, x, y, w, h = (float(v) for v in line.split())
    sides = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 1)
    left, top, right, bottom = sides
    return [f"{c:.0f}", *(f"{v:.6f}" for v in (left, top, right, top, right, bottom, left, bottom))]


def keypoints(line: str) -> list[str]:
    _, x, y, _, _ = line.split()
    return [*line.split(), x, y, "2"]


def relabelled(shapes: Path, folder: Path, row) -> Path:
    """Copy the set with every label row changed by `row`."""
    shutil.copytree(shapes.parent, folder, ignore=shutil.ignore_patterns("*.cache"))
    for file in folder.rglob("labels/**/*.txt"):
        file.write_text("".join(" ".join(row(x)) + "\n" for x in file.read_text().splitlines()))
    content = YAML.load(shapes)
    extra = {"kpt_shape": [1, 3]} if row is keypoints else {}
    YAML.save(folder / "data.yaml", {**content, "path": str(folder), **extra})
    return folder / "data.yaml"


def folders(shapes: Path, folder: Path) -> Path:
    """Write a classification set: two classes of noise."""
    rng = np.random.default_rng(0)
    for split, name, i in [(s, n, i) for s in ("train", "val") for n in ("dark", "bright") for i in range(4)]:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 128, (64, 64, 3)) + 127 * (name == "bright")
        cv2.imwrite(str(folder / split / name / f"{i}.png"), image.astype(np.uint8))
    return folder


TASKS = {
    "segment": (SegmentationModel, "yolov8n-seg.yaml", lambda s, f: relabelled(s, f, corners)),
    "obb": (OBBModel, "yolov8n-obb.yaml", lambda s, f: relabelled(s, f, corners)),
    "pose": (PoseModel, "yolov8n-pose.yaml", lambda s, f: relabelled(s, f, keypoints)),
    "classify": (ClassificationModel, "yolov8n-cls.yaml", folders),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_prune_and_distill(fit, randomise, shapes, tmp_path, task):
    build, yaml, make = TASKS[task]
    data = make(shapes, tmp_path / "data")
    more = {"data_kpt_shape": [1, 3]} if task == "pose" else {}
    model = randomise(build(yaml, nc=2 if task == "classify" else 3, verbose=False, **more))
    model.names = {0: "bright", 1: "dark"} if task == "classify" else YAML.load(shapes)["names"]
    base = save_model(model, tmp_path / f"base-{task}.pt")
    distill = {} if task == "classify" else {"distill": DISTILL}
    fit(base, TRAINERS[task], epochs=1, data=str(data), prune=PRUNE, **distill)
    best = tmp_path / "run/weights/best.pt"
    assert sum(map(np.prod, widths(best).values())) < sum(map(np.prod, widths(base).values()))
    assert is_stock(best)
    columns = polars.read_csv(tmp_path / "run/results.csv").columns
    assert ("train/kd_feat_loss" in columns) == bool(distill)
    fit(best, TRAINERS[task], "again", epochs=1, data=str(data))
    assert widths(tmp_path / "again/weights/best.pt") == widths(best)


def test_a_classifier_has_no_neck_and_no_boxes_to_distil(fit, randomise, shapes, tmp_path):
    model = randomise(ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False))
    model.names = {0: "bright", 1: "dark"}
    base = save_model(model, tmp_path / "base-cls.pt")
    wrong = (({"layers": ["neck"]}, "A classifier has no neck"), ({"logits": "bckd"}, "a classifier has no boxes"))
    for options, reason in wrong:
        with pytest.raises(UsageError, match=reason):
            data = str(folders(shapes, tmp_path / "data"))
            fit(base, TRAINERS["classify"], epochs=1, data=data, distill={**DISTILL, **options})
