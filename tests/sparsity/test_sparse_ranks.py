# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity training on two processes with DistributedDataParallel: one model, whatever the images of each are like."""

from __future__ import annotations

import sys
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from yolo_ext.core.config import PruneConfig, SparsityConfig
from yolo_ext.sparsity.penalties import penalties
from yolo_ext.sparsity.sparsifier import Sparsifier


def _rank(rank: int, model: nn.Module, folder: str) -> None:
    """Train with each penalty on images of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    start, found = {k: v.clone() for k, v in model.state_dict().items()}, {}
    given = model  # whose memory all processes share
    for method in penalties.names():
        model = deepcopy(given)
        torch.manual_seed(rank)
        ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        sparsifier = Sparsifier(model, SparsityConfig(method=method, coefficient=1.0), PruneConfig(), 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.register_step_post_hook(lambda *_, s=sparsifier, m=model: s.shrink(m, 0.5))
        for epoch in range(3):
            sparsifier.set_epoch(epoch)
            for _ in range(2):
                optimizer.zero_grad()
                out = ddp(torch.rand(2, 3, 64, 64) * (1 + rank))
                (out["scores"].square().mean() + out["boxes"].square().mean()).backward()
                optimizer.step()
        found[method] = ({n: p.detach().clone() for n, p in model.named_parameters()}, sparsifier.state_dict())
        found[method, "statistics"] = model.get_buffer("model.0.bn.running_mean").clone()
    torch.save((start, found), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are joined by a file, which is tested on Linux only")
def test_two_processes_stay_one_model(fresh, tmp_path: Path):
    torch.multiprocessing.spawn(_rank, (fresh(), str(tmp_path)), nprocs=2)
    (start, one), (_, two) = (torch.load(tmp_path / str(r), weights_only=False) for r in (0, 1))
    for method in penalties.names():
        (params, state), (others, same) = one[method], two[method]
        assert all(torch.equal(p, others[n]) for n, p in params.items()), method
        assert "squares" in same["penalty"]
        assert all(torch.equal(v, same["penalty"][k]) for k, v in state["penalty"].items())
        assert any(not torch.equal(p, start[n]) for n, p in params.items() if n.endswith("bn.weight"))
        assert not torch.equal(one[method, "statistics"], two[method, "statistics"])  # they saw different images
