# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a run reads out of the evidence of its stages: the loss that counts, and the images that changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yolo_ext.core.errors import UsageError
from yolo_ext.pipeline.report import changed
from yolo_ext.pipeline.run import Run
from yolo_ext.pipeline.stages import contract
from yolo_ext.stock.evidence import Evidence

IMAGES = 40


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run of a segment model whose INT8 file finds all boxes, but a third of the masks no more."""
    image = np.repeat(np.arange(IMAGES, dtype=np.int32), 5)
    cls, n = np.tile(np.arange(5, dtype=np.int32) % 2, IMAGES), len(image)
    about = {"task": "segment", "names": {0: "a", 1: "b", 2: "c"}, "images_hash": "i", "labels_hash": "l"}
    conf, area = np.random.default_rng(0).uniform(0.3, 1, n).astype(np.float32), np.full(n, 5000, np.float32)
    hits = {kind: np.ones((n, 10), bool) for kind in ("box", "mask")}
    base = Evidence(about, [f"{i}.jpg" for i in range(IMAGES)], image, cls, conf, area, image, cls, area, hits)
    masks = hits["mask"] & ~((image % 3 == 0) & (conf < 0.9))[:, None]
    for stage, evidence in (("base", base), ("ptq", replace(base, hits={**hits, "mask": masks}))):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "evidence.npz").write_bytes(evidence.data())
    return Run(Path("base.pt"), "data.yaml", "segment", {}, None, None, None, None, models={}, folder=tmp_path)


MEASURED = [{"map": 0.9, "map_mask": masks, "evidence": f"{stage}/evidence.npz"}
            for masks, stage in ((0.8, "base"), (0.7, "ptq"))]  # fmt: skip


def test_the_metric_that_lost_most_counts_and_with_confidence_its_bound(run):
    assert run.lost(*MEASURED) == pytest.approx(0.1)
    run.confidence = 0.95
    change = next(c for c in contract(run, "ptq")["changes"] if c["name"] == "map_mask")
    assert run.lost(*MEASURED) == pytest.approx(-change["low"], abs=1e-9) and -change["low"] > -change["change"] > 0


@pytest.mark.parametrize(("limits", "broken"), [({"map": -0.01}, []), ({"map_mask.a": -0.05}, ["contract map_mask.a"])])
def test_limits_of_a_run_are_checked(run, limits, broken):
    run.limits = limits
    assert [c["name"] for c in contract(run, "ptq")["checks"] if not c["passed"]] == broken


def test_a_mask_that_is_gone_breaks_the_default_contract(run):
    assert "contract map_mask" in [c["name"] for c in contract(run, "ptq")["checks"] if not c["passed"]]


def test_a_class_without_objects_is_refused(run):
    run.limits = {"recall.c": -0.1}
    with pytest.raises(UsageError, match="no object on which"):
        contract(run, "base", n=20)


def test_what_was_not_measured_has_no_contract(run):
    assert contract(run, "qat") == {}


def test_images_that_changed_most_come_first(run):
    base, new = (Evidence.read(run.folder / stage / "evidence.npz") for stage in ("base", "ptq"))
    gone = [int(((new.image == i) & ~new.hits["mask"][:, 0]).sum()) for i in range(IMAGES)]
    order = changed(base, new, 0.0)
    assert [gone[int(name.split(".")[0])] for name in order] == sorted(gone, reverse=True)
    assert changed(base, base, 0.0) == base.images and changed(base, new, 0.95) == base.images, (
        "only what is shown counts"
    )
