# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ultralytics import RTDETR, YOLO

from yolo_ext.checkpoint import fingerprint
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.criteria import criteria, score
from yolo_ext.pruning.evidence import _single, collect, task_losses
from yolo_ext.pruning.graph import Group, build_graph
from yolo_ext.pruning.surgery import masked

DATA_DRIVEN = [row.name for row in criteria if Need.DATA in row.needs]


# A model whose gradients can be had by other means -------------------------------------------------------------------
class Toy(nn.Module):
    """Convs, BatchNorm, a depthwise and a transposed conv, a Linear, and a layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.SiLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Dropout(0.9),
            nn.ConvTranspose2d(4, 5, 2, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 2),
        )
        nn.init.normal_(self.model[1].running_mean)
        nn.init.normal_(self.model[1].bias)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.model(x)

    def loss(self, batch):
        return (self(batch["img"]) - batch["cls"]).square().sum().view(1), {}  # as detection: summed over the images


def toy_batches(*sizes: int) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(sum(sizes), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.randn(sum(sizes), 2, generator=torch.Generator().manual_seed(2))
    return [{"img": a, "cls": b} for a, b in zip(x.split(sizes), y.split(sizes))]


def gradients_of_single_images(toy: Toy) -> dict[str, torch.Tensor]:
    """Return (images,) + shape gradients for each parameter."""
    toy, rows = deepcopy(toy).eval(), []
    for batch in toy_batches(*[1] * 7):
        toy.zero_grad()
        toy.loss(batch)[0].sum().backward()
        rows.append({n: p.grad for n, p in toy.named_parameters() if p.grad is not None})
    return {n: torch.stack([r[n] for r in rows]) for n in rows[0]}


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (4, 3), (0, 5, 2)], ids=str)
@pytest.mark.parametrize("method", ["taylor", "hessian"])
def test_all_images_count_alike(method, sizes):
    toy = Toy()
    weights, each = dict(toy.named_parameters()), gradients_of_single_images(toy)
    expected = {
        n: (weights[n] * g.mean(0)).abs() if method == "taylor" else weights[n].square() * g.square().mean(0)
        for n, g in each.items()
    }
    torch.testing.assert_close(
        collect(toy, method, toy_batches(*sizes)), {n: t.detach() for n, t in expected.items()}, rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (0, 5, 2)], ids=str)
def test_obd_is_that_of_the_kronecker_factors(sizes):
    """Build A from the input patches and S from the output gradients, as the paper does."""
    toy, gradient = Toy().eval(), {}
    conv, batch = toy.model[0], toy_batches(7)[0]
    batch["img"].requires_grad_()  # or the hook warns
    conv.register_full_backward_hook(lambda m, inp, out: gradient.update(out=out[0]))
    toy.loss(batch)[0].sum().backward()
    patches = F.unfold(batch["img"].detach(), 3, padding=1, stride=2)  # (images, fan_in, positions)
    a = torch.einsum("bit,bjt->ij", patches, patches) / 7
    s = gradient["out"].square().mean((0, 2, 3))
    w = conv.weight.detach().flatten(1)
    expected = s * torch.einsum("oi,ij,oj->o", w, a, w)
    found = collect(Toy(), "obd", toy_batches(*sizes))
    torch.testing.assert_close(found["model.0"], expected, rtol=1e-4, atol=1e-9)
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "model.0": (4,), "model.3": (4,), "model.5": (5,), "model.8": (2,),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["taylor", "hessian"])
def test_batchnorm_and_depthwise_count_and_unused_layers_do_not(method):
    found = collect(Toy(), method, toy_batches(4))
    assert {"model.1.weight", "model.1.bias", "model.3.weight", "model.5.weight"} <= set(found)
    assert all(t.any() for t in found.values()) and "unused.weight" not in found


@pytest.mark.parametrize("batches", [[], toy_batches(0)], ids=["no-batch", "no-image"])
@pytest.mark.parametrize("method", [*DATA_DRIVEN, "losses"])
def test_no_image_at_all(method, batches):
    with pytest.raises(UsageError, match="no labelled train image"):
        task_losses(Toy(), batches) if method == "losses" else collect(Toy(), method, batches)


# Real models ---------------------------------------------------------------------------------------------------------
def labelled(task: str = "detect", n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of noise with two objects in each image; the second image is empty."""
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=draw)  # noqa: E731
    batch = {"img": rand(n, 3, 64, 64)}
    if task == "classify":
        return batch | {"cls": torch.arange(n) % 3}
    images = torch.arange(n).repeat_interleave(2).float()
    images = images[images != 1]
    boxes = len(images)
    batch |= {"batch_idx": images, "cls": (rand(boxes, 1) * 3).floor()}
    batch["bboxes"] = torch.cat([0.3 + 0.4 * rand(boxes, 2), 0.2 + 0.3 * rand(boxes, 2 + (task == "obb"))], 1)
    if task == "pose":
        batch["keypoints"] = torch.cat([rand(boxes, 17, 2), torch.full((boxes, 17, 1), 2.0)], 2)
    if task == "segment":
        batch |= {"masks": (rand(n, 16, 16) * 3).floor(), "sem_masks": (rand(n, 16, 16) * 3).long()}
    return batch


