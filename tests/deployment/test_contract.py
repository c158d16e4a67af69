# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The verdict on two models over the same images: precision as Ultralytics counts it, intervals, limits."""

from dataclasses import replace

import numpy as np
import pytest
from ultralytics.utils.metrics import ap_per_class

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.contract import (
    Change,
    average_precision,
    best_confidence,
    broken,
    calibration_error,
    changes,
    figures,
    judged,
    read_limits,
    resamples,
    same_recall,
    verdict,
)  # fmt: skip
from yolo_ext.stock.evidence import Evidence

NAMES = {0: "cell", 1: "plate", 2: "rare"}


def made(seed: int, images: int = 60, found: float = 0.8, kinds=("box",)) -> Evidence:
    """Return detections of random quality; the targets are the same for each seed below 100."""
    rng = np.random.default_rng(seed % 100)
    target_image = np.repeat(np.arange(images), rng.poisson(4, images)).astype(np.int32)
    target_cls = rng.choice(3, len(target_image), p=(0.5, 0.4, 0.1)).astype(np.int32)
    area = rng.lognormal(8, 1.5, len(target_image)).astype(np.float32)
    rng = np.random.default_rng(seed)
    kept = rng.random(len(target_image)) < found
    false = rng.integers(0, images, 3 * images)
    image = np.concatenate([target_image[kept], false]).astype(np.int32)
    cls = np.concatenate([target_cls[kept], rng.integers(0, 3, len(false))]).astype(np.int32)
    conf = rng.permutation(len(image)).astype(np.float32) / len(image)  # no two are equal
    hits = {}
    for kind in kinds:
        iou = rng.uniform(0.4, 1, int(kept.sum()))
        hits[kind] = np.concatenate([iou[:, None] >= np.linspace(0.5, 0.95, 10), np.zeros((len(false), 10), bool)])
    areas = np.concatenate([area[kept], rng.lognormal(8, 1.5, len(false))]).astype(np.float32)
    about = {"task": "detect", "names": NAMES, "images_hash": "i", "labels_hash": "l"}
    files = [f"{i}.jpg" for i in range(images)]
    return Evidence(about, files, image, cls, conf, areas, target_image, target_cls, area, hits)


def by_ultralytics(e: Evidence, weights: np.ndarray) -> np.ndarray:
    """Return AP50-95 by class with each image as often as it is drawn."""

    def often(values: np.ndarray, image: np.ndarray) -> np.ndarray:
        return np.repeat(values, weights[image], axis=0)

    found = ap_per_class(often(e.hits["box"], e.image), often(e.conf, e.image), often(e.cls, e.image),
                         often(e.target_cls, e.target_image))  # fmt: skip
    each = np.full(len(NAMES), np.nan)
    each[found[6]] = found[5].mean(1)
    return each


@pytest.mark.parametrize("seed", range(8))
def test_precision_of_resampled_images_is_that_of_ultralytics(seed):
    e, weights = made(seed), resamples(60, 5, seed)
    found = figures(e, weights, 0.5)
    for r, w in enumerate(weights):
        expected = by_ultralytics(e, w)
        got = [found[f"map.{name}"][r] for name in NAMES.values()]
        np.testing.assert_allclose(got, expected, atol=1e-9)
        assert found["map"][r] == pytest.approx(np.nanmean(expected), abs=1e-9)


def test_a_class_without_hits_or_targets():
    none, weights = np.zeros((4, 10), bool), resamples(3, 2)
    image, targets = np.array([0, 1, 2, 2]), np.array([2, 2, 0])
    assert average_precision(none, image, targets, weights)[0].tolist() == [0] * 10
    assert np.isnan(average_precision(none, image, targets, weights)[2]).all()


def test_sizes_are_those_of_the_targets():
    e = made(3)
    e = replace(e, target_area=np.full(len(e.target_cls), 100, np.float32), area=np.full(len(e.cls), 100, np.float32))
    found = figures(e, resamples(60, 1), 0.5)
    assert found["size.small"][0] == found["map"][0] and not {"size.medium", "size.large"} & found.keys()


def test_a_model_is_the_same_as_itself():
    found = changes(made(1), made(1), n=50)
    assert all(c.change == 0 and c.low == c.high == 0 and c.verdict == "same" for c in found)


