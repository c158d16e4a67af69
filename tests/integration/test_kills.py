# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A run is killed at each change of a file in turn; afterwards all that is there loads, and the run ends the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import polars
import pytest
from ultralytics import YOLO

import yolo_ext
from yolo_ext.pipeline import compress
from yolo_ext.stock.load import load_model


class Killed(BaseException):
    """What stops a run in these tests."""


@contextmanager
def killed_at(n: int) -> Iterator[None]:
    """Stop in place of the n-th time, counted from 0, that a file is put into its place or removed."""
    seen = count()

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def act(self: Path, *args: Any, **options: Any) -> Any:
            if self.suffix != ".cache" and self.exists() and next(seen) == n:
                raise Killed
            return change(self, *args, **options)

        return act

    with pytest.MonkeyPatch.context() as m:
        for name in ("replace", "unlink"):
            m.setattr(Path, name, watched(getattr(Path, name)))
        yield


def state(weights: Path) -> list[dict[str, Any]]:
    return [load_model(weights / f"{name}.pt")[0].state_dict() for name in ("last", "best")]


TRAININGS = {
    "plain": {"epochs": 2},
    "stops early": {"epochs": 4, "patience": 1, "lr0": 0.0},
    "prunes while training": {"epochs": 3, "prune": {"speedup": 1.5, "at": [1], "images": 4}},
    "all before": {"epochs": 2, "prune": {"speedup": 1.5}, "distill": {}, "quant": {"mode": "qat", "calib": 4}},
}
MATRIX = ("stops early", "all before")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param(v, id=k, marks=pytest.mark.matrix if k in MATRIX else ()) for k, v in TRAININGS.items()]
)
def test_a_training_that_is_killed_anywhere_ends_the_same(fit, tiny, tmp_path, options):
    fit(tiny, yolo_ext.DetectionTrainer, "whole", **options)
    expected, table = state(tmp_path / "whole/weights"), polars.read_csv(tmp_path / "whole/results.csv").drop("time")
    for n in count():
        folder = tmp_path / f"run{n}"
        last = folder / "weights" / "last.pt"
        try:
            with killed_at(n):
                fit(tiny, yolo_ext.DetectionTrainer, folder.name, **options)
            break
        except Killed:
            pass
        for file in folder.glob("weights/[bl]*.pt"):
            load_model(file)
        if not last.exists():  # nothing to go on with
            fit(tiny, yolo_ext.DetectionTrainer, folder.name, **options)
        elif load_model(last)[1]["epoch"] >= 0:
            YOLO(str(last)).train(trainer=yolo_ext.DetectionTrainer, resume=True)
            assert sorted(p.name for p in last.parent.iterdir()) == ["best.pt", "last.pt"]
        for found, wanted in zip(state(last.parent), expected, strict=True):
            assert found.keys() == wanted.keys() and all((found[k] == wanted[k]).all() for k in wanted), n
        assert polars.read_csv(folder / "results.csv").drop("time").equals(table), n
    assert n > 8


@pytest.mark.slow
@pytest.mark.matrix
def test_a_compress_run_that_is_killed_anywhere_goes_on(tiny, shapes, settings, tmp_path, quick):
    options = {**settings(shapes, tmp_path), "epochs": 1, "prune": {"ratio": 0.3, "round_to": 1}, "exist_ok": None}
    data = options.pop("data")
    whole = compress(tiny, data, **{**options, "save_dir": str(tmp_path / "whole")})
    expected, _ = load_model(tmp_path / "whole/weights/best.pt")
    for n in count():
        folder = tmp_path / f"run{n}"
        options["save_dir"] = str(folder)
        try:
            with killed_at(n):
                compress(tiny, data, **options)
            break
        except Killed:
            pass
        done = {p: p.stat().st_mtime_ns for p in folder.glob("*/stage.json")}
        again = compress(tiny, data, resume=(folder / "compress.yaml").exists(), **options)
        assert {k: v["map"] for k, v in again["stages"].items()} == {k: v["map"] for k, v in whole["stages"].items()}
        assert done.items() <= {p: p.stat().st_mtime_ns for p in folder.glob("*/stage.json")}.items()
        for k, v in load_model(folder / "weights/best.pt")[0].state_dict().items():
            assert (v == expected.state_dict()[k]).all(), (n, k)
        assert sorted(p.name for p in (folder / "finetune/weights").iterdir()) == ["best.pt", "last.pt"], n
    assert n > 20
