# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.tasks import ClassificationModel, SegmentationModel

from yolo_ext import stock
from yolo_ext.checkpoint import save_model
from yolo_ext.core.config import TARGETS, PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.evidence import NO_PROBES, Probes
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.groups import tied_groups
from yolo_ext.pruning.plan import Job, by_rank, everything, kept_of, widths_of
from yolo_ext.pruning.prune import make_plan, prune_model
from yolo_ext.pruning.solve import Target, measure, solve, targets
from yolo_ext.pruning.surgery import apply_plan

EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def widths(model: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in stock.deployed(model).parameters())


FIGURES = {"speedup": stock.gflops, "params": params}


def flops(model: nn.Module) -> float:
    """Return GFLOPs at 64 pixels, counted from the shapes that the layers really see."""
    total = 0.0

    def count(m: nn.Conv2d, args: tuple, out: torch.Tensor) -> None:
        nonlocal total
        total += 2e-9 * m.weight.numel() * out.shape[2] * out.shape[3]

    model = deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    return total


# What a plan keeps ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
@EXAMPLES
@given(
    method=st.sampled_from(["l1", "l2", "lamp", "random"]),
    ratio=st.floats(0.0, 0.95),
    scope=st.sampled_from(["global", "local", "isomorphic"]),
    round_to=st.sampled_from([1, 2, 4, 8, 16]),
    min_channels=st.integers(1, 48),
    max_ratio=st.floats(0.0, 0.95),
)
def test_floors_and_rounding_hold_in_every_layer(traced, **options):
    model, graph = traced
    cfg = PruneConfig(**options)
    try:
        kept = make_plan(model, graph(), cfg)
    except UsageError as e:  # floors at or above all widths, or above what the ratio asks for
        assert "Nothing can be pruned" in str(e) or "cannot be reached: the floors" in str(e)
        return
    before, after = widths(model), widths(apply_plan(deepcopy(model), kept))
    for path, n in after.items():
        if n != before[path]:
            assert n % cfg.round_to == 0
            assert n >= cfg.min_channels
            assert n >= before[path] * (1 - cfg.max_ratio) - 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
def test_flops_fall_with_the_ratio(traced, scope):
    model, graph = traced
    found = []
    for ratio in (0.0, 0.1, 0.4, 0.75):
        cfg = PruneConfig(ratio=ratio, scope=scope, round_to=1)
        found.append(flops(apply_plan(deepcopy(model), make_plan(model, graph(), cfg))))
    assert found[0] == flops(model)
    assert all(a > b for a, b in pairwise(found))


@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
def test_ratio_zero_is_the_identity(traced, scope):
    model, graph = traced
    assert make_plan(model, graph(), PruneConfig(ratio=0.0, scope=scope)) == {}


@pytest.mark.parametrize("options", [{"method": "lamp", "speedup": 2.0}, {"method": "random", "ratio": 0.4, "seed": 3}])
def test_plans_are_repeatable(traced, options):
    model, graph = traced
    cfg = PruneConfig(**options)
    assert make_plan(model, graph(), cfg) == make_plan(deepcopy(model), build_graph(model), PruneConfig(**asdict(cfg)))


def test_another_seed_is_another_random_plan(traced):
    model, graph = traced
    plans = [make_plan(model, graph(), PruneConfig(method="random", ratio=0.4, seed=s)) for s in (0, 1)]
    assert plans[0] != plans[1]


def test_the_worst_channels_go():
    """Local ranking by l2 in a chain: exactly the filters with the smallest norm are removed."""
    net = nn.Sequential()
    net.model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        for i, scale in enumerate([5, 1, 4, 2, 6, 3]):
            net.model[0].weight[i] = scale
    cfg = PruneConfig(method="l2", ratio=0.5, scope="local", round_to=1, min_channels=1)
    assert make_plan(net, build_graph(net), cfg) == {"model.0": {"out": [0, 2, 4]}, "model.1": {"in": [0, 2, 4]}}


