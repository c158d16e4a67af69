# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning between two epochs: what each step aims at, and that everything a run holds is cut by the same plan."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.utils.torch_utils import ModelEMA

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note, size_mb
from yolo_ext.core.config import PruneConfig
from yolo_ext.pruning.evidence import Probes
from yolo_ext.pruning.prune import prune_model, prune_with_plan, remember_dense, sizes, step_config
from yolo_ext.pruning.surgery import cut, cut_run, follow

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "Adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "RMSProp": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


def run_of(model: nn.Module, optimizer) -> SimpleNamespace:
    """Return what a trainer holds, after one optimizer step that every moment remembers."""
    live = deepcopy(model).train().requires_grad_(True)
    made = optimizer(list(live.parameters()))
    ema = ModelEMA(live)
    sum(t.pow(2).mean() for t in stock.returned_tensors(live(torch.rand(2, 3, 64, 64)))).backward()
    made.step()
    ema.update(live)
    return SimpleNamespace(model=live, ema=ema, optimizer=made)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_follow_their_channels(name, yolo):
    """A marked channel keeps its moments; the state of what is left is that of before, by index."""
    run = run_of(yolo("yolov8n"), OPTIMIZERS[name])
    before = {n: {k: v.clone() for k, v in run.optimizer.state[p].items() if isinstance(v, torch.Tensor)}
              for n, p in run.model.named_parameters() if p in run.optimizer.state}  # fmt: skip
    grads = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
    pruned, kept = prune_with_plan(deepcopy(run.ema.ema), PruneConfig(speedup=2.0))
    cut_run(run.model, run.ema, run.optimizer, kept, manifest(pruned).prune)
    after = dict(run.model.named_parameters())
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in after.values()}
    assert {id(p) for p in run.optimizer.state} <= {id(p) for p in after.values()}
    smaller = 0
    for n, moments in before.items():
        path, _, leaf = n.rpartition(".")
        dims = kept.get(path, {})
        for k, v in moments.items():
            now = run.optimizer.state[after[n]][k]
            if v.ndim == 0:
                assert torch.equal(now, v)
                continue
            expected = v
            if "in" in dims and v.ndim > 1 and leaf == "weight" and v.shape[1] > 1:
                expected = expected[:, dims["in"]]
            if "out" in dims:
                expected = expected[dims["out"]]
            assert torch.equal(now, expected), (n, k)
            smaller += expected.numel() < v.numel()
        assert after[n].grad.shape == after[n].shape and after[n].grad.numel() <= grads[n].numel()
    assert smaller > 100
    for p in after.values():
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.ema.update(run.model)  # pairs of tensors were looked up anew
    moved = [not torch.equal(a, b) for a, b in zip(run.ema.ema.state_dict().values(), pruned.state_dict().values())]
    assert sum(moved) > 100


@pytest.mark.slow
def test_ema_and_live_model_lose_the_same_channels(yolo):
    run = run_of(yolo("yolo11n"), OPTIMIZERS["SGD"])
    run.model.model[0].conv.weight.requires_grad_(False)
    pruned, kept = prune_with_plan(deepcopy(run.ema.ema), PruneConfig(speedup=2.0))
    path = next(p for p, dims in kept.items() if len(dims) == 2 and isinstance(run.model.get_submodule(p), nn.Conv2d))
    live = cut(run.model.get_submodule(path).weight, [(1, kept[path]["in"]), (0, kept[path]["out"])])
    cut_run(run.model, run.ema, run.optimizer, kept, manifest(pruned).prune)
    assert [p.shape for p in run.model.parameters()] == [p.shape for p in run.ema.ema.parameters()]
    torch.testing.assert_close(run.ema.ema.state_dict(), pruned.state_dict(), rtol=0, atol=0)
    assert torch.equal(run.model.get_submodule(path).weight, live)
    assert not run.model.model[0].conv.weight.requires_grad and run.model.model[1].conv.weight.requires_grad
    assert not any(p.requires_grad for p in run.ema.ema.parameters())
    assert manifest(run.model).prune == manifest(run.ema.ema).prune != {}


