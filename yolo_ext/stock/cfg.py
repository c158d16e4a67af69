# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ultralytics' arguments and its own command line."""

from __future__ import annotations

import sys

from ultralytics import cfg
from ultralytics.cfg import TASKS, cfg2dict, get_cfg, get_save_dir, merge_equals_args, parse_key_value_pair

__all__ = [
    "TASKS",
    "cfg2dict",
    "get_cfg",
    "get_save_dir",
    "merge_equals_args",
    "parse_key_value_pair",
    "yolo_entrypoint",
]


def yolo_entrypoint(argv: list[str]) -> None:
    """Run Ultralytics' own command line with these words, as if `yolo` had been called."""
    words, before = ["yolo", *argv], list(sys.argv)
    seen = [sys.argv, getattr(cfg, "ARGV", [])]
    try:
        for argv_ in seen:
            argv_[:] = words  # predict tells the command line from Python by the program name
        cfg.entrypoint()
    finally:  # or every later predict() of this process would take itself for the command line
        for argv_ in seen:
            argv_[:] = before
