# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Unmodified torch-pruning: its pruners and importances on every YOLO, what they write, and prune.pruner."""

from __future__ import annotations

import runpy
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning as tp
from test_matrix import FAST, NAMES, dense
from torch import nn
from ultralytics import YOLO
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import stock
from yolo_ext.checkpoint import TRIPWIRE, manifest
from yolo_ext.core.config import PruneConfig, parse
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.pruning.depgraph import DependencyGraph
from yolo_ext.pruning.graph import build_graph
from yolo_ext.pruning.prune import check_plan, prune_model
from yolo_ext.pruning.pruner import by_pruner, regrown
from yolo_ext.pruning.surgery import TOLERANCE, equivalence_gap, verify
from yolo_ext.stock.load import load_model

I = tp.importance  # noqa: E741
COUPLINGS = cache(build_graph)  # by model, of which each test takes copies
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
QUICK = {**dict.fromkeys(FAST, pytest.mark.slow), "yolo11n-cls": ()}  # the others are of the matrix
FAMILIES = ["yolo11n", pytest.param("yolo26n", marks=pytest.mark.matrix)]
ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT.parent / "shared" / "weights"


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def made(kind, model: nn.Module, *args, of: nn.Module | None = None, **kwargs):
    """Return a pruner of a model, a copy of which may have told the couplings."""
    with yolo_ext.on_yolo(COUPLINGS(of) if of else None):
        return kind(model, X, *args, **kwargs)


def backward(model: nn.Module) -> None:
    """Leave the gradients of some loss in a model, whose BatchNorm statistics stay."""
    model.requires_grad_(True).zero_grad()
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    sum(t.float().sigmoid().mean() for t in stock.returned_tensors(model(X))).backward()
    model.eval()


def proved(pruner, before: nn.Module) -> float:
    """Return the share of parameters that is left, after the proof against the model that the script started with."""
    assert verify(before, pruner.model, pruner.DG.plan()) <= TOLERANCE
    return size(pruner.model) / size(before)


# Every model ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=QUICK.get(n, pytest.mark.matrix)) for n in (n.rstrip("*") for n in NAMES)]
)
def test_magnitude_pruner_halves_every_model(name):
    before, model = dense(name), deepcopy(dense(name))
    pruner = made(tp.pruner.MagnitudePruner, model, I.GroupMagnitudeImportance(), pruning_ratio=0.9, iterative_steps=9)
    while size(model) > size(before) / 2 and pruner.current_step < pruner.iterative_steps:
        pruner.step()
    assert not pruner.DG.skipped
    left = proved(pruner, before)
    assert left <= 0.5 or any(word in name for word in ("rtdetr", "world", "yoloe"))  # decoder and text layers stay
    assert left < 1


# Importances and options ---------------------------------------------------------------------------------------------
class Spread(I.Importance):
    """An importance of the user."""

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor:
        spread = group[0].dep.layer.weight.detach().flatten(1).std(1)[group[0].idxs]
        return spread / spread.mean()


def hessian(pruner) -> None:
    backward(pruner.model)
    pruner.importance.zero_grad()
    pruner.importance.accumulate_grad(pruner.model)


