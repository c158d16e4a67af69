# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What surrounds a model: the Ultralytics that is there, its arguments, modes, random generators and the machine."""

import inspect
import logging
import os
import platform
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import ultralytics
from torch import nn
from torch.optim.swa_utils import update_bn
from ultralytics import cfg, utils
from ultralytics.cfg import TASKS, cfg2dict, get_cfg, get_save_dir, merge_equals_args, parse_key_value_pair
from ultralytics.data import augment, build_yolo_dataset, dataset
from ultralytics.data import utils as data_utils
from ultralytics.engine import exporter
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv, Detect
from ultralytics.utils import LOGGER, checks, patches, torch_utils

from yolo_ext.core.errors import UsageError

BUSY = 0.75  # share of the processors that others use, from which on they noticeably slow a measurement down
LEGAL = ">=8.4.140,<8.5"  # tested lower bound, excluded upper bound
MEND = f"Run: pip install 'ultralytics{LEGAL}'"
# Each with the number of its positional arguments and the names of the others that ours pass on; methods count `self`.
CALLS: list[tuple[Callable[..., Any], int, tuple[str, ...]]] = [
    (tasks.load_checkpoint, 1, ()), (tasks.torch_safe_load, 1, ("safe_only",)), (tasks.yaml_model_load, 1, ()),
    (tasks.BaseModel.fuse, 1, ("verbose",)), (torch_utils.fuse_conv_and_bn, 2, ()),
    (torch_utils.select_device, 1, ("verbose",)),
    (cfg.get_cfg, 0, ("overrides",)), (cfg.cfg2dict, 1, ()), (cfg.get_save_dir, 1, ()), (cfg.entrypoint, 0, ()),
    (cfg.merge_equals_args, 1, ()), (cfg.parse_key_value_pair, 1, ()),
    (augment.LetterBox, 1, ("auto",)), (augment.CenterCrop, 1, ()), (data_utils.img2label_paths, 1, ()),
    (data_utils.check_det_dataset, 1, ("autodownload",)), (data_utils.check_cls_dataset, 1, ()),
    (data_utils.verify_image_label, 1, ()), (build_yolo_dataset, 4, ("mode", "rect", "stride")),
    (dataset.ClassificationDataset, 0, ("root", "args", "augment", "prefix")),
    (BaseValidator, 0, ("dataloader", "save_dir", "args")), (BaseValidator.__call__, 1, ("model",)),
    (exporter.Exporter, 0, ("overrides",)), (exporter.NMSModel, 2, ()), (exporter.export_formats, 0, ()),
]  # fmt: skip
ATTRIBUTES: list[tuple[Any, tuple[str, ...]]] = [
    (Detect, ("shape", "export", "xyxy", "end2end")),  # cached anchors; what a head returns
    (tasks.DetectionModel, ("end2end",)),
    (Conv, ("forward", "forward_fuse")),
    (checks, ("AUTOINSTALL", "check_yolov5u_filename")),
    (data_utils, ("YAML", "check_font", "check_image")),
    (tasks, ("SAFE_LOAD", "_SafeLoad", "yaml_model_load")),
    (patches, ("torch",)),
    (utils.YAML, ("_get_instance",)),
    (dataset, ("load_dataset_cache_file",)),
    (exporter, ("SETTINGS",)),  # what is replaced for a while
]


def check_stock() -> None:
    """Refuse an Ultralytics outside the tested range, or one that lacks what this package builds on."""
    have = ultralytics.__version__
    if not checks.check_version(have, LEGAL):
        raise UsageError(f"Ultralytics {have} is not supported. Legal: {LEGAL}. {MEND}")
    if missing := lacking():
        what = f"Ultralytics {have} lacks what yolo_ext builds on, or has changed it: {', '.join(missing)}"
        raise UsageError(f"{what}. {MEND} in a version that yolo_ext was tested with, or update yolo_ext.")


@cache
def lacking() -> list[str]:
    """Return what this Ultralytics lacks: functions that cannot be called as ours do, and attributes."""
    calls = [f"{f.__module__}.{f.__qualname__}()" for f, n, names in CALLS if not callable_with(f, n, names)]
    return calls + [f"{owner.__name__}.{a}" for owner, names in ATTRIBUTES for a in names if not hasattr(owner, a)]


def callable_with(function: Any, n: int, names: tuple[str, ...] = ()) -> bool:
    """Tell whether something can be called with `n` positional arguments and arguments of these names."""
    try:
        inspect.signature(function).bind(*range(n), **dict.fromkeys(names))
    except (TypeError, ValueError):
        return False
    return True


