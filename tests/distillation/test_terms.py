# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest

from yolo_ext.core.config import DistillConfig, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.schedules import loss_factor
from yolo_ext.distillation.terms import terms, title


def read(**options):
    return terms(parse({"distill": options})["distill"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("kl_binary", 1.0, {}), ("ld", 1.0, {}), ("cwd", 1.0, {})]),
        ({"logits": ["bckd", "ld"], "features": None}, [("bckd", 1.0, {}), ("ld", 1.0, {})]),
        ({"logits": None, "feature_weight": 2.0, "features": [{"name": "cwd", "weight": 0.5, "temperature": 3}]},
         [("cwd", 1.0, {"temperature": 3})]),
        ({"logits": ["kl_binary", "bckd"], "features": None, "temperature": 4.0},
         [("kl_binary", 1.0, {"temperature": 4.0}), ("bckd", 1.0, {})]),
        ({"logits": [{"name": "l1", "norm": "mean"}], "features": None}, [("l1", 1.0, {"norm": "mean"})]),
    ],
    ids=["defaults", "names", "weights multiply", "temperature goes where there is one", "own option"],
)  # fmt: skip
def test_stacks_are_read(options, expected):
    assert [(t.row.name, t.weight, t.options) for t in read(**options)] == expected


def test_layers_and_timing_of_a_loss_go_before_the_common_ones():
    stack = [{"name": "cwd", "layers": ["backbone", 15], "schedule": "constant", "end": 5}, "pkd"]
    first, second = read(logits=None, features=stack, layers=["neck"], start=2)
    assert first.layers == ("backbone", "15") and second.layers == ("neck",)
    assert first.timing == {"schedule": "constant", "final": 0.1, "start": 2, "end": 5, "warmup": 0}
    assert second.timing["schedule"] == "cosine" and title([first, second]) == "cwd + pkd"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": ["cdw"]}, ["Unknown feature loss 'cdw'", "'cwd'"]),
        ({"features": [{"nam": "cwd"}]}, ["distill.features", "name: cwd"]),
        ({"features": 3}, ["distill.features=3"]),
        ({"features": [{"name": "cwd", "tau": 2}]}, ["no option 'tau'", "temperature"]),
        ({"features": [{"name": "mgd", "module": 2}]}, ["no option 'module'"]),
        ({"logits": [{"name": "bckd", "layers": [4]}]}, ["no option 'layers'"]),
        ({"features": [{"name": "cwd", "weight": -1}]}, ["weight=-1"]),
        ({"features": [{"name": "cwd", "temperature": 0}]}, ["temperature=0"]),
        ({"features": [{"name": "cwd", "schedule": "cosin"}]}, ["'cosin'", "'cosine'"]),
        ({"features": [{"name": "cwd", "start": 3, "end": 2}]}, ["end=2", "start=3"]),
        ({"features": "pkd", "logits": "bckd", "temperature": 2.0}, ["temperature=2.0", "no effect"]),
        ({"start": 3, "end": 3}, ["distill.end=3"]),
        ({"features": None, "layers": ["neck"]}, ["distill.layers"]),
        ({"teacher": ["a.pt", "self"]}, ["distill.teacher"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_is_illegal_is_refused_in_one_message(options, words):
    with pytest.raises(UsageError) as e:
        read(**options)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_plain_options_are_read_as_the_same():
    from yolo_ext.core.config import as_plain

    given = {"distill": {"logits": ["bckd", {"name": "ld", "weight": 0.5}], "teacher": ["a.pt", "b.pt"], "layers": [4]}}
    once = parse(given)
    assert parse(as_plain(once)) == once and isinstance(once["distill"], DistillConfig)


@pytest.mark.parametrize(
    ("epoch", "timing", "expected"),
    [
        (0, {}, 1.0),
        (9, {}, 0.2),
        (12, {}, 0.2),
        (1, {"start": 2}, 0.0),
        (2, {"start": 2}, 1.0),
        (5, {"end": 5}, 0.0),
        (4, {"end": 5}, 0.2),
        (0, {"warmup": 3, "schedule": "constant"}, 0.25),
        (3, {"warmup": 3, "schedule": "constant"}, 1.0),
    ],
)
def test_factor_of_an_epoch(epoch, timing, expected):
    plan = {"schedule": "linear", "final": 0.2, "start": 0, "end": None, "warmup": 0, **timing}
    assert loss_factor(epoch=epoch, epochs=10, **plan) == pytest.approx(expected)