BATCHES = [labelled(seed=s) for s in range(3)]


def removal(model: nn.Module, graph, group: Group, channel: int) -> nn.Module:
    """Return a copy in which one channel of a group is zero."""
    modules = dict(model.named_modules())
    kept = {}
    for m in (m for m in group.members if m.dim == "out"):
        wide = graph.shapes[m.module][0] if m.module in graph.shapes else modules[m.module].num_features
        kept[m.module] = {"out": [i for i in range(wide) if i not in m.index[channel]]}
    return masked(model, kept)


@pytest.fixture(scope="module", params=["yolov8n", "yolo11n"])
def costs(yolo, request) -> tuple[nn.Module, Group, range, list[float]]:
    """Remove some channels of a group in the head one by one and see what each costs."""
    model = yolo(request.param)
    graph = build_graph(model)
    group = next(g for g in graph.groups if g.name == f"model.{len(model.model) - 1}.cv2.0.1.conv")
    base, some = sum(task_losses(model, BATCHES[:2]).values()), range(0, group.size, 3)
    removed = (sum(task_losses(removal(model, graph, group, c), BATCHES[:2]).values()) for c in some)
    return model, group, some, [abs(loss - base) for loss in removed]


@pytest.mark.slow
@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_scores_tell_what_a_channel_costs(costs, method):
    model, group, some, cost = costs
    scores = score(model, group, criteria[method], torch.Generator(), collect(model, method, BATCHES[:2]))[list(some)]
    ranks = torch.stack([scores.argsort().argsort(), torch.tensor(cost).argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.5  # Spearman; L2 has 0.4 to 0.5 here


@pytest.mark.parametrize("method", DATA_DRIVEN)
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_dead_channel_scores_lowest(yolo, name, method):
    model = yolo(name)
    graph = build_graph(model)
    group = next(g for g in graph.groups if g.name == "model.1.conv")
    dead = removal(model, graph, group, 5)
    evidence = collect(dead, method, BATCHES[:1])
    scores = score(dead, group, criteria[method], torch.Generator(), evidence)
    assert scores.argmin() == 5 and (scores > scores[5]).sum() == group.size - 1


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_the_order_of_the_batches_does_not_matter(yolo, method):
    one, other = (collect(yolo("yolov8n"), method, b) for b in (BATCHES, BATCHES[::-1]))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [*DATA_DRIVEN, "losses"])
def test_the_model_stays_as_it_was(yolo, method):
    """Also when it comes from a checkpoint: half precision, gradients off, options as a dict."""
    model = deepcopy(yolo("yolov8n")).half().requires_grad_(False)
    model.args, before = {"box": 1.0}, fingerprint(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = task_losses(model, BATCHES[:1]) if method == "losses" else collect(model, method, BATCHES[:1])
    assert found and fingerprint(model) == before and model.args == {"box": 1.0} and not model.training
    assert getattr(model, "criterion", None) is None and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_losses_use_the_gains_of_the_model(yolo):
    model = deepcopy(yolo("yolov8n"))
    usual = task_losses(model, BATCHES[:1])
    model.args, model.criterion = {"box": 15.0}, nn.Identity()  # twice the default; what trained it before is not asked
    assert task_losses(model, BATCHES[:1]) == pytest.approx(usual | {"box_loss": 2 * usual["box_loss"]}, rel=1e-5)


def test_losses_are_averaged_over_the_images(yolo):
    model = yolo("yolov8n")
    a, b = labelled(n=2), labelled(n=4, seed=1)
    one, other, both = (task_losses(model, x) for x in ([a], [b], [a, b]))
    assert both == pytest.approx({k: (2 * one[k] + 4 * other[k]) / 6 for k in one}, rel=1e-5)


@pytest.mark.parametrize("overlap", [True, False])
def test_images_are_taken_one_by_one(overlap):
    model = nn.Module()
    model.args = type("Args", (), {"overlap_mask": overlap})
    batch = labelled("segment", n=3) | {"im_file": ["a", "b", "c"], "scale": 2}
    if not overlap:
        batch["masks"] = torch.arange(4.0).view(4, 1, 1).expand(4, 16, 16)
    found = list(_single([batch], model))
    assert [len(one["cls"]) for one in found] == [2, 0, 2]
    assert [len(one["masks"]) for one in found] == ([1, 1, 1] if overlap else [2, 0, 2])
    assert [one["im_file"] for one in found] == [["a"], ["b"], ["c"]] and all(one["scale"] == 2 for one in found)
    assert all(not one["batch_idx"].any() for one in found)
    for key in ("img", "cls", "bboxes", "masks", "sem_masks"):
        assert torch.equal(torch.cat([one[key] for one in found]), batch[key])


DETECT = {"box_loss", "cls_loss", "dfl_loss"}
DETECT_26 = {"box_loss", "cls_loss", "l1_loss"}
TASKS = [
    ("yolov8n-seg", "segment", DETECT | {"seg_loss", "sem_loss"}),
    ("yolo11n-pose", "pose", DETECT | {"pose_loss", "kobj_loss"}),
    ("yolov8n-obb", "obb", DETECT | {"angle_loss"}),
    ("yolo11n-cls", "classify", {"loss"}),
    ("yolov10n", "detect", DETECT),
    ("yolo26n-seg", "segment", DETECT_26 | {"seg_loss", "sem_loss"}),
    ("yolo26n-pose", "pose", DETECT_26 | {"pose_loss", "kobj_loss", "rle_loss"}),
    pytest.param("yolo26n-obb", "obb", DETECT_26 | {"angle_loss"}, marks=pytest.mark.matrix),
    pytest.param("rtdetr-l", "detect", {"giou_loss", "cls_loss", "l1_loss"}, marks=pytest.mark.matrix),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task", "losses"), TASKS)
def test_every_task(name, task, losses):
    torch.manual_seed(0)
    model = (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml").model
    batch = labelled(task)
    found = task_losses(model, [batch])
    assert set(found) == losses and found == task_losses(model, [batch])  # nothing is random
    evidence = {method: collect(model, method, [batch]) for method in DATA_DRIVEN}
    assert all(t.isfinite().all() for e in evidence.values() for t in e.values())
    if not name.startswith("rtdetr"):  # train-only branches too; the projection of the DFL is no parameter of ours
        silent = {n for n, p in model.named_parameters() if n not in evidence["taylor"]}
        assert {n for n in silent if ".dfl." not in n} == set()
