# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import io
import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg

from yolo_ext.core.config import DistillConfig, PruneConfig
from yolo_ext.distillation.criterion import DistillationLoss, Distiller
from yolo_ext.distillation.terms import terms
from yolo_ext.pruning.prune import prune_model

CPU = torch.device("cpu")
KEYS = ["kd_cls_loss", "kd_box_loss", "kd_feat_loss"]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "img": torch.rand(2, 3, 64, 64, generator=g),
        "cls": torch.tensor([[0.0], [2.0], [1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3], [0.6, 0.5, 0.5, 0.6]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }


@pytest.fixture
def setup(build, saved):
    """Return a function that gives a student in train mode with its distillation criterion."""

    def make(student: str | nn.Module, teacher: str, seed: int = 0, **options):
        model = build(student, 3) if isinstance(student, str) else student
        model.args = get_cfg()
        model.requires_grad_(True).train()
        distiller = Distiller(model, DistillConfig(teacher=str(saved(teacher, seed)), **options), CPU)
        model.criterion = DistillationLoss(model.init_criterion(), distiller=distiller)
        return model, distiller

    return make


# What is built -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_pruned_self_is_compared_on_kept_channels(build, saved):
    from yolo_ext.stock.load import load_model

    dense, _ = load_model(saved("yolov8n.yaml"))
    student = prune_model(dense, PruneConfig(ratio=0.3))
    distiller = Distiller(student, DistillConfig(teacher=str(saved("yolov8n.yaml"))), CPU)
    assert distiller.guides[0].kept and not list(distiller.adapters.parameters())
    assert all(a.kept is not None for a in distiller.aligns.values())


@pytest.mark.slow
def test_other_teacher_of_a_pruned_student_gets_adapters(build, saved):
    student = prune_model(build("yolov8n.yaml"), PruneConfig(ratio=0.3))
    distiller = Distiller(student, DistillConfig(teacher=str(saved("yolov8n.yaml", 9))), CPU)
    assert distiller.guides[0].kept is None and len(list(distiller.adapters.parameters())) == 3


PAIRS = [("yolov8n", "yolov8s", True), ("yolov8n", "yolov8n", False), ("yolo11n", "yolov8n", False),
         ("yolov8n", "yolo26n", False), ("yolo26n", "yolov8n", False), ("yolo26n", "yolo26n", False),
         ("yolov8n-seg", "yolov8n-seg", False), ("yolov8n-obb", "yolov8n-obb", False)]  # fmt: skip


@pytest.mark.parametrize(("student", "teacher", "adapters"), PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_pairs_of_families_learn(setup, batch, student, teacher, adapters):
    if "obb" in student:
        batch["bboxes"] = torch.cat([batch["bboxes"], torch.zeros(3, 1)], 1)
    if "seg" in student:
        batch["masks"] = torch.ones(2, 16, 16)
    model, distiller = setup(f"{student}.yaml", f"{teacher}.yaml", seed=1)
    assert bool(list(distiller.adapters.parameters())) == adapters
    loss, items = model(batch)
    plain, before = deepcopy(model.criterion)(model(batch["img"]), batch)
    assert list(items) == [*before, *KEYS]
    assert all(items[k].shape == () and items[k].isfinite() and items[k] > 0 for k in KEYS)
    assert loss.shape == (len(plain) + 3,)
    assert torch.allclose(loss[-3:].detach(), 2 * torch.stack([items[k] for k in KEYS]))  # times the batch size

    model.zero_grad()
    loss[-3:].sum().backward()
    assert all(p.grad is None for p in distiller.guides[0].model.parameters())
    assert all(p.grad.abs().max() > 0 for p in distiller.adapters.parameters())
    touched = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"0", "4", "9", str(len(model.model) - 1)} <= touched
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_identical_student_has_no_distillation_loss(build, saved, batch):
    """Teacher and student from one file, both in eval mode, so that BatchNorm does the same on both sides."""
    from yolo_ext.stock.load import load_model

    model, _ = load_model(saved("yolov8n.yaml"))
    distiller = Distiller(model, DistillConfig(teacher=str(saved("yolov8n.yaml"))), CPU)
    with torch.no_grad():
        found = distiller.losses(model.eval()(batch["img"])[1], batch, {"": 1.0})
    assert found["kd_cls_loss"] < 1e-4 and found["kd_box_loss"] < 1e-3 and found["kd_feat_loss"] < 1e-4


def test_classes_in_another_order_are_mapped(setup, saved, build, batch, tmp_path):
    from yolo_ext.checkpoint import save_model
    from yolo_ext.stock.load import load_model

    turned = load_model(saved("yolov8n.yaml"))[0]
    order = [2, 0, 1]
    for branch in turned.model[-1].cv3:
        last = branch[-1]
        last.weight.data, last.bias.data = last.weight.data[order], last.bias.data[order]
    turned.names = {i: "abc"[j] for i, j in enumerate(order)}
    file = save_model(turned, tmp_path / "turned.pt")
    x, student = batch["img"], build("yolov8n.yaml", 3)
    with torch.no_grad():
        raw = student(x)[1]
        both = [Distiller(student, DistillConfig(teacher=str(p)), CPU) for p in (saved("yolov8n.yaml"), file)]
        found = [d.losses(raw, batch, {"": 1.0}) for d in both]
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-4) for k in KEYS)


