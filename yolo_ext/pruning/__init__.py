# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Structured and unstructured pruning: labels -> rules -> graph -> groups -> plan -> cut -> proof."""

from yolo_ext.pruning.analyze import analyze_model, measure_sensitivity
from yolo_ext.pruning.criteria import GroupWeights
from yolo_ext.pruning.evidence import Probes, task_losses
from yolo_ext.pruning.graph import Graph, Group, Kept, Member, build_graph
from yolo_ext.pruning.masks import zero_weights
from yolo_ext.pruning.plan import layer_report
from yolo_ext.pruning.prune import check_plan, check_prunable, make_plan, prune_model, prune_with_plan
from yolo_ext.pruning.surgery import apply_plan, verify
