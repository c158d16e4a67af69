# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The command `label`: labels, previews and a review sheet for images, from a trained model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.utils import LOGGER

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.data.label import PREVIEWS, Labelled, Predict, find_images, label_images, update
from yolo_ext.data.records import quote
from yolo_ext.data.write import FORMATS
from yolo_ext.reporting.review import LOW, class_counts, in_order, lowest, render_review
from yolo_ext.reporting.tables import align
from yolo_ext.stock.load import load_model

TASKS = ("detect", "segment")


def label(
    model: str | Path,
    source: Any,
    out: str | Path,
    *,
    format: str = "yolo",
    classes: Any = None,
    conf: float = 0.25,
    iou: float = 0.7,
    imgsz: int | None = None,
    device: Any = None,
    beside: bool = False,
    overwrite: bool = False,
    save_conf: bool = False,
    previews: bool = True,
    files: str | None = "link",
    review: int = 500,
) -> dict[str, Any]:
    """Label images with a trained model and write what a person needs to review the labels.

    Args:
        model: Detect or segment model, ``.pt`` or ``.onnx``.
        source: Image, folder, glob, text file with one path per line, or a list of these.
        out: Folder for labels, previews, `review.html` and `label.json`; it may hold an unfinished run.
        format: ``yolo``, ``voc`` or ``coco``.
        classes: Classes to label, names or indices, a list or separated by commas; all by default. Labels keep the
            class indices of the model.
        conf: Lowest confidence of an object.
        iou: IoU above which the less certain of two objects of a class is dropped.
        imgsz: Image size in pixels; that of the training or of the ONNX file by default.
        device: Device as Ultralytics takes it.
        beside: Write the labels where training looks for them, or next to the images (VOC), not into `out`.
        overwrite: Replace labels that are there.
        save_conf: Append the confidence to YOLO rows.
        previews: Write a picture with boxes drawn for each image.
        files: Make `out` a dataset with the images in it: ``link`` or ``copy`` them, or ``none``.
        review: Pictures on the review sheet.

    Returns:
        The contents of `label.json`.

    Raises:
        UsageError: The model, an image source or an option is not usable.
    """
    if format not in FORMATS:
        raise UsageError(f"Unknown label format '{format}'.{suggest(format, [*FORMATS])} Legal: {', '.join(FORMATS)}.")
    if files not in ("link", "copy", "none", None):
        raise UsageError(f"'files={files}' is illegal. Legal: link, copy, none.")
    _check_shares(conf=conf, iou=iou)
    _check_flags(beside=beside, overwrite=overwrite, save_conf=save_conf, previews=previews)
    folder = Path(out).resolve()
    root, images = find_images(source, folder)
    about = _about(model, imgsz)
    names = about["names"]
    wanted = _choose(classes, names)
    settings = {"model": _digest(model), "imgsz": about["imgsz"], "conf": conf, "iou": iou, "classes": wanted,
                "names": list(names.values())}  # fmt: skip
    predict = _predictor(model, about, conf=conf, iou=iou, classes=wanted, device=device)
    with stock.no_autoinstall():
        done = label_images(
            images, folder, predict, names, settings, format=format, beside=beside or folder == root,
            overwrite=overwrite, save_conf=save_conf, previews=previews, files=files or "none",
        )  # fmt: skip
    found = _summary(Path(model).name, format, settings, len(images), done, names)
    update(folder / "label.json", json.dumps(found, indent=2) + "\n")
    notes = [f"{found['model']} · {about['imgsz']} px · confidence from {conf} · {format} labels", _counts(found)]
    page = render_review(
        f"Review of {len(done.records)} labelled images", list(done.records.values()), images, names, notes=notes,
        skipped=done.skipped, previews=PREVIEWS if previews else "", limit=review,
    )  # fmt: skip
    update(folder / "review.html", page)
    _report(found, done, folder)
    return found


def _check_shares(**values: Any) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UsageError(f"'{key}={value}' is illegal. Legal: a number from 0 to 1.")


def _check_flags(**values: Any) -> None:
    for key, value in values.items():
        if not isinstance(value, bool):
            raise UsageError(f"'{key}={value}' is illegal. Legal: True or False.")


