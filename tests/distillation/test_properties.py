# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What holds for every loss of the tables in a run: identity, batch size, precision, labels, and pairs of models."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg

from yolo_ext import stock
from yolo_ext.core.config import parse
from yolo_ext.distillation.criterion import DistillationLoss, Distiller
from yolo_ext.distillation.losses import feature_losses, logit_losses
from yolo_ext.stock.load import load_model

LOGITS, FEATURES = [r.name for r in logit_losses], [r.name for r in feature_losses]
EVERY = pytest.mark.parametrize("name", [*LOGITS, *FEATURES])
# Rows that are not 0 for equal models, and why. Those with an entropy term are none of them: bckd weights it by
# a disagreement that is 0, kl_binary subtracts it.
NOT_ZERO = {"mgd": "its generator has not learnt yet to restore what the mask hides"}


@dataclass
class Rig:
    """A student, and a distiller whose stack is every loss that the pair allows."""

    model: nn.Module
    distiller: Distiller
    names: list[str]

    def losses(self, batch: dict[str, Any], name: str, change: Callable = lambda raw: raw) -> dict[str, torch.Tensor]:
        """Return the losses of one row; `change` is done to all that student and teacher say."""
        distiller = self.distiller
        distiller.factors = [float(n == name) for n in self.names]
        distiller.step = 0
        raw = change(self.model(batch["img"]))
        distiller.taps[0].found.update(change(dict(distiller.taps[0].found)))
        gains = {"one2many": 0.8, "one2one": 0.2} if "one2many" in raw else {"": 1.0}
        guide = distiller.guides[0]
        guide.ask = lambda images: change(type(guide).ask(guide, images))
        return distiller.losses(raw, batch, gains)

    def value(self, batch: dict[str, Any], name: str, **options: Any) -> float:
        return float(sum(v.detach() for v in self.losses(batch, name, **options).values()))


