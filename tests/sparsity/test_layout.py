# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
import torch
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.criteria import criteria, score
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.sparsity.layout import lay_out, multiply, read_scales, scale_norms, sparse_groups, weight_norms

FAMILIES = ["small", "yolo11n", *(pytest.param(f, marks=pytest.mark.matrix) for f in ("yolov8n", "yolov9t", "yolo26n"))]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_that_pruning_can_shrink(fresh, family):
    model = fresh(family)
    made = tied_groups(model, build_graph(model), PruneConfig(method="l1"))
    wanted = [(g.name, g.size) for b in made for g in b.groups]
    assert [(g.name, g.size) for g in sparse_groups(model, PruneConfig())] == wanted
    assert all(g.gammas for g in sparse_groups(model, PruneConfig(), scales=True))


def test_slots_of_a_known_group(fresh):
    model = fresh()
    group = next(g for g in sparse_groups(model, PruneConfig()) if g.name == "model.0.conv")
    assert group.size == 16
    assert [(n, i.shape) for n, i in group.gammas] == [("model.0.bn.weight", (16, 1))]
    assert [(n, d) for n, d, _ in group.weights] == [("model.0.conv.weight", 0), ("model.1.conv.weight", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "weights"), [("group_slim", False), ("group_sl", True)])
def test_norms_rank_as_pruning_does(fresh, family, method, weights):
    model = fresh(family)
    groups = sparse_groups(model, PruneConfig(), scales=not weights)
    layout = lay_out(model, groups, weights)
    norms = weight_norms(model, layout) if weights else scale_norms(read_scales(model, layout), layout)
    made = tied_groups(model, build_graph(model), PruneConfig(method="l1"))
    pruned = {(g.name, tuple(g.members[0].index.flatten().tolist())): g for b in made for g in b.groups}
    for g, own in zip(groups, norms.split([g.size for g in groups])):
        of = pruned[g.name, tuple((g.gammas[0][1] if not g.weights else g.weights[0][2]).flatten().tolist())]
        theirs = score(model, of, criteria[method], torch.Generator())
        torch.testing.assert_close(own / own.max(), theirs / theirs.max(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_factors_take_the_channel_out_of_all_its_tensors(fresh, family):
    model = fresh(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = sparse_groups(model, PruneConfig())
    layout = lay_out(model, groups, True)
    factors = torch.ones(layout.starts[-1])
    factors[layout.starts[:-1]] = 0  # the first channel of each group
    multiply(model, layout, factors[layout.owner], factors)
    for g in groups:
        for name, index in g.gammas:
            assert (model.get_parameter(name)[index[0]] == 0).all()
        for name, dim, index in g.weights:
            assert (model.get_parameter(name).index_select(dim, index[0]) == 0).all()
    touched = {n for g in groups for n, _ in g.gammas} | {n for g in groups for n, _, _ in g.weights}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in touched)
        assert torch.equal(p[p != 0], before[name][p != 0])


def test_exclude_and_freeze_leave_their_layers_out(fresh):
    model = fresh()
    for n, p in model.named_parameters():
        p.requires_grad_(not n.startswith(("model.0.", "model.1.")))
    groups = sparse_groups(model, PruneConfig(exclude=["model.3", "head"]))
    names = [n for g in groups for n, _ in g.gammas] + [n for g in groups for n, d, _ in g.weights if d == 0]
    assert names and not any(n.startswith(("model.0.", "model.1.", "model.3.", "model.5.")) for n in names)
    assert all(model.get_parameter(n).requires_grad for g in groups for n, _, _ in g.weights)


def test_a_model_for_inference_has_groups(fresh):
    model = fresh()
    wanted = len(sparse_groups(model, PruneConfig()))
    assert len(sparse_groups(model.requires_grad_(False), PruneConfig())) == wanted


@pytest.mark.parametrize("scales", [True, False])
def test_refuses_a_fused_model(fresh, scales):
    with pytest.raises(UsageError, match=r"needs BatchNorm.*fuse"):
        sparse_groups(fresh().eval().fuse(verbose=False), PruneConfig(), scales)


def test_refuses_a_model_without_batchnorm(fresh):
    model = fresh()
    for m in model.modules():
        if hasattr(m, "bn"):
            m.bn = nn.Identity()
    with pytest.raises(UsageError, match="needs BatchNorm"):
        sparse_groups(model, PruneConfig(), scales=True)


def test_refuses_when_nothing_can_be_pruned(fresh):
    with pytest.raises(UsageError, match="no group of channels"):
        sparse_groups(fresh(), PruneConfig(exclude=["backbone", "head"]))
