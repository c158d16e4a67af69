# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""torch-pruning's dependency graph on labelled channels: its groups, and what it does before, at and after a cut."""

from __future__ import annotations

import threading
from copy import deepcopy
from functools import cache

import pytest
import torch
import torch_pruning as tp
from torch import nn
from ultralytics import YOLO

import yolo_ext
from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.depgraph import DependencyGraph, depthwise, width
from yolo_ext.pruning.graph import Graph, Group, Member, build_graph
from yolo_ext.pruning.surgery import TOLERANCE, verify

FAMILIES = [
    "yolo11n",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("yolov8n", "yolov9t", "yolov10n", "yolo26n")),
]
TRACED = [
    "yolov5n",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("yolov3-tiny", "yolov5s", "yolov6n", "yolov6s")),
]
X = torch.rand(1, 3, 64, 64)


@pytest.fixture
def model(yolo):
    return deepcopy(yolo("yolo11n")).requires_grad_(True)


@cache
def couplings(dense: nn.Module) -> Graph:
    return build_graph(dense)


def graph_of(model: nn.Module, dense: nn.Module) -> DependencyGraph:
    """Return the graph of a model with the couplings of one like it, which are found once."""
    with yolo_ext.on_yolo(couplings(dense)):
        return tp.DependencyGraph().build_dependency(model, X)


@pytest.fixture
def graph(model, yolo) -> DependencyGraph:
    return graph_of(model, yolo("yolo11n"))


def cut(graph: DependencyGraph, path: str, idxs: list[int]) -> None:
    layer = graph.model.get_submodule(path)
    graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs).prune()


# Groups --------------------------------------------------------------------------------------------------------------
def atoms(graph: tp.DependencyGraph, ignored: list[nn.Module]) -> set[frozenset]:
    """Return what goes together, as sets of (layer, dimension, position), for every channel of every group."""
    names, found = {m: n for n, m in graph.model.named_modules()}, set()
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
    for group in graph.get_all_groups(ignored_layers=ignored):
        at: dict[int, set] = {}
        for item in group.items:
            if isinstance(layer := item.dep.layer, kinds) and layer in names:
                dim = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
                for position, rank in zip(item.idxs, item.root_idxs):
                    at.setdefault(rank, set()).add((names[layer], dim, position))
        found |= {frozenset(places) for places in at.values()}
    return found


