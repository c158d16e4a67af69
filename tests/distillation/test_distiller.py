# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What can be put together by options: every loss, layers, several teachers, levels, tasks, and what is skipped."""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import ClassificationModel

from yolo_ext.checkpoint import save_model
from yolo_ext.core.config import parse
from yolo_ext.core.errors import UsageError
from yolo_ext.distillation.criterion import DistillationLoss, Distiller
from yolo_ext.distillation.losses import feature_losses, logit_losses
from yolo_ext.distillation.teacher import sites
from yolo_ext.distillation.terms import Balance

CPU = torch.device("cpu")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "img": torch.rand(2, 3, 64, 64, generator=g),
        "cls": torch.tensor([[0.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.3]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }


@pytest.fixture
def setup(build, saved):
    """Return a function that gives a student in train mode with its criterion, from options."""

    def make(student: str, teacher: str | list[str] = "yolov8n", shrinks: bool = False, **options):
        model = build(f"{student}.yaml", 3)
        model.args = get_cfg()
        model.requires_grad_(True).train()
        files = [
            t if t == "ema" else str(saved(f"{t}.yaml")) for t in ([teacher] if isinstance(teacher, str) else teacher)
        ]
        cfg = parse({"distill": {"teacher": files[0] if isinstance(teacher, str) else files, **options}})["distill"]
        distiller = Distiller(model, cfg, CPU, shrinks=shrinks)
        model.criterion = DistillationLoss(model.init_criterion(), distiller=distiller)
        return model, distiller

    return make


def distilled(items: dict[str, torch.Tensor]) -> dict[str, float]:
    return {k: v.item() for k, v in items.items() if k.startswith("kd_")}


EVERY = [("logits", r.name) for r in logit_losses] + [("features", r.name) for r in feature_losses]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[name for _, name in EVERY])
def test_every_loss_runs_from_the_options_and_trains_what_it_built(setup, batch, kind, name):
    model, distiller = setup("yolov8n", "yolov8s", **{"logits": None, "features": None, kind: name})
    loss, items = model(batch)
    assert all(torch.isfinite(loss)) and max(distilled(items).values()) > 0
    loss[-len(distilled(items)) :].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.adapters.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.model[4].parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "options"),
    [
        ("yolov8n", "yolov8s", {"logits": ["bckd", "ld"], "features": ["cwd", {"name": "pkd", "layers": "backbone"}]}),
        ("yolov8n", "yolo11n", {"logits": None, "features": "at", "layers": ["backbone", "15:16"]}),
        ("yolov8n", ["yolov8s", "yolo11n"], {"logits": "kl_binary"}),
        ("yolov8n-p2", "yolov8n", {}),
        ("yolov8n", "yolov8n-p2", {}),
        ("yolo26n", "yolo26n", {"logits": "bckd", "features": None}),
    ],
    ids=["stack", "layers", "two teachers", "student with P2", "teacher with P2", "end to end"],
)
def test_combinations_learn(setup, batch, student, teacher, options):
    model, distiller = setup(student, teacher, **options)
    loss, items = model(batch)
    loss.sum().backward()
    assert loss.isfinite().all() and distiller.skipped == 0
    found = distilled(items)
    assert all(v > 0 for k, v in found.items() if k != "kd_box_loss" or options.get("logits") != "kl_binary")
    assert all(p.grad is not None for p in distiller.adapters.parameters())


@pytest.mark.slow
def test_a_stack_is_the_sum_and_several_teachers_the_mean(setup, batch):
    runs = [
        {"teacher": "yolov8s"},
        {"teacher": "yolo11n"},
        {"teacher": ["yolov8s", "yolo11n"]},
        {"teacher": "yolov8s", "logits": ["l1", {"name": "l1", "weight": 2.0}]},
    ]
    cls = [
        distilled(setup("yolov8n", **{"logits": "l1", "features": None, **r})[0](batch)[1])["kd_cls_loss"] for r in runs
    ]
    assert cls[2] == pytest.approx((cls[0] + cls[1]) / 2, rel=1e-4)
    assert cls[3] == pytest.approx(3 * cls[0], rel=1e-4)


def test_shared_classes_only_are_distilled(setup, build, batch, tmp_path):
    other = build("yolov8n.yaml")
    other.names = {0: "x", 1: "C ", 2: "a"}
    file = str(save_model(other, tmp_path / "other.pt"))
    student = build("yolov8n.yaml", 3)
    distiller = Distiller(student, parse({"distill": {"teacher": file}})["distill"], CPU)
    assert distiller.guides[0].classes == ([0, 2], [2, 1]) and "2 of 3 classes shared" in distiller.summary()
    assert distiller.losses(student.train()(batch["img"]), batch, {"": 1.0})["kd_cls_loss"] > 0


