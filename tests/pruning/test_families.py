# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Model families and modules of the user: the pruned model is exact, fast enough, trainable and of stock classes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from yolo_ext import stock
from yolo_ext.checkpoint import TRIPWIRE, manifest, save_model
from yolo_ext.core.config import PruneConfig
from yolo_ext.pruning.graph import build_graph, custom_types
from yolo_ext.pruning.prune import make_plan, prune_model
from yolo_ext.pruning.surgery import TOLERANCE, apply_plan, equivalence_gap, verify
from yolo_ext.stock.load import load_model

FAST = ("yolov5n", "yolov8n", "yolo11n", "yolo26n")
MATRIX = ("yolov3-tiny", "yolov6n", "yolov9t", "yolov10n", "yolo12n")
FAMILIES = [*FAST, *(pytest.param(f, marks=pytest.mark.matrix) for f in MATRIX)]
OTHER_TASKS = [f"{family}n-{task}" for family in ("yolov8", "yolo26") for task in ("seg", "pose", "obb", "cls")]


@pytest.fixture(scope="module")
def pruned(yolo):
    """Return a function that gives a pruned model, each made once; do not change them."""

    @cache
    def make(name: str) -> nn.Module:
        return prune_model(yolo(name), PruneConfig(speedup=2.0))

    return make