GLOBAL = {"global_pruning": True, "max_pruning_ratio": 0.9}
# name -> importance, options of the pruner, what the script does before `step`
SCRIPTS = {
    "random": (I.RandomImportance, GLOBAL, None),
    "l1": (lambda: I.MagnitudeImportance(p=1), GLOBAL, None),
    "lamp": (I.LAMPImportance, GLOBAL, None),
    "fpgm": (I.FPGMImportance, GLOBAL, None),
    "bn-scale": (I.BNScaleImportance, GLOBAL, None),
    "taylor": (I.TaylorImportance, GLOBAL, lambda pruner: backward(pruner.model)),
    "hessian": (I.HessianImportance, GLOBAL, hessian),
    "isomorphic": (I.LAMPImportance, {**GLOBAL, "isomorphic": True}, None),
    "three-steps": (I.MagnitudeImportance, {"iterative_steps": 3, "round_to": 8}, None),
    "own": (Spread, GLOBAL, None),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "script", [s if s in ("lamp", "taylor") else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]
)
def test_importances(script, name, yolo):
    importance, options, prepare = SCRIPTS[script]
    model = deepcopy(yolo(name)).requires_grad_(True)
    torch.manual_seed(0)
    pruner = made(tp.pruner.MagnitudePruner, model, importance(), of=yolo(name), pruning_ratio=0.3, **options)
    if prepare:
        prepare(pruner)
    for _ in range(pruner.iterative_steps):
        pruner.step()
    assert proved(pruner, yolo(name)) < 0.95
    if script == "three-steps":
        roots = [model.get_submodule(s.root[0]) for s in pruner.DG.sets]
        assert sum(r.out_channels % 8 == 0 for r in roots) > 0.8 * len(roots)  # parts of a cut are rounded together


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_ignored_layers_keep_what_they_produce(name, yolo):
    model = deepcopy(yolo(name))
    head = {n: m.out_channels for n, m in model.model[-1].named_modules() if isinstance(m, nn.Conv2d)}
    pruner = made(tp.pruner.MagnitudePruner, model, I.MagnitudeImportance(), of=yolo(name),
                  ignored_layers=[model.model[-1]])  # fmt: skip
    pruner.step()
    assert proved(pruner, yolo(name)) < 0.8
    assert head == {n: m.out_channels for n, m in model.model[-1].named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("name", FAMILIES)
def test_ratios_of_single_layers(name, yolo):
    model = deepcopy(yolo(name))
    ratios = {model.model[1]: 0.5, (model.model[3], model.model[5]): 0.25}
    pruner = made(tp.pruner.MagnitudePruner, model, I.MagnitudeImportance(), of=yolo(name), pruning_ratio=0.0,
                  pruning_ratio_dict=ratios)  # fmt: skip
    pruner.step()
    left = {i: model.model[i].conv.out_channels / yolo(name).model[i].conv.out_channels for i in (0, 1, 3, 5, 7)}
    assert left == {0: 1.0, 1: 0.5, 3: 0.75, 5: 0.75, 7: 1.0}
    assert proved(pruner, yolo(name)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_history_is_replayed_on_another_copy(name, yolo):
    model, other = deepcopy(yolo(name)), deepcopy(yolo(name))
    pruner = made(tp.pruner.MagnitudePruner, model, I.MagnitudeImportance(), of=yolo(name), pruning_ratio=0.3,
                  iterative_steps=2)  # fmt: skip
    pruner.step()
    pruner.step()
    DependencyGraph().build_dependency(other, X).load_pruning_history(pruner.pruning_history())
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_default_dicts_that_pruners_share_do_no_harm(yolo):
    """They hold the layers of all models before, under keys that no later model has."""
    found = []
    for fresh in ({}, {}, {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}):
        model = deepcopy(yolo("yolo11n"))
        made(tp.pruner.MagnitudePruner, model, I.MagnitudeImportance(), of=yolo("yolo11n"), **fresh).step()
        found.append(model.state_dict())
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*(f.values() for f in found)))


@pytest.mark.slow
def test_interactive_groups_may_be_left_out(yolo):
    model = deepcopy(yolo("yolo11n"))
    pruner = made(tp.pruner.MagnitudePruner, model, I.MagnitudeImportance(), of=yolo("yolo11n"), pruning_ratio=0.3)
    for group in list(pruner.step(interactive=True))[::2]:
        group.prune()
    assert 0.5 < proved(pruner, yolo("yolo11n")) < 0.95


# Regularising pruners ------------------------------------------------------------------------------------------------
REGULARISING = {
    "bn-scale": (tp.pruner.BNScalePruner, I.BNScaleImportance, {"reg": 1e-2}),
    "group-norm": (tp.pruner.GroupNormPruner, I.GroupMagnitudeImportance, {"reg": 1e-2}),
    "growing": (tp.pruner.GrowingRegPruner, I.GroupMagnitudeImportance, {"reg": 1e-2, "delta_reg": 1e-2}),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "kind", [k if k == "group-norm" else pytest.param(k, marks=pytest.mark.slow) for k in REGULARISING]
)
def test_regularising_pruners_in_a_loop(kind, name, yolo, tmp_path):
    """Training before, between and after two cuts; what is saved is proved against the weights of today."""
    cls, importance, options = REGULARISING[kind]
    model = deepcopy(yolo(name)).requires_grad_(True)
    pruner = made(cls, model, importance(), of=yolo(name), pruning_ratio=0.4, iterative_steps=2,
                  **GLOBAL, **options)  # fmt: skip
    for _ in range(2):
        pruner.update_regularizer()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            backward(model)
            plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            pruner.regularize(model)
            pulled = [p.grad for p in model.parameters() if p.grad is not None]
            assert any(not torch.equal(a, b) for a, b in zip(plain, pulled)) and all(g.isfinite().all() for g in pulled)
            optimizer.step()
        if kind == "growing":
            pruner.update_reg()
        pruner.step()
    backward(model)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    file = yolo_ext.save_pruned(pruner, tmp_path / "pruned.pt")
    assert manifest(load_model(file)[0]).prune["gap"] <= TOLERANCE and size(model) < 0.9 * size(yolo(name))


