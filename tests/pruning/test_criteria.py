# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.pruning.criteria import GroupWeights, criteria, group_weights, score
from yolo_ext.pruning.evidence import NO_PROBES
from yolo_ext.pruning.graph import Group, Member, build_graph
from yolo_ext.pruning.prune import decide, make_plan, remember_dense

DATA_FREE = [row.name for row in criteria if not row.needs and row.name != "random"]
GENERATOR = torch.Generator()


def group(*layers: list[list[float]], seed: int = 0, **more: list) -> GroupWeights:
    tensors = {k: [torch.tensor(t) for t in v] for k, v in more.items()}
    return GroupWeights([torch.tensor(w) for w in layers], torch.Generator().manual_seed(seed), **tensors)


def member(path: str, dim: str, *index: list[int]) -> Member:
    return Member(path, dim, torch.tensor(index))


@pytest.mark.parametrize(
    ("method", "layers", "expected"),
    [
        pytest.param("l1", [[[3.0, -4.0], [1.0, 0.0]]], [7 / 4, 1 / 4], id="l1"),
        pytest.param("l2", [[[3.0, -4.0], [1.0, 0.0]]], [25 / 13, 1 / 13], id="l2"),
        pytest.param("lamp", [[[3.0], [1.0], [2.0]]], [9 / 9, 1 / 14, 4 / 13], id="lamp"),
        # coupled layers count alike: magnitudes are averaged channel by channel before anything else
        pytest.param("l1", [[[2.0], [2.0]], [[4.0], [0.0]]], [3 / 2, 1 / 2], id="l1-coupled"),
        pytest.param("lamp", [[[1.0], [2.0]], [[3.0], [0.0]]], [1.0, 2 / 7], id="lamp-coupled"),
        pytest.param("l1", [[[0.0], [0.0]]], [0.0, 0.0], id="l1-dead"),
        pytest.param("lamp", [[[0.0], [1.0]]], [0.0, 1.0], id="lamp-dead-channel"),
        # equal channels must not have equal scores, or a global ranking takes all of them or none
        pytest.param("lamp", [[[1.0], [1.0], [1.0]]], [1 / 3, 1 / 2, 1.0], id="lamp-ties"),
        pytest.param("group_norm", [[[2.0], [0.0]]], [2.0, 0.0], id="group_norm-nothing-reads-it"),
        pytest.param("fpgm", [[[0.0], [1.0], [5.0]]], [6 / (20 / 3), 5 / (20 / 3), 9 / (20 / 3)], id="fpgm"),
        pytest.param("fpgm", [[[1.0]]], [0.0], id="fpgm-single"),
        pytest.param("group_sl", [[[0.0], [0.0]]], [0.0, 0.0], id="group_sl-dead"),
    ],
)
def test_by_hand(method, layers, expected):
    assert criteria[method].fn(group(*layers)).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        pytest.param("group_norm", [(9 + 16) / 15, (1 + 4) / 15], id="group_norm"),
        pytest.param("group_sl", [1.0, (5 / 25) ** 0.5], id="group_sl"),
        pytest.param("slim", [2.0, 1.0], id="slim"),
        pytest.param("group_slim", [(10 / 2) ** 0.5, 1.0], id="group_slim"),
        pytest.param("taylor", [7.0, 4.0], id="taylor"),
        pytest.param("hessian", [7.0, 4.0], id="hessian"),
        pytest.param("obd", [7.0, 4.0], id="obd"),
    ],
)
def test_every_coupled_tensor_counts(method, expected):
    whole = group(
        [[3.0], [1.0]],
        inp=[[[4.0], [2.0]]],
        gamma=[[1.0, 1.0], [3.0, 1.0]],
        evidence=[[[1.0, 2.0], [1.0, 3.0]], [[4.0], [0.0]]],
    )
    assert criteria[method].fn(whole).tolist() == pytest.approx(expected, rel=1e-6)


def _relative(score: torch.Tensor) -> torch.Tensor:
    return score / score.mean()


def _lamp(score: torch.Tensor) -> torch.Tensor:
    return torch.tensor([s / score[score >= s].sum() for s in score])