REFUSED = [
    ("yolo26n", "yolov8n", {"logits": "ld"}, ["'ld'", "reg_max=1", "bckd"]),
    ("yolov8n", "yolov8n", {"layers": ["99"]}, ["no layer '99'", "0 to 22"]),
    ("yolov8n", "yolov8n", {"layers": ["15:18"]}, ["differ in size"]),
    ("yolov8n", "yolov8n", {"layers": ["22"]}, ["layer '22'", "one map"]),
    ("yolov8n", "ema", {"layers": ["4"]}, ["running average"]),
    ("yolov8n", "ema", {"shrinks": True}, ["ema", "pruned while"]),
    ("yolov8n", "yolov8n", {"shrinks": True, "layers": ["4"]}, ["lose channels"]),
]


@pytest.mark.parametrize(
    ("student", "teacher", "options", "words"), REFUSED, ids=lambda v: v[0] if isinstance(v, list) else ""
)
def test_what_cannot_work_is_refused_before_training(setup, student, teacher, options, words):
    with pytest.raises(UsageError) as e:
        setup(student, teacher, **options)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_softmax_over_one_class_is_refused(build, saved):
    student = build("yolov8n.yaml")
    student.names = {0: "b"}
    cfg = parse({"distill": {"teacher": str(saved("yolov8n.yaml")), "logits": "kl"}})["distill"]
    with pytest.raises(UsageError, match="kl_binary"):
        Distiller(student, cfg, CPU)


# Batches ---------------------------------------------------------------------------------------------------------
def test_a_batch_with_a_loss_that_is_not_finite_is_trained_without(setup, batch, caplog):
    model, distiller = setup("yolov8n", "yolov8s")
    bias = distiller.guides[0].model.model[-1].cv3[0][-1].bias
    before = bias.clone()
    bias[0] = float("nan")
    loss, items = model(batch)
    loss.sum().backward()
    assert list(distilled(items).values()) == [0.0, 0.0, 0.0] and distiller.skipped == 1
    assert all(p.grad is None for p in distiller.adapters.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    bias.copy_(before)
    assert distilled(model(batch)[1])["kd_cls_loss"] > 0 and distiller.skipped == 1
    distiller.set_epoch(1, 10)
    assert distiller.skipped == 0


@pytest.mark.slow
def test_every_so_many_batches_with_the_same_pull(setup, batch):
    expected = distilled(setup("yolov8n", "yolov8s", features=None)[0](batch)[1])
    model, distiller = setup("yolov8n", "yolov8s", features=None, every=3)
    asked, ask = [], distiller.guides[0].ask
    distiller.guides[0].ask = lambda x: asked.append(1) or ask(x)
    found = [distilled(model(batch)[1]) for _ in range(4)]
    assert len(asked) == 2 and found[1] == found[2] == {"kd_cls_loss": 0.0, "kd_box_loss": 0.0}
    assert found[0]["kd_cls_loss"] == pytest.approx(3 * expected["kd_cls_loss"], rel=1e-4)


@pytest.mark.parametrize("options", [{"end": 2}, {"mosaic": "stop"}], ids=["end", "close_mosaic"])
def test_a_teacher_that_is_through_is_not_asked_any_more(setup, batch, options):
    model, distiller = setup("yolov8n", "yolov8s", **options)
    distiller.set_epoch(1, 10, 8)
    before = distilled(model(batch)[1])
    assert before["kd_cls_loss"] > 0
    distiller.set_epoch(2, 10, 8)
    distiller.guides[0].ask = None
    after = distilled(model(batch)[1])
    assert set(after.values()) == {0.0} and list(after) == list(before)  # the header of results.csv is written once


@pytest.mark.slow
def test_hard_and_soft_weights(setup, batch):
    one, two = (setup("yolov8n", "yolov8s", **o)[0] for o in ({}, {"alpha": 0.5, "beta": 2.0}))
    (a, x), (b, y) = one(batch), two(batch)
    assert torch.allclose(b[:3], 0.5 * a[:3], rtol=1e-4) and torch.allclose(b[3:5], 2.0 * a[3:5], rtol=1e-3)
    assert x["box_loss"].item() == pytest.approx(y["box_loss"].item(), rel=1e-4)  # logged as without a teacher


@pytest.mark.parametrize("logits", [None, "auto"])
def test_labels_without_weight_cost_no_backward_pass(setup, batch, logits):
    model, distiller = setup("yolov8n", "yolov8s", alpha=0.0, logits=logits, features="mimic")
    loss, items = model(batch)
    loss.sum().backward()
    head = [p.grad is not None for n, p in model.named_parameters() if n.startswith("model.22.cv")]
    assert model.model[0].conv.weight.grad.abs().sum() > 0 and items["box_loss"] > 0
    assert all(head) if logits else not any(head)  # maps before the head alone teach it nothing
    distiller.factors = [0.0] * len(distiller.terms)
    loss, _ = model(batch)
    loss.sum().backward()  # a batch without a teacher still has a gradient, of zeros


def test_balance_keeps_the_share(setup, batch):
    model, distiller = setup("yolov8n", "yolov8s", balance="auto", share=0.25)
    loss, _ = model(batch)
    assert (loss[3:].sum() / loss[:3].sum()).item() == pytest.approx(0.25, rel=1e-3)
    distiller.factors = [0.1] * len(distiller.terms)
    loss, _ = model(batch)
    assert (loss[3:].sum() / loss[:3].sum()).item() == pytest.approx(0.025, rel=0.1)
    assert "means" in " ".join(distiller.adapters.state_dict())


def test_balance_ignores_what_is_not_finite():
    balance = Balance()
    one = balance(torch.tensor(8.0), torch.tensor(2.0), 0.5)
    assert one == 2.0 and balance(torch.tensor(float("nan")), torch.tensor(1.0), 0.5) == one


def test_the_average_of_the_student_teaches_as_it_is_now(setup, batch):
    model, distiller = setup("yolov8n", "ema")
    average = deepcopy(model).eval()
    distiller.begin(SimpleNamespace(ema=SimpleNamespace(ema=average)))
    first = distilled(model(batch)[1])["kd_cls_loss"]
    average.model[-1].cv3[0][-1].bias.data += 2.0
    assert distilled(model(batch)[1])["kd_cls_loss"] > 1.1 * first
    assert not average.model[-1].training and not list(distiller.adapters.parameters())


def test_a_teacher_in_half_precision_says_the_same(setup, batch):
    model, distiller = setup("yolov8n", "yolov8s", logits="bckd", features=["cwd", "at"])
    expected = distilled(model(batch)[1])
    distiller.guides[0].model.bfloat16()
    loss, items = model(batch)
    loss.sum().backward()
    assert loss.isfinite().all() and loss.dtype == torch.float32
    assert distilled(items) == pytest.approx(expected, rel=0.1)


def test_taps_leave_nothing_in_a_saved_student(setup, batch):
    model, _ = setup("yolov8n", "yolov8s", layers=["4"])
    model(batch)
    assert not any(m._forward_hooks for m in model.modules())
    data = io.BytesIO()
    torch.save(deepcopy(model), data)
    assert b"yolo_ext." not in data.getvalue()


# Classification ----------------------------------------------------------------------------------------------------
@pytest.fixture
def classifiers(tmp_path):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False))
        models[-1].names = {0: "a", 1: "b", 2: "c"}
        torch.nn.init.normal_(models[-1].model[-1].linear.weight, 0, 0.3)
    return models[0], str(save_model(models[1], tmp_path / "teacher.pt"))


