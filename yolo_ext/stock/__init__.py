# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every touch of Ultralytics internals; nothing else in this package imports them.

`model` knows blocks and heads, `load` reads files, `context` is what surrounds a model while it runs, `data`, `cfg`,
`exporter` and `trainer` are the parts of these names, `accuracy` runs the validators, and `premises` checks when a run
starts that all of that is as this package takes it for.
"""

from yolo_ext.stock.context import cpu_info, evaluating, native_bf16, quiet, recalibrate, undisturbed
from yolo_ext.stock.load import float_model, load_model, no_autoinstall
from yolo_ext.stock.model import (
    ACTIVATIONS,
    ATTENTION,
    BRANCHED,
    DFL,
    FREE_CUTS,
    FUSIONS,
    OPAQUE,
    SUMS,
    WIDEST_BRANCH,
    WIDTH_ATTRIBUTES,
    branched,
    branches,
    deployed,
    deployed_layers,
    detection_head,
    freeze,
    fuse_blocks,
    gflops,
    head_prefix,
    image_size,
    input_channels,
    level_inputs,
    level_widths,
    max_stride,
    merge_block,
    module_path,
    natural_key,
    probe_size,
    raw_outputs,
    refresh_widths,
    refuse_rtdetr,
    restart_ema,
    returned_tensors,
    rewrap,
    single_conv,
    task_of,
)
from yolo_ext.stock.premises import check_stock

__all__ = [
    "ACTIVATIONS", "ATTENTION", "BRANCHED", "DFL", "FREE_CUTS", "FUSIONS", "OPAQUE", "SUMS", "WIDEST_BRANCH",
    "WIDTH_ATTRIBUTES", "branched", "branches", "check_stock", "cpu_info", "deployed", "deployed_layers",
    "detection_head", "evaluating", "float_model", "freeze", "fuse_blocks", "gflops", "head_prefix", "image_size",
    "input_channels", "level_inputs", "level_widths", "load_model", "max_stride", "merge_block", "module_path",
    "native_bf16", "natural_key", "no_autoinstall", "probe_size", "quiet", "raw_outputs", "recalibrate",
    "refresh_widths", "refuse_rtdetr", "restart_ema", "returned_tensors", "rewrap", "single_conv", "task_of",
    "undisturbed",
]  # fmt: skip
