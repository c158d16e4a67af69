# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What holds for every pruning of a detector: what it keeps, costs and computes, and how it is repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML

from yolo_ext import stock
from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.masks import zero_weights
from yolo_ext.pruning.prune import make_plan, prune_model
from yolo_ext.pruning.surgery import apply_plan

EXAMPLES = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(EXAMPLES, max_examples=3)
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
options = st.builds(
    PruneConfig,
    method=st.sampled_from(["l1", "l2", "lamp", "slim", "random"]),
    ratio=st.floats(0.0, 0.9),
    scope=st.sampled_from(["global", "local", "isomorphic"]),
    round_to=st.sampled_from([1, 2, 4, 8]),
    min_channels=st.integers(1, 8),
    max_ratio=st.floats(0.5, 0.95),
    force=st.just(True),
)


@pytest.fixture(scope="module")
def dense(tiny_yaml, calibrate) -> nn.Module:
    torch.manual_seed(0)
    content = YAML.load(tiny_yaml)
    content["scales"]["n"][1] = 0.25
    return calibrate(DetectionModel(content, nc=3, verbose=False))


@pytest.fixture(scope="module")
def plan(dense) -> Callable[[PruneConfig], Any]:
    """Return a function that plans for a copy of the graph; None where floors leave nothing or too little to remove."""
    graph = build_graph(dense)

    def make(cfg: PruneConfig) -> Any:
        try:
            return make_plan(dense, deepcopy(graph), cfg)
        except UsageError as e:
            assert "Nothing can be pruned" in str(e) or "cannot be reached: the floors" in str(e)
            return None

    return make


@torch.no_grad()
def said(model: nn.Module) -> torch.Tensor:
    return model.eval()(IMAGE)[0]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@EXAMPLES
@given(cfg=options)
def test_kept_channels_are_sorted_unique_and_there(dense, plan, cfg):
    widths = {n: m for n, m in dense.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))}
    for path, dims in (plan(cfg) or {}).items():
        for dim, kept in dims.items():
            m = widths[path]
            size = (
                m.num_features if isinstance(m, nn.BatchNorm2d) else m.out_channels if dim == "out" else m.in_channels
            )
            assert kept and kept == sorted({*kept}) and kept[0] >= 0 and kept[-1] < size, path


@pytest.mark.slow
@EXAMPLES
@given(cfg=options, ratio=st.floats(0.0, 0.9))
def test_flops_and_parameters_never_rise_with_the_ratio(dense, plan, cfg, ratio):
    low, high = sorted((cfg.ratio, ratio))
    plans = [{}, plan(replace(cfg, ratio=low)), plan(replace(cfg, ratio=high))]
    cut = [apply_plan(deepcopy(dense), p) for p in plans if p is not None]
    for figure in (stock.gflops, lambda m: sum(p.numel() for p in m.parameters())):
        found = [figure(m) for m in cut]
        assert found == sorted(found, reverse=True)


@settings(EXAMPLES, max_examples=6)
@given(cfg=options)
def test_masked_equals_pruned(dense, plan, cfg):
    """Counted without our own masks: a block whose channel has neither scale nor shift says SiLU(0), nothing."""
    kept = plan(cfg) or {}
    masked = deepcopy(dense)
    for path, dims in kept.items():
        m = masked.get_submodule(path)
        if isinstance(m, nn.BatchNorm2d):
            gone = [i for i in range(m.num_features) if i not in {*dims["out"]}]
            m.weight.data[gone] = m.bias.data[gone] = 0
    torch.testing.assert_close(said(apply_plan(deepcopy(dense), kept)), said(masked), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@FEW
@given(method=st.sampled_from(["l1", "lamp", "random"]), ratios=st.lists(st.floats(0.1, 0.3), min_size=1, max_size=2))
def test_replay_of_the_history_gives_the_same_model(dense, method, ratios):
    pruned = dense
    for ratio in ratios:
        cfg = PruneConfig(method=method, ratio=ratio, round_to=1, min_channels=2, force=True)
        pruned = prune_model(pruned, cfg, 64)
    kept = json.loads(json.dumps(manifest(pruned).prune["kept"]))
    again = apply_plan(deepcopy(dense), kept)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), pruned.state_dict().values(), strict=True)
    )
    assert torch.equal(said(again), said(pruned))


@FEW
@given(cfg=options)
def test_ratio_zero_is_the_identity(dense, plan, cfg):
    if (kept := plan(replace(cfg, ratio=0.0))) is not None:
        assert kept == {}
    models = [apply_plan(deepcopy(dense), kept or {}), deepcopy(dense)]
    zero_weights(models[1], PruneConfig(kind="unstructured", ratio=0.0, scope="global"), 0.0)
    for model in models:
        assert_equal(model, dense)
        assert torch.equal(said(model), said(dense))