@pytest.fixture(scope="module")
def dense_gflops(yolo):
    return cache(lambda name: stock.gflops(yolo(name), 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_target_and_gate(name, dense_gflops, pruned):
    model = pruned(name)
    assert dense_gflops(name) / stock.gflops(model, 64) == pytest.approx(2.0, rel=0.03)
    assert manifest(model).prune["gap"] <= TOLERANCE
    homes = ("ultralytics.", "torch.")
    assert all(type(m).__module__.startswith(homes) for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_fuses_and_copies(name, pruned):
    model, x = deepcopy(pruned(name)), torch.rand(2, 3, 64, 64)
    sum(t.mean() for t in stock.returned_tensors(model.train()(x))).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model = deepcopy(pruned(name)).requires_grad_(False).eval()
    expected = model(x)[0]
    assert expected.isfinite().all()
    assert torch.equal(deepcopy(model)(x)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], expected)
    fused = deepcopy(model).fuse(verbose=False)
    torch.testing.assert_close(fused(x)[0], expected, rtol=1e-3, atol=2e-2)  # float32; boxes in pixels


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_export_path_of_cut_blocks(name, pruned):
    """The exporter swaps `forward` of C2f for `forward_split`, which reads the width from the attribute `c`."""
    checked = 0

    def compare(block: nn.Module, args: tuple, out: torch.Tensor) -> None:
        nonlocal checked
        torch.testing.assert_close(block.forward_split(*args), out, rtol=0, atol=1e-6)
        checked += 1

    model = deepcopy(pruned(name)).eval()
    blocks = [m for m in model.modules() if hasattr(m, "forward_split")]
    for m in blocks:
        m.register_forward_hook(compare)
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert checked == len(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_a_wrong_index_fails_the_gate(name, yolo, pruned):
    """Negative control: a single wrong input channel of a single layer must show, far above the tolerance."""
    dense, kept = yolo(name), manifest(pruned(name)).prune["kept"]
    modules = dict(dense.named_modules())
    paths = [p for p, dims in kept.items() if "in" in dims and modules[p].groups == 1]
    assert len(paths) > 20
    for path in paths[:: len(paths) // 4]:
        wrong = deepcopy(kept)
        index = wrong[path]["in"]
        index[0] = next(i for i in range(modules[path].in_channels) if i not in index)
        assert equivalence_gap(dense, apply_plan(deepcopy(dense), wrong), kept) > 1e4 * TOLERANCE, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [OTHER_TASKS[0], *(pytest.param(t, marks=pytest.mark.matrix) for t in OTHER_TASKS[1:])]
)
def test_other_tasks(name, calibrate):
    torch.manual_seed(0)
    model = calibrate(YOLO(f"{name}.yaml").model)
    small = prune_model(model, PruneConfig(speedup=2.0))
    assert manifest(small).prune["gap"] <= TOLERANCE
    assert stock.gflops(model, 64) / stock.gflops(small, 64) == pytest.approx(2.0, rel=0.03)


# Modules of the user --------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A block of the user that keeps the number of channels; `wire` is its forward pass."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.c, self.conv, self.other = c, Conv(c, c), Conv(c, c, 3)
        self.norm, self.group_norm, self.grouped = nn.BatchNorm2d(c), nn.GroupNorm(4, c), nn.Conv2d(c, c, 3, 1, 1, 1, 4)
        self.down, self.up = nn.Conv2d(4 * c, c, 1), nn.ConvTranspose2d(c, c, 2, 2, groups=c)
        self.fc1, self.fc2, self.over_channels = nn.Linear(c, 32), nn.Linear(32, c), nn.Conv1d(1, 1, 3, padding=1)
        self.gamma, self.kernel = nn.Parameter(torch.ones(1, c, 1, 1)), nn.Parameter(torch.randn(c, c, 1, 1) / c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wire(self, x)


def excite(m: Block, x: torch.Tensor) -> torch.Tensor:
    return x * m.fc2(m.fc1(F.adaptive_avg_pool2d(x, 1).flatten(1)).relu()).sigmoid().view(*x.shape[:2], 1, 1)


def shuffle(m: Block, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = m.conv(x).shape
    return m.conv(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def spatial_attention(m: Block, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x) * (x.mean(1, keepdim=True) + x.max(1, keepdim=True)[0]).sigmoid()


def channel_attention(m: Block, x: torch.Tensor) -> torch.Tensor:
    return x * m.over_channels(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


def space_to_depth(m: Block, x: torch.Tensor) -> torch.Tensor:
    return m.up(m.down(torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)))


# forward pass -> what the report says about a layer of the block, empty when all of them can be pruned
FOLLOWED = {
    "residual": (lambda m, x: x + m.other(m.conv(x)), ""),
    "norm-only": (lambda m, x: m.norm(x), ""),
    "shared": (lambda m, x: m.conv(m.conv(x)), ""),
    "squeeze-excite": (excite, ""),
    "layer-scale": (lambda m, x: x + m.gamma * m.conv(x), "with a parameter or constant in Block model.2"),
    "space-to-depth": (space_to_depth, "meets the grouped convolution model.2.up"),
    "group-norm": (lambda m, x: m.conv(m.group_norm(x)), "goes through 'group_norm' in GroupNorm model.2.group_norm"),
    "grouped": (lambda m, x: m.grouped(m.conv(x)), "meets the grouped convolution model.2.grouped"),
    "sigmoid-into-a-layer": (lambda m, x: m.other(m.conv(x).sigmoid()), "makes zero channels nonzero"),
    "constant-into-a-layer": (lambda m, x: m.other(m.conv(x) + 1), "makes zero channels nonzero"),
    "softmax-into-a-layer": (lambda m, x: m.other(m.conv(x).softmax(1)), "goes through 'softmax' in Block model.2"),
    "einsum": (lambda m, x: torch.einsum("bchw,kc->bkhw", m.conv(x), m.kernel[..., 0, 0]), "goes through 'einsum'"),
    "functional-conv": (lambda m, x: F.conv2d(m.conv(x), m.kernel), "goes through 'conv2d' in Block model.2"),
    "borrowed-weights": (lambda m, x: m.other(x) + F.conv2d(x, m.conv.conv.weight), "goes through 'conv2d'"),
    "pixel-shuffle": (lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(m.conv(x), 2), 2), "goes through 'pixel_shuffle'"),
    "channel-shuffle": (shuffle, "is reshaped by 'view' in Block model.2"),
    "spatial-attention": (spatial_attention, "goes through 'mean' in Block model.2"),
    "channel-attention": (channel_attention, "goes through '__getitem__' in Block model.2"),
    "fixed-cut": (lambda m, x: torch.cat(m.conv(x).split([m.c // 2] * 2, 1)[::-1], 1), "is cut at places written in"),
}
UNFOLLOWED = {
    "expects-its-width": lambda m, x: m.conv(x).view(-1, m.c, *x.shape[2:]),
    "scales-by-its-width": lambda m, x: m.conv(x) / x.shape[1] ** 0.5,
}


@pytest.fixture
def custom(monkeypatch, calibrate):
    """Return a function that builds a YOLO with blocks of the user from a YAML."""

    def make(wire):
        monkeypatch.setattr(Block, "wire", staticmethod(wire), raising=False)
        monkeypatch.setattr(tasks, "Block", Block, raising=False)
        backbone = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Block", [32]]]
        backbone += [[-1, 1, "C2f", [32, True]], [-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Block", [64]]]
        backbone += [[-1, 1, "Conv", [64, 3, 2]]]
        head = [[[5, 6], 1, "Detect", ["nc"]]]
        torch.manual_seed(0)
        return calibrate(DetectionModel({"nc": 3, "backbone": backbone, "head": head}, verbose=False))

    return make


@pytest.mark.parametrize(("wire", "reason"), FOLLOWED.values(), ids=FOLLOWED)
def test_modules_of_the_user_are_followed_or_reported(wire, reason, custom):
    small = prune_model(custom(wire), PruneConfig(method="random", ratio=0.2, scope="local"))
    record = manifest(small).prune
    assert record["gap"] <= TOLERANCE and len(record["kept"]) > 10
    outside_the_head = [r for path, r in record["frozen"].items() if not path.startswith("model.7.")]
    assert any(reason in r for r in outside_the_head) if reason else not outside_the_head


@pytest.mark.parametrize("wire", UNFOLLOWED.values(), ids=UNFOLLOWED)
def test_modules_that_depend_on_their_width_can_be_skipped(wire, custom):
    model, cfg = custom(wire), PruneConfig(method="random", ratio=0.2, scope="local")
    graph = build_graph(model, whole=custom_types(model))
    kept = make_plan(model, graph, cfg)
    assert verify(model, apply_plan(deepcopy(model), kept), kept) <= TOLERANCE and len(kept) > 10
    assert "enters Block model.2" in {g.frozen for g in graph.groups}


# Checkpoints ---------------------------------------------------------------------------------------------------------
PLAIN = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "yolo_ext":
            raise ImportError("yolo_ext is not here")
sys.meta_path.insert(0, Block())
try:
    import yolo_ext
    raise SystemExit("yolo_ext could be imported")
except ImportError:
    pass
import numpy as np, torch
from ultralytics import YOLO
torch.set_num_threads(1)
x = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
found = {}
for path in sys.argv[1:]:
    yolo = YOLO(path)
    result = yolo.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False, conf=0.0)[0]
    with torch.no_grad():
        out = YOLO(path).model.float().eval()(x)[0]
    found[path] = [len(result.boxes), float(out.double().abs().sum()), sorted(yolo.model.yolo_ext["prune"])]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def files(request, pruned, tmp_path_factory):
    """Pruned checkpoints of all families that this run covers."""
    matrix = "not matrix" not in (request.config.getoption("-m") or "")
    folder = tmp_path_factory.mktemp("pruned")
    return {
        name: save_model(pruned(name), folder / f"pruned_{name}.pt") for name in (*FAST, *(MATRIX if matrix else ()))
    }


@pytest.mark.slow
@pytest.mark.parametrize("safe", ["0", "1"], ids=["default", "safe-load"])
def test_loads_where_yolo_ext_is_not_installed(safe, files, tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, *map(str, files.values())],
        **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300},
        env={**clean, "ULTRALYTICS_SAFE_LOAD": safe, "YOLO_AUTOINSTALL": "false"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    x = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    for path in map(str, files.values()):
        boxes, total, keys = found[path]
        model, _ = load_model(path)
        with torch.no_grad():
            assert float(model(x)[0].double().abs().sum()) == pytest.approx(total, rel=1e-4)
        assert boxes > 0 and {"kept", "shapes", "parent", "frozen", "gap", "config"} <= set(keys)


@pytest.mark.parametrize("name", FAST)
def test_round_trip_keeps_widths_and_manifest(name, files, pruned):
    model, ckpt = load_model(files[name])
    before, after = pruned(name).state_dict(), model.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.equal(v.half(), after[k].half()) for k, v in before.items())
    assert manifest(model) == manifest(pruned(name)) and ckpt["yolo_ext"] == model.yolo_ext
    assert json.loads(json.dumps(model.yolo_ext)) == model.yolo_ext  # plain data only


@pytest.mark.parametrize("name", FAMILIES)
def test_tripwire_against_silent_un_pruning(name, pruned):
    model = pruned(name)
    with pytest.raises(KeyError, match=TRIPWIRE):
        DetectionModel(deepcopy(model.yaml), nc=3, verbose=False)
    trainer = DetectionTrainer.__new__(DetectionTrainer)
    trainer.data = {"nc": 3, "channels": 3, "names": {0: "a", 1: "b", 2: "c"}}
    with pytest.raises(KeyError, match=TRIPWIRE):  # what stock YOLO(pruned).train() does
        trainer.get_model(cfg=deepcopy(model.yaml), weights=model, verbose=False)
    rebuilt = DetectionModel(deepcopy(manifest(model).yaml), nc=3, verbose=False)  # the dense YAML is still there
    assert sum(p.numel() for p in rebuilt.parameters()) > sum(p.numel() for p in model.parameters())
