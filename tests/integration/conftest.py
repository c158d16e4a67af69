# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sets of shapes for all five tasks, and models that really learned them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from filelock import FileLock
from ultralytics import YOLO
from ultralytics.utils import YAML

from yolo_ext.data.shapes import NAMES, _outline
from yolo_ext.stock.load import yaml_model_load

Object = tuple[int, np.ndarray]  # class and outline (N, 2) in pixels
SUFFIX = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}  # of a model YAML
COLOURS = np.array([[60, 60, 220], [60, 200, 60], [220, 80, 60]], float)
KEYPOINTS = 3  # leftmost, middle, rightmost


def scene(rng: np.random.Generator, imgsz: int, count: int, cls: int | None = None) -> tuple[np.ndarray, list[Object]]:
    """Draw long shapes of the colour of their class in quadrants of a dark picture (imgsz, imgsz, 3)."""
    image = rng.normal(60, 12, (imgsz, imgsz, 3))
    objects = list[Object]()
    for place in rng.permutation(4)[:count]:
        c = int(rng.integers(3)) if cls is None else cls
        turn = rng.uniform(0, np.pi)
        long = _outline(rng, c) @ np.diag([1.0, 0.55]) @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        middle = np.array([place % 2, place // 2]) * imgsz / 2 + imgsz / 4 + rng.uniform(-2, 2, 2)
        outline = np.clip(long * imgsz * rng.uniform(0.36, 0.46) + middle, 1, imgsz - 2)
        mask = np.zeros((imgsz, imgsz), np.uint8)
        cv2.fillPoly(mask, np.rint(outline * 16).astype(np.int32)[None], 1, shift=4)
        image[mask > 0] = COLOURS[c] + rng.normal(0, 12, 3)
        objects.append((c, outline))
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8), objects


def box(outline: np.ndarray) -> list[float]:
    low, high = outline.min(0), outline.max(0)
    return [*(low + high) / 2, *(high - low)]


def polygon(outline: np.ndarray) -> list[float]:
    return [*outline[:: max(1, len(outline) // 24)].ravel()]


def rotated(outline: np.ndarray) -> list[float]:
    return [*cv2.boxPoints(cv2.minAreaRect(outline.astype(np.float32))).ravel()]


def ends(outline: np.ndarray) -> list[float]:
    x = outline[:, 0]
    return [*box(outline), *outline[x.argmin()], *outline.mean(0), *outline[x.argmax()]]


ROWS: dict[str, Callable[[np.ndarray], list[float]]] = {
    "detect": box, "segment": polygon, "obb": rotated, "pose": ends,
}  # fmt: skip


def write_scenes(out: Path, task: str, train: int = 64, val: int = 24, imgsz: int = 64) -> Path:
    """Write a set of a task; return its data.yaml, or the folder of a classification set."""
    for k, (split, count) in enumerate((("train", train), ("val", val))):
        for i in range(count):
            rng = np.random.default_rng([k, i])
            if task == "classify":  # two sizes of each shape: more than five classes
                image, objects = scene(rng, imgsz, 1 + i // 3 % 2, i % 3)
                file = out / split / f"{NAMES[i % 3]}{len(objects)}" / f"{i}.png"
            else:
                image, objects = scene(rng, imgsz, int(rng.integers(1, 3)))
                file = out / "images" / split / f"{i}.png"
                label = out / "labels" / split / f"{i}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                rows = ((c, *np.clip(np.array(ROWS[task](o)) / imgsz, 0, 1)) for c, o in objects)
                label.write_text("".join(" ".join(f"{v:.6g}" for v in row) + "\n" for row in rows))
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), image)
    if task == "classify":
        return out
    more = {"kpt_shape": [KEYPOINTS, 2], "flip_idx": [2, 1, 0]} if task == "pose" else {}
    content = {"path": str(out), "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    YAML.save(out / "data.yaml", {**content, **more})
    return out / "data.yaml"


def half_as_wide(name: str, folder: Path) -> Path:
    """Write the YAML of a model with half of the channels of its size n."""
    content = {k: v for k, v in yaml_model_load(name).items() if k not in ("yaml_file", "scale")}
    depth, width, most = content["scales"]["n"]
    YAML.save(folder / name, {**content, "scales": {"n": [depth, width / 2, most]}})
    return folder / name


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, str], tuple[Path, Path]]:
    """Return a function that trains a model of a family on a task, once; it returns the model and its data."""
    temp = tmp_path_factory.getbasetemp()
    root = (temp if worker_id == "master" else temp.parent) / "learned"  # one for all workers of pytest-xdist
    root.mkdir(exist_ok=True)

    def get(task: str, family: str) -> tuple[Path, Path]:
        run, data = root / f"{family}{SUFFIX[task]}", root / "data" / task
        with FileLock(f"{run}.lock"), FileLock(f"{data.parent}-{task}.lock"):
            given = data if task == "classify" else data / "data.yaml"
            if not given.exists():
                write_scenes(data, task)
            if not (done := run / "done").exists():
                options: dict[str, Any] = {"imgsz": 64, "batch": 8, "nbs": 8, "device": "cpu", "workers": 0,
                                           "plots": False, "optimizer": "AdamW", "lr0": 0.003, "warmup_epochs": 0.5,
                                           "mosaic": 0.0, "scale": 0.2, "erasing": 0.0, "auto_augment": None,
                                           "epochs": {"classify": 28, "obb": 18}.get(task, 14)}  # fmt: skip
                yolo = YOLO(str(half_as_wide(f"{run.name}.yaml", root)), verbose=False)
                yolo.train(data=str(given), save_dir=str(run), exist_ok=True, **options)
                done.touch()
        return run / "weights" / "best.pt", given

    return get