@pytest.mark.parametrize("name", ["kl", "kl_binary", "l1"])
def test_classifiers_are_distilled_as_means_over_images(classifiers, name):
    student, file = classifiers
    student.args = get_cfg()
    cfg = parse({"distill": {"teacher": file, "features": None, "logits": name}})["distill"]
    student.criterion = DistillationLoss(student.init_criterion(), distiller=Distiller(student, cfg, CPU))
    x = {"img": torch.rand(2, 3, 32, 32), "cls": torch.tensor([0, 2])}
    loss, items = student.train()(x)
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(items["kd_cls_loss"].item()) and items["kd_cls_loss"] > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [({"layers": ["neck"]}, "classifier"), ({"features": None, "logits": "bckd"}, "kl_binary")],
    ids=["maps", "boxes"],
)
def test_classifiers_have_no_neck_and_no_boxes(classifiers, options, word):
    with pytest.raises(UsageError, match=word):
        Distiller(classifiers[0], parse({"distill": {"teacher": classifiers[1], **options}})["distill"], CPU)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "expected"),
    [
        ("yolov8n", "yolov8s", {}, ["kl_binary", "ld"]),
        ("yolov8n", "yolov8s", {"imgsz": 96}, ["bckd"]),
        ("yolo26n", "yolov8n", {}, ["bckd"]),
        ("yolo26n", "yolo26n", {}, ["bckd"]),
        ("yolov8n", "yolov8s", {"logits": "l1"}, ["l1"]),
    ],
    ids=["equal bins", "another grid", "other bins", "no bins", "asked for"],
)
def test_auto_takes_what_the_pair_allows(setup, student, teacher, options, expected):
    _, distiller = setup(student, teacher, **options)
    assert [t.row.name for t in distiller.terms if t.kind == "logits"] == expected


def test_auto_of_classifiers_is_a_softmax_and_the_last_map_before_the_head(classifiers):
    distiller = Distiller(classifiers[0], parse({"distill": {"teacher": classifiers[1]}})["distill"], CPU)
    assert {t.row.name for t in distiller.terms} == {"cwd", "kl"}
    (site,) = sites([], classifiers[0], distiller.guides[0])
    assert site.student == site.teacher == "model.8"


def test_features_alone_need_no_common_classes(setup):
    model, distiller = setup("yolov8n", "yolov8s", logits=None)
    other = {i: f"other {i}" for i in range(len(model.names))}
    model.names = other
    found = Distiller(model, replace(distiller.cfg, logits=None), CPU)
    assert found.guides[0].classes == ([], [])
    with pytest.raises(UsageError, match="knows none of the classes"):
        Distiller(model, replace(distiller.cfg, logits="kl_binary"), CPU)
