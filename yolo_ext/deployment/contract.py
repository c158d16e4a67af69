# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Two models over the same images: what differs by class and size, how sure that is, and whether it is allowed.

Differences come with intervals of a paired bootstrap over images (Efron and Tibshirani, 1993); intervals of many
classes or sizes are simultaneous, by the largest studentised difference (Westfall and Young, 1993).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_ext.core.config import read_flat
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.stock.evidence import Evidence
from yolo_ext.stock.model import METRIC, METRICS

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # of COCO, in square pixels
FIGURES = {"box": "map", "mask": "map_mask", "pose": "map_pose"}  # mAP50-95 by kind
ENOUGH = 10  # images with objects of a class or size; resamples of fewer show too little of how the others would be
EPS = 1e-9


@dataclass(frozen=True)
class Change:
    """How much a figure differs: result minus base, its interval, and in words what that means."""

    name: str  # such as map, map.person, recall.person, size.small
    before: float
    after: float
    change: float
    low: float
    high: float
    verdict: str  # better, same, worse or undecided

    def words(self, within: float, images: int) -> str:
        """Say the verdict; `within` is the difference that matters, `images` how many there are."""
        if self.verdict != "undecided":
            return f"same within {within:g}" if self.verdict == "same" else self.verdict
        width = (self.high - self.low) / 2
        nearest = max(abs(self.change), within - abs(self.change), EPS)  # to a verdict
        needed = int(np.ceil(images * (width / nearest) ** 2))
        what = f"show {within:g}" if nearest > abs(self.change) else "decide a change of this size"
        at_best = f"not decidable: this split shows differences of about {width:.3f} at best"
        return f"{at_best}; {needed:,} images would {what}"


def resamples(images: int, n: int, seed: int = 0) -> np.ndarray:
    """Return how often each image is drawn: once each in the first row, then `n` draws with replacement."""
    drawn: np.ndarray = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), n)
    return np.concatenate([np.ones((1, images), drawn.dtype), drawn])


