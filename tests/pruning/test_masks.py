# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from yolo_ext.checkpoint import manifest, save_model
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import pruned_share
from yolo_ext.pruning.masks import _largest, _two_of_four, apply, capture, eligible, packed_mb, sparsity, zero_weights
from yolo_ext.stock.load import load_model

GLOBAL = PruneConfig(kind="unstructured", ratio=0.8)
LOCAL = PruneConfig(kind="unstructured", ratio=0.6, scope="local")
TWO_OF_FOUR = PruneConfig(kind="2:4")
KINDS = [pytest.param(GLOBAL, id="global"), pytest.param(LOCAL, id="local"), pytest.param(TWO_OF_FOUR, id="2:4")]


def masked(model: nn.Module, cfg: PruneConfig, ratio: float | None = None) -> nn.Module:
    copy = deepcopy(model)
    zero_weights(copy, cfg, ratio)
    return copy


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    modules = dict(model.named_modules())
    return {p: modules[p].weight.detach().float() == 0 for p in manifest(model).masks["layers"]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@given(
    values=arrays("float32", st.integers(1, 60), elements=st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0, 3.0])),
    ratio=st.floats(0, 0.99),
)
def test_exactly_that_many_go_and_none_of_them_is_larger(values, ratio):
    values = torch.from_numpy(values)
    kept = _largest(values, ratio)
    assert int((~kept).sum()) == round(ratio * len(values))
    if kept.any() and not kept.all():
        limit = values[~kept].max()
        assert values[kept].min() >= limit
        equal = kept[values == limit]
        assert torch.equal(equal, equal.sort(stable=True).values)  # of equal ones the first go


@given(
    weight=arrays(
        "float32", st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 4)), elements=st.floats(-2, 2, width=16)
    ),
    dim=st.integers(0, 2),
)
def test_two_largest_of_four_stay(weight, dim):
    weight = torch.from_numpy(weight).repeat_interleave(4, dim)
    weight = weight + torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    quads = [x.movedim(dim, -1).unflatten(-1, (-1, 4)) for x in (_two_of_four(weight, dim), weight.abs())]
    assert (quads[0].sum(-1) == 2).all()
    least = quads[1].masked_fill(~quads[0], torch.inf).amin(-1)
    assert (least >= quads[1].masked_fill(quads[0], -1).amax(-1)).all()


@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
@pytest.mark.parametrize("cfg", KINDS)
def test_share_is_met(yolo, name, cfg):
    model = masked(yolo(name), cfg)
    found, rows = sparsity(model), [r for r in eligible(model, cfg) if r["eligible"]]
    assert manifest(model).masks["layers"] == [r["name"] for r in rows] == [r["name"] for r in found["layers"]]
    ratio = manifest(model).masks["ratio"]
    assert ratio == (0.5 if cfg.kind == "2:4" else cfg.ratio)
    total = sum(r["weights"] for r in found["layers"])
    slack = len(found["layers"]) if cfg.scope == "local" else 1  # one weight in each ranking
    assert abs(sum(r["zeros"] for r in found["layers"]) - ratio * total) <= slack
    if cfg.scope == "local":
        assert all(abs(r["zeros"] - ratio * r["weights"]) <= 1 for r in found["layers"])
    assert found["overall"] < found["masked"]
    untouched = set(dict(yolo(name).named_parameters())) - {f"{r['name']}.weight" for r in rows}
    before, after = dict(yolo(name).named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(before[p], after[p]) for p in untouched)


