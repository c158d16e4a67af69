# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands that look at images: label, which writes what a model finds, and predict, which compares two models."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from yolo_ext.commands import (  # isort: skip
    BOTH, LOGGER, PLACE, PREDICTS, Count, Device, Names, Natural, Resume, Share, Weights, command, refuse_unread,
    some, tell_idle,
)  # fmt: skip
from yolo_ext.core.config import comma_list, listed
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.lock import hold
from yolo_ext.core.log import resumes
from yolo_ext.core.registry import suggest

TASKS = ("detect", "segment")
COMPARED = ("detect", "segment", "pose", "obb", "classify")  # tasks that `predict compare=` draws
WORDS = "base {base}, model {new} objects, {missed} missed, {added} added"
Images = Annotated[Any, lambda v: some(v, str, Path, int) or all(hasattr(i, "size") for i in listed(v) or [0]),
                   "a path, a list of them, or images in memory"]  # fmt: skip
OUTPUT = ("save", "show", "visualize", "project", "name")  # what the base model is not to write or open
IOU = 0.5  # two boxes of one class are the same object from this overlap on; `match_boxes` uses the same


@command("Label images with a model: labels, previews and a review sheet")
def label(
    model: Weights, source: Names, out: str | Path, *, format: str = "yolo", classes: Names = None,
    conf: Share = 0.25, iou: Share = 0.7, imgsz: Count | None = None, device: Device = None, beside: bool = False,
    overwrite: bool = False, save_conf: bool = False, previews: bool = True,
    files: Literal["link", "copy", "none"] | None = "link", review: Natural = 500, resume: Resume = False,
) -> dict[str, Any]:  # fmt: skip
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
        beside: Write the labels where training looks for them, or next to the images (VOC), not into `out`.
        overwrite: Replace labels that are there.
        save_conf: Append the confidence to YOLO rows.
        previews: Write a picture with boxes drawn for each image.
        files: Make `out` a dataset with the images in it: ``link`` or ``copy`` them, or ``none``.
        review: Pictures on the review sheet.

    Returns: The contents of `label.json`.
    Raises: `UsageError` if the model, an image source or an option is not usable.
    """
    given = {k: v for k, v in locals().items() if k != "resume"}
    from ultralytics import YOLO

    from yolo_ext import runs
    from yolo_ext.data.formats import FORMATS
    from yolo_ext.data.label import JOURNAL, find_images, label_images, preview_of, update
    from yolo_ext.data.records import quote
    from yolo_ext.reporting.pages import LOW, render_review
    from yolo_ext.reporting.tables import TEXT

    if format not in FORMATS:
        raise UsageError(f"Unknown label format '{format}'.{suggest(format, [*FORMATS])} Legal: {', '.join(FORMATS)}.")
    tell_idle([save_conf and format != "yolo" and "save_conf (only YOLO labels hold it)",
               beside and files == "copy" and "files (the labels lie where the images are)"])  # fmt: skip
    folder = Path(out).resolve()
    root, images = find_images(source, folder)
    task, names, size, channels = _about(model, imgsz)
    wanted = _choose(classes, names)
    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()[:16]
    settings = {"model": digest, "imgsz": size, "conf": conf, "iou": iou, "classes": wanted,
                "names": list(names.values())}  # fmt: skip
    options: dict[str, Any] = {"imgsz": size, "conf": conf, "iou": iou, "classes": wanted, "device": device}
    hold(folder)
    resumes("label", folder, JOURNAL)
    yolo = YOLO(str(model), task=task)
    done = label_images(
        images, folder, lambda image: _objects(yolo.predict(image, verbose=False, save=False, **options)[0]),
        names, {**settings, "options": runs.plain({**given, "out": folder})}, format=format,
        beside=beside or folder == root, overwrite=overwrite, save_conf=save_conf, previews=previews,
        files=files or "none", channels=channels)  # fmt: skip
    found = _summary(Path(model).name, format, settings, len(images), done, names)
    told = TEXT.get_template("labelled.txt.j2").render(found, low=LOW).strip()
    update(folder / "label.json", json.dumps(found, indent=2) + "\n")
    notes = [f"{found['model']} · {size} px · confidence from {conf} · {format} labels", told]
    records = [*done.records.values()]
    drawn = {name: preview_of(name) for name in images if previews}
    page = render_review(f"Review of {len(records)} labelled images", records, images, names, notes=notes,
                         skipped=done.skipped, previews=drawn, limit=review)  # fmt: skip
    update(folder / "review.html", page)
    if done.skipped:
        LOGGER.warning(f"Not read: {quote([f'{name} ({why})' for name, why in done.skipped.items()])}")
    LOGGER.info(TEXT.get_template("label.txt.j2").render(found, told=told, done=done, low=LOW).rstrip())
    runs.saved(folder, f"open {folder / 'review.html'} in a browser")
    return {**found, "run_dir": str(folder)}


def _about(model: str | Path, imgsz: int | None) -> tuple[str, dict[int, str], Any, int]:
    """Return task, class names, image size and channels of a model after checking that it finds boxes or polygons."""
    from yolo_ext import stock
    from yolo_ext.deployment.detector import read_metadata
    from yolo_ext.deployment.runtime import session

    suffix = Path(model).suffix
    if suffix not in (".pt", ".onnx"):
        raise UsageError(f"Model '{model}' cannot label images. Legal: a trained .pt or an .onnx.")
    if suffix == ".pt":
        net, ckpt = stock.load_model(model)
        task, names, channels = stock.task_of(net), net.names, stock.input_channels(net)
        size = stock.image_size(net, ckpt, imgsz)
    else:
        opened = session(model)
        meta = read_metadata(opened, model)
        task, names, size = meta["task"], meta["names"], imgsz or meta["imgsz"] or 640
        batch, channels, *fixed = opened.get_inputs()[0].shape
        if isinstance(batch, int) and batch != 1:
            raise UsageError(f"'{model}' is fixed to batch {batch}; labelling takes images one by one. Export it anew.")
        if imgsz and all(isinstance(s, int) for s in fixed) and [imgsz, imgsz] != fixed:
            raise UsageError(f"'imgsz={imgsz}' is illegal: '{model}' is fixed to {fixed}. Leave imgsz out.")
    if task not in TASKS:
        raise UsageError(f"'{model}' is a '{task}' model. Labelling takes {' and '.join(TASKS)} models.")
    return task, {int(i): str(n) for i, n in names.items()}, size, channels


def _choose(classes: Any, names: dict[int, str]) -> list[int] | None:
    """Read classes given as names or indices."""
    from yolo_ext.data.records import quote

    if classes is None:
        return None
    texts = comma_list(classes)
    by_name = {str(i): i for i in names} | {n: i for i, n in names.items()}
    if unknown := [t for t in texts if t not in by_name]:
        hint = suggest(unknown[0], [*names.values()])
        raise UsageError(f"Unknown classes {quote(unknown)}.{hint} Legal: {quote([*names.values()], 30)}, or indices.")
    return sorted({by_name[t] for t in texts})


def _objects(result: Any) -> list[dict[str, Any]]:
    """Return the objects of an Ultralytics result, the most certain first; boxes without area are left out."""
    import numpy as np

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
    model: str, format: str, settings: dict[str, Any], images: int, done: Any, names: dict[int, str]
) -> dict[str, Any]:
    """Return the contents of `label.json`, which tell nothing of this run only."""
    from yolo_ext.reporting.pages import LOW, class_counts, in_order, lowest

    records = done.records.values()
    review = [{"image": r["image"], "lowest": low} for r in in_order(records) if (low := lowest(r)) and low < LOW]
    empty = sum(not r["objects"] for r in records)
    return {"model": model, "format": format, "settings": settings, "images": images, "labelled": len(records),
            "nothing_found": empty, "classes": class_counts(records, names), "review": review, "kept": done.kept,
            "skipped": done.skipped}  # fmt: skip


@command("Run a model on images; compare=base.pt marks what the base finds differently")
def predict(model: Weights, compare: Weights, source: Images, **native: Any) -> dict[str, Any]:
    """Predict as `yolo predict` does, and draw the detections of a base model beside those of the model.

    Args:
        model: ``.pt``, ``.onnx`` or another format of Ultralytics.
        compare: The base model; without it the command is Ultralytics' own.
        source: Image, video, folder, glob or list of images.
        native: `project`, `name`, `exist_ok`, `save_dir` for the pictures, and any prediction argument of Ultralytics,
            which both models take.

    Returns: The contents of ``compare.json``: `model`, `compare`, `iou`, `total`, and counts for each picture.
    Raises: `UsageError` if a model or the source is not usable, or the models do not fit together.
    """
    from yolo_ext import runs
    from yolo_ext.reporting.figures import side_by_side

    refuse_unread("predict compare=", native, lambda key: key not in (*PREDICTS, *BOTH, *PLACE))
    new, base = _load(model, native), _load(compare, native)
    if "classify" in {new.task, base.task} and new.task != base.task:
        raise UsageError(f"'{model}' is a '{new.task}' model, '{compare}' a '{base.task}' model. Give two of one task.")
    rows: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    options = {"save": True, "verbose": False, **native}  # the command line of Ultralytics saves, too
    if {Path(model).suffix, Path(compare).suffix} != {".pt"}:
        options = {"rect": False, **options}  # a file of fixed size sees the whole frame, so both have to
    quiet = {k: v for k, v in options.items() if not k.startswith(OUTPUT)} | {"verbose": False}
    for result in new.predict(source, stream=True, **options):
        reference = base.predict(result.orig_img, **{**quiet, "imgsz": new.predictor.imgsz})[0]
        if {*reference.names.values()} != {*result.names.values()}:  # they may be numbered otherwise
            both = " and ".join(", ".join(r.names.values()) for r in (reference, result))
            raise UsageError(f"The models have different classes: {both}. Compare models of one dataset.")
        folder = Path(new.predictor.save_dir)
        name = f"{_free_stem(Path(result.path).stem, taken)}.jpg"
        counts = side_by_side(reference, result, folder / "compare" / name)
        rows.append({"source": result.path, "picture": name, **counts})
        LOGGER.info(f"{name}: {WORDS.format(**counts)}")
    if not rows:
        raise UsageError(f"No readable images found in 'source={source}'.")
    total = {k: sum(row[k] for row in rows) for k in counts}
    found = {"model": model, "compare": compare, "iou": IOU, "total": total, "images": rows}
    runs.write_json(folder / "compare.json", found)
    LOGGER.info(f"Total of {len(rows)} images: {WORDS.format(**total)}")
    runs.saved(folder / "compare")
    return {**found, "run_dir": str(folder)}


def _load(path: str | Path, native: dict[str, Any]) -> Any:
    """Return the YOLO, whose file has to be there: Ultralytics would look for a missing one on the net."""
    from ultralytics import YOLO

    from yolo_ext.deployment.runtime import describe

    if not Path(path).exists():
        raise UsageError(f"Model '{path}' does not exist. Give a file such as best.pt or best_int8.onnx.")
    if Path(path).suffix == ".onnx":
        describe(path)  # says what is no YOLO
    with refused(f"Model '{path}' cannot be loaded ({{why}})."):  # whatever unpickling and parsing raise
        model = YOLO(str(path), task=native.get("task"))
    if model.task not in COMPARED:
        raise UsageError(f"'{path}' is a '{model.task}' model. 'compare' takes {', '.join(COMPARED)}.")
    return model


def _free_stem(stem: str, taken: Counter[str]) -> str:
    """Return a file stem that no other picture has: those of two folders, or the frames of a video, may share one."""
    taken[stem] += 1
    return stem if taken[stem] == 1 else _free_stem(f"{stem}-{taken[stem]}", taken)