FORMULAS = {  # by magnitudes (layers, n): of producers in the first and second power, of readers, and of norms
    "l1": (lambda one, two, inp, gamma: _relative(one.mean(0)), 0.0),
    "l2": (lambda one, two, inp, gamma: _relative(two.mean(0)), 5e-7),
    "group_norm": (lambda one, two, inp, gamma: _relative(torch.cat([two, inp]).mean(0)), 5e-7),
    "lamp": (lambda one, two, inp, gamma: _lamp(two.mean(0)), 2e-5),  # it subtracts sums in float32
    "slim": (lambda one, two, inp, gamma: gamma.mean(0), 0.0),
    "group_slim": (lambda one, two, inp, gamma: (gamma**2).mean(0) ** 0.5, 5e-7),
    "group_sl": (lambda one, two, inp, gamma: (s := torch.cat([two, inp]).mean(0) ** 0.5) / s.max(), 5e-7),
}


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("n", [1, 16, 512])
def test_torch_pruning_scores_by_these_formulas(method, n):
    torch.manual_seed(n)
    out, inp, gamma = (
        [torch.randn(n, 9), torch.randn(n, 288)],
        [torch.randn(n, 64), torch.randn(n, 7)],
        torch.rand(2, n),
    )
    one, two, read = (torch.stack([w.abs().pow(p).sum(1) for w in t]) for t, p in ((out, 1), (out, 2), (inp, 2)))
    formula, tolerance = FORMULAS[method]
    found = criteria[method].fn(GroupWeights(out, GENERATOR, inp, [*gamma]))
    torch.testing.assert_close(found, formula(one, two, read, gamma), rtol=tolerance, atol=0)


@pytest.mark.parametrize("method", ["slim", "group_slim"])
def test_a_group_without_batchnorm_cannot_be_ranked_by_it(method):
    net = nn.Module()
    net.conv = nn.Conv2d(3, 2, 1)
    assert score(net, Group("conv", [member("conv", "out", [0], [1])]), criteria[method], GENERATOR) is None


@pytest.mark.parametrize("method", [row.name for row in criteria if Need.DATA in row.needs])
def test_channels_that_no_loss_depends_on_score_zero(method):
    assert criteria[method].fn(group([[1.0], [2.0]])).tolist() == [0.0, 0.0]


def test_equal_filters_are_at_distance_zero():
    """In float32 the fast distances of large equal filters are far from zero."""
    w = 1000 * torch.rand(1, 300, generator=torch.Generator().manual_seed(0)).repeat(64, 1)
    w[0] += 1.0
    distances = criteria["fpgm"].fn(GroupWeights([w], GENERATOR))
    torch.testing.assert_close(distances / distances[1], torch.tensor([63.0] + [1.0] * 63), rtol=0.01, atol=0)