def _digest(model: str | Path) -> str:
    with Path(model).open("rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _about(model: str | Path, imgsz: int | None) -> dict[str, Any]:
    """Return `task`, `names` and `imgsz` of a model after checking that it finds boxes or polygons."""
    if Path(model).suffix == ".onnx":
        found = _about_onnx(model, imgsz)
    elif Path(model).suffix == ".pt":
        net, ckpt = load_model(model)
        trained = (ckpt.get("train_args") or {}).get("imgsz")
        found = {"task": stock.task_of(net), "names": net.names, "imgsz": imgsz or trained or 640}
    else:
        raise UsageError(f"Model '{model}' cannot label images. Legal: a trained .pt or an .onnx.")
    if found["task"] not in TASKS:
        raise UsageError(f"'{model}' is a '{found['task']}' model. Labelling takes {' and '.join(TASKS)} models.")
    return {**found, "names": {int(i): str(n) for i, n in found["names"].items()}}


def _about_onnx(model: str | Path, imgsz: int | None) -> dict[str, Any]:
    from yolo_ext.deployment.runtime import metadata, session

    opened = session(model)
    meta = metadata(opened)
    if not isinstance(meta.get("names"), dict):
        raise UsageError(f"'{model}' carries no Ultralytics metadata. Export it with yolo-ext or Ultralytics.")
    batch, _, *size = opened.get_inputs()[0].shape
    if isinstance(batch, int) and batch != 1:
        raise UsageError(f"'{model}' is fixed to batch {batch}; labelling runs one image at a time. Export it anew.")
    fixed = all(isinstance(s, int) for s in size)
    if fixed and imgsz and [imgsz, imgsz] != size:
        raise UsageError(f"'imgsz={imgsz}' is illegal: '{model}' is fixed to {size}. Leave imgsz out.")
    return {"task": meta.get("task"), "names": meta["names"], "imgsz": imgsz or meta.get("imgsz") or 640}


def _choose(classes: Any, names: dict[int, str]) -> list[int] | None:
    """Read classes given as names or indices."""
    if classes is None:
        return None
    items = (
        classes.split(",") if isinstance(classes, str) else classes if isinstance(classes, (list, tuple)) else [classes]
    )
    by_name = {**{str(i): i for i in names}, **{n: i for i, n in names.items()}}
    texts = [str(i).strip() for i in items]
    if unknown := [t for t in texts if t not in by_name]:
        hint = suggest(unknown[0], [*names.values()])
        raise UsageError(f"Unknown classes {quote(unknown)}.{hint} Legal: {quote([*names.values()], 30)}, or indices.")
    return sorted({by_name[t] for t in texts})


def _predictor(model: str | Path, about: dict[str, Any], **options: Any) -> Predict:
    """Return a function from an image to its objects, through Ultralytics' own predictor."""
    from ultralytics import YOLO

    with stock.no_autoinstall():
        yolo = YOLO(str(model), task=about["task"])

    def predict(image: np.ndarray) -> list[dict[str, Any]]:
        result = yolo.predict(image, imgsz=about["imgsz"], verbose=False, save=False, **options)[0]
        return _objects(result)

    return predict


def _objects(result: Any) -> list[dict[str, Any]]:
    """Return the objects of an Ultralytics result, the most certain first; boxes without area are left out."""
    found = []
    polygons = result.masks.xy if result.masks is not None else None
    for i, (*xyxy, confidence, cls) in enumerate(result.boxes.data.cpu().tolist()):
        box = [round(v, 2) for v in xyxy]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        o = {"class": int(cls), "confidence": round(confidence, 4), "box": box}
        if polygons is not None:
            x0, y0, x1, y1 = box
            points = polygons[i] if len(polygons[i]) > 2 else np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
            h, w = result.orig_shape
            o["polygon"] = [round(float(v), 2) for v in np.clip(points, 0, (w, h)).flatten()]
        found.append(o)
    return found


def _summary(
    model: str, format: str, settings: dict[str, Any], images: int, done: Labelled, names: dict[int, str]
) -> dict[str, Any]:
    """Return the contents of `label.json`, which tell nothing of this run that the next one would not tell."""
    records = done.records.values()
    review = [{"image": r["image"], "lowest": low} for r in in_order(records) if (low := lowest(r)) and low < LOW]
    return {
        "model": model,
        "format": format,
        "settings": settings,
        "images": images,
        "labelled": len(records),
        "nothing_found": sum(not r["objects"] for r in records),
        "classes": class_counts(records, names),
        "review": review,
        "kept": done.kept,
        "skipped": done.skipped,
    }


def _counts(found: dict[str, Any]) -> str:
    parts = {
        f"{len(found['review'])} with a box below {LOW}": found["review"],
        f"{found['nothing_found']} with nothing found": found["nothing_found"],
        f"{len(found['kept'])} keep a label that was there or was edited": found["kept"],
        f"{len(found['skipped'])} cannot be read": found["skipped"],
    }
    return ", ".join([f"{found['labelled']} of {found['images']} images labelled", *(p for p, n in parts.items() if n)])


def _report(found: dict[str, Any], done: Labelled, folder: Path) -> None:
    rows = [(n, c["boxes"], c["images"], f"{c['mean_confidence']:.2f}", c["low"]) for n, c in found["classes"].items()]
    LOGGER.info("\n" + align(rows, ["Class", "Boxes", "Images", "Mean conf", f"Below {LOW}"]))
    LOGGER.info(_counts(found))
    if done.skipped:
        LOGGER.warning(f"Not read: {quote([f'{name} ({why})' for name, why in done.skipped.items()])}")
    LOGGER.info(f"{done.predicted} images predicted, {done.written} labels written in this run")
    LOGGER.info(f"Results saved to {folder}; review {folder / 'review.html'}")