@pytest.mark.slow
def test_channels_last_stays(yolo):
    run = run_of(yolo("yolov8n"), OPTIMIZERS["SGD"])
    run.model.to(memory_format=torch.channels_last)
    pruned, kept = prune_with_plan(deepcopy(run.ema.ema), PruneConfig(speedup=2.0))
    cut_run(run.model, run.ema, run.optimizer, kept, manifest(pruned).prune)
    assert run.model.model[1].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_follow_leaves_other_state_alone():
    p, new = (nn.Parameter(torch.arange(n, dtype=torch.float32)) for n in (4, 2))
    optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    optimizer.state[p] = {"momentum_buffer": torch.arange(4.0), "step": torch.tensor(3.0), "kind": "x"}
    follow(optimizer, [(p, new, [(0, [1, 3])])])
    assert optimizer.param_groups[0]["params"][0] is new and p not in optimizer.state
    found = optimizer.state[new]
    assert found["momentum_buffer"].tolist() == [1.0, 3.0] and found["step"] == 3 and found["kind"] == "x"


# Steps ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cubic"])
@pytest.mark.parametrize(
    ("target", "value", "size"), [("speedup", 3.0, "gflops"), ("params", 3.0, "params"), ("size_mb", 2.5, "size_mb")]
)
def test_steps_add_up_to_the_target(yolo, schedule, target, value, size):
    model = deepcopy(yolo("yolov8n"))
    cfg = PruneConfig(**{target: value}, schedule=schedule, at=[1, 2, 3])
    remember_dense(model, cfg, Probes())
    dense, found = manifest(model).dense, []
    for step in (1, 2, 3):
        narrowed = step_config(cfg, model, step, 3, Probes())
        model = prune_model(model, narrowed)
        found.append((sizes(model) | {"size_mb": size_mb(model)})[size] / dense[size])
    aim = 1 / value if size != "size_mb" else value / dense[size]
    assert found[2] == pytest.approx(aim, rel=0.02)
    shares = [1 / 3, 2 / 3] if schedule == "linear" else [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3]
    for share, left in zip(shares, found):
        assert left == pytest.approx(1 - share * (1 - aim), rel=0.06)


def test_ratios_count_from_the_first_model():
    cfg = PruneConfig(ratio=0.5, ratios={"model.2": 0.8}, schedule="linear", at=[1, 2])
    first, second = (step_config(cfg, nn.Identity(), k, 2, Probes()) for k in (1, 2))
    assert first.ratio == pytest.approx(0.25) and first.ratios == {"model.2": pytest.approx(0.4)}
    assert (1 - first.ratio) * (1 - second.ratio) == pytest.approx(0.5)
    assert (1 - first.ratios["model.2"]) * (1 - second.ratios["model.2"]) == pytest.approx(0.2)
    assert not first.at and first.schedule == "linear"


def test_latency_steps_multiply():
    cfg = PruneConfig(latency=2.0, at=[1, 2, 3])
    total = 1.0
    for k in (1, 2, 3):
        total *= step_config(cfg, nn.Identity(), k, 3, Probes()).latency
    assert total == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("found", "room"),
    [({"map": 0.49}, 0.01), ({"map": 0.52}, 0.04), ({"map": 0.47}, None), ({"map": 0.52, "map_mask": 0.295}, 0.015),
     ({"map": 0.52, "map_mask": 0.27}, None)],
    ids=["lost", "gained", "spent", "mask lost", "mask spent"],
)  # fmt: skip
def test_a_budget_counts_from_the_first_model(found, room):
    model, cfg = nn.Identity(), PruneConfig(max_drop=0.02, at=[1, 2])
    note(model, dense={"map": 0.5, **({"map_mask": 0.3} if "map_mask" in found else {})})
    found = step_config(cfg, model, 2, 2, Probes(accuracy=lambda m: found))
    assert found is None if room is None else found.max_drop == pytest.approx(room)


@pytest.mark.slow
def test_a_step_that_gains_nothing_is_left_out(yolo):
    model = deepcopy(yolo("yolov8n"))
    cfg = PruneConfig(speedup=2.0, at=[1, 2])
    remember_dense(model, cfg, Probes())
    pruned = prune_model(model, PruneConfig(speedup=2.1))
    assert step_config(cfg, pruned, 2, 2, Probes()) is None