@pytest.mark.parametrize("method", DATA_FREE)
@settings(deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=2, max_size=12).filter(
        lambda rows: len({sum(v * v for v in r) for r in rows}) == len(rows)  # of equal channels either may go first
    ),
    data=st.data(),
)
def test_the_order_of_the_channels_does_not_matter(method, weights, data):
    w = torch.tensor(weights, dtype=torch.float32)
    order = torch.tensor(data.draw(st.permutations(range(len(w)))))
    score = criteria[method].fn(GroupWeights([w], torch.Generator()))
    moved = criteria[method].fn(GroupWeights([w[order]], torch.Generator()))
    torch.testing.assert_close(moved, score[order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", DATA_FREE)
def test_the_scale_of_a_layer_does_not_matter(method):
    """Groups are ranked against each other, so a layer with large weights must not win for that reason."""
    w = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    small, large = (criteria[method].fn(GroupWeights([s * w], torch.Generator())) for s in (1.0, 100.0))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)


def test_random_is_seeded():
    draw = lambda seed: criteria["random"].fn(group([[1.0]] * 5, seed=seed)).tolist()  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("row", criteria, ids=lambda row: row.name)
def test_rows_say_what_help_needs(row):
    assert row.summary and not row.summary.endswith(".") and row.fn.__doc__
    assert row.paper or row.name == "random"
    assert criteria[row.name] is row


def test_weights_are_those_of_the_deployed_layer():
    """BatchNorm is folded in, a transposed conv counts by output, and only the positions of the group are taken."""
    net = nn.Module()
    net.a = nn.Module()
    net.a.conv, net.a.bn, net.t = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ConvTranspose2d(3, 4, 2)
    with torch.no_grad():
        net.a.bn.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        net.a.bn.running_var.copy_(torch.tensor([4.0, 1.0, 0.25, 1.0]))
    index = torch.tensor([[2], [0]])
    members = [Member(p, "out", index) for p in ("a.conv", "a.bn", "t")] + [Member("t", "in", index)]
    found = group_weights(net, Group("a.conv", members), torch.Generator()).out
    assert len(found) == 2
    scale = net.a.bn.weight / (net.a.bn.running_var + net.a.bn.eps).sqrt()
    torch.testing.assert_close(found[0], (net.a.conv.weight.flatten(1) * scale[:, None])[[2, 0]].detach())
    torch.testing.assert_close(found[1], net.t.weight.transpose(0, 1).flatten(1)[[2, 0]].detach())


@pytest.fixture
def coupled() -> tuple[nn.Module, Group]:
    """Two channels: a conv with BatchNorm, a depthwise conv on them, and three layers that read them."""
    torch.manual_seed(0)
    net = nn.Module()
    net.a, net.c = nn.Module(), nn.Module()
    net.a.conv, net.a.bn = nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2)
    net.depthwise = nn.Conv2d(2, 2, 3, groups=2)
    net.c.conv, net.c.bn = nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4)  # reads channel k at k and at 3 + k
    net.up, net.linear = nn.ConvTranspose2d(2, 4, 2), nn.Linear(2, 6)
    for bn in (net.a.bn, net.c.bn):
        nn.init.uniform_(bn.weight, -2, 2)
    both = ([0], [1])
    members = [member(p, "out", *both) for p in ("a.conv", "depthwise", "a.bn")]
    members += [member("depthwise", "in", *both), member("c.conv", "in", [0, 3], [1, 4])]
    members += [member("up", "in", *both), member("linear", "in", *both)]
    return net, Group("a.conv", members)


def test_layers_on_both_sides_are_seen(coupled):
    net, whole = coupled
    found = group_weights(net, whole, GENERATOR)
    assert [tuple(w.shape) for w in found.out] == [(2, 27), (2, 9)]  # a depthwise conv takes part, once
    assert [tuple(w.shape) for w in found.inp] == [(2, 2 * 4 * 9), (2, 4 * 4), (2, 6)]
    torch.testing.assert_close(found.gamma[0], net.a.bn.weight.abs().detach())
    scale = (net.c.bn.weight / (net.c.bn.running_var + net.c.bn.eps).sqrt()).detach()
    reads = (net.c.conv.weight * scale[:, None, None, None]).detach()
    for k in (0, 1):
        torch.testing.assert_close(found.inp[0][k].norm(), reads[:, [k, 3 + k]].norm())
        torch.testing.assert_close(found.inp[1][k], net.up.weight[k].flatten().detach())
        torch.testing.assert_close(found.inp[2][k], net.linear.weight[:, k].detach())


def test_evidence_of_every_coupled_parameter_is_seen(coupled):
    """BatchNorm and depthwise convs count, the bias counts on the producing side only, and gaps do no harm."""
    net, whole = coupled
    evidence = {name: torch.ones_like(p) for name, p in net.named_parameters() if name != "linear.weight"}
    expected = 27 + 9 + 1 + 2 + 2 * 4 * 9 + 4 * 4  # a.conv, depthwise weight and bias, a.bn, c.conv, up
    assert score(net, whole, criteria["taylor"], GENERATOR, evidence).tolist() == [expected] * 2
    per_output = {"a.conv": torch.tensor([1.0, 2.0]), "depthwise": torch.tensor([10.0, 20.0]), "linear": torch.ones(6)}
    assert score(net, whole, criteria["obd"], GENERATOR, per_output).tolist() == [11.0, 22.0]


def test_data_driven_criteria_say_what_they_need(coupled):
    with pytest.raises(UsageError, match=r"'prune.method=obd' needs labelled train images. Give data=..., .* lamp"):
        score(*coupled, criteria["obd"], GENERATOR)


@pytest.mark.parametrize("method", [*DATA_FREE, "random", "slim", "group_slim", "group_sl"])
def test_scores_draw_nothing_from_the_run(coupled, method):
    """A training run that prunes and one that resumes behind it see the same random numbers."""
    before = torch.get_rng_state()
    score(*coupled, criteria[method], torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", [*DATA_FREE, "slim", "group_slim", "group_sl", "tp:LAMPImportance",
                                    "tp:MagnitudeImportance", "tp:BNScaleImportance"])  # fmt: skip
