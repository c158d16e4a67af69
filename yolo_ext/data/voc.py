# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Convert a Pascal VOC dataset into a YOLO one without touching the source."""

from __future__ import annotations

import math
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from uuid import uuid4

from ultralytics.data.utils import IMG_FORMATS
from ultralytics.utils import LOGGER, NUM_THREADS, TQDM, YAML

from yolo_ext.data.check import attempt, image_size, jpeg_is_whole, quote
from yolo_ext.data.split import choose_splits
from yolo_ext.errors import UsageError

Box = tuple[float, float, float, float]


@dataclass
class VocSummary:
    """What a conversion wrote and what it left out.

    Attributes:
        data: The data.yaml written.
        names: Class names in label order.
        images: Images per split.
        boxes: Boxes per class; an image in two splits counts once.
        clipped: Boxes cut at the image border.
        degenerate: Image of every box dropped because no area is left of it.
        skipped: Objects per class that is not among the wanted ones.
        no_xml: Listed images without an annotation file, kept as background.
        resized: Images whose size differs from the one in their annotation.
        overlap: Images that are in more than one split.
        unused: Annotated images in no split.
    """

    data: Path
    names: list[str]
    images: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, int] = field(default_factory=dict)
    clipped: int = 0
    degenerate: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    no_xml: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    overlap: int = 0
    unused: int = 0


@dataclass(frozen=True)
class Annotation:
    """One VOC annotation file.

    Attributes:
        size: (width, height) in pixels, or None where the file does not say.
        objects: (class name, (xmin, ymin, xmax, ymax) in pixels) of every object, the difficult ones included.
    """

    size: tuple[float, float] | None = None
    objects: tuple[tuple[str, Box], ...] = ()


