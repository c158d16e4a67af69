# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Probes made of a dataset and of this machine's clock, for pruning plans that must look at a model from outside."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from yolo_ext import stock
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.data.calibration import calibration_images, letterbox_batches
from yolo_ext.pruning.evidence import Probes
from yolo_ext.stock.load import labelled_dataset

ROUNDS, SECONDS = 60, 20.0  # of one latency comparison


def make_probes(
    info: dict[str, Any], imgsz: int, cfg: PruneConfig, task: str, base: nn.Module | None = None, batch: int = 16,
    device: str | torch.device = "cpu",
) -> Probes:  # fmt: skip
    """Make everything that a pruning plan may ask for.

    Args:
        info: What `data.check.check_data` returned, empty when there are no data: then only `speed` can be had.
        imgsz: Side of the square images in pixels.
        cfg: Pruning options: `images`, `recalibrate`, `seed` and `runtime`.
        task: Ultralytics task.
        base: The model to be pruned; its number of classes is held against that of the data.
        batch: Images per batch.
        device: Where the labelled batches go, which are read on first use and kept in memory.
    """

    def speed(dense: nn.Module, pruned: nn.Module) -> float:
        return (_speed_ort if cfg.runtime == "ort" else _speed_torch)(dense, pruned, imgsz)

    if not info:
        return Probes(speed=speed)

    def read(n: int) -> Iterator[dict[str, Any]]:
        _check_classes(base, info)
        return labelled_batches(info, imgsz, n, cfg.seed, task, base, batch)

    @cache
    def labelled() -> list[dict[str, Any]]:
        return [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in read(cfg.images)]

    def images() -> Iterator[torch.Tensor]:
        n = cfg.recalibrate or cfg.images
        if task == "classify":  # seen cropped, not letterboxed
            return (b["img"] for b in read(n))
        return letterbox_batches(calibration_images(info, None, cfg.seed, at_most=n), imgsz, batch)

    def score(model: nn.Module) -> float:
        _check_classes(base, info)
        return _accuracy(model, info, imgsz, task, batch)

    return Probes(batches=labelled, images=images, score=score, speed=speed)


def labelled_batches(
    info: dict[str, Any], imgsz: int, n: int, seed: int, task: str, base: nn.Module | None = None, batch: int = 16
) -> Iterator[dict[str, Any]]:
    """Yield up to `n` labelled train images, (B, C, imgsz, imgsz) in 0..1, as the criterion of `base` takes them."""
    chosen = {p.resolve() for p in calibration_images(info, None, seed, at_most=n)}
    args = getattr(base, "args", None) or {}
    given = args if isinstance(args, dict) else vars(args)
    stride = stock.max_stride(base) if base is not None else 32
    dataset, files = labelled_dataset(info, task, imgsz, batch, stride, given)
    places = [i for i, file in enumerate(files) if file.resolve() in chosen]
    if not places:
        raise UsageError(f"None of the {len(chosen)} chosen train images has usable labels. Mend the train split.")
    loader = DataLoader(Subset(dataset, places), batch, collate_fn=getattr(dataset, "collate_fn", None))
    for found in loader:
        image = found["img"]
        yield {**found, "img": image.float() if image.is_floating_point() else image.float() / 255}


def _check_classes(base: nn.Module | None, info: dict[str, Any]) -> None:
    names = getattr(base, "names", None)
    if names and len(names) != info["nc"]:
        raise UsageError(
            f"The model has {len(names)} classes and the data have {info['nc']}, so its losses and its accuracy mean "
            "nothing. Train it on these data first."
        )


def _accuracy(model: nn.Module, info: dict[str, Any], imgsz: int, task: str, batch: int) -> float:
    """Return box mAP50-95, or the top-1 accuracy of a classifier, of a copy on the val split."""
    from yolo_ext.stock.accuracy import accuracy, score

    data = Path(info["train"]).parent if task == "classify" else info["yaml_file"]
    return score(accuracy(model, data, imgsz, batch=batch)) or 0.0


def _speed_torch(dense: nn.Module, pruned: nn.Module, imgsz: int) -> float:
    """Return the latency ratio of two models in torch, fused, on one thread, taking turns."""
    from yolo_ext.deployment.latency import measure, speedup
    from yolo_ext.stock.context import quiet
    from yolo_ext.stock.load import as_exported, float_model

    x = torch.rand(1, stock.input_channels(dense), imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    runners: dict[str, Callable[[], Any]] = {}
    for name, model in (("dense", dense), ("pruned", pruned)):
        fused = as_exported(stock.deployed(float_model(model)))
        runners[name] = partial(fused, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), quiet():
            found = measure(runners, rounds=ROUNDS, seconds=SECONDS)
    finally:
        torch.set_num_threads(threads)
    return speedup(found["dense"], found["pruned"])["ratio"]


def _speed_ort(dense: nn.Module, pruned: nn.Module, imgsz: int) -> float:
    """Return the latency ratio of two models in ONNX Runtime, on one thread, taking turns."""
    from yolo_ext.deployment.export import export_onnx
    from yolo_ext.deployment.latency import bench, speedup
    from yolo_ext.stock.context import quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        files = {
            name: export_onnx(model, Path(folder) / f"{name}.onnx", imgsz)
            for name, model in (("dense", dense), ("pruned", pruned))
        }
        found = bench(files, imgsz, rounds=ROUNDS, seconds=SECONDS)
    return speedup(found["dense"], found["pruned"])["ratio"]