@pytest.mark.parametrize("name", TRACED)
def test_groups_are_those_of_torch_pruning_where_it_can_trace(name, yolo):
    model = deepcopy(yolo(name)).requires_grad_(True)
    head = model.model[-1]
    fixed = [m for m in head.modules() if isinstance(m, nn.Conv2d) and m.bias is not None] + [head.dfl]
    theirs = tp.DependencyGraph().build_dependency(model, X, verbose=False)
    ours = DependencyGraph().build_dependency(model, X)
    assert atoms(theirs, fixed) == atoms(ours, fixed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_channel_that_can_go_is_in_one_group(name, yolo):
    graph = graph_of(yolo(name), yolo(name))
    listed = [(m, d, p) for atom in atoms(graph, []) for m, d, p in atom]
    free = [g for t in graph.couplings.ties for i in t if not (g := graph.couplings.groups[i]).frozen]
    places = [(m.module, m.dim, p) for g in free for m in g.members for p in m.index.flatten().tolist()]
    layers = dict(graph.model.named_modules())
    expected = {x for x in places if not (x[1] == "in" and depthwise(layers[x[0]]))}
    assert not graph.skipped and len(listed) == len(set(listed)) and set(listed) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rules_that_are_silent_when_broken(name, yolo):
    graph = graph_of(yolo(name), yolo(name))
    for group in graph.get_all_groups():
        root = group[0]
        n = width(root.dep.layer, "out")
        assert root.idxs == root.root_idxs == list(range(n))  # ranks are the positions that a pruner asks for
        for item in group.items:
            assert item.idxs == sorted(item.idxs) and len(item.idxs) == len(item.root_idxs)  # Taylor sorts in place
            assert set(item.root_idxs) <= set(range(n))
            if depthwise(item.dep.layer):
                assert item.dep.handler == tp.prune_conv_out_channels  # or no importance looks at its filters
        whole = [sorted(item.root_idxs) == list(range(n)) for item in group.items]
        assert whole == sorted(whole, reverse=True)  # scores get the size of the first layer


def test_parts_of_a_cut_tensor_are_channel_groups(graph, model):
    root = model.model[2].cv1.conv
    assert graph.get_pruner_of_module(root).get_out_channel_groups(root) == 2
    assert graph.get_pruner_of_module(model.model[0].conv).get_out_channel_groups(model.model[0].conv) == 1
    attention = next(m for m in model.modules() if type(m).__name__ == "C2PSA")
    heads = attention.m[0].attn.num_heads
    assert graph.parts[attention.cv1.conv] == 2 * heads
    group = graph.get_pruning_group(root, tp.prune_conv_out_channels, [1])
    assert group[0].idxs == [1, 1 + root.out_channels // 2]


def test_part_of_a_group_has_as_many_scores(graph, model):
    conv, importance = model.model[0].conv, tp.importance.MagnitudeImportance(normalizer=None)
    some, all_ = [9, 2, 6], list(range(conv.out_channels))
    found = importance(graph.get_pruning_group(conv, tp.prune_conv_out_channels, some))
    every = importance(graph.get_pruning_group(conv, tp.prune_conv_out_channels, all_))
    torch.testing.assert_close(found, every[sorted(some)])


def test_what_no_single_layer_shows_stays_whole_and_says_so(yolo, caplog):
    first, second = torch.arange(8)[:, None], torch.arange(8, 16)[:, None]
    groups = [Group("model.0.conv", [Member("model.0.conv", "out", i), Member("model.1.conv", "in", i)])
              for i in (first, second)]  # fmt: skip
    couplings = Graph(groups, [[0], [1]])
    with yolo_ext.on_yolo(couplings):
        graph = tp.DependencyGraph().build_dependency(yolo("yolov8n"), X)
    assert list(graph.get_all_groups()) == [] and "whole layers" in graph.skipped["model.0.conv"]
    assert "model.0.conv stays whole" in caplog.text


def test_any_place_of_a_channel_names_its_group(graph, model):
    conv, bn, reader = model.model[0].conv, model.model[0].bn, model.model[1].conv
    asked = [
        (conv, tp.prune_conv_out_channels),
        (bn, tp.prune_batchnorm_out_channels),
        (reader, tp.prune_conv_in_channels),
    ]
    found = [{(d.layer, tuple(i)) for d, i in graph.get_pruning_group(m, fn, [3, 5])} for m, fn in asked]
    assert found[0] == found[1] == found[2] and (reader, (3, 5)) in found[0]


# Cuts ----------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_cuts_are_exact_and_widths_follow(name, yolo):
    dense, model = yolo(name), deepcopy(yolo(name))
    graph = graph_of(model, dense)
    for group in graph.get_all_groups():
        n = len(group[0].idxs) // graph.parts.get(group[0].dep.layer, 1)
        group.prune(idxs=range(n // 3))
    plan = graph.plan()
    assert len(plan) > 40 and verify(dense, model, plan) <= TOLERANCE
    assert not any(p.grad_fn for p in model.parameters())
    blocks = [m for m in model.modules() if isinstance(m, stock.WIDTH_ATTRIBUTES)]
    assert blocks and all(2 * m.c == m.cv1.conv.out_channels for m in blocks)


def test_frozen_stays_frozen_and_gradients_follow(model, yolo):
    model.model[1].requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    wanted = [p.requires_grad for p in model.parameters()]
    grad = model.model[2].cv1.conv.weight.grad.clone()
    cut(graph_of(model, yolo("yolo11n")), "model.1.conv", [0, 4])
    assert [p.requires_grad for p in model.parameters()] == wanted
    keep = [i for i in range(grad.shape[1]) if i not in (0, 4)]
    assert torch.equal(model.model[2].cv1.conv.weight.grad, grad[:, keep])


@pytest.mark.slow
def test_groups_in_a_list_may_be_pruned_one_after_the_other(yolo, graph, model):
    """Readers of a concatenation belong to several groups, whose positions move with every cut."""
    for group in [graph.get_pruning_group(g[0].dep.layer, g[0].dep.handler, [0, 1]) for g in graph.get_all_groups()]:
        group.prune()
    assert verify(yolo("yolo11n"), model, graph.plan()) <= TOLERANCE


def test_history_has_one_entry_for_each_cut(graph, model):
    conv = model.model[0].conv
    group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, range(conv.out_channels))
    group.prune(idxs=[1, 2])
    group.prune(idxs=torch.tensor([0]), record_history=False)
    assert graph.pruning_history() == [["model.0.conv", True, [1, 2]]] and conv.out_channels == 13


def test_asking_for_nothing_cuts_nothing(graph, model):
    cut(graph, "model.0.conv", [])
    assert graph.plan() == {} and model.model[0].conv.out_channels == 16


@pytest.mark.slow
def test_the_model_keeps_its_mode_and_gradient_flags(yolo):
    model = deepcopy(yolo("yolov8n")).train().requires_grad_(False)
    DependencyGraph().build_dependency(model, X)
    assert model.training and not any(p.requires_grad for p in model.parameters())


# Wrong use -----------------------------------------------------------------------------------------------------------
def test_channels_that_stay_are_refused_with_the_reason(graph, model):
    last = model.model[-1].cv2[0][-1]
    with pytest.raises(UsageError, match=r"model.23.cv2.0.2 is .*cannot go"):
        graph.get_pruning_group(last, tp.prune_conv_out_channels, [0])
    with pytest.raises(UsageError, match=r"model.0.conv has 16 .*\[16\]"):
        graph.get_pruning_group(model.model[0].conv, tp.prune_conv_out_channels, [3, 16])
    with pytest.raises(ValueError, match="Conv2d"):
        graph.get_pruning_group(nn.Conv2d(3, 8, 1), tp.prune_conv_out_channels, [0])


@pytest.mark.parametrize("ask", ["group", "held", "plan"])
def test_a_layer_that_was_cut_by_hand_is_refused(ask, graph, model):
    conv = model.model[0].conv
    held = graph.get_pruning_group(conv, tp.prune_conv_out_channels, [0])
    tp.prune_batchnorm_out_channels(model.model[0].bn, [0])
    with pytest.raises(UsageError, match=r"model.0.bn has 15 channels .* 16, so it was cut by hand"):
        {"group": lambda: cut(graph, "model.0.conv", [0]), "held": held.prune, "plan": graph.plan}[ask]()
    assert conv.out_channels == 16


def test_a_layer_in_the_place_of_another_is_refused(graph, model):
    model.model[0].conv = deepcopy(model.model[0].conv)
    with pytest.raises(UsageError, match=r"model\.0\.conv"):
        graph.plan()


def test_a_layer_never_loses_all_its_channels(graph, model):
    root = model.model[2].cv1.conv
    with pytest.raises(UsageError, match=r"model.2.cv1.conv would lose all"):
        cut(graph, "model.2.cv1.conv", range(root.out_channels // 2))
    assert graph.plan() == {}


def test_what_is_no_network_is_refused(yolo):
    with pytest.raises(UsageError, match=r"A YOLO is no .* YOLO\(path\).model"):
        DependencyGraph().build_dependency(YOLO("yolov8n.yaml", verbose=False), X)
    with pytest.raises(UsageError, match="fused"):
        DependencyGraph().build_dependency(deepcopy(yolo("yolov8n")).fuse(verbose=False), X)


# on_yolo -------------------------------------------------------------------------------------------------------------
def swapped() -> list[bool]:
    return [issubclass(home.DependencyGraph, DependencyGraph) for home in (tp, tp.dependency)]


def test_the_swap_ends_with_the_block():
    theirs = tp.DependencyGraph
    with yolo_ext.on_yolo():
        with yolo_ext.on_yolo():
            assert swapped() == [True, True]
        assert swapped() == [True, True]
    with pytest.raises(KeyError), yolo_ext.on_yolo():
        raise KeyError
    assert tp.DependencyGraph is tp.dependency.DependencyGraph is theirs


def test_threads_that_overlap_restore_what_the_first_found():
    theirs, inside, go = tp.DependencyGraph, threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with yolo_ext.on_yolo():
            inside.set()
            go.wait(10)
            seen.extend(swapped())

    thread = threading.Thread(target=other)
    with yolo_ext.on_yolo():
        thread.start()
        inside.wait(10)
    go.set()  # the first one has left
    thread.join()
    assert seen == [True, True] and tp.DependencyGraph is tp.dependency.DependencyGraph is theirs


def test_known_couplings_are_used_also_in_a_block_inside(yolo):
    couplings = build_graph(yolo("yolov8n"))
    with yolo_ext.on_yolo(couplings), yolo_ext.on_yolo():
        graph = tp.DependencyGraph().build_dependency(yolo("yolov8n"), X)
    assert graph.couplings is couplings