def test_pattern_holds_along_the_input_channels(yolo):
    model = masked(yolo("yolov8n"), TWO_OF_FOUR)
    for zero in zeros(model).values():
        assert (zero.unflatten(1, (-1, 4)).sum(2) >= 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cubic", "linear"])
def test_gradual_pruning_only_adds_zeros(yolo, kind):
    model, before = deepcopy(yolo("yolov8n")), None
    for step in range(1, 5):
        share = GLOBAL.ratio * pruned_share(step=step, steps=4, kind=kind)
        zero_weights(model, GLOBAL, share)
        now = zeros(model)
        assert sparsity(model)["masked"] == pytest.approx(share, abs=1e-6)
        assert before is None or all((now[p] | ~before[p]).all() for p in now)
        before = now
        with torch.no_grad():  # the rest learns on, and changes its order
            for w in (p for p in model.parameters() if p.ndim == 4):
                w.mul_(torch.rand_like(w) + 0.5)
    zero_weights(model, GLOBAL, 0.1)
    assert same(zeros(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", KINDS)
def test_masks_survive_files(yolo, tmp_path, cfg):
    model = masked(yolo("yolov8n"), cfg)
    expected = zeros(model)
    assert same(zeros(deepcopy(model)), expected)
    assert same(zeros(pickle.loads(pickle.dumps(model))), expected)
    loaded, ckpt = load_model(save_model(model, tmp_path / "m.pt"))
    assert ckpt["yolo_ext"]["masks"] == manifest(model).masks
    assert all((zeros(loaded)[p] >= z).all() for p, z in expected.items())
    assert sparsity(loaded)["masked"] == pytest.approx(sparsity(model)["masked"], abs=1e-5)  # fp16 may round to 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-3), id="sgd"),
        pytest.param(lambda p: torch.optim.AdamW(p, 1e-3), id="adamw"),
    ],
)
def test_training_keeps_the_zeros(yolo, make):
    model = deepcopy(yolo("yolov8n")).train()
    optimizer, ema = make(model.parameters()), ModelEMA(model)

    def step() -> None:
        optimizer.zero_grad()
        sum(x.square().mean() for x in model(torch.rand(2, 3, 64, 64)).values() if torch.is_tensor(x)).backward()
        optimizer.step()
        ema.update(model)

    step()
    zero_weights(model, TWO_OF_FOUR)
    masks, expected, first = capture(model), zeros(model), model.model[0].conv.weight.clone()
    for _ in range(2):
        step()
        assert not same(zeros(model), expected)  # without masks the zeros are gone
        apply(masks, model, optimizer)
        apply(masks, ema.ema)
        assert same(zeros(model), expected) and same(zeros(ema.ema), expected)
    modules = dict(model.named_modules())
    for path, kept in masks.kept.items():
        moments = [v for v in optimizer.state[modules[path].weight].values() if v.ndim]
        assert moments and all((v[~kept] == 0).all() and (v[kept] != 0).any() for v in moments)
    assert not torch.equal(model.model[0].conv.weight, first)  # other layers learn


def test_no_layer_dies_in_a_fresh_model():
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)  # its wide layers start with the smallest weights
    zero_weights(model, GLOBAL, 0.9)
    assert 0.985 < max(r["share"] for r in sparsity(model)["layers"]) < 0.991
    assert sparsity(model)["masked"] == pytest.approx(0.9, abs=1e-6)


def test_model_without_masks(yolo):
    model = deepcopy(yolo("yolov8n"))
    assert capture(model) is None
    assert sparsity(model)["masked"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("name", "kind", "layer", "reason"),
    [
        pytest.param("yolov8n", "unstructured", "model.0.conv", "reads the image", id="stem"),
        pytest.param("yolov8n", "unstructured", "model.22.dfl.conv", "box distribution", id="dfl"),
        pytest.param("yolo26n", "unstructured", "model.23.cv3.0.0.0.conv", "depthwise", id="depthwise"),
        pytest.param("yolov8n", "unstructured", "model.2.cv1.conv", "", id="conv"),
        pytest.param("yolov9t", "2:4", "model.4.cv2.0.m.0.cv1.conv1.conv", "summed with another", id="rep"),
        pytest.param("yolov9t", "unstructured", "model.4.cv2.0.m.0.cv1.conv1.conv", "", id="rep single weights"),
    ],
)
def test_eligible(yolo, name, kind, layer, reason):
    row = next(r for r in eligible(yolo(name), PruneConfig(kind=kind)) if r["name"] == layer)
    assert row["eligible"] is (not reason) and reason in row["reason"]


def test_pattern_needs_a_multiple_of_four(yolo):
    model = deepcopy(yolo("yolov8n"))
    model.model[2].cv1.conv = nn.Conv2d(30, 32, 1)
    row = next(r for r in eligible(model, TWO_OF_FOUR) if r["name"] == "model.2.cv1.conv")
    assert row["reason"] == "has 30 input channels, not a multiple of 4"


