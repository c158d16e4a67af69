# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Does the verdict on two models tell the truth? Detections are simulated, so that the truth is known.

    python benchmarks/contract.py draws=100 coverage=1000 images=500 classes=10

Two models see the same targets. What is hard for one is hard for the other, by target and by image, and each has luck
of its own: `luck` is the spread of that, where the spread of what they share is 1. Printed are, over `draws`, how often
a planted loss of 20 % of the recall of one class in ten is flagged and how often two draws of the same model raise an
alarm; over `coverage` draws, how often the interval of the mAP difference holds the true one; and the time of a
comparison of 500 images with 10 classes and of 5,000 images with 80.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from yolo_ext.deployment.contract import Change, changes, surely_broken
from yolo_ext.stock.evidence import Evidence

LOST = 0.2  # share of the found targets of class 3 that the worse model loses
IOUS = np.linspace(0.5, 0.95, 10)


def spread(rng: np.random.Generator, image: np.ndarray, kinds: int = 1) -> np.ndarray:
    """Return normal numbers of variance 1 (N, kinds), a quarter of which the targets of an image share."""
    shared = rng.normal(size=(image.max() + 1, kinds))[image]
    return np.sqrt(0.75) * rng.normal(size=(len(image), kinds)) + 0.5 * shared


def targets(rng: np.random.Generator, images: int, classes: int) -> dict[str, np.ndarray]:
    """Return targets, 5 an image, each with how easy it is, and 20 places an image that look like one."""
    found = {}
    for name, each in (("target", 5), ("decoy", 20)):
        image = np.repeat(np.arange(images, dtype=np.int32), rng.poisson(each, images))
        found |= {name: image, f"{name}_cls": rng.integers(0, classes, len(image), dtype=np.int32),
                  f"{name}_area": rng.lognormal(8, 1.2, len(image)).astype(np.float32),
                  f"{name}_looks": spread(rng, image, 3)}  # fmt: skip
    return found


def detections(
    rng: np.random.Generator, t: dict[str, np.ndarray], images: int, classes: int, luck: float, lost: float = 0.0
) -> Evidence:
    """Return what a model finds, without a share `lost` of the targets of class 3."""
    skill, looks = ((t[f"{n}_looks"] + luck * spread(rng, t[n], 3)) / np.hypot(1, luck) for n in ("target", "decoy"))
    kept = (skill[:, 0] > -1.1) & ~((t["target_cls"] == 3) & (rng.random(len(skill)) < lost))
    iou, conf = 0.78 + 0.12 * skill[:, 1], 1 / (1 + np.exp(-0.8 - skill[:, 2]))
    false = 1 / (1 + np.exp(2 - 0.9 * looks[:, 0]))
    about = {"task": "detect", "names": {i: f"c{i}" for i in range(classes)}}
    return Evidence(
        about, [str(i) for i in range(images)], np.concatenate([t["target"][kept], t["decoy"]]),
        np.concatenate([t["target_cls"][kept], t["decoy_cls"]]), np.concatenate([conf[kept], false]).astype(np.float32),
        np.concatenate([t["target_area"][kept], t["decoy_area"]]), t["target"], t["target_cls"], t["target_area"],
        {"box": np.concatenate([iou[kept, None] >= IOUS, np.zeros((len(false), 10), bool)])},
    )  # fmt: skip


def models(seed: int, images: int, classes: int, luck: float) -> list[Evidence]:
    """Return what a model finds in one draw of images, the same model with other luck, and one with the loss."""
    rng = np.random.default_rng(seed)
    t = targets(rng, images, classes)
    return [detections(rng, t, images, classes, luck, lost) for lost in (0, 0, LOST)]


def only_map(e: Evidence) -> Evidence:
    """Return the same evidence with areas that lie in one size bin, which need no resamples of their own."""
    return Evidence(e.about, e.images, e.image, e.cls, e.conf, e.area * 0, e.target_image, e.target_cls,
                    e.target_area * 0, e.hits)  # fmt: skip


def worse(found: Sequence[Change], ending: str = "") -> bool:
    return any(c.verdict == "worse" and c.name.endswith(ending) for c in found)


def flags(draws: int, images: int, classes: int, n: int, luck: float, first: int) -> None:
    """Print how often the loss is flagged, and how often there is an alarm without one."""
    seen = Counter[str]()
    for seed in range(first, first + draws):
        base, same, lossy = models(seed, images, classes, luck)
        found, alarms = (changes(base, other, n=n, seed=seed) for other in (lossy, same))
        seen["loss flagged"] += worse(found, ".c3")
        seen["loss breaks the default contract"] += any(not c["passed"] for c in surely_broken(found))
        seen["false alarm"] += worse(alarms)
        seen["false alarm of the default contract"] += any(not c["passed"] for c in surely_broken(alarms))
        seen["no loss, but some figure differs"] += any(c.low > 0 or c.high < 0 for c in alarms)
        if (done := seed + 1 - first) % 10 == 0 or done == draws:
            print(f"{done} draws: {dict(seen)}", flush=True)


def truth(images: int, classes: int, luck: float) -> float:
    """Print the true mAP50-95 and return what the loss takes of it, by very many images."""
    base, _, lossy = models(10**6, images, classes, luck)
    found = changes(only_map(base), only_map(lossy), n=2)[0]
    print(f"true mAP50-95 {found.before:.4f}, difference of the planted loss {found.change:.5f}", flush=True)
    return found.change


def held(draws: int, images: int, classes: int, n: int, luck: float) -> None:
    """Print how often the interval of the mAP difference holds the true one, which is 0 between draws of one model."""
    true = {"same": 0.0, "lossy": truth(200 * images, classes, luck)}
    seen = Counter[str]()
    for seed in range(10**5, 10**5 + draws):
        base, *others = (only_map(e) for e in models(seed, images, classes, luck))
        for (name, value), other in zip(true.items(), others):
            found = changes(base, other, n=n, seed=seed)[0]
            seen[f"{name}: held"] += found.low <= value <= found.high
            seen[f"{name}: too low"] += found.high < value
            seen[f"{name}: too high"] += found.low > value
        if seed % 50 == 49:
            print(f"{seed + 1 - 10**5} draws: {dict(seen)}", flush=True)


def speed(images: int, classes: int, n: int, luck: float) -> None:
    base, same, _ = models(0, images, classes, luck)
    start = time.monotonic()
    changes(base, same, n=n)
    seconds = time.monotonic() - start
    size = f"{images} images, {classes} classes, {len(base.conf)} detections"
    print(f"{size}, {n} resamples: {seconds:.1f} s", flush=True)


def main(
    draws: int = 100, coverage: int = 1000, images: int = 500, classes: int = 10, n: int = 1000, luck: float = 0.3,
    first: int = 1000,
) -> None:  # fmt: skip
    speed(500, 10, 1000, luck)
    speed(5000, 80, 200, luck)
    flags(draws, images, classes, n, luck, first)  # seeds below 1000 were looked at while the intervals were made
    held(coverage, images, classes, 2 * n // 5, luck)


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[1:])
    main(**{k: float(v) if k == "luck" else int(v) for k, v in given.items()})