def test_a_plan_leaves_the_model_alone(traced):
    model, graph = traced
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make_plan(model, graph(), PruneConfig(speedup=2.0, exclude=["0"]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "yolo_ext") or "prune" not in model.yolo_ext


def test_excluded_layers_stay(traced):
    model, graph = traced
    kept = make_plan(model, graph(), PruneConfig(speedup=2.0, exclude=["model.2", "5"]))
    before, after = widths(model), widths(apply_plan(deepcopy(model), kept))
    whole = [n for n in before if n.startswith(("model.2.", "model.5."))]
    assert all(after[n] == before[n] for n in whole)
    assert any(after[n] < before[n] for n in before)


def test_only_included_layers_shrink(traced):
    model, graph = traced
    kept = make_plan(model, graph(), PruneConfig(speedup=1.1, include=["neck"]))
    assert {int(p.split(".")[1]) for p, dims in kept.items() if "out" in dims} <= set(range(10, 22))


# Shares of single layers ---------------------------------------------------------------------------------------------
def test_a_single_conv_loses_80_percent_and_all_else_stays(traced):
    model, graph = traced
    cfg = PruneConfig(ratios={"model.9.cv2": 0.8}, round_to=1)
    before, after = widths(model), widths(apply_plan(deepcopy(model), make_plan(model, graph(), cfg)))
    assert {n: (before[n], after[n]) for n in before if before[n] != after[n]} == {"model.9.cv2.conv": (256, 52)}


def test_a_share_is_kept_whatever_the_target(traced):
    model, graph = traced
    cfg = PruneConfig(ratios={"model.9.cv2": 0.5, "model.7": 0.0}, speedup=2.0)
    small = apply_plan(deepcopy(model), make_plan(model, graph(), cfg))
    assert widths(small)["model.9.cv2.conv"] == 128
    assert widths(small)["model.7.conv"] == 256
    assert stock.gflops(model) / stock.gflops(small) == pytest.approx(2.0, rel=0.01)


# Analytic figures ----------------------------------------------------------------------------------------------------
MODELS = {
    "yolov8n": None, "yolov9t": None, "yolov10n": None, "yolo11n": None, "yolo12n": None, "yolo26n": None,
    "yolov8n-seg": SegmentationModel, "yolov8n-cls": ClassificationModel,
}  # fmt: skip


@pytest.fixture(scope="module")
def made_of(yolo):
    """Return a function from a name to a model and a way to its graph."""

    def make(name: str):
        model = yolo(name) if MODELS.get(name) is None else MODELS[name](f"{name}.yaml", nc=3, verbose=False).eval()
        return model, build_graph(model)

    return make


FAST = {"yolov8n", "yolo12n", "yolo26n", "yolov8n-seg", "yolov8n-cls"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.matrix) for n in MODELS])
def test_figures_are_those_of_the_cut_model(made_of, name):
    """FLOPs as Ultralytics counts them, attention and transposed convs included, without building the model."""
    model, graph = made_of(name)
    made = tied_groups(model, graph, PruneConfig())
    units = [b.allowed[len(b.allowed) // 2] for b in made]
    small = apply_plan(deepcopy(model), kept_of(graph, made, units))
    for imgsz in (64, 640):
        figures = measure(model, graph, imgsz)
        found = figures(widths_of(graph, made, units))
        assert found[0] == pytest.approx(stock.gflops(small, imgsz) * 1e9, rel=1e-3)
        assert found[1] == params(small)
    assert figures({})[1] == params(model)


@pytest.mark.parametrize("value", [1.1, 2.0, 3.5])
@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("target", FIGURES)
def test_flops_and_parameters_are_met(traced, target, scope, value):
    model, graph = traced
    small = apply_plan(deepcopy(model), make_plan(model, graph(), PruneConfig(scope=scope, **{target: value})))
    assert FIGURES[target](model) / FIGURES[target](small) == pytest.approx(value, rel=0.01)


@pytest.mark.matrix
@pytest.mark.parametrize("value", [2.0, 3.0])
@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("name", ["yolov5n", *MODELS])
def test_targets_are_met_on_all_families(made_of, name, scope, value):
    model, graph = made_of(name)
    for target, figure in FIGURES.items():
        cfg = PruneConfig(scope=scope, **{target: value})
        small = apply_plan(deepcopy(model), make_plan(model, deepcopy(graph), cfg))
        assert figure(model) / figure(small) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(("ratio", "scope"), [(0.2, "global"), (0.5, "global"), (0.3, "local"), (0.5, "isomorphic")])
def test_the_ratio_is_the_share_of_all_channels(traced, ratio, scope):
    model, graph = traced
    used = graph()
    after = widths(apply_plan(deepcopy(model), make_plan(model, used, PruneConfig(ratio=ratio, scope=scope))))
    groups = [g for g in used.groups if not g.frozen]
    whole = sum(g.size for g in groups)
    before = widths(model)
    left = sum(g.size * after[g.name] / before[g.name] for g in groups)
    assert 1 - left / whole == pytest.approx(ratio, rel=0.01)


def test_steps_that_are_too_coarse_are_told(traced, caplog):
    """With the reached figure and those of the plans on both sides of the target."""
    model, graph = traced
    cfg = PruneConfig(params=1.045, include=["model.7"], round_to=64)
    reached = params(model) / params(apply_plan(deepcopy(model), make_plan(model, graph(), cfg)))
    found = re.search(r"params is (\S+) instead of 1\.045: .*round_to=64 .* have (\S+) and (\S+)\)", caplog.text)
    told, below, above = map(float, found.groups())
    assert told == pytest.approx(reached, rel=1e-3) and told in (below, above)
    assert below < 1.045 / 1.01 and above > 1.045 * 1.01


def test_what_the_formula_does_not_know_is_measured(traced):
    """A tenth of the FLOPs shrinks with the widths like the rest, but a formula takes it for constant."""
    model, graph = traced
    used, cfg = graph(), PruneConfig(speedup=2.0)
    job = Job(model, used, tied_groups(model, used, cfg), cfg)
    figures, settled = measure(model, used), []
    dense = figures({})[0]

    def true(units: list[int]) -> float:
        return figures(job.widths(units))[0]

    def settle(units: list[int]) -> float:
        settled.append(true(units))
        return dense / settled[-1]

    def figure(units: list[int]) -> float:
        return dense / (0.9 * true(units) + 0.1 * (settled or [dense])[-1])

    steps = by_rank(job.ties, everything(job.ties, model))
    units = solve("speedup", Target(figure, 2.0, settle=settle), steps, job)
    assert true(units) == pytest.approx(dense / 2, rel=0.01) and 2 <= len(settled) <= 3


def test_options_and_rows_agree():
    assert set(targets.names()) == set(TARGETS)


# Figures of copies ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["global", pytest.param("local", marks=pytest.mark.slow)])
def test_the_file_has_the_size(yolo, tmp_path, scope):
    pruned = prune_model(yolo("yolov8n"), PruneConfig(size_mb=3.0, scope=scope))
    assert save_model(pruned, tmp_path / "pruned.pt").stat().st_size / 1e6 == pytest.approx(3.0, rel=0.01)


def cost(model: nn.Module) -> float:
    return float(sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_latency_is_met_by_a_few_measurements(traced, noise):
    model, graph = traced
    generator, calls = torch.Generator().manual_seed(0), []

    def speed(a: nn.Module, b: nn.Module) -> float:
        calls.append(b)
        return cost(a) / cost(b) * (1 + noise * float(torch.randn((), generator=generator)))

    small = apply_plan(deepcopy(model), make_plan(model, graph(), PruneConfig(latency=2.0), Probes(speed=speed)))
    assert cost(model) / cost(small) == pytest.approx(2.0, rel=0.05 + 2 * noise)
    assert len(calls) <= 9


def test_a_clock_that_says_nothing_is_told(traced, caplog):
    model, graph = traced
    jumps = Probes(speed=lambda a, b: 3.0 if cost(a) / cost(b) > 2 else 1.2)
    make_plan(model, graph(), PruneConfig(latency=2.0), jumps)
    assert "latency is 1.2 instead of 2: the measurements spread" in caplog.text


def scored(model: nn.Module, base: float = 0.5, slope: float = 0.1):
    """Return probes whose mAP falls with the share of the parameters that went, but only after recalibration."""
    full, seen = cost(model), []

    def score(m: nn.Module) -> float:
        steady = cost(m) == full or any(float(n.num_batches_tracked) == 1 for n in m.modules() if hasattr(n, "eps"))
        return base - slope * (1 - cost(m) / full) if steady else 0.0

    def images():
        seen.append(1)
        return [torch.rand(2, 3, 64, 64)]

    return Probes(accuracy=lambda m: {"map": score(m)}, images=images), seen


def test_the_largest_ratio_within_the_drop(traced):
    model, graph = traced
    probes, seen = scored(model)
    small = apply_plan(deepcopy(model), make_plan(model, graph(), PruneConfig(max_drop=0.05), probes))
    drop = 0.1 * (1 - cost(small) / cost(model))
    assert 0.045 < drop <= 0.05
    assert 4 <= len(seen) <= 9  # the dense model is recalibrated too


def test_a_drop_that_nothing_exceeds_ends_at_the_floors(traced):
    model, graph = traced
    probes, seen = scored(model)
    floors = make_plan(model, graph(), PruneConfig(max_drop=0.2), probes)
    assert len(seen) == 1  # the floors
    used = graph()
    made = tied_groups(model, used, PruneConfig())
    assert floors == kept_of(used, made, [b.allowed[-1] for b in made])


# Ways to share out ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_sensitivity_spares_what_map_depends_on(traced, tmp_path):
    model, graph = traced
    groups = [
        {"name": b.name, "channels": sum(g.size for g in b.groups),
         "curve": [{"ratio": r, "map": 0.5 - r * (0.4 if b.name.startswith("model.6") else 0.01)} for r in (0.4, 0.8)]}
        for b in tied_groups(model, graph(), PruneConfig())
    ]  # fmt: skip
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps({"base": {"map": 0.5}, "groups": groups}))
    cfg = PruneConfig(speedup=2.0, sensitivity=str(file))
    small = apply_plan(deepcopy(model), make_plan(model, graph(), cfg))
    assert stock.gflops(model) / stock.gflops(small) == pytest.approx(2.0, rel=0.01)
    before, after = widths(model), widths(small)
    lost = {n: 1 - after[n] / before[n] for n in before if "dfl" not in n}
    spared = [v for n, v in lost.items() if n.startswith("model.6.")]
    assert max(spared) < 0.1
    assert sum(lost.values()) / len(lost) > 3 * sum(spared) / len(spared)


# Wrong input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"speedup": 500.0}, r"'prune\.speedup=500' cannot be reached: .* at most \d+\.\d\d", id="speedup"),
        pytest.param({"params": 500.0}, r"'prune\.params=500' cannot be reached: .* at most \d+\.\d\d", id="params"),
        pytest.param({"ratio": 0.95}, r"'prune\.ratio=0\.95' cannot be reached: .* at most 0\.\d\d", id="ratio"),
        pytest.param(
            {"speedup": 2.0, "include": ["model.2"]},
            r"what can be pruned brings at most 1\.\d\d\. Of the FLOPs, \d\d% is not in prune\.include \(and \d+ like "
            r"it\); .* Without the floors prune\.min_channels=8, prune\.round_to=8, prune\.max_ratio=0\.8 it is about "
            r"1\.\d\d\. Lower prune\.speedup\.$",
            id="floors-are-not-the-reason",
        ),
        pytest.param(
            {"ratio": 0.6, "max_ratio": 0.5, "min_channels": 1, "round_to": 1},
            r"the floors allow at most 0\.\d\d\. Lower prune\.ratio, or loosen prune\.max_ratio=0\.5\.$",
            id="only-floors-that-bind",
        ),
        pytest.param({"size_mb": 0.01}, r"brings at least \d\.\d\d\. .*Raise prune\.size_mb", id="size"),
        pytest.param({"latency": 90.0}, r"'prune\.latency=90' cannot be reached: .* at most \d+\.\d\d", id="latency"),
        pytest.param({"max_drop": 1e-6}, r"cannot be met: the mildest of \d trials loses 0\.\d+", id="drop"),
        pytest.param(
            {"size_mb": 99.0}, r"is passed before anything is pruned for it: size_mb is 6\.", id="size-is-met"
        ),
        pytest.param({"speedup": 1.1, "ratios": {"C2f": 0.5}}, "with prune.ratios alone", id="ratios-pass-the-target"),
        pytest.param({"speedup": 1.5, "max_ratio": 0.0}, "Nothing can be pruned", id="no-room"),
        pytest.param({"ratio": 0.5, "min_channels": 4096}, "Nothing can be pruned", id="floor-too-high"),
        pytest.param(
            {"ratio": 0.5, "method": "lmap"}, "Unknown pruning criterion 'lmap'. Did you mean 'lamp'", id="method"
        ),
        pytest.param({"ratio": 0.5, "method": "nowhere.mod:fn"}, "Cannot import pruning criterion", id="user-method"),
        pytest.param({"ratio": 0.5, "method": "taylor"}, "'prune.method=taylor' needs labelled train", id="no-data"),
        pytest.param({"ratio": 0.5, "exclude": ["model.(2"]}, "is not a regular expression", id="bad-regex"),
        pytest.param({"ratio": 0.5, "exclude": ["modle"]}, "matches no layer", id="no-match"),
        pytest.param({"ratio": 0.5, "exclude": [".*"]}, "Nothing can be pruned: .*excluded", id="everything-excluded"),
        pytest.param({"ratio": 0.5, "include": ["9"], "exclude": ["SPPF"]}, "Nothing can be pruned", id="nothing-left"),
    ],
)
def test_wrong_input(traced, options, message):
    model, graph = traced
    probes = replace(scored(model)[0], speed=lambda a, b: cost(a) / cost(b))
    with pytest.raises(UsageError, match=message) as e:
        make_plan(model, graph(), PruneConfig(**options), probes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"latency": 1.5}, "'prune.latency' is measured", id="no-clock"),
        pytest.param({"max_drop": 0.01}, "'prune.max_drop' measures mAP, which needs data", id="no-data"),
    ],
)
def test_targets_that_need_probes(traced, options, message):
    model, graph = traced
    with pytest.raises(UsageError, match=message):
        make_plan(model, graph(), PruneConfig(**options), NO_PROBES)


def test_an_untrained_model_has_no_map_to_lose(traced):
    model, graph = traced
    with pytest.raises(UsageError, match=r"says nothing: the model itself has mAP50-95 0\.0010"):
        make_plan(model, graph(), PruneConfig(max_drop=0.02), scored(model, base=0.001)[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["speedup", "params"])
def test_the_most_that_the_error_names_is_reachable(traced, target):
    model, graph = traced
    with pytest.raises(UsageError) as e:
        make_plan(model, graph(), PruneConfig(**{target: 500.0}))
    most = float(str(e.value).split("at most ")[1].split(". ")[0])
    assert make_plan(model, graph(), PruneConfig(**{target: most}))
