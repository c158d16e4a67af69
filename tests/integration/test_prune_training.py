# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning while training, through each way in: what a run ends with, and what it refuses."""

from __future__ import annotations

import shutil

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, SegmentationModel
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import cli, stock
from yolo_ext.checkpoint import manifest, save_model
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.masks import sparsity
from yolo_ext.stock.load import load_model

LATER = {"speedup": 2.0, "at": [1, 2], "images": 4, "recalibrate": 4}


def flops(path) -> float:
    return stock.gflops(load_model(path)[0])


@pytest.mark.slow
def test_a_run_ends_with_the_target_and_a_best_that_is_pruned(fit, tiny):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=4, prune=LATER, distill={"teacher": "self"})
    for name in ("best.pt", "last.pt"):
        model = load_model(trainer.save_dir / "weights" / name)[0]
        assert flops(tiny) / stock.gflops(model) == pytest.approx(2.0, rel=0.03)
        record = manifest(model).prune
        assert [s["epoch"] for s in record["steps"]] == [1, 2] and record["gap"] <= 1e-9
        assert record["steps"][0]["gflops"] > record["steps"][1]["gflops"]
        assert YOLO(str(trainer.save_dir / "weights" / name)).predict(torch.zeros(1, 3, 64, 64), verbose=False)
    # the unpruned self is compared on the kept channels to the end
    assert trainer.technique("distill").distiller.guides[0].kept


@pytest.mark.slow
def test_what_was_best_before_pruning_is_forgotten(fit, tiny):
    """Fitness is made to fall, so that only forgetting lets a pruned epoch become the best one."""
    yolo, seen = YOLO(str(tiny)), []
    yolo.add_callback("on_fit_epoch_end", lambda t: seen.append((t.epoch, t.best_fitness)))

    def worse(trainer):
        trainer.validate = lambda stock=trainer.validate: _worse(trainer, stock)

    yolo.add_callback("on_train_start", worse)
    trainer = fit(yolo, yolo_ext.DetectionTrainer, epochs=4, prune={**LATER, "at": [2]})
    assert flops(tiny) / flops(trainer.save_dir / "weights" / "best.pt") == pytest.approx(2.0, rel=0.03)
    assert [s[1] for s in seen[:4]] == [1.0, 1.0, 1 / 3, 1 / 3]


def _worse(trainer, stock):
    best = trainer.best_fitness
    metrics, _ = stock()
    fitness = 1 / (trainer.epoch + 1)
    trainer.best_fitness = fitness if best is None or best < fitness else best
    return metrics, fitness


@pytest.mark.slow
def test_attach_and_command_line_do_the_same(fit, tiny, shapes, settings, tmp_path):
    ours = fit(tiny, yolo_ext.DetectionTrainer, name="a", epochs=3, prune=LATER)
    fit(yolo_ext.attach(YOLO(str(tiny)), prune=LATER), name="b", epochs=3)
    options = {**settings(shapes, tmp_path / "c"), "epochs": 3, "model": tiny, "project": tmp_path, "name": "c"}
    del options["save_dir"]
    words = [f"{k}={v}" for k, v in options.items()] + [f"prune.{k}={v}" for k, v in LATER.items()]
    assert cli.main(["train", *words]) == 0
    states = [load_model(tmp_path / n / "weights" / "last.pt")[0].state_dict() for n in "abc"]
    for other in states[1:]:
        torch.testing.assert_close(states[0], other, rtol=0, atol=0)
    assert ours.technique("prune").epochs == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"params": 2.0}, {"ratio": 0.3}, {"size_mb": 0.2}])
def test_any_target(fit, tiny, target):
    options = {"images": 4, "recalibrate": 4, "every": 1, "end": 2, **target}
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=3, prune=options)
    assert flops(tiny) / flops(trainer.save_dir / "weights" / "best.pt") > 1.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "slim"])
def test_criteria_that_need_more_than_weights(fit, tiny, method):
    trainer = fit(
        tiny, yolo_ext.DetectionTrainer, epochs=2, prune={**LATER, "at": [1], "method": method, "force": True}
    )
    assert flops(tiny) / flops(trainer.save_dir / "weights" / "best.pt") == pytest.approx(2.0, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "MuSGD", "Adam", "RMSProp"])
def test_every_optimizer_goes_on(fit, tiny, optimizer):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=3, prune=LATER, optimizer=optimizer)
    assert flops(tiny) / flops(trainer.save_dir / "weights" / "best.pt") == pytest.approx(2.0, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [pytest.param(1, id="of the cut"), pytest.param(2, id="behind it")])
