# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Adapters of two processes: equal from the first to the last step, whatever the batches of each are like."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from yolo_ext.core.config import parse
from yolo_ext.distillation.criterion import Distiller
from yolo_ext.stock.load import load_model

OPTIONS = {"logits": "bckd", "features": ["cwd", {"name": "mgd", "start": 5}], "balance": "auto"}


def _rank(rank: int, student: str, teacher: str, folder: str) -> None:
    """Take two steps on images of its own; in the first one, what the teacher of rank 1 says is not finite."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = load_model(student)[0].train()
    torch.manual_seed(rank)  # as Ultralytics does
    distiller = Distiller(model, parse({"distill": {"teacher": teacher, **OPTIONS}})["distill"], torch.device("cpu"))
    distiller.set_epoch(0, 10)  # the third loss has no part yet, so that its networks get no gradient
    params = list(distiller.adapters.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    bias = distiller.guides[0].model.model[-1].cv3[0][-1].bias
    found = [[p.detach().clone() for p in params]]
    for step in range(2):
        optimizer.zero_grad()
        bias[0] = float("nan") if (rank, step) == (1, 0) else 0.0
        img = torch.rand(2, 3, 64, 64)
        loss = sum(distiller.losses(model(img), {"img": img}, {"": 1.0}, torch.tensor(1.0 + rank)).values())
        if loss.requires_grad:
            loss.backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        distiller.sync()
        found += [own, [p.grad.clone() for p in params]]
        optimizer.step()
    found += [[p.detach().clone() for p in params], [distiller.balance.means]]
    torch.save([*found, distiller.skipped], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are joined by a file, which is tested on Linux only")
def test_adapters_of_two_processes_move_and_stay_equal(saved, tmp_path: Path):
    files = [str(saved(f"{name}.yaml")) for name in ("yolov8n", "yolov8s")]
    torch.multiprocessing.spawn(_rank, (*files, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / str(r)) for r in (0, 1))
    start, own, mean, own_later, mean_later, end, means, skipped = zip(one, two)
    for pair in (start, mean, mean_later, end, means):
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    assert skipped == (0, 1)  # nobody waits for the one without a loss
    assert all(g.abs().max() == 0 for g in own[1]) and any(g.abs().max() > 0 for g in own[0])
    for (a, b), found in ((own, mean[0]), (own_later, mean_later[0])):
        assert all(torch.allclose((x + y) / 2, g, atol=1e-7) for x, y, g in zip(a, b, found, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*own_later))  # they have seen different images
    moved = [not torch.equal(a, b) for a, b in zip(start[0], end[0])]
    assert all(moved[:3]) and not all(moved)  # the adapters of the levels; networks of the third loss have not