@pytest.fixture(scope="module")
def rig(build, saved) -> Callable[..., Rig]:
    """Return a function that gives the rig of a pair, made once."""
    made: dict[tuple, Rig] = {}

    def make(student: str = "yolov8n", teacher: str = "yolov8s", nc: int = 3, without: tuple[str, ...] = ()) -> Rig:
        key = (student, teacher, nc, without)
        if key not in made:
            model = build(f"{student}.yaml", 3, nc)
            model.args = get_cfg()
            model.requires_grad_(True).train()
            stack = {
                "logits": [n for n in LOGITS if n not in without],
                # Without a mask, which is drawn anew in every batch.
                "features": [{"name": n, **({"masked": 0.0} if n == "mgd" else {})} for n in FEATURES],
            }
            cfg = parse({"distill": {"teacher": str(saved(f"{teacher}.yaml", nc=nc)), **stack}})["distill"]
            distiller = Distiller(model, cfg, torch.device("cpu"))
            made[key] = Rig(model, distiller, [t.row.name for t in distiller.terms])
        return made[key]

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {
        "img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)),
        "cls": torch.tensor([[0.0], [0.0], [0.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3], [0.6, 0.5, 0.5, 0.6]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }


def repeated(batch: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    size = len(batch["img"])
    found = {k: torch.cat([v] * times) for k, v in batch.items()}
    return {**found, "batch_idx": torch.cat([batch["batch_idx"] + size * i for i in range(times)])}


def first(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch with its first image only."""
    keep = batch["batch_idx"] == 0
    return {"img": batch["img"][:1], **{k: batch[k][keep] for k in ("cls", "bboxes", "batch_idx")}}


def empty(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, **{k: batch[k][:0] for k in ("cls", "bboxes", "batch_idx")}}


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(dtype)
    return {k: cast(v, dtype) for k, v in x.items()} if isinstance(x, dict) else [cast(v, dtype) for v in x]


# Equal models ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def twin(saved) -> Rig:
    """Return a student whose teacher is a copy of it: no fused convolutions, which differ in the last digits."""
    model, _ = load_model(saved("yolov8n.yaml"))
    model.eval().requires_grad_(True)
    model.model[-1].training = True
    cfg = parse({"distill": {"teacher": str(saved("yolov8n.yaml")), "logits": LOGITS, "features": FEATURES}})["distill"]
    distiller = Distiller(model, cfg, torch.device("cpu"))
    copy = deepcopy(model).requires_grad_(False)
    distiller.guides[0].get = lambda: copy
    return Rig(model, distiller, [t.row.name for t in distiller.terms])


@EVERY
def test_equal_models_have_no_loss_and_no_gradient(twin, batch, name):
    twin.model.zero_grad()
    loss = sum(twin.losses(batch, name).values())
    loss.backward()
    gradient = max(float(p.grad.abs().max()) for p in twin.model.parameters() if p.grad is not None)
    if name in NOT_ZERO:
        assert loss > 0 and gradient > 0
    else:
        assert 0 <= loss.item() <= 1e-6 and gradient <= 1e-5


# Batches -----------------------------------------------------------------------------------------------------------
@EVERY
def test_the_share_of_the_task_loss_does_not_depend_on_the_batch_size(rig, batch, name):
    """The images of a batch are repeated, so that statistics of BatchNorm stay what they are."""
    found = rig()
    criterion = DistillationLoss(found.model.init_criterion(), distiller=found.distiller)
    shares, values = [], []
    for times in (1, 2, 4):
        x = repeated(batch, times)
        found.losses(x, name)  # which sets the schedule
        loss, items = criterion(found.model(x["img"]), x)
        task, taught = loss[:3].sum().item(), loss[3:].sum().item()
        shares.append(taught / task)
        values.append(float(sum(v for k, v in items.items() if k.startswith("kd_"))))
        assert taught == pytest.approx(len(x["img"]) * values[-1], rel=1e-5)  # as Ultralytics scales all losses
    assert values[0] > 0 and values == pytest.approx([values[0]] * 3, rel=1e-3)
    assert shares[1] == pytest.approx(shares[2], rel=1e-3)  # the task's own normaliser is clamped in the smallest batch


@EVERY
@pytest.mark.parametrize("make", [empty, first, lambda x: empty(first(x))], ids=["no labels", "one image", "both"])
def test_batches_without_labels_or_with_one_image_train(rig, batch, name, make):
    found = rig()
    found.model.zero_grad()
    loss = sum(found.losses(make(batch), name).values())
    assert loss.isfinite() and loss > 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in found.model.parameters())
    assert found.distiller.skipped == 0


# Precision and memory format ---------------------------------------------------------------------------------------
@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_precision_of_the_models_does_not_matter(rig, batch, name, dtype):
    """Losses compute in float32 under autocast, so that only the rounding of what they are given is left."""
    found = rig()
    expected = found.value(batch, name)
    student = found.model(batch["img"])  # autocast is for the losses here
    found.model.forward, stock = (lambda x: student), found.model.forward
    taken = dict(found.distiller.taps[0].found)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found.distiller.taps[0].found.update(taken)
            losses = found.losses(batch, name, change=lambda x: cast(x, dtype))
    finally:
        found.model.forward = stock
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert float(sum(v.detach() for v in losses.values())) == pytest.approx(expected, rel=1e-2)


@EVERY
def test_channels_last_does_not_matter(rig, batch, name):
    found = rig()
    expected = found.value(batch, name)
    found.model.to(memory_format=torch.channels_last)
    try:
        img = batch["img"].contiguous(memory_format=torch.channels_last)
        assert found.value({**batch, "img": img}, name) == pytest.approx(expected, rel=1e-3)
    finally:
        found.model.to(memory_format=torch.contiguous_format)


# Pairs -------------------------------------------------------------------------------------------------------------
BINS = ("ld",)  # what other bins leave out; the refusals have their own tests
PAIRS = {
    "one class": ("yolov8n", "yolov8s", 1, ("kl",), [8, 16, 32]),
    "P2 student": ("yolov8n-p2", "yolov8n", 3, (), [8, 16, 32]),
    "P2 teacher": ("yolov8n", "yolov8n-p2", 3, (), [8, 16, 32]),
    "P6 student": ("yolov8n-p6", "yolov8n", 3, (), [8, 16, 32]),
    "P6 teacher": ("yolov8n", "yolov8n-p6", 3, (), [8, 16, 32]),
    "P2 and P6": ("yolov8n-p2", "yolov8n-p6", 3, (), [8, 16, 32]),
    "26 teaches v8": ("yolov8n", "yolo26n", 3, BINS, [8, 16, 32]),
    "v8 teaches 26": ("yolo26n", "yolov8n", 3, BINS, [8, 16, 32]),
    "10 teaches 26": ("yolo26n", "yolov10n", 3, BINS, [8, 16, 32]),
    "26 teaches 10": ("yolov10n", "yolo26n", 3, BINS, [8, 16, 32]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher", "nc", "without", "strides"), PAIRS.values(), ids=PAIRS)
def test_every_loss_that_a_pair_allows_learns_on_shared_strides(rig, batch, student, teacher, nc, without, strides):
    found = rig(student, teacher, nc, without)
    head = stock.detection_head(found.model)
    assert [int(head.stride[i]) for i, _ in found.distiller.guides[0].levels] == strides
    for name in found.names:
        found.model.zero_grad()
        loss = sum(found.losses(batch, name).values())
        assert loss.isfinite() and loss > 0, name
        loss.backward()
        grads = [p.grad for p in found.model.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in grads) and max(g.abs().max() for g in grads) > 0, name
        if name in LOGITS:
            assert all(
                p.grad is None or p.grad.abs().max() == 0
                for i, s in enumerate(head.stride) if int(s) not in strides
                for p in head.cv3[i].parameters()
            ), f"{name} teaches a level that the teacher does not have"  # fmt: skip
    assert found.distiller.skipped == 0