def test_loss_that_is_not_a_number_goes_back_to_the_pruned_checkpoint(fit, tiny, epoch, record_property):
    yolo, poisoned = YOLO(str(tiny)), []

    def poison(trainer):
        if trainer.epoch == epoch and not poisoned:
            poisoned.append(True)
            trainer.loss = torch.tensor(float("nan"))

    yolo.add_callback("on_train_batch_end", poison)
    trainer = fit(yolo, yolo_ext.DetectionTrainer, epochs=3, prune={**LATER, "at": [1]})
    assert poisoned and trainer.nan_recovery_attempts == 0  # it recovered and went on
    model = load_model(trainer.save_dir / "weights" / "last.pt")[0]
    assert flops(tiny) / stock.gflops(model) == pytest.approx(2.0, rel=0.03)
    assert [s["epoch"] for s in manifest(model).prune["steps"]] == [1]
    record_property("reliability", "NaN in the epoch of a cut and behind it: back to the pruned checkpoint, then on")


@pytest.mark.slow
def test_frozen_layers_stay_frozen(fit, tiny):
    trainer = fit(
        tiny, yolo_ext.DetectionTrainer, epochs=2, freeze=2, prune={**LATER, "at": [1], "exclude": ["0", "1"]}
    )
    before, after = load_model(tiny)[0].state_dict(), trainer.model.state_dict()
    assert torch.equal(before["model.0.conv.weight"], after["model.0.conv.weight"].cpu())
    assert not trainer.model.model[1].conv.weight.requires_grad
    assert flops(tiny) / flops(trainer.save_dir / "weights" / "best.pt") > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segment", "classify"])
def test_other_tasks(fit, shapes, randomise, tmp_path, kind):
    torch.manual_seed(0)
    if kind == "classify":
        for i, image in enumerate(sorted(shapes.parent.rglob("*.jpg"))):
            for split in ("train", "val"):
                folder = tmp_path / "classes" / split / f"c{i % 3}"
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, folder)
        model, options = (
            ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False),
            {"data": str(tmp_path / "classes")},
        )
    else:
        labels = tmp_path / "seg"
        shutil.copytree(shapes.parent, labels, ignore=shutil.ignore_patterns("*.cache"))
        YAML.save(labels / shapes.name, {**YAML.load(shapes), "path": str(labels)})
        for f in labels.rglob("labels/**/*.txt"):
            rows = [[float(v) for v in line.split()] for line in f.read_text().splitlines()]
            f.write_text("\n".join(f"{int(c)} {x - w / 2} {y - h / 2} {x + w / 2} {y - h / 2} {x + w / 2} {y + h / 2}"
                                   for c, x, y, w, h in rows))  # fmt: skip
        model, options = SegmentationModel("yolo11n-seg.yaml", nc=3, verbose=False), {"data": str(labels / shapes.name)}
    model.task = kind
    base = save_model(randomise(model), tmp_path / f"{kind}.pt")
    trainer = fit(base, yolo_ext.trainer_for(kind), epochs=3, prune=LATER, **options)
    assert flops(base) / flops(trainer.save_dir / "weights" / "best.pt") == pytest.approx(2.0, rel=0.03)


# Masks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("at", [[], [1, 2]])
def test_masks_hold_to_the_end(fit, tiny, at):
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=3, prune={"kind": "unstructured", "ratio": 0.7, "at": at})
    for name in ("best.pt", "last.pt"):
        found = sparsity(load_model(trainer.save_dir / "weights" / name)[0])
        assert found["masked"] == pytest.approx(0.7, abs=0.002)
    assert sparsity(trainer.model)["masked"] == pytest.approx(0.7, abs=0.002)


@pytest.mark.slow
def test_a_masked_model_keeps_its_masks_in_a_later_training(fit, tiny):
    first = fit(tiny, yolo_ext.DetectionTrainer, name="a", epochs=1, prune={"kind": "2:4"})
    second = fit(first.save_dir / "weights" / "best.pt", yolo_ext.DetectionTrainer, name="b", epochs=1)
    found = sparsity(load_model(second.save_dir / "weights" / "best.pt")[0])
    assert found["masked"] == pytest.approx(0.5, abs=0.002)


# Wrong input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": LATER, "epochs": 2}, r"'prune.at=\[1, 2\]' lies outside a run of 2 epochs"),
        ({"prune": LATER, "epochs": 4, "quant": {"calib": 4}}, "Pruning while training and QAT are both on"),
        ({"prune": LATER, "epochs": 4, "freeze": 2}, "frozen layers"),
        ({"prune": {"speedup": 1.5}, "epochs": 4, "freeze": [1]}, "frozen layers"),
    ],
)
def test_refused(fit, tiny, options, message):
    with pytest.raises(UsageError, match=message):
        fit(tiny, yolo_ext.DetectionTrainer, **options)
