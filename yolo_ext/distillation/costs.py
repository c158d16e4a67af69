# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a step with a teacher costs, measured before training and without a trace in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from yolo_ext import stock
from yolo_ext.distillation.teacher import Guide

STEPS = 2  # timed ones, behind one to warm up


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest time of a few calls, in seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(1 + STEPS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def student_seconds(student: nn.Module, images: torch.Tensor, amp: bool | torch.dtype) -> float:
    """Return how long forward and backward pass of a copy of the student take, without the task's loss.

    Args:
        student: The student, which is not changed.
        images: (B, C, H, W) images.
        amp: Whether training runs in half precision, or in which.
    """
    copy, device = deepcopy(student).train(), images.device.type
    dtype = amp if isinstance(amp, torch.dtype) else torch.float16 if device == "cuda" else torch.bfloat16

    def step() -> None:
        with torch.autocast(device, dtype, enabled=bool(amp)):
            found = list(stock.returned_tensors(copy(images)))
        torch.stack([x.float().sum() for x in found]).sum().backward()

    return seconds(step, images.device)


def teacher_cost(guide: Guide, images: torch.Tensor) -> tuple[float, float]:
    """Return how long a teacher takes for (B, C, H, W) images, and the memory in MB that it holds.

    Memory is that of its weights, and on a GPU also what its forward pass needs at most.
    """
    held = sum(t.numel() * t.element_size() for t in guide.model.state_dict().values())
    cuda, device = images.device.type == "cuda", images.device
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    took = seconds(lambda: guide.ask(images), device)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return took, (held + peak) / 1e6


def sample(shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """Return noise of a shape as images."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
