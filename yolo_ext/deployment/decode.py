# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""From raw head outputs to detections in NumPy, step by step as Ultralytics' predictors do it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np

Image: TypeAlias = str | Path | np.ndarray  # file, or (height, width, C), uint8
Size: TypeAlias = int | Sequence[int]  # side of a square, or height and width, in pixels
MAX_CANDIDATES = 30000  # Ultralytics' max_nms
CLASS_OFFSET = 7680  # px between the classes, so that boxes of two classes never overlap; Ultralytics' max_wh
BLOCK = 1024  # columns of the overlap matrix at a time
OF_BOXES = ("boxes", "scores", "classes", "masks", "keypoints", "rboxes")  # fields with a row for each box
SHOWN = 5  # classes of a classifier in a summary, as Ultralytics has them, and boxes in a text


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """What was found in one picture, the best score first; all in pixels of the picture.

    Its boxes can be counted (`len`), gone through and chosen by number, slice or mask; each choice is Detections again.
    """

    boxes: np.ndarray  # x1, y1, x2, y2 (N, 4), float32
    scores: np.ndarray  # confidences (N,), float32
    classes: np.ndarray  # class indices (N,), int64
    names: dict[int, str]  # class names by class index
    shape: tuple[int, int]  # height and width of the picture
    masks: np.ndarray | None = None  # segment: one for each box (N, height, width), bool
    keypoints: np.ndarray | None = None  # pose: x, y and, where the model has it, visibility (N, K, 2 or 3)
    rboxes: np.ndarray | None = None  # OBB: x, y, w, h and radians (N, 5); `boxes` lie upright around them
    probs: np.ndarray | None = None  # classify: probability of each class; there are no boxes then
    source: Image | None = None  # the picture, as it was given

    def __len__(self) -> int:
        """Return the number of boxes."""
        return len(self.boxes)

    def __getitem__(self, chosen: Any) -> "Detections":
        """Return some of the boxes, by number, slice, mask or list of numbers, with what belongs to them."""
        rows = np.atleast_1d(np.arange(len(self))[chosen])
        return replace(self, **{k: getattr(self, k)[rows] for k in OF_BOXES if getattr(self, k) is not None})

    def __iter__(self) -> Iterator["Detections"]:
        """Go through the boxes one by one."""
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        """Return names and scores of the first few."""
        found = [f"{d['name']} {d['confidence']:.2f}" for d in self[:SHOWN].summary()]
        more = [f"{len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return f"Detections({', '.join(found + more) or 'nothing'})"

    def summary(self) -> list[dict[str, Any]]:
        """Return what was found as plain values, by the keys of Ultralytics' `Results.summary`.

        Returns: For each box its `name`, `class`, `confidence` and `box`, upright: x1, y1, x2, y2 in pixels; of a
            classifier the five likeliest classes.
        """
        classes, scores = self.classes, self.scores
        if self.probs is not None:
            classes = np.argsort(-self.probs, kind="stable")[:SHOWN]
            scores = self.probs[classes]
        found = [{"name": self.names[c], "class": c, "confidence": round(s, 5)}
                 for c, s in zip(classes.tolist(), scores.tolist())]  # fmt: skip
        for row, box in zip(found, self.boxes.tolist()):
            row["box"] = {k: round(v, 5) for k, v in zip(("x1", "y1", "x2", "y2"), box)}
        return found

    def plot(self, **options: Any) -> np.ndarray:
        """Draw what was found on a copy of the picture with Ultralytics, which has to be installed for it.

        Args:
            options: Those of Ultralytics' `Results.plot`, such as `line_width=1` or `conf=False`.
        Returns: The picture (height, width, 3), uint8, BGR.
        """
        from yolo_ext.stock.load import as_results

        return as_results(self).plot(**options)


def height_width(imgsz: Size) -> tuple[int, int]:
    """Return height and width in pixels; one number means a square."""
    h, w = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    return int(h), int(w)


def full_batches(x: np.ndarray, size: int) -> np.ndarray:
    """Return images (B, C, H, W), the last one repeated until they fill batches of a static graph's size."""
    missing = -len(x) % size
    return np.concatenate([x, np.repeat(x[-1:], missing, 0)]) if missing else x


def fit(inside: Sequence[int], image: Sequence[int]) -> tuple[float, float, int, int]:
    """Return scale in x and y, left and top border in px of a letterboxed picture, from (height, width) of both."""
    gain = min(inside[0] / image[0], inside[1] / image[1])
    h, w = (max(round(side * gain), 1) for side in image[:2])
    return w / image[1], h / image[0], round((inside[1] - w) / 2 - 0.1), round((inside[0] - h) / 2 - 0.1)


def dense(output: np.ndarray, nc: int, conf: float, *, rotated: bool) -> np.ndarray:
    """Return anchors above a threshold (N, 6 + extras): x1, y1, x2, y2 (rotated: x, y, w, h), score, class, extras."""
    rows = output[:, output[4 : 4 + nc].max(0) > conf].T
    scores = rows[:, 4 : 4 + nc]
    boxes = rows[:, :4] if rotated else corners(rows[:, :4])
    best = scores.argmax(1)[:, None].astype(rows.dtype)
    return np.concatenate([boxes, scores.max(1, keepdims=True), best, rows[:, 4 + nc :]], 1)


def queries(output: np.ndarray) -> np.ndarray:
    """Return RT-DETR's rows (N, 6), the best first: box x, y, w, h in shares of the picture, score, class."""
    if output.shape[1] == 6 and not (output[:, 5] % 1).any():
        return output
    # Before 8.4.150 or so, its head gives the score of each class (N, 4 + nc) and leaves the choice to the reader.
    best = output[:, 4:].argmax(1)[:, None].astype(output.dtype)
    rows = np.concatenate([output[:, :4], output[:, 4:].max(1, keepdims=True), best], 1)
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def suppress(rows: np.ndarray, iou: float, max_det: int, *, rotated: bool) -> np.ndarray:
    """Return the rows of `dense` that survive class-aware NMS, the best first; rotated ones end with their angle."""
    rows = rows[np.argsort(-rows[:, 4], kind="stable")[:MAX_CANDIDATES]]
    offset: np.ndarray = rows[:, 5:6] * CLASS_OFFSET
    if rotated:
        boxes = np.concatenate([rows[:, :2] + offset, rows[:, 2:4], rows[:, -1:]], 1)
        return rows[_unrivalled(boxes, iou)][:max_det]
    return rows[_greedy(rows[:, :4] + offset, iou, max_det)]


def _greedy(boxes: np.ndarray, iou: float, max_det: int) -> list[int]:
    """Return the indices of boxes (N, 4), sorted by score, that no kept box before them overlaps."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left, kept = np.arange(len(boxes)), list[int]()
    while left.size and len(kept) < max_det:
        i, left = left[0], left[1:]
        kept.append(int(i))
        top, bottom = np.maximum(boxes[i, :2], boxes[left, :2]), np.minimum(boxes[i, 2:], boxes[left, 2:])
        shared = (bottom - top).clip(0).prod(1)
        with np.errstate(invalid="ignore"):  # two boxes without area overlap by NaN, and both stay
            left = left[~(shared / (area[i] + area[left] - shared) > iou)]
    return kept


def _unrivalled(boxes: np.ndarray, iou: float) -> np.ndarray:
    """Return for each rotated box (N, 5), sorted by score, whether no box before it, kept or not, overlaps it."""
    index: np.ndarray = np.arange(len(boxes))
    keep = index >= 0
    for start in range(0, len(boxes), BLOCK):
        part = slice(start, start + BLOCK)
        rival = prob_iou(boxes[: start + BLOCK], boxes[part]) > iou
        keep[part] = ~(rival & (index[: start + BLOCK, None] < index[part])).any(0)
    return keep


def prob_iou(a: np.ndarray, b: np.ndarray, eps: float = 1e-7) -> np.ndarray:
    """Return the overlaps (N, M), 0..1, of boxes x, y, w, h, angle (N, 5) and (M, 5) as Gaussians: ProbIoU (2021)."""

    def covariance(box: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        w, h, cos, sin = box[:, 2] ** 2 / 12, box[:, 3] ** 2 / 12, np.cos(box[:, 4]), np.sin(box[:, 4])
        return w * cos**2 + h * sin**2, w * sin**2 + h * cos**2, (w - h) * cos * sin

    (a1, b1, c1), (a2, b2, c2) = ([v[:, None] for v in covariance(a)], covariance(b))
    dx, dy = a[:, None, 0] - b[:, 0], a[:, None, 1] - b[:, 1]
    u, v, w = a1 + a2, b1 + b2, c1 + c2
    det = u * v - w**2
    own = np.sqrt((a1 * b1 - c1**2).clip(0) * (a2 * b2 - c2**2).clip(0))
    distance = (u * dy**2 + v * dx**2) / (det + eps) / 4 - w * dx * dy / (det + eps) / 2
    distance += np.log(det / (4 * own + eps) + eps) / 2
    return 1 - np.sqrt(1 - np.exp(-distance.clip(eps, 100)) + eps)


def corners(boxes: np.ndarray) -> np.ndarray:
    """Turn boxes x, y, w, h (N, 4) into x1, y1, x2, y2."""
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


def around(rboxes: np.ndarray) -> np.ndarray:
    """Return the upright boxes x1, y1, x2, y2 (N, 4) around rotated ones (N, 5)."""
    turn = np.abs(np.stack([np.cos(rboxes[:, 4]), np.sin(rboxes[:, 4])], 1))
    size = np.abs(rboxes[:, 2:4])
    sides = (size * turn).sum(1), (size * turn[:, ::-1]).sum(1)
    return corners(np.concatenate([rboxes[:, :2], np.stack(sides, 1)], 1))


def masks(protos: np.ndarray, weights: np.ndarray, boxes: np.ndarray, image: Sequence[int]) -> np.ndarray:
    """Return masks (N, height, width) cut to boxes (N, 4), of prototypes (C, h, w) at a quarter of the input's size."""
    c, *small = protos.shape
    height, width = image[:2]
    gain = min(4 * small[0] / height, 4 * small[1] / width)
    border = [4 * s - max(round(side * gain), 1) for s, side in zip(small, (height, width))]
    odd = border[0] | border[1]
    up = 4 // math.gcd(4, odd | odd // 2)  # the smallest enlargement that puts the border on whole pixels
    size = [up * s for s in small]
    sx, sy, left, top = fit(size, (height, width))
    inside = slice(top, top + round(sy * height)), slice(left, left + round(sx * width))
    logits = (weights @ protos.reshape(c, -1)).reshape(-1, *small)
    found: np.ndarray = np.zeros((len(weights), height, width), bool)
    y, x = np.arange(height)[:, None], np.arange(width)
    for mask, logit, (x1, y1, x2, y2) in zip(found, logits, boxes):
        part = cv2.resize(logit, size[::-1], interpolation=cv2.INTER_LINEAR)[inside]
        mask[:] = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) > 0
        mask &= (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return found