@pytest.mark.parametrize(("found", "word"), [(0.4, "worse"), (0.8, "undecided")], ids=["half of it lost", "other luck"])
def test_what_is_lost_is_named(found, word):
    new = changes(made(2), made(102, found=found), n=200)
    assert new[0].name == "map" and new[0].verdict == word
    assert new[0].low <= new[0].change <= new[0].high


def test_one_class_that_is_gone_is_flagged():
    base = made(4, images=200)
    rare = base.cls == 2
    new = replace(base, hits={"box": base.hits["box"] & ~rare[:, None]})
    worse = {c.name for c in changes(base, new, n=200) if c.verdict == "worse"}
    assert {"recall.rare", "precision.rare"} <= worse
    assert not {"map.cell", "map.plate", "recall.cell", "recall.plate"} & worse


@pytest.mark.parametrize("kind", ["mask", "pose"])
def test_a_broken_branch_shows_where_boxes_are_fine(kind):
    base = made(5, kinds=("box", kind))
    new = replace(base, hits={**base.hits, kind: np.zeros_like(base.hits[kind])})
    found = {c.name: c.verdict for c in changes(base, new, n=100)}
    assert found["map"] == "same" and found[f"map_{kind}"] == "worse"


def test_classifiers_by_the_first_and_the_first_five():
    n = np.arange(40, dtype=np.int32)
    top = np.stack([n % 2 == 0, n % 4 != 3], axis=1)
    zero = np.zeros(40, np.float32)
    about = {"task": "classify", "names": NAMES, "images_hash": "i", "labels_hash": "l"}
    e = Evidence(about, [str(i) for i in n], n, n % 3, zero + 1, zero, n, (n % 2).astype(np.int32), zero, {"top": top})
    found = {c.name: c.before for c in changes(e, e, n=20)}
    assert found == {"top1": 0.5, "top5": 0.75, "top1.cell": 1.0, "top1.plate": 0.0}


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.001, 0.02, "better"), (-0.02, -0.001, "worse"), (-0.004, 0.004, "same"), (-0.004, -0.001, "same"),
     (-0.006, 0.004, "undecided"), (-0.05, 0.05, "undecided")],
)  # fmt: skip
def test_verdicts(low, high, word):
    assert verdict(low, high, 0.005) == word


@pytest.mark.parametrize(
    ("change", "told"),
    [(0.0, "400 images would show 0.005"), (0.0021, "1,190 images would show 0.005"),
     (-0.009, "124 images would decide a change of this size")],
)  # fmt: skip
def test_what_cannot_be_decided_says_how_many_images_could(change, told):
    undecided = Change("map", 0.5, 0.5 + change, change, change - 0.01, change + 0.01, "undecided")
    assert undecided.words(0.005, 100) == (
        f"not decidable: this split shows differences of about 0.010 at best; {told}"
    )


def test_that_no_object_changed_does_not_prove_that_none_will():
    base = made(4, images=100)
    new = replace(base, conf=base.conf**1.01)
    found = {c.name: c for c in changes(base, new, n=100, conf=0.0)}["recall.rare"]
    assert found.change == 0 and found.verdict == "undecided"
    assert found.high == -found.low >= 1 / (base.target_cls == 2).sum()


def test_thresholds_that_find_as_much():
    base = made(6)
    lower = replace(base, conf=base.conf / 2)
    conf = best_confidence(base)
    assert same_recall(base, lower, conf) == pytest.approx(conf / 2, rel=0.05)
    assert same_recall(base, made(6, found=0.0), conf) is None
    sure = replace(base, conf=np.where(base.hits["box"][:, 0], 1.0, 0.0).astype(np.float32))
    assert calibration_error(sure) == 0 < calibration_error(base)


@pytest.mark.parametrize("what", ["images_hash", "labels_hash", "names", "task"])
def test_other_images_are_refused(what):
    base = made(1)
    with pytest.raises(UsageError, match="different"):
        changes(base, replace(base, about={**base.about, what: "other"}), n=2)


WRONG = {
    "unknown class": ({"recall": {"rar": -0.1}}, "detect", "recall.rare"),
    "unknown size": ({"size.tiny": -0.1}, "detect", "size.small"),
    "figure of another task": ({"map_mask": -0.1}, "detect", "Legal: map, recall, precision, size.small"),
    "wrong sign": ({"map": 0.1}, "detect", "such as -0.01"),
    "no number": ({"map": "low"}, "detect", "such as -0.01"),
    "no number either": ({"top1": True}, "classify", "such as -0.01"),
    "no mapping": ([-0.1], "detect", "holds no options"),
    "no file": ("absent.yaml", "detect", "does not exist"),
}


