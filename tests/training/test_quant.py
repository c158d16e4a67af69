# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What QAT does by epoch and step, without a training around it."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import DistillConfig, QuantConfig
from yolo_ext.quantization.fake_quant import insert_fake_quant, quantized_layers, quantizers
from yolo_ext.quantization.spec import resolve_profile
from yolo_ext.training import quant


def technique(**options) -> quant.Quant:
    return quant.Quant({"quant": QuantConfig(**options)}, SimpleNamespace())


def trainer_of(model: nn.Module, epoch: int = 0, epochs: int = 4) -> SimpleNamespace:
    """Return the little of a trainer that the technique looks at."""
    return SimpleNamespace(
        model=model.train(),
        ema=SimpleNamespace(ema=deepcopy(model).eval()),
        epoch=epoch,
        epochs=epochs,
        world_size=1,
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    weights4 = [{"op_types": ["Conv2d"], "quant_bits": {"weight": 4}}]
    insert_fake_quant(net, resolve_profile("ort-x86"), config_list=weights4)
    for *_, q, _ in quantizers(net):
        q.set_range(-1.0, 3.0)
    return net


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "moving"),
    [({}, 0), ({"observe_epochs": 1}, 1), ({"observe_epochs": 3}, 3)],
    ids=["default", "1", "3"],
)
def test_ranges_follow_the_data_in_the_first_epochs(model, options, moving):
    for epoch in range(4):
        trainer = trainer_of(model, epoch)
        technique(**options).before_epoch(trainer)
        for m in (trainer.model, trainer.ema.ema):
            assert {q.momentum > 0 for *_, q, _ in quantizers(m)} == {epoch < moving}
            assert all(layer.mode == "on" for _, layer, _ in quantized_layers(m))


@pytest.mark.parametrize(("share", "frozen"), [(0.0, 0), (0.3, 2), (0.5, 2), (0.75, 3), (1.0, 4)], ids=lambda v: str(v))
def test_batch_norm_is_frozen_behind_a_share_of_the_epochs(model, share, frozen):
    """Frozen in epochs from `frozen` on, counted from 0, of 4."""
    for epoch in range(4):
        trainer = trainer_of(model, epoch)
        technique(freeze_bn=share).train_mode(trainer)
        norms = [m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {m.training for m in norms} == {epoch < frozen}
        assert trainer.model.training and all(q.training for *_, q, _ in quantizers(trainer.model))


def test_frozen_batch_norm_still_learns_scale_and_shift(model):
    trainer = trainer_of(model)
    technique(freeze_bn=0.0).train_mode(trainer)
    norm = next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))
    mean = norm.running_mean.clone()
    sum(v.sum() for v in trainer.model(torch.rand(2, 3, 96, 96))["feats"]).backward()
    assert torch.equal(norm.running_mean, mean) and norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("given", [None, DistillConfig(alpha=0.0), DistillConfig(alpha=0.0, teacher="t.pt")])
def test_without_labels_only_a_teacher_is_left(given):
    found = quant.without_labels(given)
    assert found.alpha == 0.0 and found.features
    assert given is None or found is given


def test_labels_and_no_labels_contradict_each_other():
    with pytest.raises(UsageError, match=r"distill\.alpha=1' weighs them"):
        quant.without_labels(DistillConfig())


@pytest.mark.parametrize(
    ("options", "native", "why"),
    [
        ({"mode": "ptq"}, {}, "does not train"),
        ({}, {"quantize": 8}, "Both insert fake quantizers"),
        ({}, {"distill_model": "t.pt"}, r"give distill\.teacher"),
    ],
    ids=["ptq", "quantize", "distill_model"],
)
def test_what_qat_cannot_be_combined_with(options, native, why):
    with pytest.raises(UsageError, match=why):
        quant.Quant.settle({"quant": QuantConfig(**options), "distill": None}, SimpleNamespace(**native))


@pytest.mark.parametrize(
    ("optimizer", "lr0", "expected"),
    [("auto", 0.01, ("AdamW", 3e-5, 3e-5)), ("SGD", 0.01, ("SGD", 0.01, 0.01)), ("SGD", 0.2, ("SGD", 0.2, 0.1))],
)
def test_learning_rates_are_those_of_a_trained_model(optimizer, lr0, expected):
    """Ultralytics starts biases at 0.1 otherwise, which cost 0.02 mAP50-95 on BCCD."""
    args = SimpleNamespace(optimizer=optimizer, lr0=lr0, warmup_bias_lr=0.1, task="detect")
    quant.Quant.settle({"quant": QuantConfig(lr0=3e-5), "distill": None}, args)
    assert (args.optimizer, args.lr0, args.warmup_bias_lr) == expected


@pytest.mark.parametrize(
    ("task", "distill", "supervision"),
    [
        ("detect", None, "features"),
        ("detect", DistillConfig(teacher="a.pt"), "labels"),
        ("classify", None, "labels"),
    ],
)
def test_auto_supervision_follows_from_what_else_is_asked(task, distill, supervision):
    args = SimpleNamespace(optimizer="SGD", lr0=0.01, warmup_bias_lr=0.1, task=task)
    configs = {"quant": QuantConfig(), "distill": distill}
    quant.Quant.settle(configs, args)
    assert configs["quant"].supervision == supervision
    assert (configs["distill"] == distill) == (supervision == "labels")


def two_ranks(rank: int, file: str, found: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    layer = nn.Sequential(nn.Conv2d(3, 4, 1))
    from yolo_ext.quantization.fake_quant import insert_plan
    from yolo_ext.quantization.spec import Spec

    insert_plan(layer, {"0": {"input": Spec(), "weight": Spec(symmetric=True, per_channel=True)}})
    q = layer[0].input_quantizer
    q.fixed = False
    q.set_range(-1.0 - rank, 2.0 + 4 * rank)
    quant.mean_of_ranks(layer, 2)
    found[rank] = (float(q.lo), float(q.hi))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranges_are_equal_on_all_ranks(tmp_path):
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(two_ranks, (str(tmp_path / "store"), found), nprocs=2)
        assert dict(found) == {0: (-1.5, 4.0), 1: (-1.5, 4.0)}
