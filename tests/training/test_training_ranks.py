# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Several devices: what rank 0 decides or calibrates, the others receive as data."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.engine import validator
from ultralytics.models.yolo.detect import val
from ultralytics.nn.tasks import DetectionModel

from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.options import QuantConfig
from yolo_ext.data.check import check_data
from yolo_ext.data.shapes import make_shapes
from yolo_ext.quantization.fake_quant import get_state
from yolo_ext.stock.accuracy import accuracy
from yolo_ext.stock.trainer import agreed
from yolo_ext.training.quant import Quant


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=120)  # and not half an hour
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", wait, rank=rank, world_size=2)


def decide(rank: int, folder: str) -> None:
    start(rank, folder)

    def fail() -> None:
        raise CheckFailed("no")

    found: list[Any] = [agreed(lambda: {"a": [rank, 7]})]
    try:
        agreed(fail if rank == 0 else lambda: None)
    except CheckFailed as e:
        found.append(str(e))
    torch.save(found, f"{folder}/{rank}")
    os._exit(0)  # in torch 2.6 the end of a group may wait for ever for a thread that waits for the GIL


def test_rank_0_decides_for_all(tmp_path):
    """Each rank decides otherwise, and would without the broadcast; an error on rank 0 stops all of them."""
    torch.multiprocessing.spawn(decide, (str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / str(r)) for r in (0, 1)] == [[{"a": [0, 7]}, "no"]] * 2


def measure(rank: int, folder: str, model: str, data: str) -> None:
    start(rank, folder)
    for module in (validator, val):  # as in a process that Ultralytics has started for a GPU
        module.RANK = module.LOCAL_RANK = rank
    found = agreed(lambda: accuracy(model, data, 64, device="cpu"))
    torch.save(found, f"{folder}/{rank}")
    os._exit(0)  # as above


@pytest.mark.slow
def test_a_budget_is_measured_by_rank_0_alone(tmp_path, tiny, shapes):
    """Ultralytics' validators would wait for those of the other rank, which waits for what rank 0 decides."""
    torch.multiprocessing.spawn(measure, (str(tmp_path), str(tiny), str(shapes)), nprocs=2)
    first, second = (torch.load(tmp_path / str(r)) for r in (0, 1))
    assert first == second == accuracy(tiny, shapes, 64, device="cpu")


def quantize(rank: int, folder: str, info: dict[str, Any]) -> None:
    start(rank, folder)
    torch.manual_seed(rank)
    cfg = QuantConfig(mode="qat", calib=2, profile="ort-x86", supervision="labels", adaround=2)
    args = SimpleNamespace(task="detect", imgsz=64)
    trainer = SimpleNamespace(args=args, data=info if rank == 0 else {}, device=torch.device("cpu"), resume=False)
    model: nn.Module = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    try:
        model = Quant({"quant": cfg}, args).put_in(trainer, model, None)
        torch.save(
            {"ranges": get_state(model), "model": model.state_dict(), "note": model.yolo_ext}, f"{folder}/{rank}"
        )
    except UsageError as e:
        torch.save(str(e), f"{folder}/{rank}")
    os._exit(0)  # as above


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False], ids=["images", "no images"])
def test_ranges_and_weights_are_those_of_rank_0(tmp_path, images):
    """The other rank has other weights, and no images to calibrate with."""
    info = check_data(str(make_shapes(tmp_path / "data", train=2, val=1, imgsz=64))) if images else {"train": "nothing"}
    torch.multiprocessing.spawn(quantize, (str(tmp_path), info), nprocs=2)
    first, second = (torch.load(tmp_path / str(r), weights_only=False) for r in (0, 1))
    assert isinstance(first, dict) == images
    if not images:
        assert first == second and "nothing" in first
        return
    assert first["ranges"] == second["ranges"] and first["note"] == second["note"]
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())
    assert Path(info["train"]).exists() and len(first["ranges"]) > 50
