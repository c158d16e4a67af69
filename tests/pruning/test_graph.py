# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.modules.block import AAttn, Attention
from ultralytics.nn.modules.transformer import AIFI

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.pruning.graph import build_graph, custom_types
from yolo_ext.pruning.prune import make_plan
from yolo_ext.pruning.surgery import TOLERANCE, apply_plan, equivalence_gap
from yolo_ext.stock.load import load_model

OUTPUT = "is an output of the model"


class Toy(nn.Module):
    """A few named layers and a function that wires them."""

    def __init__(self, wire: Callable, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.model = nn.ModuleList(layers.values())  # where a YOLO keeps its layers
        self.wire = wire

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wire(self, x)


def conv(n_in: int, n_out: int, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, k, padding=k // 2, **options)


def set_to_zero(x: torch.Tensor) -> torch.Tensor:
    x[:, :2] = 0
    return x


def halves(m: Toy, x: torch.Tensor) -> torch.Tensor:
    """Wire as C2f does: the second half feeds a layer, everything is concatenated."""
    y, z = m.a(x).chunk(2, 1)
    return m.c(torch.cat((y, z, m.b(z) + z), 1))


def share(layer: nn.Module, other: nn.Module) -> nn.Module:
    layer.weight = other.weight
    return layer


class Standardised(nn.Conv2d):
    """A conv whose output depends on how many inputs there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Hidden(torch.autograd.Function):
    """A function that torch does not show to anyone: the result is a new tensor."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() * 2)


# id: (wiring, layers, {group name: (size, reason, {(layer, dim)})}); the output group is the same everywhere
A, B = conv(3, 8), conv(8, 4)
TOYS = {
    "chain": (
        lambda m, x: m.b(m.act(m.bn(m.a(x)))),
        {"a": A, "bn": nn.BatchNorm2d(8), "act": nn.SiLU(), "b": B},
        {"a": (8, "", {("a", "out"), ("bn", "out"), ("b", "in")})},
    ),
    "residual": (
        lambda m, x: m.b((y := m.a(x)) + m.r(y)),
        {"a": A, "r": conv(8, 8, 3), "b": B},
        {"a": (8, "", {("a", "out"), ("r", "out"), ("r", "in"), ("b", "in")})},
    ),
    "residual-in-place": (
        lambda m, x: m.b((y := m.a(x)).add_(m.r(y))),
        {"a": A, "r": conv(8, 8, 3), "b": B},
        {"a": (8, "", {("a", "out"), ("r", "out"), ("r", "in"), ("b", "in")})},
    ),
    "gate": (
        lambda m, x: m.b((y := m.a(x)) * m.r(y).sigmoid()),
        {"a": A, "r": conv(8, 8), "b": B},
        {"a": (8, "", {("a", "out"), ("r", "out"), ("r", "in"), ("b", "in")})},
    ),
    "concat": (
        lambda m, x: m.b(torch.cat((m.a(x), m.r(x)), 1)),
        {"a": A, "r": conv(3, 5), "b": conv(13, 4)},
        {"a": (8, "", {("a", "out"), ("b", "in")}), "r": (5, "", {("r", "out"), ("b", "in")})},
    ),
    "concat-with-the-image": (
        lambda m, x: m.b(torch.cat((x, m.a(x)), dim=1)),
        {"a": A, "b": conv(11, 4)},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "depthwise": (
        lambda m, x: m.b(m.dw(m.a(x))),
        {"a": A, "dw": conv(8, 8, 3, groups=8), "b": B},
        {"a": (8, "", {("a", "out"), ("dw", "out"), ("dw", "in"), ("b", "in")})},
    ),
    "grouped": (
        lambda m, x: m.b(m.g(m.a(x))),
        {"a": A, "g": conv(8, 8, 3, groups=2), "b": B},
        {
            "a": (8, "grouped convolution g", {("a", "out"), ("g", "in")}),
            "g": (8, "grouped convolution g", {("g", "out"), ("b", "in")}),
        },
    ),
    "spatial": (
        lambda m, x: m.b(m.up(m.pool(m.pad(nn.functional.max_pool2d(m.a(x), 2))))),
        {
            "a": A,
            "pad": nn.ZeroPad2d((0, 1, 0, 1)),
            "pool": nn.MaxPool2d(2, 1),
            "up": nn.Upsample(scale_factor=2),
            "b": B,
        },
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "shared-layer": (
        lambda m, x: m.b(m.s(m.a(x)) + m.s(m.r(x))),
        {"a": A, "r": conv(3, 8), "s": conv(8, 8), "b": B},
        {
            "a": (8, "", {("a", "out"), ("r", "out"), ("s", "in")}),
            "s": (8, "", {("s", "out"), ("b", "in")}),
        },
    ),
    "transposed": (
        lambda m, x: m.b(m.t(m.a(x))),
        {"a": A, "t": nn.ConvTranspose2d(8, 6, 2, 2), "b": conv(6, 4)},
        {"a": (8, "", {("a", "out"), ("t", "in")}), "t": (6, "", {("t", "out"), ("b", "in")})},
    ),
    "linear-after-pooling": (
        lambda m, x: m.b(m.pool(m.a(x)).flatten(1)),
        {"a": A, "pool": nn.AdaptiveAvgPool2d(1), "b": nn.Linear(8, 4)},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "linear-after-flatten": (
        lambda m, x: m.b(m.pool(m.a(x)).flatten(1)),
        {"a": A, "pool": nn.AdaptiveAvgPool2d(2), "b": nn.Linear(32, 4)},
        {"a": (8, "is reshaped by 'flatten'", {("a", "out")})},
    ),
    "keyword-call": (
        lambda m, x: m.b(input=m.a(x)),
        {"a": A, "b": B},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "only-its-type": (
        lambda m, x: m.b((y := m.a(x)) + torch.zeros(1).type_as(y)) + torch.zeros_like(y).sum(),
        {"a": A, "b": B},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "unknown-function": (
        lambda m, x: m.b(m.a(x).flip(1)),
        {"a": A, "b": B},
        {"a": (8, "goes through 'flip'", {("a", "out")})},
    ),
    "written-into": (
        lambda m, x: m.b(set_to_zero(m.a(x))),
        {"a": A, "b": B},
        {"a": (8, "is written into", {("a", "out"), ("b", "in")})},
    ),
    "unknown-module": (
        lambda m, x: m.b(m.ln(m.a(x))),
        {"a": A, "ln": nn.GroupNorm(2, 8), "b": B},
        {"a": (8, "goes through 'group_norm'", {("a", "out")})},
    ),
    "transformer": (
        lambda m, x: m.b(m.t(m.a(x))),
        {"a": A, "t": AIFI(8, 16, num_heads=2), "b": B},
        {
            "a": (8, "is reshaped by 'flatten' in AIFI t", {("a", "out")}),
            "t.fc1": (16, "belongs to tokens", {("t.fc1", "out")}),
            "t.fc2": (8, "belongs to tokens", {("t.fc2", "out")}),
        },
    ),
    "bare-norm": (
        lambda m, x: m.b(m.bn(m.a(x))),
        {"a": A, "bn": nn.BatchNorm2d(8, affine=False), "b": B},
        {"a": (8, "without weights", {("a", "out"), ("b", "in")})},
    ),
    "constant": (
        lambda m, x: m.b(m.a(x) * torch.ones(1, 8, 1, 1)),
        {"a": A, "b": B},
        {"a": (8, "with a parameter or constant", {("a", "out"), ("b", "in")})},
    ),
    "broadcast": (
        lambda m, x: m.b(m.a(x) * m.r(x)),
        {"a": A, "r": conv(3, 1), "b": B},
        {"a": (8, "broadcasting", {("a", "out")}), "r": (1, "broadcasting", {("r", "out")})},
    ),
    "weights-used-elsewhere": (
        lambda m, x: m.b(m.a(x)) + nn.functional.conv2d(x, m.a.weight).sum(),
        {"a": A, "b": B},
        {"a": (8, "whose weights are also used elsewhere", {("a", "out"), ("b", "in")})},
    ),
    "shared-weights": (
        lambda m, x: m.b(m.a(x) + m.r(x)),
        {"a": A, "r": share(conv(3, 8), A), "b": B},
        {"a": (8, "whose weights are also used elsewhere", {("a", "out"), ("r", "out"), ("b", "in")})},
    ),
    "subclass": (
        lambda m, x: m.b(m.s(m.a(x))),
        {"a": A, "s": Standardised(8, 8, 1), "b": B},
        {"a": (8, "goes through 'conv2d' in Standardised s", {("a", "out")})},
    ),
    "parametrised": (
        lambda m, x: m.b(m.s(m.a(x))),
        {"a": A, "s": nn.utils.parametrizations.weight_norm(conv(8, 8)), "b": B},
        {"a": (8, "goes through 'conv2d' in ParametrizedConv2d s", {("a", "out")})},
    ),
    "out-of-sight": (
        lambda m, x: m.b(Hidden.apply(m.a(x))),
        {"a": A, "b": B},
        {"a": (8, "cannot be followed", {("a", "out")})},
    ),
    "einsum": (
        lambda m, x: m.b(torch.einsum("bchw,kc->bkhw", m.a(x), torch.eye(8))),
        {"a": A, "b": B},
        {"a": (8, "goes through 'einsum'", {("a", "out")})},
    ),
    "pixel-shuffle": (
        lambda m, x: m.b(m.p(m.a(x))),
        {"a": A, "p": nn.PixelShuffle(2), "b": conv(2, 4)},
        {"a": (8, "goes through 'pixel_shuffle' in PixelShuffle p", {("a", "out")})},
    ),
    "channel-slice": (
        lambda m, x: m.b(m.a(x)[:, 2:]),
        {"a": A, "b": conv(6, 4)},
        {"a": (8, "goes through '__getitem__'", {("a", "out")})},
    ),
    "spatial-slices": (
        lambda m, x: m.b(torch.cat(((y := m.a(x))[..., ::2, ::2], y[:, :, 1::2, 1::2]), -3)),
        {"a": A, "b": conv(16, 4)},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "squeeze-excite": (
        lambda m, x: m.b((y := m.a(x)) * m.f2(m.f1(y.mean((2, 3))).relu()).sigmoid().view(*y.shape[:2], 1, 1)),
        {"a": A, "f1": nn.Linear(8, 2), "f2": nn.Linear(2, 8), "b": B},
        {
            "a": (8, "", {("a", "out"), ("f1", "in"), ("f2", "out"), ("b", "in")}),
            "f1": (2, "", {("f1", "out"), ("f2", "in")}),
        },
    ),
    "expanded-gate": (
        lambda m, x: m.b((y := m.a(x)) * m.r(y.mean((2, 3), keepdim=True)).sigmoid().expand_as(y)),
        {"a": A, "r": conv(8, 8), "b": B},
        {"a": (8, "", {("a", "out"), ("r", "out"), ("r", "in"), ("b", "in")})},
    ),
    "expanded-places": (
        lambda m, x: m.b((y := m.a(x)) * m.r(y).amax((2, 3), keepdim=True).expand(-1, -1, *y.shape[2:])),
        {"a": A, "r": conv(8, 8), "b": B},
        {"a": (8, "", {("a", "out"), ("r", "out"), ("r", "in"), ("b", "in")})},
    ),
    "expanded-over-channels": (
        lambda m, x: m.b((y := m.a(x)) * m.r(y).expand(-1, 8, -1, -1)),
        {"a": A, "r": conv(8, 1), "b": B},
        {
            "a": (8, "with a parameter or constant", {("a", "out"), ("r", "in"), ("b", "in")}),
            "r": (1, "goes through 'expand' with broadcasting over channels", {("r", "out")}),
        },
    ),
    "places-swapped": (
        lambda m, x: m.b(m.a(x).permute(0, 1, 3, 2).transpose(-1, -2).swapaxes(2, 3)),
        {"a": A, "b": B},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "channels-last": (
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
        {"a": A, "b": B},
        {"a": (8, "is reshaped by 'permute'", {("a", "out")})},
    ),
    "channels-swapped-with-equal-rows": (  # 8 channels, 8 rows, 8 columns: only the order tells them apart
        lambda m, x: m.b(nn.functional.interpolate(m.a(x), (8, 8)).transpose(1, 2)),
        {"a": A, "b": B},
        {"a": (8, "is reshaped by 'transpose'", {("a", "out")})},
    ),
    "cut-along-rows": (
        lambda m, x: m.b(torch.cat(torch.split(y := m.a(x), [16, 48], 2)[::-1], 2) + torch.cat(y.chunk(2, -1), dim=3)),
        {"a": A, "b": B},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "joined-along-rows": (
        lambda m, x: m.b(torch.cat((m.a(x), m.r(x)), 2)),
        {"a": A, "r": conv(3, 8), "b": B},
        {"a": (8, "", {("a", "out"), ("r", "out"), ("b", "in")})},
    ),
    "joined-with-a-constant": (
        lambda m, x: m.b(torch.cat((m.a(x), torch.zeros(len(x), 8, 1, x.shape[3])), 2)),
        {"a": A, "b": B},
        {"a": (8, "goes through 'cat' with a parameter or constant", {("a", "out"), ("b", "in")})},
    ),
    "new-places": (
        lambda m, x: m.b((y := m.a(x)) * m.f(y.mean((2, 3)))[:, :, None, None]) + m.b(y[:, :, 0, 0][..., None, None]),
        {"a": A, "f": nn.Linear(8, 8), "b": B},
        {"a": (8, "", {("a", "out"), ("f", "in"), ("f", "out"), ("b", "in")})},
    ),
    "channels-picked": (
        lambda m, x: m.b(m.a(x)[:, [1, 0, 2, 3, 4, 5, 6, 7]]),
        {"a": A, "b": B},
        {"a": (8, "goes through '__getitem__'", {("a", "out")})},
    ),
    "mirrored": (
        lambda m, x: m.b(m.a(x).flip(3).roll(2, 2)),
        {"a": A, "b": B},
        {"a": (8, "", {("a", "out"), ("b", "in")})},
    ),
    "mean-over-channels": (
        lambda m, x: m.b((y := m.a(x)) * y.mean(1, keepdim=True)),
        {"a": A, "b": B},
        {"a": (8, "goes through 'mean'", {("a", "out"), ("b", "in")})},
    ),
    "linear-on-places": (  # 8 channels and 8 columns: only the position tells them apart
        lambda m, x: m.b(m.f(nn.functional.interpolate(m.a(x), (8, 8)))),
        {"a": A, "f": nn.Linear(8, 8), "b": B},
        {
            "a": (8, "is reshaped before f", {("a", "out")}),
            "f": (8, "belongs to tokens", {("f", "out")}),
        },
    ),
    "depthwise-transposed": (
        lambda m, x: m.b(m.t(m.a(x))),
        {"a": A, "t": nn.ConvTranspose2d(8, 8, 2, 2, groups=8), "b": B},
        {
            "a": (8, "grouped convolution t", {("a", "out"), ("t", "in")}),
            "t": (8, "grouped convolution t", {("t", "out"), ("b", "in")}),
        },
    ),
    "unequal-parts": (
        lambda m, x: m.b(m.a(x).split([3, 5], 1)[1]),
        {"a": A, "b": conv(5, 4)},
        {"a": (8, "cut at places written in the code", {("a", "out"), ("b", "in")})},
    ),
}


@pytest.mark.parametrize("name", TOYS)
def test_groups_of_toys(name):
    wire, layers, expected = TOYS[name]
    found: dict[str, tuple[int, list[str], set]] = {}
    for g in build_graph(Toy(wire, **layers)).groups:  # parts of one layer are added up
        size, reasons, members = found.setdefault(g.name, (0, [], set()))
        found[g.name] = (size + g.size, [*reasons, g.frozen], members | {(m.module, m.dim) for m in g.members})
    assert found.pop("b")[1] == [OUTPUT]
    assert set(found) == set(expected)
    for group, (size, reason, members) in expected.items():
        got_size, reasons, got_members = found[group]
        assert (got_size, got_members) == (size, members)
        assert all(reason in r if reason else r == "" for r in reasons), reasons


LIFTED = "makes zero channels nonzero"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        *[
            pytest.param(f, LIFTED, id=n)
            for n, f in {
                "sigmoid": torch.sigmoid,
                "sigmoid-module": nn.Sigmoid(),
                "softplus": nn.functional.softplus,
                "exp": torch.exp,
                "plus": lambda x: x + 0.5,
                "reversed-minus": lambda x: 1 - x,
                "plus-in-place": lambda x: x.add_(1.0),
                "clamp-from-below": lambda x: x.clamp(min=0.1),
                "divided-by-itself": lambda x: x / x,
                "then-pooled": lambda x: nn.functional.max_pool2d(x.sigmoid(), 2),
                "then-concatenated": lambda x: torch.cat((x, x.sigmoid()), 1)[..., 1:].chunk(2, 1)[0],
                "then-added": lambda x: x + x.sigmoid(),
                "then-turned": lambda x: x.sigmoid().permute(0, 1, 3, 2),
                "then-expanded": lambda x: x.mean((2, 3), keepdim=True).sigmoid().expand_as(x),
                "joined-along-rows": lambda x: torch.cat((x, x.sigmoid()), 2),
                "padded-with-ones": lambda x: nn.functional.pad(x, (1, 1), value=1.0),
            }.items()
        ],
        *[
            pytest.param(f, "", id=n)
            for n, f in {
                "tanh": torch.tanh,
                "hardswish": nn.functional.hardswish,
                "scaled": lambda x: 2 * x / 3,
                "clamp": lambda x: x.clamp(0, 6),
                "swish": lambda x: x * x.sigmoid(),
                "gated": lambda x: x * (1 + torch.exp(-x)),
                "minus-itself": lambda x: x.sub(x),
                "padded": lambda x: nn.functional.pad(x, (1, 1, 1, 1)),
            }.items()
        ],
    ],
)
def test_functions_that_make_something_of_zero(function, reason):
    """A removed channel is a zero channel; after such a function it would not be, and the next layer would see it."""
    graph = build_graph(Toy(lambda m, x: m.b(function(m.a(x))), a=A, b=B))
    reasons = {g.name: g.frozen for g in graph.groups}
    assert reason in reasons["a"] if reason else reasons["a"] == ""


@pytest.mark.parametrize("mend", [nn.BatchNorm2d(8), conv(8, 8, 3, groups=8)], ids=["norm", "depthwise"])
def test_layers_that_lose_the_channel_too_make_it_zero_again(mend):
    toy = Toy(lambda m, x: m.b(m.mend(m.a(x).sigmoid())), a=A, mend=mend, b=B)
    assert {g.name: g.frozen for g in build_graph(toy).groups} == {"a": "", "b": OUTPUT}


def test_custom_modules_can_be_skipped():
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1] == 8
            return self.inner(x)

    toy = Toy(lambda m, x: m.b(m.t(m.r(m.a(x)))), a=A, r=conv(8, 8), t=Custom(), b=B)
    assert {g.name: g.frozen for g in build_graph(toy).groups} == {"a": "", "r": "", "t.inner": "", "b": OUTPUT}
    assert custom_types(toy) == [Custom]
    skipped = {g.name: g.frozen for g in build_graph(toy, whole=[Custom]).groups}
    assert skipped == {"a": "", "r": "enters Custom t", "b": OUTPUT}


def test_a_model_that_does_not_run_is_a_user_error():
    toy = Toy(lambda m, x: m.b(m.a(x)), a=A, b=conv(7, 4))
    with pytest.raises(UsageError, match=r"does not run in training mode on an image of 64x64 pixels \(RuntimeError: "):
        build_graph(toy)


def test_random_numbers_of_a_run_go_on_as_without():
    toy = Toy(lambda m, x: m.b(nn.functional.dropout(m.a(x))), a=A, b=B)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_graph(toy)
    assert torch.equal(torch.rand(3), expected)


def test_positions_after_concat():
    graph = build_graph(Toy(*TOYS["concat"][:1], **TOYS["concat"][1]))
    positions = {(g.name, m.module): m.index.flatten().tolist() for g in graph.groups for m in g.members}
    assert positions["a", "b"] == list(range(8))
    assert positions["r", "b"] == list(range(8, 13))


def test_halves_are_tied_and_keep_their_order():
    graph = build_graph(Toy(halves, a=A, b=conv(4, 4), c=conv(12, 4)))
    first, second = [g for g in graph.groups if g.name == "a"]
    assert any({graph.groups[i].name for i in tied} == {"a"} and len(tied) == 2 for tied in graph.ties)
    where = {(m.module, m.dim): m.index for m in first.members}
    assert where["a", "out"].flatten().tolist() == [0, 1, 2, 3] == where["c", "in"].flatten().tolist()
    where = {(m.module, m.dim): m.index for m in second.members}
    assert where["a", "out"].flatten().tolist() == [4, 5, 6, 7]
    assert where["b", "out"].flatten().tolist() == where["b", "in"].flatten().tolist() == [0, 1, 2, 3]
    assert where["c", "in"].tolist() == [[4, 8], [5, 9], [6, 10], [7, 11]]  # the sum arrives beside its summand


def test_a_fixed_half_keeps_the_other_one():
    toy = Toy(lambda m, x: m.b((p := m.a(x).chunk(2, 1))[0]) + p[1].flip(1), a=A, b=conv(4, 4))
    reasons = {g.members[0].index[0, 0].item(): g.frozen for g in build_graph(toy).groups if g.name == "a"}
    assert "goes through 'flip'" in reasons[4]
    assert reasons[0] == f"must stay as wide as a part that {reasons[4]}" or reasons[0] == reasons[4]


def test_attention_prunes_values_at_the_rate_of_the_stream():
    toy = Toy(lambda m, x: m.b(m.t(m.a(x))), a=conv(3, 32), t=Attention(32, num_heads=2), b=conv(32, 4))
    graph = build_graph(toy)
    tied = next(b for b in graph.ties if any(graph.groups[g].name == "a" for g in b))
    groups = [graph.groups[g] for g in tied]
    assert sorted(g.size for g in groups) == [16, 16, 32] and not any(g.frozen for g in groups)
    qkv = {int(i) for g in groups for m in g.members if (m.module, m.dim) == ("t.qkv.conv", "out") for i in m.index}
    assert qkv == {*range(16, 32), *range(48, 64)}  # each head: 8 rows of q, 8 of k, which stay, 16 of v


def test_area_attention_is_kept_and_said_so():
    toy = Toy(lambda m, x: m.b(m.t(m.a(x))), a=conv(3, 32), t=AAttn(32, num_heads=2), b=conv(32, 4))
    frozen = {g.name: g.frozen for g in build_graph(toy).groups}
    assert frozen["t.qkv.conv"].startswith("is reshaped by")
    assert frozen["a"] == "" and frozen["t.proj.conv"] == ""


def test_the_model_is_left_alone(yolo):
    model = yolo("yolov8n")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    build_graph(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training and not any(m._forward_hooks for m in model.modules())


def test_reasons_of_a_yolo_read_well(yolo):
    frozen = {g.name: g.frozen for g in build_graph(yolo("yolov8n")).groups if g.frozen}
    finals = {f"model.22.cv{b}.{level}.2" for b in (2, 3) for level in range(3)}
    assert set(frozen) == {*finals, "model.22.dfl.conv"}  # everything else can be pruned
    assert set(frozen.values()) == {"is reshaped by 'view' (head output)"}


# Property: surgery is exact on any net -----------------------------------------------------------------------------
class Net(nn.Module):
    """A random net: each step takes the stream and returns a new one."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.kinds, blocks, width = [k for k, _ in steps], [], 3
        for kind, w in steps:
            out = width if kind in SAME_WIDTH else w
            first = nn.Sequential(conv(width, out, 3, bias=False), nn.BatchNorm2d(out), nn.SiLU())
            if kind == "depthwise":
                first = nn.Sequential(conv(width, width, 3, groups=width), nn.BatchNorm2d(width), nn.SiLU())
            extra = conv(out // 2, out // 2, 3) if kind == "halves" else conv(width, out)
            last = conv(3 * (out // 2), out) if kind == "halves" else nn.ConvTranspose2d(out, out, 2, 2)
            blocks.append(nn.ModuleList([first, extra, last]))
            width = 2 * out if kind == "concat" else out
        self.model = nn.ModuleList([*blocks, conv(width, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kind, (first, extra, last) in zip(self.kinds, self.model):
            if kind == "conv" or kind == "depthwise":
                x = first(x)
            elif kind == "residual":
                x = first(x) + extra(x)
            elif kind == "gate":
                x = first(x) * extra(x).sigmoid()
            elif kind == "concat":
                x = torch.cat((first(x), extra(x)), 1)
            elif kind == "halves":
                y, z = first(x).chunk(2, 1)
                x = last(torch.cat((extra(z) + z, y, z), 1))
            elif kind == "up":
                x = last(nn.functional.max_pool2d(first(x), 4))
            elif kind == "sigmoid":
                x = first(x).sigmoid()
            elif kind == "shift":
                x = first(x) + 0.5
            elif kind == "excite":
                x = x * first[0](x).mean((2, 3), keepdim=True).sigmoid()
            elif kind == "slices":
                x = torch.cat([x[:, ::2], nn.functional.pad(x, (1, 0))[..., :-1][:, 1::2]], 1)
            else:
                x = nn.functional.avg_pool2d(x, 3, 1, 1)
        return self.model[-1](x)


SAME_WIDTH = ("residual", "depthwise", "pool", "gate", "excite", "slices")
KINDS = (*SAME_WIDTH, "conv", "concat", "halves", "up", "sigmoid", "shift")
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@EXAMPLES
@given(
    steps=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 6, 8])), min_size=1, max_size=5),
    ratio=st.floats(0.1, 0.8),
    scope=st.sampled_from(["local", "global"]),
    seed=st.integers(0, 99),
)
def test_any_legal_plan_is_exact_and_a_wrong_index_shows(calibrate, steps, ratio, scope, seed):
    torch.manual_seed(seed)
    net = calibrate(Net([("conv", 8), *steps]))
    cfg = PruneConfig(method="random", ratio=ratio, scope=scope, seed=seed, round_to=1, min_channels=1, max_ratio=0.9)
    try:
        kept = make_plan(net, build_graph(net), cfg)
    except UsageError as e:
        assert re.search("Nothing can be pruned|cannot be reached", str(e))  # too little is left that may go
        return
    assert equivalence_gap(net, apply_plan(deepcopy(net), kept), kept) <= TOLERANCE
    wrong = spoil(net, kept, seed)
    if wrong is not None:
        assert not equivalence_gap(net, apply_plan(deepcopy(net), wrong), kept) <= TOLERANCE


def spoil(net: nn.Module, kept: dict, seed: int) -> dict | None:
    """Return the plan with one kept input swapped for a removed one in some layer, None where there is none."""
    modules, wrong = dict(net.named_modules()), deepcopy(kept)
    paths = [p for p, dims in kept.items() if "in" in dims and getattr(modules[p], "groups", 1) == 1]
    if not paths:
        return None
    path = sorted(paths)[seed % len(paths)]
    index = wrong[path]["in"]
    width = getattr(modules[path], "in_channels", None) or modules[path].in_features
    index[seed % len(index)] = next(i for i in range(width) if i not in index)
    return wrong


def test_a_layer_that_no_rule_can_save_fails_the_gate_with_advice():
    toy = Toy(lambda m, x: m.b(m.a(x).view(2 if len(x) == 2 else 1, 8, -1, 64)[:, :, :64]), a=A, b=B)
    kept = {"a": {"out": [0, 1]}, "b": {"in": [0, 1]}}
    with pytest.raises(CheckFailed, match=r"does not run: .* prune\.exclude"):
        equivalence_gap(toy, apply_plan(deepcopy(toy), kept), kept)


def test_nothing_to_prune_is_an_error():
    toy = Toy(lambda m, x: m.b(m.a(x).flip(1)), a=A, b=B)
    with pytest.raises(UsageError, match="Nothing can be pruned"):
        make_plan(toy, build_graph(toy), PruneConfig(ratio=0.5, round_to=1, min_channels=1))


LARGE = [
    "yolov3",
    "yolov5x",
    "yolov8x",
    "yolov9e",
    "yolov10x",
    "yolo11x",
    "yolo12x",
    "yolo26x",
    "yolo26x-p6",
    "rtdetr-x",
]


# Bounds --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *[pytest.param(f"{f}n", 10, id=f"{f}n") for f in ("yolov8", "yolo11", "yolo12", "yolo26")],
        *[pytest.param(n, 60, id=n, marks=pytest.mark.matrix) for n in LARGE],
    ],
)
def test_graph_building_is_bounded(name, limit):
    """In time, and in memory: the traced image is small, so the weights of the copy are most of it."""
    model = load_model(f"{name}.yaml")[0]
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
    build_graph(model)
    assert time.perf_counter() - start < limit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before < 2 * weights + 1024  # MB
