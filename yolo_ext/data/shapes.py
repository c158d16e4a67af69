# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Generate the shapes set: a small detection set that is ours, needs no download and is not trivially easy."""

import json
from pathlib import Path

import cv2
import numpy as np
from ultralytics.utils import LOGGER, YAML

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.data.records import staged_folder

NAMES = ("circle", "square", "triangle")
MARK = "shapes.json"  # says which parameters made a folder, and that it is ours to replace
OURS = r"shapes\.json|data\.yaml|(images|labels)/(train|val)/\d{5}\.(jpg|txt|npy)|labels/(train|val)\.cache"


def make_shapes(out: Path, *, train: int = 160, val: int = 48, imgsz: int = 160, seed: int = 0) -> Path:
    """Write a detection set of circles, squares and triangles to a new or empty folder; return its data.yaml.

    The same arguments give the same bytes on the same versions of NumPy and OpenCV, and a set that is there is used
    again. UsageError where an argument is illegal, or `out` holds files of somebody else.
    """
    out = Path(out).resolve()
    given = {"train": train, "val": val, "imgsz": imgsz, "seed": seed}
    if train < 1 or val < 1 or imgsz < 64 or seed < 0:
        raise UsageError(f"Shapes set of {given} is not legal. Legal: train, val from 1, imgsz from 64, seed from 0.")
    wanted = {"version": 1, "path": str(out), **given}  # another version when the pictures change
    if _is_current(out, wanted):
        return out / "data.yaml"
    with staged_folder(out, OURS) as stage:
        for k, (split, count) in enumerate((("train", train), ("val", val))):
            images, labels = stage / "images" / split, stage / "labels" / split
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            for i in range(count):
                image, rows = draw_scene(np.random.default_rng([seed, k, i]), imgsz)
                jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
                (images / f"{i:05d}.jpg").write_bytes(jpeg.tobytes())
                text = "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in rows)
                (labels / f"{i:05d}.txt").write_text(text, encoding="utf-8")
        content = {"path": str(out), "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
        YAML.save(stage / "data.yaml", content)
        (stage / MARK).write_text(json.dumps(wanted), encoding="utf-8")
    LOGGER.info(f"Generated {train} train, {val} val images of {imgsz} px in '{out}'")
    return out / "data.yaml"


def _is_current(out: Path, wanted: dict[str, object]) -> bool:
    """Return whether `out` already holds the wanted set, refusing a folder that is not ours to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    with refused(f"'{out}' exists and is not a shapes set. Give a new or empty folder.", OSError, ValueError):
        made = json.loads((out / MARK).read_text(encoding="utf-8"))
    counts = {split: len(list((out / "labels" / split).glob("*.txt"))) for split in ("train", "val")}
    images = {split: len(list((out / "images" / split).glob("*.jpg"))) for split in counts}
    return made == wanted == {**wanted, **counts} == {**wanted, **images} and (out / "data.yaml").is_file()


def draw_scene(rng: np.random.Generator, imgsz: int) -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """Draw one picture; return it (imgsz, imgsz, 3), uint8, BGR, and rows (class, x, y, w, h) normalised to 0..1."""
    image = _background(rng, imgsz)
    for _ in range(rng.integers(0, 3)):
        _distractor(rng, image)
    boxes, rows = list[np.ndarray](), list[tuple[float, ...]]()
    for _ in range(rng.integers(2, 6)):
        cls = int(rng.integers(3))
        if (outline := _place(rng, cls, imgsz, boxes)) is not None:
            _paint(rng, image, outline)
            x0, y0, x1, y1 = boxes[-1] / imgsz
            rows.append((cls, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0))
    noise = rng.normal(0, rng.uniform(2, 8), image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), rows


def _background(rng: np.random.Generator, imgsz: int) -> np.ndarray:
    """Return smooth colour noise over a gradient, in half of the pictures with stripes, float32."""
    cells = int(rng.integers(2, 9))
    noise = (rng.uniform(60, 195, 3) + rng.uniform(-30, 30, (cells, cells, 3))).astype(np.float32)
    image = cv2.resize(noise, (imgsz, imgsz), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:imgsz, :imgsz].astype(np.float32) / imgsz
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    image += along[..., None] * rng.uniform(-15, 15, 3)
    if rng.random() < 0.5:
        waves = np.sin(along * rng.uniform(20, 90) + rng.uniform(0, 6))
        image += waves[..., None] * rng.uniform(-15, 15, 3)
    return np.clip(image, 0, 255).astype(np.float32)


def _distractor(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw a straight line or an open arc, which is no object."""
    size = image.shape[0]
    colour, width = rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 4))
    p, q = rng.integers(0, size, (2, 2)).tolist()
    if rng.random() < 0.6:
        cv2.line(image, p, q, colour, width, cv2.LINE_AA)
    else:
        axes = rng.integers(size // 12, size // 4, 2).tolist()
        start = float(rng.uniform(0, 360))
        cv2.ellipse(image, p, axes, float(rng.uniform(0, 180)), start, start + 130, colour, width, cv2.LINE_AA)


def _place(rng: np.random.Generator, cls: int, imgsz: int, boxes: list[np.ndarray]) -> np.ndarray | None:
    """Return the outline (N, 2) in pixels of a shape where there is room, and add its box; None after 30 tries."""
    for _ in range(30):
        outline = _outline(rng, cls) * imgsz * np.exp(rng.uniform(np.log(0.2), np.log(0.42)))
        extent = np.ptp(outline, axis=0)
        outline += rng.uniform(1, imgsz - 1 - extent) - outline.min(0)
        box = np.concatenate([outline.min(0), outline.max(0)])
        if all(_cover(box, other) < 0.3 for other in boxes):  # of the smaller box: IoU stays below 0.3 too
            boxes.append(box)
            return outline
    return None


def _cover(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection of two boxes as a share of the smaller one."""
    side = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    return float(side.prod() / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))


def _outline(rng: np.random.Generator, cls: int) -> np.ndarray:
    """Return a shape of about unit size, turned and slightly distorted, as polygon (N, 2)."""
    corners = (72, 4, 3)[cls]
    angles = np.arange(corners) * 2 * np.pi / corners
    if cls == 2:
        angles = angles + rng.uniform(-0.3, 0.3, 3)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * (0.5, 0.66, 0.58)[cls]
    turn = rng.uniform(0, 2 * np.pi)
    points[:, 0] *= rng.uniform(0.9, 1.1)
    return points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])


def _paint(rng: np.random.Generator, image: np.ndarray, outline: np.ndarray) -> None:
    """Paint a shape that is filled, striped or hollow, more or less opaque, in a colour apart from the background."""
    size = image.shape[0]
    points = np.rint(outline * 16).astype(np.int32)[None]  # 4 fractional bits
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, points, 255, cv2.LINE_AA, 4)
    under = image[mask > 127].mean(0)
    colour = rng.uniform(0, 255, 3)
    while np.abs(colour - under).mean() < 70:
        colour = rng.uniform(0, 255, 3)
    edge = np.zeros_like(mask)
    width = max(2, round(0.05 * np.ptp(outline, axis=0).min()))
    cv2.polylines(edge, points, True, 255, 2 * width, cv2.LINE_AA, 4)
    edge = np.minimum(edge, mask)  # the inner half only, so that the box stays tight
    style = rng.choice(["filled", "striped", "hollow"], p=[0.65, 0.2, 0.15])
    fill, rim = colour, colour if style == "hollow" else rng.uniform(0, 255, 3)
    if style == "striped":
        y, x = np.mgrid[:size, :size]
        waves = np.sin((x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) * rng.uniform(0.5, 1.2))
        fill = colour + waves[..., None] * rng.uniform(15, 40)
    opacity = rng.uniform(0.0, 0.3) if style == "hollow" else rng.uniform(0.75, 1.0)
    image += mask[..., None] / np.float32(255) * opacity * (fill - image)
    if style == "hollow" or rng.random() < 0.3:
        image += edge[..., None] / np.float32(255) * rng.uniform(0.8, 1.0) * (rim - image)
    np.clip(image, 0, 255, out=image)