@pytest.mark.parametrize(("limits", "task", "says"), WRONG.values(), ids=WRONG)
def test_limits_that_cannot_be(limits, task, says):
    with pytest.raises(UsageError, match=says):
        read_limits(limits, task, NAMES)


def test_a_class_that_the_split_does_not_hold():
    base = made(1)
    base = replace(base, target_cls=np.minimum(base.target_cls, 1))
    with pytest.raises(UsageError, match=r"holds no object on which 'recall\.rare' shows"):
        judged(base, base, {"recall.rare": -0.1}, n=2)


def test_a_class_may_be_called_like_a_size():
    base = made(4, images=100)
    base = replace(base, about={**base.about, "names": {0: "small", 1: "medium", 2: "large"}})
    new = replace(base, hits={"box": base.hits["box"] & (base.area >= 32**2)[:, None]})
    found = {c.name: c.after for c in changes(base, new, n=20)}
    assert found["size.small"] == 0 < found["map.small"]


def test_too_few_images_decide_nothing():
    base = made(1)
    rare = np.isin(base.target_image, np.unique(base.target_image)[:9])
    base = replace(base, target_cls=np.where(rare, 2, base.target_cls % 2).astype(np.int32))
    new = replace(base, hits={"box": base.hits["box"] & (base.cls != 2)[:, None]})
    found = {c.name: c for c in changes(base, new, n=100)}
    assert found["recall.rare"].change < -0.1 and found["recall.rare"].verdict == "undecided"
    assert not any("rare" in c["name"] for c in judged(base, new, n=100)["checks"] if not c["passed"])


def test_the_default_contract_names_what_is_surely_lost():
    base = made(4, images=200)
    new = replace(base, hits={"box": base.hits["box"] & (base.cls != 2)[:, None]})
    same, found = (judged(base, e, n=100) for e in (base, new))
    assert [c["name"] for c in same["checks"]] == ["contract map", "contract map.cell"]
    assert all(c["passed"] for c in same["checks"]) and same["verdict"] == "mAP50-95 +0.0000, same within 0.005"
    assert [c["name"] for c in found["checks"]] == ["contract map", "contract recall.rare"]
    assert [c["passed"] for c in found["checks"]] == [True, False] and found["verdict"].startswith("mAP50-95 -0.")
    assert found["images"] == 200 and found["calibration"]["before"] < found["calibration"]["after"]


@pytest.mark.parametrize("kind", ["mask", "pose"])
def test_boxes_that_are_fine_do_not_save_the_contract(kind):
    base = made(5, kinds=("box", kind))
    found = judged(base, replace(base, hits={**base.hits, kind: np.zeros_like(base.hits[kind])}), n=50)
    assert f"contract map_{kind}" in {c["name"] for c in found["checks"] if not c["passed"]}
    assert found["verdict"].startswith("mAP50-95 +0.0000, same within 0.005. ") and "worse" in found["verdict"]


def test_limits_hold_for_the_point_or_for_the_bound():
    found = changes(made(102), made(2), n=200)
    limit = {"map": found[0].change - 1e-6}
    assert broken(found, limit)[0]["passed"] and not broken(found, limit, sure=True)[0]["passed"]


def test_evidence_is_kept_in_one_file(tmp_path):
    e = made(7, kinds=("box", "mask"))
    (tmp_path / "base.npz").write_bytes(e.data())
    again = Evidence.read(tmp_path / "base.npz")
    assert again.about == e.about and again.images == e.images
    assert [c for c in changes(e, again, n=5) if c.change] == []
    assert again.hits["mask"].dtype == bool and (again.hits["mask"] == e.hits["mask"]).all()


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "missing"])
def test_what_is_no_evidence_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UsageError, match="no evidence"):
        Evidence.read(tmp_path / "x.npz")


def test_a_pickle_in_the_place_of_evidence_does_not_run(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "x.npz", text=np.array([Boom()], dtype=object))
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(UsageError, match="no evidence"):
        Evidence.read(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()