def test_gain_is_told_for_wide_layers_only(yolo):
    rows = eligible(yolo("yolov8n"), TWO_OF_FOUR)
    assert 0 < sum(r["gain"] for r in rows) < len(rows) / 5
    assert all(r["eligible"] and min(r["in"], r["out"]) >= 256 for r in rows if r["gain"])
    assert not any(r["gain"] for r in eligible(yolo("yolov8n"), GLOBAL))


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        pytest.param({"include": ["model.4"]}, lambda n: n.startswith("model.4."), id="include"),
        pytest.param({"exclude": ["head"]}, lambda n: not n.startswith("model.22."), id="exclude"),
        pytest.param({"include": ["neck"], "exclude": ["15"]}, lambda n: 9 < int(n.split(".")[1]) < 22 and
                     not n.startswith("model.15."), id="both"),
    ],
)  # fmt: skip
def test_selectors(yolo, options, inside):
    model = yolo("yolov8n")
    everything = [r["name"] for r in eligible(model, GLOBAL) if r["eligible"]]
    names = [r["name"] for r in eligible(model, PruneConfig(kind="unstructured", **options)) if r["eligible"]]
    assert names and names == [n for n in everything if inside(n)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"include": ["model.0"]}, "No layer can take 'prune.kind=unstructured': .*reads the image", id="none"
        ),
        pytest.param({"exclude": ["model.77"]}, "'prune.exclude=model.77' matches no layer", id="unknown"),
    ],
)
def test_refused(yolo, options, message):
    model = deepcopy(yolo("yolov8n"))
    with pytest.raises(UsageError, match=message):
        zero_weights(model, PruneConfig(kind="unstructured", ratio=0.5, **options))
    assert not manifest(model).masks


def test_frozen_layers_are_refused(yolo):
    model = deepcopy(yolo("yolov8n"))
    model.model[1].requires_grad_(False)
    with pytest.raises(UsageError, match="frozen layers"):
        zero_weights(model, GLOBAL)
    assert sparsity(model)["masked"] < 0.01


@pytest.mark.parametrize(
    ("ratio", "smaller"), [pytest.param(0.5, 0.70, id="half"), pytest.param(0.8, 0.40, id="four fifths")]
)
def test_zip_is_what_zeros_save(yolo, ratio, smaller):
    dense = packed_mb(yolo("yolov8n"))
    stored = sum(t.numel() for t in yolo("yolov8n").state_dict().values()) * 2 / 1e6
    assert 0.8 * stored < dense < 1.05 * stored
    assert packed_mb(masked(yolo("yolov8n"), GLOBAL, ratio)) < smaller * dense


@pytest.mark.parametrize(
    ("name", "cfg", "loss"),
    [
        pytest.param("yolov8n", GLOBAL, 0.0, id="v8n"),
        pytest.param("yolov8n", LOCAL, 0.0, id="v8n local"),
        pytest.param("yolov8n", TWO_OF_FOUR, 0.0, id="v8n 2:4"),
        pytest.param(
            "yolov9t", GLOBAL, 0.02, id="v9t: summing the branches of RepConv fills zeros in", marks=pytest.mark.slow
        ),
    ],
)
def test_export_keeps_the_zeros(tmp_path, name, cfg, loss):
    import onnx

    from yolo_ext.deployment.export import export_onnx

    model = DetectionModel(f"{name}.yaml", nc=3, verbose=False)
    zero_weights(model, cfg)
    graph = onnx.load(export_onnx(model.eval(), tmp_path / "m.onnx", 64)).graph
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    weights = [w for w in weights if w.ndim == 4]
    modules = dict(model.named_modules())
    share = sum(r["zeros"] for r in sparsity(model)["layers"]) / sum(
        m.weight.numel() for m in modules.values() if isinstance(m, nn.Conv2d)
    )
    assert sum((w == 0).sum() for w in weights) / sum(w.size for w in weights) >= share - loss - 1e-4
    if cfg.kind == "2:4":
        whole = [w for w in weights if w.shape[1] % 4 == 0 and w.shape[1] > 3]
        pattern = [(w.reshape(len(w), -1, 4, *w.shape[2:]) == 0).sum(2).min() >= 2 for w in whole]
        assert sum(pattern) == len(manifest(model).masks["layers"])