def test_dead_channels_have_finite_scores(coupled, method):
    net, whole = coupled
    for p in net.parameters():
        nn.init.zeros_(p)
    assert score(net, whole, criteria[method], GENERATOR).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("method", ["lamp", "group_norm", "tp:LAMPImportance"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused(coupled, method, value):
    """What torch-pruning cannot divide must not be taken for dead."""
    nn.init.constant_(coupled[0].a.conv.weight, value)
    with pytest.raises(UsageError, match="are the weights of the model finite"):
        score(*coupled, criteria[method], GENERATOR)


# Importances of torch-pruning ----------------------------------------------------------------------------------------
class Residual(nn.Module):
    """A network that torch-pruning can trace: 8 channels come from two layers, which three read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.up, self.end = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 5, 2), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.norm(self.a(x))
        x = x + self.b(x)
        return [self.up(x), self.end(torch.cat([x, x], 1))]


@pytest.fixture
def residual() -> tuple[nn.Module, Group]:
    torch.manual_seed(0)
    net = Residual().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    same = [[k] for k in range(8)]
    members = [member("end", "in", *([k, 8 + k] for k in range(8)))]
    members += [
        member(p, d, *same) for p, d in (("a", "out"), ("norm", "out"), ("b", "out"), ("b", "in"), ("up", "in"))
    ]
    return net, Group("a", members)


@pytest.mark.parametrize(
    "name",
    ["MagnitudeImportance", "MagnitudeImportance(p=1)", "LAMPImportance", "BNScaleImportance", "FPGMImportance",
     "MagnitudeImportance(normalizer=None, group_reduction='max')", "GroupMagnitudeImportance(bias=True)"],
)  # fmt: skip
def test_an_importance_sees_what_torch_pruning_itself_would_show_it(residual, name):
    net, whole = residual
    graph = tp.DependencyGraph().build_dependency(net, torch.rand(1, 3, 8, 8), verbose=False)
    theirs = graph.get_pruning_group(net.a, tp.prune_conv_out_channels, list(range(8)))
    row = criteria[f"tp:{name}"]
    torch.testing.assert_close(score(net, whole, row, GENERATOR), row.fn(theirs).detach(), rtol=1e-6, atol=0)


def test_depthwise_filters_count_for_an_importance(coupled):
    net, whole = coupled
    before = score(net, whole, criteria["tp:MagnitudeImportance(normalizer=None)"], GENERATOR)
    nn.init.zeros_(net.depthwise.weight)
    assert (score(net, whole, criteria["tp:MagnitudeImportance(normalizer=None)"], GENERATOR) < before).all()


def test_random_importance_follows_the_seed(coupled):
    before = torch.get_rng_state()
    draw = lambda seed: score(*coupled, criteria["tp:RandomImportance"], GENERATOR.manual_seed(seed)).tolist()  # noqa: E731
    assert [draw(seed) for seed in range(9)] == [draw(seed) for seed in range(9)]
    assert len({tuple(draw(seed)) for seed in range(9)}) > 1 and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("tp:LAMP", r"Did you mean 'tp:LAMPImportance'\?.*tp:MagnitudeImportance", id="unknown name"),
        pytest.param("tp:Importance", "cannot be made|no importance", id="abstract"),
        pytest.param("tp:nn", "no importance", id="not a class"),
        pytest.param("tp:", "no importance", id="no name"),
        pytest.param("tp:MagnitudeImportance(q=1)", "knows no 'q'. Legal: p, group_reduction", id="unknown keyword"),
        pytest.param(
            "tp:MagnitudeImportance(1)", r"by keyword, as in 'tp:MagnitudeImportance\(p=1\)'", id="positional"
        ),
        pytest.param("tp:MagnitudeImportance(p=1, p=2)", "by keyword", id="twice"),
        pytest.param("tp:MagnitudeImportance(**{'p': 1})", "by keyword", id="stars"),
        pytest.param("tp:MagnitudeImportance(p=__import__('os').getpid())", "literals", id="code"),
        pytest.param("tp:MagnitudeImportance(p=1", "Cannot read", id="unclosed"),
        pytest.param("tp:MagnitudeImportance(p=1)(p=2)", "Cannot read", id="called twice"),
        pytest.param("tp:MagnitudeImportance(p=1) + 1", "Cannot read", id="sum"),
        pytest.param("tp:LAMPImportance(normalizer='mean')", "cannot be made", id="refused by the class"),
        pytest.param("tp:MagnitudeImportance(p='a')", "fails on 'a.conv'", id="wrong type"),
        pytest.param("tp:MagnitudeImportance(group_reduction=None)", "returned shape|fails on", id="not reduced"),
        pytest.param("tp:TaylorImportance", "prune.method=taylor.*on_yolo", id="taylor"),
        pytest.param("tp:GroupHessianImportance", "prune.method=hessian", id="hessian"),
        pytest.param("tp:OBDCImportance(num_classes=3)", "prune.method=obd", id="obd"),
        pytest.param("tp:ActivationImportance", "prune.method=taylor", id="activation"),
    ],
)
def test_an_importance_that_cannot_rank(coupled, name, message):
    with pytest.raises(UsageError, match=message):
        score(*coupled, criteria[name], GENERATOR)


# The user's own ------------------------------------------------------------------------------------------------------
MINE = """
import torch
def first(group):
    return torch.arange(group.out[0].shape[0], 0, -1)
def scalar(group):
    return 1.0
def short(group):
    return torch.zeros(3)
def nan(group):
    return torch.full((group.out[0].shape[0],), float("nan"))

import torch_pruning as tp
class First(tp.importance.Importance):
    def __init__(self, sign=1):
        self.sign = sign
    def __call__(self, group):
        return -self.sign * torch.arange(float(len(group[0].idxs)))
class Gradient(tp.importance.GroupTaylorImportance):
    pass
class Broken(tp.importance.Importance):
    def __call__(self, group):
        return 1 / 0
made = First(sign=-1)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_pruning_criteria.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_pruning_criteria"


def test_user_criterion_by_dotted_path(mine, yolo):
    model = yolo("yolov8n")
    cfg = PruneConfig(method=f"{mine}:first", ratio=0.5, scope="local")
    kept = make_plan(model, build_graph(model), cfg)
    assert kept["model.1.conv"]["out"] == list(range(16))  # the last channels were worst


@pytest.mark.parametrize(
    ("name", "worst"), [("First", range(16, 32)), ("First(sign=-1)", range(16)), ("made", range(16))]
)
def test_user_importance_by_dotted_path(mine, yolo, name, worst):
    model = yolo("yolov8n")
    kept = make_plan(model, build_graph(model), PruneConfig(method=f"{mine}:{name}", ratio=0.5, scope="local"))
    assert kept["model.1.conv"]["out"] == sorted({*range(32)} - {*worst})


@pytest.mark.slow
def test_user_importance_at_an_epoch_of_a_training_run(mine, yolo):
    model = deepcopy(yolo("yolov8n"))
    cfg = PruneConfig(method=f"{mine}:First(sign=-1)", ratio=0.5, scope="local", steps=1, every=1)
    remember_dense(model, cfg, NO_PROBES, 64)
    kept, record = decide(model, cfg, 1, 1, 1, NO_PROBES, 64)
    assert kept["model.1.conv"]["out"] == list(range(16, 32)) and record["config"]["method"] == cfg.method


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("First(sing=1)", "knows no 'sing'. Did you mean 'sign'"),
        ("first(p=1)", "no importance"),
        ("Gradient", "prune.method=taylor"),
        ("Broken", r"fails on .*ZeroDivisionError"),
        ("Missing", "Cannot import"),
    ],
)
def test_user_importance_that_cannot_rank(mine, yolo, name, message):
    model = yolo("yolov8n")
    with pytest.raises(UsageError, match=message):
        make_plan(model, build_graph(model), PruneConfig(method=f"{mine}:{name}", ratio=0.5))


@pytest.mark.parametrize(("name", "got"), [("scalar", "a float"), ("short", r"shape \(3,\)"), ("nan", "shape")])
def test_user_criterion_that_returns_nonsense(mine, yolo, name, got):
    model = yolo("yolov8n")
    with pytest.raises(UsageError, match=f"returned {got}.* finite scores"):
        make_plan(model, build_graph(model), PruneConfig(method=f"{mine}:{name}", ratio=0.5))