# save_pruned ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def pruner(yolo):
    model = deepcopy(yolo("yolov8n"))
    model.names, model.args = {0: "a", 1: "b", 2: "c"}, {"imgsz": 64, "data": "mine.yaml", "task": "detect"}
    return made(tp.pruner.MagnitudePruner, model, I.LAMPImportance(), of=yolo("yolov8n"), pruning_ratio=0.3)


@pytest.mark.slow
def test_a_saved_model_is_stock_and_knows_what_was_done(pruner, yolo, tmp_path):
    pruner.step()
    expected = deepcopy(pruner.model).half().float().eval()(X)[0]
    file = yolo_ext.save_pruned(pruner, str(tmp_path / "pruned.pt"))
    loaded = YOLO(file)
    assert torch.equal(loaded.model.float().eval()(X)[0], expected)
    assert loaded.names == {0: "a", 1: "b", 2: "c"} and loaded.ckpt["train_args"]["data"] == "mine.yaml"
    assert all(type(m).__module__.startswith(("ultralytics.", "torch.")) for m in loaded.model.modules())
    found = manifest(loaded.model).prune
    assert found["kept"] == pruner.DG.plan() and found["gap"] <= TOLERANCE
    assert found["config"]["method"] == "tp:LAMPImportance"
    assert found["config"]["pruner"] == "torch_pruning:BasePruner"  # of which it is another name
    assert found["shapes"]["model.0.conv"] == [16, 3] and "model.22.dfl.conv" in found["frozen"]
    assert TRIPWIRE in str(loaded.model.yaml) and TRIPWIRE not in str(yolo("yolov8n").yaml)
    loaded.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False, device="cpu")


@pytest.mark.slow
def test_saving_twice_and_pruning_a_saved_model_counts_from_the_first(pruner, yolo, tmp_path):
    pruner.step()
    once = manifest(load_model(yolo_ext.save_pruned(pruner, tmp_path / "a.pt"))[0])
    model = load_model(yolo_ext.save_pruned(pruner, tmp_path / "b.pt"))[0]
    assert manifest(model) == once
    again = made(tp.pruner.MagnitudePruner, model, I.LAMPImportance(), pruning_ratio=0.2)
    again.step()
    found = manifest(load_model(yolo_ext.save_pruned(again, tmp_path / "c.pt"))[0])
    widths = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(len(d["out"]) == widths[p] for p, d in found.prune["kept"].items() if "out" in d and p in widths)
    assert found.prune["parent"] == once.prune["parent"] and found.prune["shapes"] == once.prune["shapes"]


@pytest.mark.slow
def test_the_proof_sees_a_wrong_plan_also_after_training(pruner, yolo):
    """Negative control: weights that were trained on, and one input channel that is said to be another."""
    pruner.step()
    for p in pruner.model.parameters():
        p.data.mul_(1.01)
    kept, before = pruner.DG.plan(), pruner.DG.dense
    assert equivalence_gap(regrown(before, pruner.model, kept), pruner.model, kept) <= TOLERANCE
    wrong = deepcopy(kept)
    index = wrong["model.1.conv"]["in"]
    index[0] = next(i for i in range(16) if i not in index)
    assert equivalence_gap(regrown(before, pruner.model, wrong), pruner.model, wrong) > 1e4 * TOLERANCE


def test_what_cannot_be_saved_is_refused(pruner, yolo, tmp_path):
    with pytest.raises(UsageError, match="not cut anything yet"):
        yolo_ext.save_pruned(pruner, tmp_path / "pruned.pt")
    pruner.step()
    with pytest.raises(UsageError, match=r"ends with \.pt"):
        yolo_ext.save_pruned(pruner, tmp_path / "pruned.onnx")
    tp.prune_conv_out_channels(pruner.model.model[0].conv, [0])
    with pytest.raises(UsageError, match="cut by hand"):
        yolo_ext.save_pruned(pruner, tmp_path / "pruned.pt")
    with pytest.raises(UsageError, match=r"not made inside of yolo_ext\.on_yolo"):
        yolo_ext.save_pruned(nn.Identity(), tmp_path / "pruned.pt")
    assert not list(tmp_path.iterdir())


