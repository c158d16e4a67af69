# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every model family x every criterion: the pruned model is exact, fast enough, trainable, and stays a stock model."""

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
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

from yolo_ext import compat
from yolo_ext.checkpoint import TRIPWIRE, load_model, manifest, save_model
from yolo_ext.config import PruneConfig
from yolo_ext.pruning.criteria import criteria
from yolo_ext.pruning.surgery import TOLERANCE, apply_plan, equivalence_gap, prune_model

FAST = ("yolov5n", "yolov8n", "yolo11n", "yolo26n")
MATRIX = ("yolov3-tiny", "yolov6n", "yolov9t", "yolov10n", "yolo12n")
FAMILIES = [*FAST, *(pytest.param(f, marks=pytest.mark.matrix) for f in MATRIX)]
OTHER_TASKS = [
    "yolov8n-seg",
    "yolov8n-pose",
    "yolov8n-obb",
    "yolov8n-cls",
    "yolo26n-seg",
    "yolo26n-pose",
    "yolo26n-obb",
]


@pytest.fixture(scope="module")
def pruned(yolo):
    """Return a function that gives a pruned model, each made once; do not change them."""

    @cache
    def make(name: str, method: str = "lamp") -> nn.Module:
        return prune_model(yolo(name), PruneConfig(method=method, speedup=2.0))

    return make


@pytest.fixture(scope="module")
def dense_gflops(yolo):
    return cache(lambda name: compat.gflops(yolo(name), 64))


@pytest.mark.parametrize("method", [row.name for row in criteria])
@pytest.mark.parametrize("name", FAMILIES)
def test_target_and_gate(name, method, dense_gflops, pruned):
    model = pruned(name, method)
    assert dense_gflops(name) / compat.gflops(model, 64) == pytest.approx(2.0, rel=0.03)
    assert manifest(model)["prune"]["gap"] <= TOLERANCE
    stock = ("ultralytics.", "torch.")
    assert all(type(m).__module__.startswith(stock) for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_fuses_and_copies(name, pruned):
    model, x = deepcopy(pruned(name)), torch.rand(2, 3, 64, 64)
    sum(t.mean() for t in compat.returned_tensors(model.train()(x))).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model = deepcopy(pruned(name)).requires_grad_(False).eval()
    expected = model(x)[0]
    assert expected.isfinite().all()
    assert torch.equal(deepcopy(model)(x)[0], expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], expected)
    fused = deepcopy(model).fuse(verbose=False)
    torch.testing.assert_close(fused(x)[0], expected, rtol=1e-3, atol=2e-2)  # float32; boxes in pixels


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


@pytest.mark.parametrize("name", FAST)
def test_a_wrong_index_fails_the_gate(name, yolo, pruned):
    """Negative control: a single wrong input channel of a single layer must show, far above the tolerance."""
    dense, kept = yolo(name), manifest(pruned(name))["prune"]["kept"]
    modules = dict(dense.named_modules())
    paths = [p for p, dims in kept.items() if "in" in dims and modules[p].groups == 1]
    assert len(paths) > 20
    for path in paths[:: len(paths) // 4]:
        wrong = deepcopy(kept)
        index = wrong[path]["in"]
        index[0] = next(i for i in range(modules[path].in_channels) if i not in index)
        assert equivalence_gap(dense, apply_plan(deepcopy(dense), wrong), kept) > 1e4 * TOLERANCE, path


@pytest.mark.parametrize(
    "name", [OTHER_TASKS[0], *(pytest.param(t, marks=pytest.mark.matrix) for t in OTHER_TASKS[1:])]
)
def test_other_tasks(name, calibrate):
    torch.manual_seed(0)
    model = calibrate(YOLO(f"{name}.yaml").model)
    small = prune_model(model, PruneConfig(speedup=2.0))
    assert manifest(small)["prune"]["gap"] <= TOLERANCE
    assert compat.gflops(model, 64) / compat.gflops(small, 64) == pytest.approx(2.0, rel=0.03)


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
    assert ckpt["yolo_ext"] == manifest(model) == manifest(pruned(name))
    assert json.loads(json.dumps(manifest(model))) == manifest(model)  # plain data only


@pytest.mark.parametrize("name", FAMILIES)
def test_tripwire_against_silent_un_pruning(name, pruned):
    model = pruned(name)
    with pytest.raises(KeyError, match=TRIPWIRE):
        DetectionModel(deepcopy(model.yaml), nc=3, verbose=False)
    trainer = DetectionTrainer.__new__(DetectionTrainer)
    trainer.data = {"nc": 3, "channels": 3, "names": {0: "a", 1: "b", 2: "c"}}
    with pytest.raises(KeyError, match=TRIPWIRE):  # what stock YOLO(pruned).train() does
        trainer.get_model(cfg=deepcopy(model.yaml), weights=model, verbose=False)
    rebuilt = DetectionModel(deepcopy(manifest(model)["yaml"]), nc=3, verbose=False)  # the dense YAML is still there
    assert sum(p.numel() for p in rebuilt.parameters()) > sum(p.numel() for p in model.parameters())
