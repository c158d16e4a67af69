# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What is taken for granted of Ultralytics' trainers, broken on purpose: a message, or the run goes on and says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.data import YOLODataset
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER

import yolo_ext
from yolo_ext.core.errors import UsageError
from yolo_ext.stock import trainer as stock
from yolo_ext.training.resume import Exact
from yolo_ext.training.trainer import STOCK, CompressionMixin


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: lines.append(str(text)))
    return lines


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a trainer, which then has not looked at model and data yet."""
    yaml = tmp_path / "data.yaml"
    (tmp_path / "images").mkdir()
    yaml.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [a]\n")

    def run(cls: type = yolo_ext.DetectionTrainer) -> CompressionMixin:
        return cls(overrides={"model": "yolov8n.yaml", "data": str(yaml), "device": "cpu", "save_dir": str(tmp_path)})

    return run


# Checked when a run starts -------------------------------------------------------------------------------------------
def test_nothing_is_missing_today(make):
    make()


@pytest.mark.parametrize("name", sorted(stock.METHODS))
def test_a_method_that_takes_other_arguments_is_named(make, monkeypatch, name):
    if name == "run_callbacks":  # which the trainer needs to come into being
        monkeypatch.setitem(stock.METHODS, name, 2)
    else:
        monkeypatch.setattr(DetectionTrainer, name, lambda self, *, other: None)
    with pytest.raises(UsageError, match=rf"lacks what yolo_ext extends.*{name}\(\).*pip install 'ultralytics>="):
        make()


def test_a_method_that_is_gone_is_named(make, monkeypatch):
    monkeypatch.delattr(engine.BaseTrainer, "_model_train")
    with pytest.raises(UsageError, match=r"the method _model_train\(\)"):
        make()


@pytest.mark.parametrize("event", stock.EVENTS)
def test_an_event_that_is_gone_is_named(make, monkeypatch, event):
    known = stock.get_default_callbacks()
    monkeypatch.setattr(stock, "get_default_callbacks", lambda: {k: v for k, v in known.items() if k != event})
    with pytest.raises(UsageError, match=f"the event {event}"):
        make()


@pytest.mark.parametrize("strip", [None, lambda f: {}], ids=["gone", "other arguments"])
def test_final_files_finished_in_another_way_are_named(make, monkeypatch, strip):
    monkeypatch.setattr(engine, "strip_optimizer", strip)
    with pytest.raises(UsageError, match=r"strip_optimizer\(\)"):
        make()


def test_attach_that_comes_too_late_says_what_to_do():
    late = SimpleNamespace(args=SimpleNamespace(), model=nn.Identity())
    with pytest.raises(UsageError, match=r"comes too late.*trainer_for"):
        stock.extend(late, CompressionMixin, STOCK)
    assert type(late) is SimpleNamespace


# Noticed in time -----------------------------------------------------------------------------------------------------
def test_a_scan_that_insists_on_labels_says_what_to_do(monkeypatch):
    def scan(dataset, *args):
        raise ValueError("No labels found")

    monkeypatch.setattr(YOLODataset, "cache_labels", scan)
    dataset = SimpleNamespace(augment=True)
    match = r"takes no train split without labels.*quant\.supervision"
    with pytest.raises(UsageError, match=match), stock.labels_optional(True):
        YOLODataset.cache_labels(dataset)
    assert dataset.augment and YOLODataset.cache_labels is scan


# Resume goes on ------------------------------------------------------------------------------------------------------
def loader(**own) -> SimpleNamespace:
    return SimpleNamespace(generator=torch.Generator(), iterator=None, **own)


@pytest.mark.parametrize(
    "found",
    [SimpleNamespace(), loader(), loader(_get_iterator=lambda: object(), __len__=lambda: 1)],
    ids=["no iterator", "no way to make one", "one without a sampler"],
)
def test_a_loader_of_another_kind_is_left_alone(found):
    class Loader(SimpleNamespace):
        def __len__(self) -> int:
            return 1

    assert stock.continue_order(Loader(**vars(found)), torch.Generator().get_state(), True, False) is False


@pytest.mark.parametrize(("waiting", "stepped"), [(1, True), (4, False)], ids=["too early", "too late"])
def test_steps_that_come_at_other_times_are_told_once(warned, waiting, stepped):
    exact, trainer = Exact(), SimpleNamespace(accumulate=4)
    exact._shift, exact.waiting = 10, waiting - 1
    for _ in range(2):
        exact.before_batch()
        exact.prepare_batch(trainer)
        if stepped:
            exact.after_step(trainer)
        exact.after_batch(trainer)
        assert trainer.accumulate == 4
    assert len(warned) == 1 and "accumulates gradients in a way" in warned[0]


@pytest.mark.parametrize("waited", [0, 1, 3])
def test_steps_that_come_in_time_are_not(warned, waited):
    exact, trainer = Exact(), SimpleNamespace(accumulate=4)
    exact._shift, exact.waiting = 10, waited
    for i in range(waited + 1, 9):
        exact.before_batch()
        exact.prepare_batch(trainer)
        assert trainer.accumulate == 14 if i <= 4 else 4
        if i % 4 == 0:
            exact.after_step(trainer)
        exact.after_batch(trainer)
    assert trainer.accumulate == 4 and not warned