def convert_voc(
    source: Path,
    out: Path,
    *,
    classes: Sequence[str] | None = None,
    splits: dict[str, str] | None = None,
    ratios: dict[str, float] | None = None,
    seed: int = 0,
) -> VocSummary:
    """Convert `source` (Annotations/*.xml, JPEGImages|images, ImageSets/Main/*.txt) into a YOLO dataset in `out`.

    Images are hard-linked where the file system allows it and copied elsewhere. Pixels are divided by the image size
    without the one-pixel shift of the original VOC convention, because today's annotation tools count from 0.
    A failure leaves nothing behind.

    Args:
        source: VOC folder, only read.
        out: New or empty folder, outside `source`.
        classes: Wanted classes in label order; all classes found, sorted, by default.
        splits: Our split (train, val, test) to name of a list in ImageSets/Main, e.g. {"train": "trainval"}.
        ratios: Our split to share of the annotated images, for a seeded random split that ignores the lists.
        seed: Seed of the random split.

    Returns:
        Counts of what was written and left out.

    Raises:
        UsageError: The source is broken or incomplete, or an argument is illegal.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    _check_folders(source, out)
    images, annotations = _read_source(source)
    chosen = choose_splits(source, annotations, splits, ratios, seed)
    names = _choose_classes(annotations, classes)
    used = sorted(set().union(*chosen.values()))
    sizes = _read_sizes({i: images[i] for i in used if i in images}, [i for i in used if i not in images])

    summary = VocSummary(out / "data.yaml", names)
    summary.images = {split: len(ids) for split, ids in chosen.items()}
    summary.overlap = sum(summary.images.values()) - len(used)
    summary.unused = len(annotations.keys() - set(used))
    rows = {i: _to_rows(i, annotations.get(i), sizes[i], summary) for i in used}
    summary.boxes = {name: summary.boxes.get(name, 0) for name in names}
    if not any(summary.boxes.values()):
        raise UsageError(
            f"No box of the classes {quote(names) or '(none)'} is left in '{source}'. Check the classes and splits."
        )
    with staged_folder(out) as stage:
        for split, ids in chosen.items():
            _write_split(stage, split, ids, images, rows)
        content = {"path": str(out), **{s: f"images/{s}" for s in chosen}, "names": dict(enumerate(names))}
        YAML.save(stage / "data.yaml", content)
    _report(summary)
    return summary


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out` that becomes `out` on success and vanishes on failure.

    Args:
        out: Final folder; replaced where it exists.
    """
    stage = out.with_name(f".{out.name}.{uuid4().hex[:8]}.tmp")
    stage.mkdir(parents=True)
    try:
        yield stage
        if out.exists():
            old = stage.with_suffix(".old")
            out.rename(old)
            stage.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            stage.rename(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def read_voc(file: Path) -> Annotation:
    """Read one VOC annotation file.

    Args:
        file: XML file.

    Raises:
        ValueError: The file is not XML, declares a document type, or an object lacks its name or box.
    """
    raw = file.read_bytes()
    if b"<!DOCTYPE" in raw.replace(b"\0", b""):  # entities can expand to gigabytes; no VOC tool writes them
        raise ValueError("holds a document type declaration, which is refused")
    try:
        root = ET.fromstring(raw)
    except (ET.ParseError, ValueError, LookupError) as e:
        raise ValueError(f"is not valid XML ({e})") from e
    size = tuple(_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    objects = []
    for i, node in enumerate(root.findall("object"), 1):
        name = (node.findtext("name") or "").strip()
        box = tuple(_number(node.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
        if not name or not all(map(math.isfinite, box)):
            raise ValueError(f"has no name or no complete box in object {i}")
        objects.append((name, box))
    known = all(math.isfinite(s) and s > 0 for s in size)
    return Annotation(size if known else None, tuple(objects))  # type: ignore[arg-type]


def _number(text: str | None) -> float:
    """Return text as a number, NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _check_folders(source: Path, out: Path) -> None:
    """Refuse a source that is not VOC and an output folder that would endanger anything."""
    if not (source / "Annotations").is_dir():
        raise UsageError(f"'{source}' is not a VOC folder: it has no 'Annotations'. Give the folder that holds it.")
    if out.is_relative_to(source):
        raise UsageError(f"Output folder '{out}' lies inside the source '{source}'. Give a folder outside it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"Output folder '{out}' exists and is not empty. Give a new folder or empty this one.")


def _refuse(problems: list[str], what: str) -> None:
    """Raise one UsageError for all problems found."""
    if problems:
        raise UsageError(f"{what}: {len(problems)} problems, nothing was written. {quote(problems, 10)}. Mend these.")


def _read_source(source: Path) -> tuple[dict[str, Path], dict[str, Annotation]]:
    """Return the images and the annotations of a VOC folder by image id."""
    folder = next((source / n for n in ("JPEGImages", "images", "Images") if (source / n).is_dir()), None)
    if folder is None:
        raise UsageError(f"'{source}' has no image folder. Legal names: JPEGImages, images.")
    images: dict[str, Path] = {}
    annotations: dict[str, Annotation] = {}
    problems = []
    for file in sorted(folder.iterdir()):
        if file.suffix[1:].lower() in IMG_FORMATS:
            if file.stem in images:
                problems.append(f"{images[file.stem].name} and {file.name} have the same id")
            images[file.stem] = file
    files = sorted(f for f in (source / "Annotations").iterdir() if f.suffix.lower() == ".xml")
    for file in TQDM(files, "Reading annotations"):
        annotation, problem = attempt(read_voc, file)
        if annotation:
            annotations[file.stem] = annotation  # the stem is the id: <filename> is often stale
        else:
            problems.append(f"{file.name} {problem}")
    _refuse(problems, f"'{source}'")
    if not annotations:
        raise UsageError(f"'{source / 'Annotations'}' holds no XML files. Give the folder of a VOC dataset.")
    return images, annotations


def _read_sizes(files: dict[str, Path], missing: list[str]) -> dict[str, tuple[int, int]]:
    """Return the image sizes by id, refusing missing and corrupt images all at once."""
    problems = [f"{i} has no image" for i in missing]
    sizes = {}
    with ThreadPool(NUM_THREADS) as pool:
        results = pool.imap(lambda file: attempt(image_size, file), files.values())
        for (size, problem), i in zip(TQDM(results, "Checking images", len(files)), files):
            if size:
                sizes[i] = size
            else:
                problems.append(f"{files[i].name}: {problem}")
    _refuse(problems, "Images")
    return sizes


def _choose_classes(annotations: dict[str, Annotation], classes: Sequence[str] | None) -> list[str]:
    """Return the class names in label order."""
    found = sorted({name for a in annotations.values() for name, _ in a.objects})
    if classes is None:
        return found
    names = list(classes)
    if not names or len(set(names)) < len(names) or not set(names) & set(found):
        raise UsageError(f"Classes {names} are not legal. Give each once, from those present: {quote(found, 30)}.")
    if absent := [n for n in names if n not in found]:
        LOGGER.warning(f"Classes without any object: {quote(absent)}; present: {quote(found, 30)}")
    return names


def _to_rows(i: str, annotation: Annotation | None, size: tuple[int, int], summary: VocSummary) -> list[str]:
    """Return the YOLO label rows of one image, counting into `summary` what is clipped and dropped."""
    if annotation is None:
        summary.no_xml.append(i)
        return []
    w, h = annotation.size or size
    if (w, h) != size:
        summary.resized.append(i)
    rows = []
    for name, (x0, y0, x1, y1) in annotation.objects:
        if name not in summary.names:
            summary.skipped[name] = summary.skipped.get(name, 0) + 1
            continue
        box = max(x0, 0.0), max(y0, 0.0), min(x1, w), min(y1, h)
        bw, bh = (box[2] - box[0]) / w, (box[3] - box[1]) / h
        if bw < 1e-6 or bh < 1e-6:  # would be written as 0
            summary.degenerate.append(i)
            continue
        summary.clipped += box != (x0, y0, x1, y1)
        summary.boxes[name] = summary.boxes.get(name, 0) + 1
        x, y = (box[0] + box[2]) / 2 / w, (box[1] + box[3]) / 2 / h
        rows.append(f"{summary.names.index(name)} {x:.6f} {y:.6f} {bw:.6f} {bh:.6f}")
    return rows


def _write_split(stage: Path, split: str, ids: list[str], images: dict[str, Path], rows: dict[str, list[str]]) -> None:
    """Write the images and labels of one split."""
    for kind in ("images", "labels"):
        (stage / kind / split).mkdir(parents=True)
    for i in TQDM(ids, f"Writing {split}"):
        source, target = images[i].resolve(), stage / "images" / split / images[i].name
        try:
            if not jpeg_is_whole(source):
                raise OSError  # Ultralytics rewrites such a file at training; a link would let that reach the source
            target.hardlink_to(source)
        except OSError:
            shutil.copy2(source, target)
        (stage / "labels" / split / f"{i}.txt").write_text("".join(f"{r}\n" for r in rows[i]), encoding="utf-8")


def _report(s: VocSummary) -> None:
    """Log what was written, and warn about what was left out."""
    counts = ", ".join(f"{n} {split}" for split, n in s.images.items())
    LOGGER.info(f"Converted {counts} images, {sum(s.boxes.values())} boxes in {len(s.names)} classes to '{s.data}'")
    dropped = [f"{i} ({n})" if n > 1 else i for i, n in Counter(s.degenerate).items()]
    notes = {
        f"{s.clipped} boxes clipped at the image border": s.clipped,
        f"{len(s.degenerate)} boxes without area dropped: {quote(dropped)}": s.degenerate,
        f"{sum(s.skipped.values())} objects of other classes skipped: {quote(sorted(s.skipped))}": s.skipped,
        f"{len(s.no_xml)} listed images have no annotation and are kept as background: {quote(s.no_xml)}": s.no_xml,
        f"{len(s.resized)} images differ in size from their annotation, check rotation: {quote(s.resized)}": s.resized,
        f"{s.unused} annotated images are in no split": s.unused,
    }
    for note, count in notes.items():
        if count:
            LOGGER.warning(note)
