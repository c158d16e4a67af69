# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Compression by callbacks on a workflow that stays as it is."""

from __future__ import annotations

import pytest
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer as StockTrainer
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext.core.errors import UsageError
from yolo_ext.training.trainer import CompressionMixin, DetectionTrainer

PRUNE = {"speedup": 1.5}


class OwnTrainer(StockTrainer):
    """A trainer of the user, with state and behaviour of its own."""

    steps = 0

    def optimizer_step(self) -> None:
        self.steps += 1
        super().optimizer_step()


def test_attach_returns_the_same_model_and_does_nothing_until_training(tiny):
    yolo = YOLO(str(tiny))
    before = {k: v.clone() for k, v in yolo.model.state_dict().items()}
    assert yolo_ext.attach(yolo, prune=PRUNE) is yolo
    assert all((yolo.model.state_dict()[k] == v).all() for k, v in before.items())


@pytest.mark.slow
def test_stock_trainer_becomes_ours(fit, tiny, tmp_path):
    trainer = fit(yolo_ext.attach(YOLO(str(tiny)), prune=PRUNE), epochs=1)
    assert type(trainer) is DetectionTrainer
    assert YAML.load(tmp_path / "run/args.yaml")["prune"]["speedup"] == 1.5


@pytest.mark.slow
def test_own_trainer_of_the_user_is_extended_not_replaced(fit, tiny, tmp_path):
    trainer = fit(yolo_ext.attach(YOLO(str(tiny)), prune=PRUNE, distill={}), OwnTrainer, epochs=1)
    assert isinstance(trainer, OwnTrainer) and isinstance(trainer, CompressionMixin)
    assert trainer.steps == 2
    assert "yolo_ext" in (tmp_path / "run/weights/best.pt").read_bytes().decode("latin1")


@pytest.mark.slow
def test_it_compresses_once_and_a_second_training_keeps_the_widths(fit, tiny):
    yolo = yolo_ext.attach(YOLO(str(tiny)), prune=PRUNE, distill={})
    pruned, plain = (fit(yolo, name=name, epochs=1) for name in ("first", "second"))
    first, second = ({k: v.shape for k, v in YOLO(str(t.best)).model.state_dict().items()} for t in (pruned, plain))
    assert first == second and not any(plain.compression.values())
    dense = YOLO(str(tiny)).model.state_dict()
    assert any(first[k] != dense[k].shape for k in dense)


@pytest.mark.parametrize(
    ("options", "begins", "later"),
    [
        pytest.param({"prune": PRUNE}, False, DetectionTrainer, id="the first one has failed at its data"),
        pytest.param({"prune": PRUNE}, True, StockTrainer, id="it has begun"),
        pytest.param({}, False, StockTrainer, id="nothing is asked for"),
    ],
)
def test_when_it_lets_go_of_a_model(tiny, shapes, settings, tmp_path, options, begins, later):
    yolo = yolo_ext.attach(YOLO(str(tiny)), **options)
    overrides = {**settings(shapes, tmp_path / "run"), "model": str(tiny)}
    trainers = []
    for _ in range(2):
        trainers.append(StockTrainer(overrides=dict(overrides), _callbacks=yolo.callbacks))
        if begins:
            trainers[0].callbacks["on_pretrain_routine_end"][-1](trainers[0])
    assert type(trainers[1]) is later


@pytest.mark.slow
def test_our_trainer_keeps_its_own_options(fit, tiny):
    yolo = yolo_ext.attach(YOLO(str(tiny)), prune={"speedup": 1.2})
    trainer = fit(yolo, DetectionTrainer, epochs=1, prune={"speedup": 1.5})
    assert trainer.compression["prune"].speedup == 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prun": PRUNE}, "Did you mean 'prune'"),
        ({"prune": {"speedup": 0.5}}, "out of range"),
        ({"distill": {"schedule": "cosin"}}, "cosine"),
    ],
    ids=["technique", "range", "choice"],
)
def test_wrong_options_are_refused_at_once(tiny, options, words):
    with pytest.raises(UsageError, match=words):
        yolo_ext.attach(YOLO(str(tiny)), **options)


def test_several_gpus_are_refused(tiny):
    yolo = yolo_ext.attach(YOLO(str(tiny)), prune=PRUNE)
    hook = yolo.callbacks["on_pretrain_routine_start"][-1]

    class Trainer:
        world_size = 2

    with pytest.raises(UsageError, match="trainer_for"):
        hook(Trainer())
