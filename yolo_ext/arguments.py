# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Checks of what the user gave on the command line, before anything heavy is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolo_ext.core.config import CONFIGS, TARGETS
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest

OPTIMIZERS = ("auto", "SGD", "MuSGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSProp")


def need(options: Mapping[str, Any], *keys: str) -> None:
    """Check that the user gave these keys.

    Raises:
        UsageError: If one is missing.
    """
    missing = [k for k in keys if options.get(k) in (None, "")]
    if missing:
        raise UsageError(f"Missing: {', '.join(f'{k}=...' for k in missing)}. See `yolo-ext help`.")


def check_native(options: Mapping[str, Any], epochs: int) -> None:
    """Let Ultralytics check the values of its own keys, before anything else happens; `epochs` is the least legal."""
    from ultralytics.cfg import get_cfg
    from ultralytics.utils.torch_utils import select_device

    native = {k: v for k, v in options.items() if k not in (*CONFIGS, "task", "resume", "epochs")}
    try:
        get_cfg(overrides=native)
        select_device(native.get("device"), verbose=False)
    except (SyntaxError, TypeError, ValueError) as e:
        raise UsageError(str(e).strip().splitlines()[0]) from e
    check_whole(options, epochs=epochs, imgsz=1)
    if native.get("cfg") and not Path(str(native["cfg"])).is_file():
        raise UsageError(f"'cfg={native['cfg']}' does not exist. Give the path of a YAML file with training arguments.")
    name = str(native.get("optimizer", "auto"))
    if name.lower() not in map(str.lower, OPTIMIZERS):
        raise UsageError(f"Unknown optimizer '{name}'.{suggest(name, [*OPTIMIZERS])} Legal: {', '.join(OPTIMIZERS)}.")


def check_whole(options: Mapping[str, Any], **least: int) -> None:
    """Check options that are whole numbers, each given with its least legal value."""
    for key, low in least.items():
        value = options.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise UsageError(f"'{key}={value}' is illegal: give a whole number of at least {low}.")


def has_target(prune: Mapping[str, Any]) -> bool:
    """Tell whether the user said how far to prune."""
    return any(prune.get(k) is not None for k in (*TARGETS, "ratios", "kind")) or prune.get("scope") == "pagcp"