def test_a_model_that_fails_the_proof_is_not_written(pruner, tmp_path):
    pruner.step()
    kept = pruner.DG.kept["model.1.conv", "in"]
    kept[0] = next(i for i in range(16) if i not in kept)
    with pytest.raises(CheckFailed, match=r"Nothing was written.*whole=\[MyBlock\]"):
        yolo_ext.save_pruned(pruner, tmp_path / "pruned.pt")
    assert not list(tmp_path.iterdir()) and not manifest(pruner.model).prune


# The example ---------------------------------------------------------------------------------------------------------
def run_example(monkeypatch, source: Path, out: Path) -> None:
    script = ROOT / "examples" / "prune_with_torch_pruning.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(source), str(out)])
    runpy.run_path(str(script), run_name="__main__")


def test_the_example_prunes_a_checkpoint(monkeypatch, tiny, tmp_path):
    out = tmp_path / "pruned.pt"
    run_example(monkeypatch, tiny, out)
    assert size(YOLO(out).model) < 0.9 * size(YOLO(tiny).model)


def test_readme_and_docs_show_the_example(monkeypatch):
    script = (ROOT / "examples" / "prune_with_torch_pruning.py").read_text()
    lines = script[script.index("importance =") : script.index("yolo_ext.save_pruned(")].strip()
    for page in (ROOT / "README.md", ROOT / "docs" / "torch_pruning.md"):
        assert lines in page.read_text()


MODELS = ["bccd_yolov8n_192", "bccd_yolov8s_192", "coco_yolo11n_dq", "coco_yolov8n_dq", "mask_yolov8n_256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [MODELS[0], *(pytest.param(m, marks=pytest.mark.matrix) for m in [*MODELS[1:], "foreign/rail8n", "foreign/food"])],
)
def test_the_example_prunes_models_of_others(name, monkeypatch, tmp_path):
    if not (source := WEIGHTS / f"{name}.pt").is_file():
        pytest.skip("the weights are not beside the checkout")
    out = tmp_path / "pruned.pt"
    run_example(monkeypatch, source, out)
    before, after = YOLO(source), YOLO(out)
    assert after.task == before.task and after.names == before.names
    assert size(after.model) < 0.75 * size(before.model) and manifest(after.model).prune["gap"] <= TOLERANCE
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    assert len(after.predict(image, imgsz=96, verbose=False, device="cpu")) == 1


# prune.pruner --------------------------------------------------------------------------------------------------------
def make_pruner(model, example_inputs, options):
    assert example_inputs.shape[1] == 3 and options.pruner
    return tp.pruner.MagnitudePruner(model, example_inputs, I.LAMPImportance(), global_pruning=True, round_to=2,
                                     pruning_ratio=options.ratio, max_pruning_ratio=options.max_ratio)  # fmt: skip


def make_random(model, example_inputs, options):
    return tp.pruner.MagnitudePruner(model, example_inputs, I.RandomImportance(), pruning_ratio=options.ratio)


def make_other(model, example_inputs, options):
    return make_pruner(deepcopy(model), example_inputs, options)


def make_nothing(model, example_inputs, options):
    return model


def make_shy(model, example_inputs, options):
    return tp.pruner.MagnitudePruner(model, example_inputs, I.LAMPImportance(), pruning_ratio=min(options.ratio, 0.1))


HERE = Path(__file__).stem


