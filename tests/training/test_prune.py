# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning between two epochs of a training run: what it holds besides model, EMA and optimizer follows."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from yolo_ext import stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig
from yolo_ext.distillation.losses import Align
from yolo_ext.pruning.prune import prune_with_plan
from yolo_ext.pruning.surgery import cut_run
from yolo_ext.training.distill import cut_adapters
from yolo_ext.training.prune import Prune


@pytest.fixture
def run() -> SimpleNamespace:
    """Return what a trainer holds, after one optimizer step."""
    torch.manual_seed(0)
    live = DetectionModel("yolov8n.yaml", nc=3, verbose=False).train()
    made, ema = torch.optim.AdamW(list(live.parameters()), lr=1e-3), ModelEMA(live)
    sum(t.pow(2).mean() for t in stock.returned_tensors(live(torch.rand(2, 3, 64, 64)))).backward()
    made.step()
    ema.update(live)
    return SimpleNamespace(
        model=live, ema=ema, optimizer=made, epoch=5, best_fitness=0.9, techniques=(), data={}, save_period=3,
        stopper=SimpleNamespace(best_fitness=0.9, best_epoch=4), device=torch.device("cpu"), save_model=lambda: None,
        args=SimpleNamespace(imgsz=640, task="detect", epochs=9),
    )  # fmt: skip


def prune_at(run: SimpleNamespace, *epochs: int) -> Prune:
    return Prune({"prune": PruneConfig(speedup=2.0, at=list(epochs)), "sparsity": None}, run.args)


def test_adapters_follow_the_student(run):
    adapters = nn.ModuleList(Align(w, 2 * w, None) for w in stock.level_widths(run.model))
    adapters[2] = Align(stock.level_widths(run.model)[2], 256, list(range(256)))
    run.optimizer.add_param_group({"params": list(adapters.parameters())})
    x = [torch.rand(1, w, 4, 4) for w in stock.level_widths(run.model)]
    sum(a.conv(m).pow(2).sum() for a, m in zip(adapters[:2], x)).backward()
    run.optimizer.step()
    weights, moments = (
        adapters[0].conv.weight.detach().clone(),
        run.optimizer.state[adapters[0].conv.weight]["exp_avg"].clone(),
    )
    pruned, kept = prune_with_plan(deepcopy(run.ema.ema), PruneConfig(speedup=2.0))
    cut_run(run.model, run.ema, run.optimizer, kept, manifest(pruned).prune)
    cut_adapters(SimpleNamespace(adapters=adapters, levels=[0, 1, 2]), run.model, run.optimizer, kept)
    index = [kept[p]["in"] for p in stock.level_inputs(run.model)]
    assert torch.equal(adapters[0].conv.weight, weights[:, index[0]])
    assert torch.equal(run.optimizer.state[adapters[0].conv.weight]["exp_avg"], moments[:, index[0]])
    assert adapters[2].kept.tolist() == index[2]
    for adapter, width in zip(adapters, stock.level_widths(run.model)):
        adapter(
            torch.rand(2, width, 4, 4),
            torch.rand(2, 256, 4, 4) if adapter.kept is not None else torch.rand(2, adapter.conv.out_channels, 4, 4),
        )


@pytest.mark.slow
def test_best_starts_anew_and_the_step_is_recorded(run):
    saved: list[tuple[int, int]] = []
    run.save_model = lambda: saved.append((run.epoch, run.save_period))
    technique = prune_at(run, 5, 7)
    for run.epoch in range(5, 9):
        technique.before_epoch(run)
        technique.before_epoch(run)  # an epoch that is started again
        if run.epoch == 5:
            assert run.best_fitness is None and vars(run.stopper) == {"best_fitness": 0.0, "best_epoch": 5}
    assert saved == [(4, -1), (6, -1)] and run.save_period == 3  # last.pt anew, as of the epoch before
    record = manifest(run.model).prune
    assert [s["epoch"] for s in record["steps"]] == [5, 7]
    assert record["config"]["at"] == [5, 7] and record["config"]["speedup"] == 2.0
    assert manifest(run.model).dense["gflops"] / record["steps"][1]["gflops"] == pytest.approx(2.0, rel=0.02)


# Several devices -----------------------------------------------------------------------------------------------------
@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_is_wrapped_anew(run, group):
    run.model = nn.parallel.DistributedDataParallel(run.model, find_unused_parameters=True)
    old = run.model
    prune_at(run, 5).before_epoch(run)
    assert run.model is not old and run.model.module is old.module and run.model.find_unused_parameters
    sum(t.mean() for t in stock.returned_tensors(run.model(torch.rand(2, 3, 64, 64)))).backward()
    run.optimizer.step()
