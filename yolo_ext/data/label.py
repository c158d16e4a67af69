# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Label images with a model: labels that are there are kept, and a run that was stopped goes on where it was.

Detections are kept in a journal, one record per line after a line of settings, so a second run predicts nothing. A
record is a dict: `image` (path relative to the source), `size` (width and height in pixels) and `objects`, each with
`class`, `confidence`, `box` (x1, y1, x2, y2 in pixels) and, from a segmentation model, `polygon` (x, y, x, ...).
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from ultralytics.utils import LOGGER, TQDM, YAML
from ultralytics.utils.plotting import Annotator, colors

from yolo_ext.checkpoint import atomic_write, whole
from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import attempt, class_names, image_probe
from yolo_ext.data.coco import coco_store
from yolo_ext.data.formats import FORMATS, Format
from yolo_ext.data.records import Store, is_image, link_or_copy, list_images
from yolo_ext.stock import load
from yolo_ext.stock.load import IMG_FORMATS, img2label_paths

Predict = Callable[[np.ndarray], list[dict[str, Any]]]  # from an image (H, W, channels) to the objects of a record
Names = Mapping[int, str]  # class names by class index
JOURNAL, PREVIEWS, RECORD = "detections.jsonl", "previews", {"image", "stamp", "size", "objects"}