# End-to-end heads --------------------------------------------------------------------------------------------------
def test_dense_teacher_does_not_teach_the_one_to_one_branch(setup, batch):
    model, distiller = setup("yolo26n.yaml", "yolov8n.yaml")
    raw = model(batch["img"])
    none = distiller.losses(raw, batch, {"one2many": 0.0, "one2one": 1.0})
    assert none["kd_cls_loss"] == 0 and none["kd_box_loss"] == 0
    assert distiller.losses(raw, batch, {"one2many": 1.0, "one2one": 0.0})["kd_cls_loss"] > 0


def test_branches_are_weighted_as_the_task_loss_weights_them(setup, batch):
    model, distiller = setup("yolo26n.yaml", "yolo26n.yaml", seed=1)
    raw = model(batch["img"])
    parts = [distiller.losses(raw, batch, g)["kd_cls_loss"] for g in ({"one2many": 1.0}, {"one2one": 1.0})]
    _, items = model.criterion(raw, batch)
    base = model.criterion.base
    assert items["kd_cls_loss"].item() == pytest.approx((base.o2m * parts[0] + base.o2o * parts[1]).item(), rel=1e-5)


# Weights -----------------------------------------------------------------------------------------------------------
def test_weights_and_schedule_scale_each_loss(setup, batch):
    model, distiller = setup("yolov8n.yaml", "yolov8n.yaml", 1)
    raw = model(batch["img"])
    one = distiller.losses(raw, batch, {"": 1.0})
    distiller.terms = terms(DistillConfig(teacher="t", logit_weight=3.0, feature_weight=0.5, final=0.2))
    distiller.set_epoch(9, 10)
    other = distiller.losses(raw, batch, {"": 1.0})
    for key, factor in zip(KEYS, (0.6, 0.6, 0.1)):
        assert other[key].item() == pytest.approx(factor * one[key].item(), rel=1e-5)


@pytest.mark.parametrize(("epoch", "epochs", "scale"), [(0, 1, 1.0), (0, 10, 1.0), (9, 10, 0.1), (12, 10, 0.1)])
def test_schedule_runs_from_the_first_to_the_last_epoch(setup, epoch, epochs, scale):
    _, distiller = setup("yolov8n.yaml", "yolov8n.yaml", 1)
    distiller.set_epoch(epoch, epochs)
    assert distiller.factors == pytest.approx([scale] * len(distiller.terms))


@pytest.mark.parametrize(
    ("options", "keys"), [({"logits": None}, KEYS[2:]), ({"features": None}, KEYS[:2])], ids=["features", "logits"]
)
def test_losses_that_are_off_have_no_key(setup, batch, options, keys):
    model, _ = setup("yolov8n.yaml", "yolov8n.yaml", 1, **options)
    for img in (batch["img"], torch.zeros_like(batch["img"])):  # the header of results.csv is written once
        _, items = model({**batch, "img": img})
        assert [k for k in items if k.startswith("kd")] == keys


def test_images_without_objects_train(setup, batch):
    model, _ = setup("yolov8n.yaml", "yolov8n.yaml", 1)
    empty = {"img": batch["img"], "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    loss, items = model(empty)
    loss.sum().backward()
    assert loss.isfinite().all() and items["kd_feat_loss"] > 0


# The criterion -----------------------------------------------------------------------------------------------------
class Base:
    """A criterion of the task."""

    def __init__(self) -> None:
        self.hyp, self.updates = "hyp", 0

    def update(self) -> None:
        self.updates += 1

    def __call__(self, predictions, batch):
        return torch.ones(2), {"box_loss": torch.tensor(0.5)}


@pytest.fixture
def wrapped() -> DistillationLoss:
    found = {"kd_cls_loss": torch.tensor(0.25, requires_grad=True)}
    fixed = SimpleNamespace(cfg=DistillConfig(), losses=lambda p, x, gains, task: found)
    return DistillationLoss(Base(), distiller=fixed)


@pytest.mark.parametrize("copy", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_the_plain_criterion(wrapped, copy):
    wrapped.updates = 7
    other = copy(wrapped)
    assert type(other) is Base and other.updates == 7 and other is not wrapped.base


@pytest.mark.slow
def test_a_model_with_the_criterion_copies_and_saves_without_the_teacher(setup, batch):
    model, distiller = setup("yolov8n.yaml", "yolov8s.yaml")
    plain = io.BytesIO()
    clone = deepcopy(model)
    assert type(clone.criterion) is type(model.criterion.base)
    torch.save(model, plain)
    teacher = sum(p.numel() for p in distiller.guides[0].model.parameters())
    student = sum(p.numel() for p in model.parameters())
    assert 4 * student < plain.tell() < 4 * (student + teacher)
    assert b"yolo_ext." not in plain.getvalue()  # no class or function of ours


def test_attributes_are_those_of_the_task_criterion(wrapped):
    wrapped.update()
    assert wrapped.updates == wrapped.base.updates == 1 and wrapped.hyp == "hyp"
    wrapped.hyp = "other"
    assert wrapped.base.hyp == "other"
    assert hasattr(wrapped, "update") and not hasattr(wrapped, "nothing")


def test_items_are_detached_and_the_vector_is_times_the_batch(wrapped):
    loss, items = wrapped({}, {"img": torch.zeros(4, 3, 8, 8)})
    assert loss.tolist() == [1.0, 1.0, 1.0] and loss.requires_grad
    assert list(items) == ["box_loss", "kd_cls_loss"] and not items["kd_cls_loss"].requires_grad