@pytest.mark.parametrize(
    ("target", "value"),
    [("ratio", 0.25), *(pytest.param(t, v, marks=pytest.mark.slow) for t, v in (("speedup", 2.0), ("params", 3.0)))],
)
def test_a_pruner_meets_the_target(target, value, yolo):
    before = yolo("yolov8n")
    cfg = PruneConfig(pruner=f"{HERE}:make_pruner", exclude=["model.2"], **{target: value})
    after = prune_model(before, cfg, 64)
    figures = {"speedup": lambda m: stock.gflops(m, 64), "params": lambda m: size(stock.deployed(m))}
    if target in figures:
        assert figures[target](before) / figures[target](after) == pytest.approx(value, rel=0.01)
    found = manifest(after).prune
    assert found["gap"] <= TOLERANCE and found["config"]["pruner"] == cfg.pruner
    assert after.model[2].cv1.conv.out_channels == before.model[2].cv1.conv.out_channels
    assert found["frozen"]["model.2.cv1.conv"] == "is excluded by prune.exclude"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make_other", "made a pruner of another model"),
        ("make_nothing", "not made inside of yolo_ext.on_yolo"),
        pytest.param("make_shy", "'prune.speedup=2' cannot be met.*as near as 1", marks=pytest.mark.slow),
        ("absent", "Cannot import pruner"),
    ],
)
def test_pruners_that_do_not_fit_are_refused(name, message, yolo):
    with pytest.raises(UsageError, match=message):
        prune_model(yolo("yolov8n"), PruneConfig(pruner=f"{HERE}:{name}", speedup=2.0), 64)


def test_random_pruners_follow_the_seed_and_disturb_nothing(yolo):
    dense, state = yolo("yolov8n"), torch.get_rng_state()
    found = [by_pruner(dense, COUPLINGS(dense), PruneConfig(pruner=f"{HERE}:make_random", ratio=0.3, seed=s), 64)
             for s in (0, 0, 1)]  # fmt: skip
    assert found[0] == found[1] != found[2] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_pruner_is_tried_before_a_training(yolo):
    check_plan(yolo("yolov8n"), PruneConfig(pruner=f"{HERE}:make_pruner", speedup=2.0), 64)
    with pytest.raises(UsageError, match="another model"):
        check_plan(yolo("yolov8n"), PruneConfig(pruner=f"{HERE}:make_other", speedup=2.0), 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of the targets"),
        ({"latency": 1.5}, "needs one of the targets"),
        ({"ratio": 0.3, "scope": "local"}, "leave .*'scope' out"),
        ({"ratio": 0.3, "kind": "unstructured"}, "prune.pruner"),
    ],
)
def test_options_that_a_pruner_does_not_read_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        parse({"prune": {"pruner": "a:b", **options}})


@pytest.mark.slow
def test_pruning_while_training_by_a_pruner(fit, tiny):
    """Optimizer, EMA, checkpoint and manifest follow, and the file goes on."""
    prune = {"pruner": f"{HERE}:make_pruner", "ratio": 0.4, "at": [1, 2], "recalibrate": 0}
    trainer = fit(tiny, yolo_ext.DetectionTrainer, epochs=4, prune=prune)
    live = stock.detection_head(trainer.model)
    assert live is not None and {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in trainer.model.parameters()
    }
    model = load_model(trainer.best)[0]
    found = manifest(load_model(trainer.last)[0]).prune
    assert [s["epoch"] for s in found["steps"]] == [1, 2] and found["gap"] <= TOLERANCE
    assert size(load_model(trainer.last)[0]) < 0.7 * size(load_model(tiny)[0])
    assert YAML.load(trainer.save_dir / "args.yaml")["prune"]["pruner"] == prune["pruner"]
    assert build_graph(model).groups


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(fit, tiny, tmp_path):
    class Stopped(Exception):
        pass

    def stop(trainer) -> None:
        if trainer.epoch == 1:
            raise Stopped

    prune = {"pruner": f"{HERE}:make_pruner", "ratio": 0.4, "at": [1, 2], "recalibrate": 0}
    whole = fit(tiny, yolo_ext.DetectionTrainer, epochs=4, name="whole", prune=prune)
    killed = YOLO(str(tiny))
    killed.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        fit(killed, yolo_ext.DetectionTrainer, epochs=4, name="killed", prune=prune)
    last = tmp_path / "killed/weights/last.pt"
    YOLO(str(last)).train(trainer=yolo_ext.DetectionTrainer, resume=True)
    a, b = (load_model(f)[0].state_dict() for f in (whole.last, last))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_our_trainer_trains_a_saved_model_on(fit, tiny, tmp_path):
    model = YOLO(tiny).model
    pruner = made(tp.pruner.GroupNormPruner, model, I.GroupMagnitudeImportance(), pruning_ratio=0.3)
    pruner.step()
    file, before = yolo_ext.save_pruned(pruner, tmp_path / "pruned.pt"), size(model)
    trainer = fit(file, yolo_ext.DetectionTrainer, epochs=1)
    assert size(load_model(trainer.last)[0]) == before
    with pytest.raises(KeyError, match=TRIPWIRE):
        fit(file, name="stock", epochs=1)
