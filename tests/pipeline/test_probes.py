# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.pruning.evidence import task_losses
from yolo_ext.stock.accuracy import METRICS
from yolo_ext.training.prune import labelled_batches, make_probes

ROWS = {
    "detect": "0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2",
    "segment": "0 0.2 0.2 0.8 0.2 0.5 0.9\n1 0.1 0.1 0.4 0.1 0.4 0.4 0.1 0.4",
    "pose": "0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 2\n1 0.5 0.5 0.2 0.2 0.5 0.5 2 0.4 0.4 0",
    "obb": "0 0.2 0.2 0.8 0.3 0.7 0.8 0.1 0.7\n1 0.1 0.1 0.4 0.1 0.4 0.4 0.1 0.4",
}
SUFFIX = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}
LOSSES = {
    "detect": {"box_loss", "cls_loss", "dfl_loss"},
    "segment": {"seg_loss"},
    "pose": {"pose_loss", "kobj_loss"},
    "obb": {"box_loss"},
    "classify": {"loss"},
}
TASKS = list(SUFFIX)


def dataset(root: Path, task: str, train: int = 6, val: int = 2) -> str:
    """Write a set of noise pictures with labels of a task, and return what `data=` takes."""
    noise = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            part = f"{split}/{'ab'[i % 2]}" if task == "classify" else f"images/{split}"
            (root / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / part / f"{i}.png"), noise.integers(0, 255, (64, 96, 3), np.uint8))
            if task != "classify":
                (root / "labels" / split).mkdir(parents=True, exist_ok=True)
                (root / "labels" / split / f"{i}.txt").write_text(ROWS[task])
    if task == "classify":
        return str(root)
    shape = {"kpt_shape": [2, 3]} if task == "pose" else {}
    content = {"path": str(root), "train": "images/train", "val": "images/val", "names": {0: "a", 1: "b"}, **shape}
    YAML.save(root / "data.yaml", content)
    return str(root / "data.yaml")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory):
    """Return a function from a task to a model with random weights and a checked dataset, each made once."""
    made: dict[str, Any] = {}

    def get(task: str) -> tuple[Any, dict[str, Any]]:
        if task not in made:
            torch.manual_seed(0)
            info = check_data(dataset(tmp_path_factory.mktemp(task), task), task=task)
            yaml = YOLO(f"yolov8n{SUFFIX[task]}.yaml", verbose=False).model.yaml
            yaml |= {"nc": 2, **({"kpt_shape": [2, 3]} if task == "pose" else {})}
            model = YOLO(f"yolov8n{SUFFIX[task]}.yaml", verbose=False)._smart_load("model")(yaml, nc=2, verbose=False)
            made[task] = model.eval(), info
        return made[task]

    return get


@pytest.mark.parametrize("task", TASKS)
def test_batches_are_what_the_criterion_takes(setup, task: str) -> None:
    model, info = setup(task)
    probes = make_probes(info, 64, PruneConfig(images=4), task, model, batch=3)
    batches = list(probes.batches())
    assert [len(b["img"]) for b in batches] == [3, 1]
    images = torch.cat([b["img"] for b in batches])
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    assert 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1
    assert probes.batches() is probes.batches()
    losses = task_losses(model, batches)
    assert LOSSES[task] <= set(losses) and all(np.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("task", TASKS)
def test_images_and_score(setup, task: str) -> None:
    model, info = setup(task)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probes = make_probes(info, 64, PruneConfig(recalibrate=5), task, model)
    for _ in range(2):  # anew at each call
        assert sum(len(x) for x in probes.images()) == 5
    found = probes.accuracy(model)
    assert all(0 <= found[k] <= 1 for k in METRICS[task])
    assert not model.is_fused() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_choice_of_images(setup) -> None:
    _, info = setup("detect")
    names = lambda seed, n=4: [f for b in labelled_batches(info, 64, n, seed, "detect") for f in b["im_file"]]  # noqa: E731
    assert names(0) == names(0) and len(set(names(0))) == 4
    assert any(names(s) != names(0) for s in range(1, 5))
    assert names(0, 99) == sorted(map(str, info["images"]["train"]))
    assert not set(names(0, 99)) & set(map(str, info["images"]["val"]))


def test_classes_must_match(setup) -> None:
    _, info = setup("detect")
    other = YOLO("yolov8n.yaml", verbose=False).model  # 80 classes
    probes = make_probes(info, 64, PruneConfig(), "detect", other)
    assert sum(len(x) for x in probes.images()) == 6  # BatchNorm does not look at labels
    with pytest.raises(UsageError, match="number of classes 80 of the model, 2 of the data"):
        probes.accuracy(other)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "ort"])
def test_speed_without_data(setup, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    model, _ = setup("detect")
    wide = YOLO("yolov8s.yaml", verbose=False).model.eval()
    probes = make_probes({}, 64, PruneConfig(runtime=runtime), "detect")
    assert probes.batches is None and probes.images is None and probes.accuracy is None
    threads = torch.get_num_threads()
    assert probes.speed(wide, model) > 1.3
    assert torch.get_num_threads() == threads and not model.is_fused()
