# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What surrounds a model while it runs: modes, random generators, log level, BatchNorm statistics, the machine."""

from __future__ import annotations

import logging
import os
import platform
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import get_cpu_info


@contextmanager
def quiet(least: int = logging.WARNING) -> Iterator[None]:
    """Hide Ultralytics' lines below a level, progress bars and torch's trace warnings for as long as a block runs."""
    level = LOGGER.level
    LOGGER.setLevel(max(least, level))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        LOGGER.setLevel(level)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and each of its modules back into its own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def watched(model: nn.Module, handles: Iterable[Any]) -> Iterator[None]:
    """Put a model into eval mode while hooks look on, of which these handles are removed afterwards."""
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put back every random generator afterwards, so that a run goes on as if nothing had been in between."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Re-estimate BatchNorm statistics from images (B, C, H, W) in 0..1, and return their number.

    Li et al., EagleEye, 2020, arXiv:2007.02491.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta, training, seen = [m.momentum for m in norms], model.training, 0
    device = next(model.parameters()).device
    model.train()
    try:
        for x in batches:
            if not seen:  # not before: without any image the old statistics stay
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None  # cumulative average over all batches
            model(x.to(device))
            seen += len(x)
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        model.train(training)
    return seen


def native_bf16() -> bool:
    """Return whether this processor computes in bfloat16 and does not only emulate it."""
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))


def cpu_info() -> dict[str, Any]:
    """Describe the processor (None where the system does not tell) and the versions that a measurement depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="ignore").splitlines() if info.is_file() else []
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), None)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": get_cpu_info(),
        "threads": os.cpu_count(),
        "avx2": None if flags is None else "avx2" in flags,
        "vnni": None if flags is None else bool(flags & {"avx512_vnni", "avx_vnni"}),
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "ultralytics")},
    }
