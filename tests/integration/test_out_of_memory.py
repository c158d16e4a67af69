# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Out of memory in the first epoch: Ultralytics halves the batch and starts it again, with what there already is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ultralytics import YOLO

import yolo_ext
from yolo_ext.core.schedules import loss_factor
from yolo_ext.distillation.criterion import Distiller
from yolo_ext.sparsity.sparsifier import Sparsifier
from yolo_ext.stock.load import load_model

QUANT = {"mode": "qat", "calib": 4, "profile": "ort-x86", "observe_epochs": 1}


class Keeping(yolo_ext.DetectionTrainer):
    """Keeps its optimizer, as Ultralytics does from 8.4.165 on."""

    def _build_train_pipeline(self) -> None:
        kept = self.optimizer
        super()._build_train_pipeline()
        assert kept is None or self.optimizer is kept


class Rebuilding(yolo_ext.DetectionTrainer):
    """Makes a new optimizer, as Ultralytics did before."""

    def _build_train_pipeline(self) -> None:
        self.optimizer = None
        super()._build_train_pipeline()


TRAINERS = pytest.mark.parametrize("trainer", [Keeping, Rebuilding])


@pytest.fixture
def starve(fit):
    """Return a function that trains with a memory that is full in the given batch of the first epoch."""

    def run(model: Any, trainer: type, at: int = 1, **options: Any) -> Any:
        yolo, left = YOLO(str(model)), [at]

        def full(module: Any, args: Any) -> None:
            if module.training and left[0] == 0:
                left[0] = -1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        def count(_: Any) -> None:
            left[0] -= 1

        yolo.add_callback("on_train_start", lambda t: t.model.register_forward_pre_hook(full))
        yolo.add_callback("on_train_batch_end", count)
        done = fit(yolo, trainer, **options)
        assert done._oom_retries == 0 and done.batch_size == options.get("batch", 4) // 2
        return done

    return run


@pytest.fixture
def made(monkeypatch) -> list[Any]:
    """Return the distillers and sparsifiers that are made."""
    found: list[Any] = []
    for cls in (Distiller, Sparsifier):
        init = cls.__init__

        def spy(self: Any, *args: Any, init: Any = init, **kwargs: Any) -> None:
            found.append(self)
            init(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", spy)
    return found


def optimised(trainer: Any) -> list[int]:
    """Return the ids of all parameters of the optimizer, each as often as it is there."""
    return [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]


@pytest.mark.slow
@TRAINERS
def test_one_distiller_teaches_learns_and_follows_its_schedule(starve, made, tiny, wide, trainer):
    options = {"teacher": str(wide), "preflight": False, "schedule": "linear"}
    done = starve(tiny, trainer, epochs=3, distill=options)
    (distiller,) = made
    assert done.model.criterion.distiller is distiller
    ids = optimised(done)
    adapters = list(distiller.adapters.parameters())
    assert adapters and all(ids.count(id(p)) == 1 for p in adapters)
    assert any(p in done.optimizer.state for p in adapters)
    timing = distiller.terms[0].timing
    assert distiller.factors[0] == loss_factor(epoch=2, epochs=3, **timing) != loss_factor(epoch=1, epochs=3, **timing)


@pytest.mark.slow
@TRAINERS
def test_sparsity_pulls_as_far_as_without_the_incident(fit, starve, made, tiny, trainer):
    """Without a learning rate only the pull moves the scales."""
    options = {"epochs": 2, "nbs": 8, "lr0": 0.0, "warmup_bias_lr": 0.0}
    options["sparsity"] = {"coefficient": 0.2, "warmup": 0, "adaptive": False}
    whole = fit(tiny, yolo_ext.DetectionTrainer, name="whole", **options)
    done = starve(tiny, trainer, name="cut", **options)
    assert len(made) == 2  # one of each run
    name = "model.1.bn.weight"
    apart = (whole.model.get_parameter(name) - done.model.get_parameter(name)).abs().max()
    assert apart < 1e-6 and not torch.equal(done.model.get_parameter(name), load_model(tiny)[0].get_parameter(name))
    assert len(done.optimizer._optimizer_step_post_hooks) == 1
    decays = {id(p): g["weight_decay"] for g in done.optimizer.param_groups for p in g["params"]}
    assert decays[id(done.model.get_parameter(name))] == 0


@pytest.mark.slow
@TRAINERS
def test_pruned_distilled_and_quantized_all_at_once(starve, made, tiny, trainer):
    prune = {"speedup": 1.3, "images": 4, "recalibrate": 4}
    done = starve(tiny, trainer, prune=prune, distill={"teacher": "self"}, quant=QUANT)
    assert len(made) == 1
    ids = optimised(done)
    assert len(set(ids)) == len(ids)
    assert {id(p) for p in done.model.parameters() if p.requires_grad} <= set(ids)
    assert load_model(done.best)[0].yolo_ext["quant"]["state"]


@pytest.mark.slow
@TRAINERS
def test_pruning_before_the_first_epoch_happens_once(starve, tiny, trainer):
    prune = {"speedup": 1.3, "at": [0, 2], "images": 4, "recalibrate": 4}
    done = starve(tiny, trainer, epochs=3, prune=prune, distill={"teacher": "self", "preflight": False})
    assert [s["epoch"] for s in load_model(done.last)[0].yolo_ext["prune"]["steps"]] == [0, 2]
    ids = optimised(done)
    assert {id(p) for p in done.model.parameters() if p.requires_grad} <= set(ids)


@pytest.mark.parametrize("trainer", [Rebuilding])
def test_the_last_try_fails_as_it_does_without_us(fit, tiny, wide, trainer):
    """Three halvings, then Ultralytics passes the error on."""
    yolo = YOLO(str(tiny))

    def full(module: Any, args: Any) -> None:
        if module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    yolo.add_callback("on_train_start", lambda t: t.model.register_forward_pre_hook(full))
    with pytest.raises(torch.OutOfMemoryError):
        fit(yolo, trainer, distill={"teacher": str(wide), "preflight": False})