def yolo_entrypoint(argv: list[str]) -> None:
    """Run Ultralytics' own command line with these words, as if `yolo` had been called."""
    before, seen = list(sys.argv), [sys.argv, getattr(cfg, "ARGV", [])]
    try:
        for words in seen:
            words[:] = ["yolo", *argv]  # predict tells the command line from Python by the program name
        cfg.entrypoint()
    finally:  # or every later predict() of this process would take itself for the command line
        for words in seen:
            words[:] = before


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object, module or class these attributes for as long as a block runs."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def quiet(least: int = logging.WARNING) -> Iterator[None]:
    """Hide Ultralytics' lines below a level, progress bars and torch's trace warnings for as long as a block runs."""
    level = LOGGER.level
    LOGGER.setLevel(max(least, level))
    try:
        # Figures that nobody sees are counted on uninitialised memory, on which deformable convolutions can crash.
        with warnings.catch_warnings(), replaced(torch_utils, get_flops=lambda *_, **__: 0.0):
            warnings.simplefilter("ignore")
            yield
    finally:
        LOGGER.setLevel(level)


@contextmanager
def brief(verbose: Any) -> Iterator[None]:
    """Where `verbose` is False, keep Ultralytics' own lines, but no warnings, and all bars off the console."""
    silent, own = verbose is False, str(Path(__file__).parents[1])

    def ours(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or record.pathname.startswith(own)

    with ExitStack() as held:
        held.enter_context(replaced(utils, VERBOSE=utils.VERBOSE and not silent))
        for handler in LOGGER.handlers:
            if silent and type(handler) is logging.StreamHandler:  # not the log of a run
                held.enter_context(replaced(handler, filters=[*handler.filters, ours]))
        yield


@contextmanager
def evaluating(model: nn.Module, handles: Iterable[Any] = ()) -> Iterator[None]:
    """Put a model into eval mode; afterwards each module is back in its own one and the handles of hooks are gone."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
        for handle in handles:
            handle.remove()


@contextmanager
def alone(validator: type) -> Iterator[None]:
    """Have a class of validators measure in this process alone, without others of a training on several GPUs."""
    with ExitStack() as held:
        for module in {sys.modules[c.__module__] for c in validator.__mro__}:
            held.enter_context(replaced(module, **{k: -1 for k in ("RANK", "LOCAL_RANK") if hasattr(module, k)}))
        yield


def device_of(given: Any = None) -> torch.device:
    """Return the device that Ultralytics takes for `device=`, the first of several; None: a GPU where there is one."""
    try:
        with quiet(logging.ERROR):
            found = torch_utils.select_device(given, verbose=False)
    except (ValueError, RuntimeError) as e:
        legal = ", ".join(["cpu", *map(str, range(n := torch.cuda.device_count()))])
        lacks = f"'device={given}' is no device of this machine, where torch sees {n} CUDA devices"
        raise UsageError(f"{lacks}. Legal: {legal}. Leave device out to take a GPU where there is one.") from e
    return found if isinstance(found, torch.device) else torch.device("cpu")  # what OpenVINO and others run on


@contextmanager
def undisturbed(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Put back every random generator afterwards; with a `seed`, all of them start from it meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Re-estimate BatchNorm from images (B, C, H, W) in 0..1 (EagleEye, arXiv:2007.02491), and return their number."""
    waiting, sizes = iter(batches), list[int]()
    if (first := next(waiting, None)) is None:  # the old statistics stay
        return 0

    def counted() -> Iterator[torch.Tensor]:
        for x in chain([first], waiting):
            sizes.append(len(x))
            yield x

    update_bn(counted(), model, next(model.parameters()).device)
    return sum(sizes)


def native_bf16() -> bool:
    """Return whether this processor computes in bfloat16 and does not only emulate it."""
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))


def tell_busy() -> float:
    """Return which share of the processors others use now, with a warning where that slows measurements down."""
    share = psutil.cpu_percent(interval=0.2) / 100  # while this process waits; a load average counts its own past
    if share > BUSY:
        LOGGER.warning(f"The machine is busy ({100 * share:.0f} %): times in ms are too long, ratios may be unclear.")
    return share


def cpu_info() -> dict[str, Any]:
    """Describe the processor (None where the system does not tell) and the versions that a measurement depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="ignore").splitlines() if info.is_file() else []
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), None)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": torch_utils.get_cpu_info(),
        "threads": os.cpu_count(),
        "avx2": None if flags is None else "avx2" in flags,
        "vnni": None if flags is None else bool(flags & {"avx512_vnni", "avx_vnni"}),
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnx", "onnxruntime", "ultralytics")},
    }