def average_precision(hits: np.ndarray, image: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return AP (R, 10) of (D, 10) `hits` by falling confidence, of (R, N) `weights` of images and (R,) `targets`."""
    found = np.zeros((len(weights), hits.shape[1]))
    at = np.flatnonzero(hits.any(1))  # what lies between counts in `seen` alone, and what comes behind counts nothing
    drawn: np.ndarray = weights.take(image[: at[-1] + 1 if at.size else 0], axis=1)
    seen, drawn = np.maximum(drawn.cumsum(1).take(at, axis=1), 1), drawn.take(at, axis=1)
    share = 100 / np.maximum(targets, 1)[:, None]
    for t in range(hits.shape[1]):
        own = np.flatnonzero(hits[at, t])
        if not own.size:
            continue
        right: np.ndarray = drawn.take(own, axis=1).cumsum(1)
        precision = right / seen.take(own, axis=1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.ceil(right * share - EPS)  # of 101 recalls from 0 to 1, how many lie below each
        points = np.diff(reached, axis=1, prepend=0)
        first = envelope[np.arange(len(envelope)), (reached > 0).argmax(1)] * (reached[:, -1] > 0)
        found[:, t] = (np.einsum("rk,rk->r", envelope, points) - first / 2) / 100
    found[targets == 0] = np.nan
    return found


def _precisions(e: Evidence, kind: str, weights: np.ndarray, sizes: tuple[float, float] = (0, np.inf)) -> np.ndarray:
    """Return the AP50-95 of each class in each resample (R, classes), NaN without targets, of these sizes alone."""
    order = np.argsort(-e.conf, kind="stable")
    low, high = sizes
    within = (e.area[order] >= low) & (e.area[order] < high)
    wanted = (e.target_area >= low) & (e.target_area < high)
    found = np.full((len(weights), len(e.about["names"])), np.nan)
    for c in np.unique(e.target_cls[wanted]):
        own = order[within & (e.cls[order] == c)]
        count = np.bincount(e.target_image[wanted & (e.target_cls == c)], minlength=weights.shape[1])
        found[:, c] = average_precision(e.hits[kind][own], e.image[own], weights @ count, weights).mean(1)
    return found


def _mean(found: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that have targets (R,)."""
    there = ~np.isnan(found)
    return np.where(there, found, 0).sum(1) / np.maximum(there.sum(1), 1)


def figures(e: Evidence, weights: np.ndarray, conf: float) -> dict[str, np.ndarray]:
    """Return every figure of a model in each resample (R,): overall, by class and size, and at confidence `conf`."""
    if "top" in e.hits:
        return _of_classes(e, weights)
    names, found = e.about["names"], dict[str, np.ndarray]()
    for kind in e.hits:
        each = _precisions(e, kind, weights)
        found[FIGURES[kind]] = _mean(each)
        found |= {f"{FIGURES[kind]}.{names[c]}": each[:, c] for c in np.flatnonzero(~np.isnan(each[0]))}
    for size, area in SIZES.items():
        each = _precisions(e, "box", weights, area)
        if not np.isnan(each[0]).all():
            found[f"size.{size}"] = _mean(each)
    return found | _at(e, weights, conf)


def _of_classes(e: Evidence, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the accuracies of a classifier: top-1 and top-5, and top-1 by class."""
    (first, five), classes = e.hits["top"].T, np.unique(e.target_cls)
    parts = {"top1": (first, classes), "top5": (five, classes)}
    parts |= {f"top1.{e.about['names'][c]}": (first, [c]) for c in classes}
    of = {k: np.isin(e.target_cls, which) for k, (_, which) in parts.items()}
    return {k: weights @ (right & of[k]) / np.maximum(weights @ of[k], 1) for k, (right, _) in parts.items()}


def _at(e: Evidence, weights: np.ndarray, conf: float) -> dict[str, np.ndarray]:
    """Return recall and precision at an IoU of 0.5 and a confidence, overall and by class."""
    names, kept, n = e.about["names"], e.conf >= conf, weights.shape[1]
    counts = {"": np.zeros((3, len(weights)))}  # of those that are right, detections and targets
    for c in np.unique(e.target_cls):
        own = kept & (e.cls == c)
        images = (e.image[own & e.hits["box"][:, 0]], e.image[own], e.target_image[e.target_cls == c])
        counts[f".{names[c]}"] = np.stack([weights @ np.bincount(i, minlength=n) for i in images])
        counts[""] += counts[f".{names[c]}"]
    return {f"{kind}{name}": found[0] / np.maximum(found[i], 1)
            for name, found in counts.items() for i, kind in ((2, "recall"), (1, "precision"))}  # fmt: skip


def best_confidence(e: Evidence) -> float:
    """Return the confidence with the best F1 over all detections at an IoU of 0.5, 0.25 where nothing is right."""
    order = np.argsort(-e.conf, kind="stable")
    right = next(iter(e.hits.values()))[order, 0].cumsum()
    f1 = 2 * right / (np.arange(1, len(order) + 1) + len(e.target_cls))
    return float(e.conf[order][f1.argmax()]) if right.size and right[-1] else 0.25


def same_recall(base: Evidence, new: Evidence, conf: float) -> float | None:
    """Return the confidence at which `new` finds as many targets as `base` does at `conf`; None where it never does."""
    wanted = int((base.hits["box"][:, 0] & (base.conf >= conf)).sum())
    right = np.sort(new.conf[new.hits["box"][:, 0]])[::-1]
    return float(right[wanted - 1]) if 0 < wanted <= len(right) else None


def calibration_error(e: Evidence, bins: int = 10) -> float:
    """Return how far confidence is from the share that is right, weighted by bin (D-ECE; Kueppers et al., 2020)."""
    place = np.minimum((e.conf * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.bincount(place, e.conf - e.hits["box"][:, 0], bins)
    return float(np.abs(gap).sum() / max(count.sum(), 1))


def changes(base: Evidence, new: Evidence, *, conf: float | None = None, within: float = 0.005, n: int = 1000,
            confidence: float = 0.95, seed: int = 0) -> list[Change]:  # fmt: skip
    """Compare two models at the deployed `conf` figure by figure, the overall ones first, by `n` resamples."""
    for what in ("task", "images_hash", "labels_hash", "names"):
        if base.about.get(what) != new.about.get(what):
            told = f"The two evaluations are over different {what.removesuffix('_hash')}"
            raise UsageError(f"{told}. Measure both models on the same split.")
    weights = resamples(len(base.images), n, seed)
    conf = best_confidence(base) if conf is None else conf
    old, now = (figures(e, weights, conf) for e in (base, new))
    gaps = {k: np.where(np.isnan(old[k]), now[k][0] - old[k][0], now[k] - old[k]) for k in old}
    held, found = _held(base), []
    few = {k for k, (images, _) in held.items() if images < ENOUGH}
    factor = _critical([g for k, g in gaps.items() if k not in (*METRIC, *few)], (1 + confidence) / 2)
    for k in sorted(gaps, key=lambda k: k not in METRIC):  # which have intervals, and half of the risk, of their own
        spread = gaps[k][1:].std()
        if k.startswith(("recall.", "precision.")) and not np.array_equal(base.conf, new.conf):
            spread = max(spread, 1 / held[k][1])  # none of n objects changed: times the factor, the rule of three
        low, high = gaps[k][0] - factor * spread, gaps[k][0] + factor * spread
        if k in METRIC:
            low, high = np.quantile(gaps[k][1:], [(1 - confidence) / 2, (1 + confidence) / 2], method="weibull")
        word = verdict(low, high, within)
        word = "undecided" if k in few and word != "same" else word
        before, after = (round(float(v[k][0]), 4) for v in (old, now))  # as tables show them
        found.append(Change(k, before, after, round(after - before, 4), float(low), float(high), word))
    return found


def _held(e: Evidence) -> dict[str, tuple[int, int]]:
    """Return how many images have objects that a figure of a class or size is measured on, and how many those are."""
    bins = {f"size.{k}": (e.target_area >= low) & (e.target_area < high) for k, (low, high) in SIZES.items()}
    bins |= {f"{k}.{name}": e.target_cls == c for c, name in e.about["names"].items()
             for k in (*METRIC, "recall", "precision")}  # fmt: skip
    return {k: (len(np.unique(e.target_image[own])), int(own.sum())) for k, own in bins.items()}


def _critical(gaps: Sequence[np.ndarray], confidence: float) -> float:
    """Return by how many standard deviations intervals have to reach so that all of them hold together."""
    each = np.stack(gaps) if gaps else np.zeros((0, 2))
    spread = each[:, 1:].std(axis=1, keepdims=True)
    far = np.abs(each[:, 1:] - each[:, :1])[spread[:, 0] > 0] / spread[spread[:, 0] > 0]
    return float(np.quantile(far.max(axis=0), confidence)) if far.size else 1.0


def verdict(low: float, high: float, within: float) -> str:
    """Return what an interval of a difference says: better, same, worse or undecided."""
    if -within <= low and high <= within:
        return "same"
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def read_limits(
    given: Any, task: str, names: Mapping[int, str], confidence: float | None = None, data: Any = True,
    max_drop: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return the limits of a contract by figure, of options or a YAML file; refuse those that no split can have."""
    if confidence is not None and not 0 < confidence < 1:
        raise UsageError(f"'confidence={confidence}' is illegal: give a share below 1, such as 0.95.")
    if max_drop is not None and not (data and max_drop > 0):
        needs = "give a loss above 0, such as 0.01, with a trained .pt and data= that fit it"
        raise UsageError(f"'max_drop={max_drop}' limits the accuracy lost against the model as it is: {needs}.")
    if given and not data:
        raise UsageError("'contract' limits what a val split shows. Give data=data.yaml.")
    if isinstance(given, (str, Path)) and not Path(given).is_file():
        raise UsageError(f"'contract={given}' does not exist. Give a YAML file, or contract.map=-0.01 and so on.")
    flat = read_flat(given, f"'contract={given}'", "recall: {person: -0.02}") if given else {}
    boxes = task != "classify"
    each = (*METRICS[task], "recall", "precision") if boxes else ("top1",)
    overall = [*dict.fromkeys((*METRICS[task], *each)), *(f"size.{size}" for size in SIZES if boxes)]
    known = [*overall, *(f"{figure}.{name}" for figure in each for name in names.values())]
    for name, limit in flat.items():
        if name not in known:
            legal = f"{', '.join(overall)}, or {', '.join(each)} of a class, such as {known[-1]}"
            raise UsageError(f"contract: there is no '{name}'.{suggest(name, known)} Legal: {legal}.")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not -1 <= limit <= 0:
            raise UsageError(f"'contract.{name}={limit}' is illegal: give the change that is allowed, such as -0.01.")
    return flat


def broken(found: Sequence[Change], limits: Mapping[str, Any], *, sure: bool = False) -> list[dict[str, Any]]:
    """Return the checks of the lowest changes that are allowed, for `sure` by the lower ends of their intervals."""
    known = {c.name: c.low if sure else c.change for c in found}
    if absent := [k for k in limits if k not in known]:
        raise UsageError(f"contract: the val split holds no object on which '{absent[0]}' shows. Leave it out.")
    return [{"name": f"contract {k}", "value": round(known[k], 4), "limit": limit, "passed": known[k] >= limit}
            for k, limit in limits.items()]  # fmt: skip


def surely_broken(found: Sequence[Change]) -> list[dict[str, Any]]:
    """Return the checks of the default contract: of the model, and classes and sizes that break it, or the worst."""
    limits = {c: -0.02 if c.name in METRIC else -0.05 for c in sorted(found, key=lambda c: c.high)
              if c.name.split(".")[0] in ("recall", "size", *METRIC)}  # fmt: skip
    checks = [{"name": f"contract {c.name}", "value": round(c.high, 4), "limit": limit,
               "passed": c.high >= limit or c.verdict == "undecided"} for c, limit in limits.items()]  # fmt: skip
    rest = [c for c in checks if c["limit"] == -0.05]
    return [c for c in checks if c not in rest] + ([c for c in rest if not c["passed"]] or rest[:1])


def judged(
    base: Evidence, new: Evidence, limits: Mapping[str, Any] | None = None, *, conf: float | None = None,
    within: float = 0.005, n: int = 1000, confidence: float | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Judge a model, deployed at `conf`, against its base by limits (with `confidence`, of lower ends) or default."""
    conf = best_confidence(base) if conf is None else conf
    found = changes(base, new, conf=conf, within=within, n=n, confidence=confidence or 0.95, seed=seed)
    checks = broken(found, limits, sure=confidence is not None) if limits else surely_broken(found)
    said = [f"{METRIC[c.name]} {c.change:+.4f}, {c.words(within, len(base.images))}" for c in found if c.name in METRIC]
    told = {"verdict": ". ".join(said), "changes": [asdict(c) for c in found], "checks": checks,
            "images": len(base.images)}  # fmt: skip
    if "top" in base.hits:
        return told
    errors = {"before": calibration_error(base), "after": calibration_error(new)}
    return {**told, "conf": conf, "same_recall": same_recall(base, new, conf), "calibration": errors}
