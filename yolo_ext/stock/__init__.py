# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every touch of Ultralytics internals; nothing else in this package imports them."""

# fmt: off
# isort: off
from yolo_ext.stock.context import check_stock, cpu_info, device_of, native_bf16, quiet, recalibrate, tell_busy
from yolo_ext.stock.fit import ONE_CLASS, check_fit, differences, one_class, rebuilt, refuse_untrainable
from yolo_ext.stock.load import load_model, register_layers, seen_by
from yolo_ext.stock.model import (
    ACTIVATIONS, ATTENTION, BRANCHED, DFL, FREE_CUTS, FUSIONS, OPAQUE, SUMS, WIDEST_BRANCH, WIDTH_ATTRIBUTES,
    branched, branches, deployed, deployed_layers, detection_head, freeze, fuse_blocks, gflops, head_prefix,
    image_size, input_channels, level_inputs, level_widths, matches, max_stride, merge_block, metric,
    module_path, natural_key, probe_size, refresh_widths, restart_ema, returned_tensors, rewrap, select,
    single_conv, task_of, within,
)