@dataclass
class Labelled:
    """What a run found and did."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # by image, where its label is the model's
    kept: list[str] = field(default_factory=list)  # images whose label was there before, or was edited
    skipped: dict[str, str] = field(default_factory=dict)  # image to the reason why it cannot be read
    written: int = 0  # labels, by this run
    predicted: int = 0  # images, by this run


@dataclass(frozen=True)
class _Job:
    """What every step of a run needs."""

    out: Path
    predict: Predict
    names: Names
    format: Format
    store: Store
    known: dict[str, dict[str, Any]]
    journal: TextIO
    overwrite: bool
    save_conf: bool
    previews: bool
    files: str
    channels: int
    done: Labelled


def find_images(source: Any, out: Path) -> tuple[Path, dict[str, Path]]:
    """Return the folder where a source starts, and its images but those that runs wrote to `out`, by relative path."""
    sources = [Path(str(s)).absolute() for s in (source if isinstance(source, (list, tuple)) else [source])]
    sources = [s.resolve() if s.is_dir() else s for s in sources]
    files = sorted({f.absolute() for f in list_images(sources)})
    if not files:
        raise UsageError(f"No images in '{source}'. Legal: {', '.join(sorted(IMG_FORMATS))}.")
    roots = {root for s in sources if (root := _start(s))} or {f.parent for f in files}
    root = Path(os.path.commonpath([*roots, *(f.parent for f in files)]))
    within = out != root and out.is_relative_to(root)
    if within and any(s.is_dir() for s in sources):
        raise UsageError(f"Output folder '{out}' lies inside the source '{root}'. Give one outside it, or out={root}.")
    for name in {f.images for f in FORMATS.values()}:
        root = out / name if root.is_relative_to(out / name) else root  # labels then mirror the folders of a dataset
    own = out if within else out / PREVIEWS
    return root, {f.relative_to(root).as_posix(): f for f in files if not f.is_relative_to(own)}


def preview_of(image: str) -> str:
    """Return where the preview of an image lies in the output, a JPEG whatever the image is."""
    return f"{PREVIEWS}/{image}" if image.lower().endswith((".jpg", ".jpeg")) else f"{PREVIEWS}/{image}.jpg"


def _start(source: Path) -> Path | None:
    """Return the folder where a source starts, None for a text file of paths."""
    if source.is_file():
        return source.parent if is_image(source) else None
    fixed = source if source.is_dir() else Path(re.split(r"[*?[]", str(source))[0])
    return fixed if fixed.is_dir() else fixed.parent


def label_images(
    images: Mapping[str, Path], out: Path, predict: Predict, names: Names, settings: Mapping[str, Any], *,
    format: str = "yolo", beside: bool = False, overwrite: bool = False, save_conf: bool = False,
    previews: bool = True, files: str = "link", channels: int = 3,
) -> Labelled:  # fmt: skip
    """Label images, by their relative path, into `out`; the options are those of the command `label`.

    Every file is written whole, and nothing that is there changes unless `overwrite`. UsageError where two images share
    a label, or the folder holds other settings, other class names or a broken COCO file.
    """
    kind, journal = FORMATS[format], out / JOURNAL
    out.mkdir(parents=True, exist_ok=True)
    files = "none" if beside else files
    dataset = format == "yolo" and files != "none"
    if dataset and (out / "data.yaml").is_file():
        there, ours = class_names(YAML.load(out / "data.yaml").get("names")), list(names.values())
        if there != ours:
            told = f"Classes {there} of '{out}' and {ours} of the model must not be mixed."
            raise UsageError(f"{told} Give another out=.")
    known = _read_journal(journal, settings, overwrite)
    store = _open_store(images, out, kind, names, beside)
    done = Labelled()
    update(journal, _journal_text(settings, known))  # without what a killed run left half written
    with journal.open("a", encoding="utf-8") as file:
        job = _Job(out, predict, names, kind, store, known, file, overwrite, save_conf, previews, files, channels, done)
        for name, path in TQDM(images.items(), "Labelling"):
            _label(job, name, path)
    store.close()
    update(journal, _journal_text(settings, known))  # sorted: the bytes do not tell how often a run was stopped
    if dataset and not (out / "data.yaml").exists():
        content: dict[str, Any] = {"path": str(out), "train": kind.images, "val": kind.images, "names": dict(names)}
        content |= {"channels": channels} if channels != 3 else {}
        with whole(out / "data.yaml") as part:
            YAML.save(part, content)
    return done


def _label(job: _Job, name: str, path: Path) -> None:
    """Label one image, from the journal where it was seen before."""
    existing = job.store.read(name)
    stamp, problem = attempt(lambda p: [(s := p.stat()).st_size, s.st_mtime_ns], path)
    record, image, preview = job.known.get(name), None, job.out / preview_of(name)
    new = not problem and (record is None or record["stamp"] != stamp)
    if new and existing is not None and not job.overwrite:
        job.done.kept.append(name)
        return
    if new:
        image, problem = attempt(partial(read_image, channels=job.channels), path)
    if image is not None:
        preview.unlink(missing_ok=True)  # of an earlier picture or setting
        record = {"image": name, "stamp": stamp, "size": [*image.shape[1::-1]], "objects": job.predict(image)}
        job.known[name] = record
        job.journal.write(json.dumps(record) + "\n")
        job.journal.flush()
        job.done.predicted += 1
    if record is None or problem:
        job.done.skipped[name] = problem
        return
    text = job.format.render(record, job.names, job.save_conf)
    if existing is not None and existing != text and not job.overwrite:
        job.done.kept.append(name)
        return
    if existing != text:
        job.store.write(name, text)
        job.done.written += 1
    job.done.records[name] = record
    target = job.out / job.format.images / name
    if job.files != "none" and not target.exists():
        with whole(target) as part:
            link_or_copy(path, part, job.files == "link")
    if job.previews and not preview.exists():
        atomic_write(preview, draw(read_image(path) if image is None else image, record["objects"], job.names))


def read_image(path: Path, channels: int = 3) -> np.ndarray:
    """Return an image (H, W, C), upright, as the predictor sees it, or raise ValueError; nothing is fetched."""
    image_probe(path)
    try:
        image = load.read_image(path, channels)
    except cv2.error as e:
        raise ValueError(f"cannot be decoded ({e.err})") from e
    if image is None:
        raise ValueError("cannot be decoded")
    return image


def draw(image: np.ndarray, objects: list[dict[str, Any]], names: Names) -> bytes:
    """Draw objects on a copy of an image, large ones reduced, and return it as JPEG."""
    scale = min(1.0, 1280 / max(image.shape[:2]))  # px of the longer side
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    annotator = Annotator(np.ascontiguousarray(image).copy())
    for o in objects:
        flat = [v * scale for v in o.get("polygon") or o["box"]]
        shape = [[x, y] for x, y in zip(flat[::2], flat[1::2])] if o.get("polygon") else flat
        annotator.box_label(shape, f"{names[o['class']]} {o['confidence']:.2f}", colors(o["class"], bgr=True))
    return cv2.imencode(".jpg", annotator.result(), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def _open_store(images: Mapping[str, Path], out: Path, kind: Format, names: Names, beside: bool) -> Store:
    """Return the store that labels of this format are kept in."""
    if not kind.labels:
        return coco_store(out / f"annotations{kind.suffix}", names)

    def place(image: str) -> Path:
        path = images[image] if beside else out / kind.images / image
        if kind is FORMATS["yolo"]:
            return Path(img2label_paths([str(path)])[0])
        return (path if beside else out / kind.labels / image).with_suffix(kind.suffix)

    owners: dict[Path, str] = {}
    for image in images:
        if (other := owners.setdefault(place(image), image)) != image:
            raise UsageError(f"Images '{other}' and '{image}' would share the label '{place(image)}'. Rename one.")

    def read(image: str) -> str | None:
        return place(image).read_bytes().decode("utf-8", "replace") if place(image).is_file() else None

    def write(image: str, text: str) -> None:
        atomic_write(place(image), text.encode("utf-8", "replace"))  # a file name need not be valid text

    return Store(read, write)


def _read_journal(file: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, dict[str, Any]]:
    """Return the records of earlier runs with the same settings by image; lines that are damaged are left out."""
    lines: list[dict[str, Any]] = []
    texts = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    for line in texts:
        with suppress(ValueError):
            lines += [found] if isinstance(found := json.loads(line), dict) else []
    known = {line["image"]: line for line in lines if line.keys() >= RECORD}
    if (damaged := len(texts) - 1 - sum(line.keys() >= RECORD for line in lines)) > 0:  # of a killed run half a line
        LOGGER.warning(f"{file}: {damaged} lines are damaged, so their images are looked at again")
    if not lines:
        return {}
    if changed := [k for k in settings if k != "options" and lines[0].get(k) != settings[k]]:
        if overwrite:
            return {}
        before = ", ".join(f"{k}={lines[0].get(k)}" for k in changed)
        raise UsageError(f"'{file.parent}' holds other settings ({before}). Give another out=, or overwrite=True.")
    return known


def _journal_text(settings: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return the journal: a line of settings, then the records sorted by image."""
    return "".join(json.dumps(line) + "\n" for line in (settings, *(known[k] for k in sorted(known))))


def update(file: Path, content: str) -> None:
    """Write a text file atomically, unless it holds that text already."""
    data = content.encode("utf-8", "replace")
    if not file.is_file() or file.read_bytes() != data:
        atomic_write(file, data)
