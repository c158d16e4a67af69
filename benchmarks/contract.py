# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Does the verdict on two models tell the truth? Detections are simulated, so that the truth is known.

Two models see the same targets: what is hard for one is hard for the other, and each has luck of its own. Printed are
how often a planted loss of 20 % of the recall of one class in ten is flagged, how often two draws of the same model
raise an alarm, how often the interval of the mAP difference holds the true one, and the time that a comparison takes.

    python benchmarks/contract.py draws=100 images=500 classes=10
"""

import sys
import time

import numpy as np

from yolo_ext.deployment.contract import changes
from yolo_ext.stock.evidence import Evidence

LUCK = 0.3  # spread of what is by chance, where that of what both models share is 1
IOUS = np.linspace(0.5, 0.95, 10)


def targets(rng: np.random.Generator, images: int, classes: int) -> dict[str, np.ndarray]:
    """Return targets, 5 an image, each with how hard it is, and 20 places an image that look like one."""
    image = np.repeat(np.arange(images, dtype=np.int32), rng.poisson(5, images))
    decoy = np.repeat(np.arange(images, dtype=np.int32), rng.poisson(20, images))
    n, m = len(image), len(decoy)
    return {"image": image, "cls": rng.integers(0, classes, n, dtype=np.int32), "ease": rng.normal(size=(n, 3)),
            "area": rng.lognormal(8, 1.2, n).astype(np.float32), "decoy": decoy, "looks": rng.normal(size=m),
            "decoy_cls": rng.integers(0, classes, m, dtype=np.int32),
            "decoy_area": rng.lognormal(8, 1.2, m).astype(np.float32)}  # fmt: skip


def detections(
    rng: np.random.Generator, t: dict[str, np.ndarray], images: int, classes: int, lost: float = 0.0
) -> Evidence:
    """Return what a model finds, without a share `lost` of the targets of class 3."""
    skill = (t["ease"] + LUCK * rng.normal(size=t["ease"].shape)) / np.hypot(1, LUCK)
    kept = (skill[:, 0] > -1.1) & ~((t["cls"] == 3) & (rng.random(len(t["cls"])) < lost))
    iou, conf = 0.78 + 0.12 * skill[:, 1], 1 / (1 + np.exp(-0.8 - skill[:, 2]))
    false = 1 / (1 + np.exp(2 - 0.9 * (t["looks"] + LUCK * rng.normal(size=len(t["looks"])))))
    hits = np.concatenate([iou[kept, None] >= IOUS, np.zeros((len(false), 10), bool)])
    about = {"task": "detect", "names": {i: f"c{i}" for i in range(classes)}}
    return Evidence(
        about, [str(i) for i in range(images)], np.concatenate([t["image"][kept], t["decoy"]]),
        np.concatenate([t["cls"][kept], t["decoy_cls"]]), np.concatenate([conf[kept], false]).astype(np.float32),
        np.concatenate([t["area"][kept], t["decoy_area"]]), t["image"], t["cls"], t["area"], {"box": hits},
    )  # fmt: skip


def main(draws: int = 100, images: int = 500, classes: int = 10, n: int = 1000) -> None:
    """Print the figures of so many draws."""
    flagged = alarms = held = 0
    rng = np.random.default_rng(10**6)
    t = targets(rng, 40 * images, classes)
    base, worse = (detections(rng, t, 40 * images, classes, lost) for lost in (0, 0.2))
    truth = changes(base, worse, n=2)[0].change
    level = changes(base, base, n=2)[0].before
    print(f"true mAP50-95 {level:.4f}, difference of the planted loss {truth:.4f}", flush=True)
    start = time.monotonic()
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        t = targets(rng, images, classes)
        base, same, worse = (detections(rng, t, images, classes, lost) for lost in (0, 0, 0.2))
        alarms += any(c.verdict == "worse" for c in changes(base, same, n=n, seed=seed))
        found = changes(base, worse, n=n, seed=seed)
        flagged += any(c.verdict == "worse" and c.name.endswith(".c3") for c in found)
        held += found[0].low <= truth <= found[0].high
    seconds = (time.monotonic() - start) / (2 * draws)
    print(f"{draws} draws of {images} images, {classes} classes, {n} resamples; {seconds:.1f} s a comparison")
    print(f"planted loss flagged {flagged}, false alarms {alarms}, true difference in the 95 % interval {held}")


if __name__ == "__main__":
    main(**{k: int(v) for k, v in (word.split("=") for word in sys.argv[1:])})
