# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The formats: where their files lie, and how datasets of Pascal VOC and YOLO are found, read and written."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from ultralytics.utils import DATASETS_DIR

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_label, class_names, load_yaml, pose_columns
from yolo_ext.data.coco import coco_entry, detected
from yolo_ext.data.records import SPLITS, Annotation, Item, Object, Size, Source, list_images, unique_ids, walk_files
from yolo_ext.stock.load import IMG_FORMATS, img2label_paths, merge_multi_segment

Record = Mapping[str, Any]  # of a detection, see `label`
Names = Mapping[int, str]  # class names by class index
CORNERS = ("xmin", "ymin", "xmax", "ymax")
Point = Callable[[float, float], tuple[float, float]]
YOLO = "Give a data.yaml, or a folder with images/ and labels/."


def scan_voc(source: Path) -> Source:
    """Find what lies in Annotations/**.xml, JPEGImages|images/** and ImageSets/Main/*.txt of a VOC folder."""
    labels, listed = source / "Annotations", source / "ImageSets/Main"
    if not labels.is_dir():
        raise UsageError(f"'{source}' is not a VOC folder: it has no 'Annotations'. Give the folder that holds it.")
    folder = next((source / n for n in ("JPEGImages", "images", "Images") if (source / n).is_dir()), None)
    if folder is None:
        raise UsageError(f"'{source}' has no image folder. Legal names: JPEGImages, images.")
    images, _, problems = unique_ids({"": [(_id(f, folder), f) for f in walk_files(folder, IMG_FORMATS)]})
    by_name: dict[str, list[str]] = {}
    for i, file in images.items():
        by_name.setdefault(file.stem, []).append(i)
    items = {i: Item(i, file, None) for i, file in images.items()}
    annotated = set()
    for file in walk_files(labels, {"xml"}):  # the path is the id: <filename> is often stale
        i = _id(file, labels)
        if i not in images and len(by_name.get(file.stem, ())) == 1:  # the only image with that name
            i = by_name[file.stem][0]
        if i in annotated:
            problems.append(f"{items[i].label} and {file} annotate the same image")
        items[i] = Item(i, images.get(i), file)
        annotated.add(i)
    if not annotated:
        raise UsageError(f"'{labels}' holds no XML files. Give the folder of a VOC dataset.")
    files = walk_files(listed, {"txt"}) if listed.is_dir() else []
    lists = {f.stem: _read_list(f, items, by_name) for f in files}
    return Source(items, lambda item, _: read_voc(item.label), annotated, lists, problems=problems)


def _id(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def read_voc(file: Path | None) -> Annotation:
    """Read one VOC annotation, None for background; ValueError if not XML, with a document type, or incomplete."""
    if file is None:
        return Annotation()
    try:
        root = fromstring(file.read_bytes(), forbid_dtd=True)
    except DefusedXmlException as e:  # entities can expand to gigabytes or read other files; no VOC tool writes them
        raise ValueError("holds a document type declaration, which is refused") from e
    except (ParseError, LookupError) as e:
        raise ValueError(f"is not valid XML ({e})") from e
    size = tuple(_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    objects = []
    for i, node in enumerate(root.iterfind("object"), 1):
        name = (node.findtext("name") or "").strip()
        corners = node.find("bndbox")
        box = tuple(_number(corners.findtext(k)) for k in CORNERS) if corners is not None else (math.nan,)
        if not name or not np.isfinite(box).all():
            raise ValueError(f"has no name or no complete box in object {i}")
        flags = {k: _number(node.findtext(k)) > 0 for k in ("difficult", "truncated")}
        objects.append(Object(name, box, **flags))  # type: ignore[arg-type]
    known = np.isfinite(size).all() and min(size) > 0
    return Annotation(size if known else None, tuple(objects))  # type: ignore[arg-type]


def _number(text: str | None) -> float:
    """Return text as a number, NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _read_list(file: Path, items: Collection[str], by_name: dict[str, list[str]]) -> list[str]:
    """Return the image ids of an ImageSets list, without the flags of per-class lists and without file suffixes."""
    members: dict[str, None] = {}
    for line in map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()):
        if line and line not in items:
            line = re.sub(r"\s+(-1|0|1)$", "", line)
        stem, _, suffix = line.rpartition(".")
        i = stem if line not in items and suffix.lower() in IMG_FORMATS else line
        alone = by_name.get(i.rpartition("/")[2], ())
        members[alone[0] if i not in items and len(alone) == 1 else i] = None
    members.pop("", None)
    return list(members)


def voc_text(image: str, size: Size, objects: Sequence[Object]) -> str:
    """Return the VOC annotation of an image file of (width, height) in whole pixels, which most VOC readers expect."""
    boxes = []
    for o in objects:
        (x0, x1), (y0, y1) = (_whole(o.box[k], o.box[k + 2], size[k]) for k in (0, 1))
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(CORNERS, (x0, y0, x1, y1)))
        found = "" if o.confidence is None else f"    <confidence>{o.confidence:.4f}</confidence>\n"
        flags = f"<truncated>{o.truncated:d}</truncated><difficult>{o.difficult:d}</difficult>"
        boxes.append(f"  <object>\n    <name>{escape(o.name)}</name>\n    <pose>Unspecified</pose>{flags}\n")
        boxes.append(f"{found}    <bndbox>{corners}</bndbox>\n  </object>\n")
    head = f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n"
    head = f"  <filename>{escape(image)}</filename>\n{head}  <segmented>0</segmented>\n"
    return f"<annotation>\n{head}{''.join(boxes)}</annotation>\n"


def _whole(low: float, high: float, side: int) -> tuple[int, int]:
    """Return both ends of a side in whole pixels, at least one apart."""
    if round(low) < round(high):
        return round(low), round(high)
    start = min(int(low), side - 1)
    return start, start + 1


def scan_yolo(source: Path, classes: Sequence[str] | None = None) -> Source:
    """Find the images and splits of a data.yaml, its folder, or one with images/ and classes.txt or given `classes`."""
    yamls = [source] if source.is_file() else sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if len(yamls) > 1:
        raise UsageError(f"'{source}' holds {len(yamls)} YAML files. Give source= one of them.")
    content: dict[str, Any] = {}
    if yamls:
        content = load_yaml(yamls[0])
        if not isinstance(content, dict) or not content.get("names") or not any(content.get(s) for s in SPLITS):
            raise UsageError(f"Data file '{yamls[0]}' needs names, and an image folder for train, val or test.")
        folders, names = _split_folders(content, yamls[0]), class_names(content["names"])
    else:
        folders, names = _plain(source, classes)
    members = {s: [m for path in paths for m in _members(path)] for s, paths in folders.items()}
    images, lists, problems = unique_ids(members)
    if not images:
        raise UsageError(f"'{source}' holds no images. {YOLO}")
    labels = map(Path, img2label_paths([*map(str, images.values())]))
    items = {i: Item(i, image, label) for (i, image), label in zip(images.items(), labels)}
    extra: dict[str, Any] = {k: content[k] for k in ("kpt_shape", "flip_idx", "kpt_names", "channels") if k in content}
    columns = pose_columns(extra, str(source)) if "kpt_shape" in extra else 0
    read = partial(_read_yolo_item, names=names, columns=columns)
    return Source(items, read, images.keys(), lists, names, extra, problems)


def _split_folders(content: Mapping[str, Any], file: Path) -> dict[str, list[Path]]:
    """Return the folders and list files of each split, resolved as Ultralytics does."""
    root = Path(content.get("path") or file.parent)
    if not root.is_absolute():
        root = next((r for r in (Path.cwd() / root, DATASETS_DIR / root) if r.exists()), file.parent / root)
    folders = {}
    for split in SPLITS:
        given = content.get(split) or []
        paths = [root / g for g in ([given] if isinstance(given, str) else given)]
        if missing := [p for p in paths if not p.exists()]:
            raise UsageError(f"Split '{split}' of '{file}' points to '{missing[0]}', which does not exist.")
        if paths:
            folders[split] = [p.resolve() for p in paths]
    return folders


def _plain(source: Path, classes: Sequence[str] | None) -> tuple[dict[str, list[Path]], list[str]]:
    """Return image folders and class names of a dataset without data.yaml, but with images/<split>, or images alone."""
    folder = source / "images"
    if not folder.is_dir():
        raise UsageError(f"'{source}' is no YOLO dataset. {YOLO}")
    splits = {s: [folder / s] for s in SPLITS if (folder / s).is_dir()} or {"train": [folder]}
    if not classes:
        file = next((f for f in (source / "classes.txt", source / "labels/classes.txt") if f.is_file()), None)
        if file is None:
            raise UsageError(f"'{source}' has neither data.yaml nor classes.txt. Give classes=a,b in label order.")
        classes = [n for n in map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()) if n]
    return splits, list(classes)


def _members(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield images with their path below the folder `path`, or below `images` for those of a list file."""
    for file in list_images(path):
        home = next((p for p in file.parents if p.name == "images"), file.parent)
        yield _id(file, path if path.is_dir() else home), file


def _read_yolo_item(item: Item, size: Size, names: Sequence[str], columns: int) -> Annotation:
    """Read a YOLO label file; a missing one means background, as in training."""
    if item.label is None or not item.label.is_file():
        return Annotation()
    try:
        rows = check_label(item.label, len(names), columns)
    except ArithmeticError as e:
        raise ValueError(f"has a label outside the image: {e}") from e
    return Annotation(objects=tuple(_yolo_object(row, size, names, columns) for row in rows))


def _yolo_object(row: Sequence[str], size: Size, names: Sequence[str], columns: int) -> Object:
    """Return the object of a YOLO label row; of a pose the box."""
    cls, *values = map(float, row)
    name, text = names[int(cls)], " ".join(row[1:])
    if columns or len(row) == 5:
        x, y, w, h = (v * s for v, s in zip(values, (*size, *size)))
        return Object(name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), row=text)
    polygon = tuple(v * s for v, s in zip(values, size * (len(values) // 2)))
    xs, ys = polygon[::2], polygon[1::2]
    return Object(name, (min(xs), min(ys), max(xs), max(ys)), (polygon,), row=text)


def yolo_row(o: Object, index: int, size: Size, task: str) -> str:
    """Return the label row of an object inside an image of (width, height), a polygon for the task `segment`."""
    if o.row:
        return f"{index} {o.row}"
    if task == "segment":
        parts = merge_multi_segment([*o.polygons]) if len(o.polygons) > 1 else [np.reshape(o.polygons[0], (-1, 2))]
        return f"{index} " + " ".join(f"{v:.6f}" for v in (np.concatenate(parts) / size).ravel())
    x0, y0, x1, y1 = o.box
    w, h = size
    return f"{index} {(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} {(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}"


def to_image(annotation: Annotation, size: Size, orientation: int) -> tuple[list[Object], Counter[str]]:
    """Return objects with an area, cut to the upright image of (width, height) `size`, and counts of changes."""
    tally = Counter({"crowd": annotation.crowds}) if annotation.crowds else Counter()
    w, h = annotation.size or size
    move: Point | None = None
    if (w, h) != size:
        turned = (h, w) == size and orientation in (6, 8)  # by EXIF, and annotated on the stored pixels
        tally["rotated" if turned else "resized"] += 1
        sx, sy = size[0] / w, size[1] / h
        turns: dict[int, Point] = {6: lambda x, y: (h - y, x), 8: lambda x, y: (y, w - x)}
        move = turns[orientation] if turned else lambda x, y: (x * sx, y * sy)
    objects = []
    for o in annotation.objects:
        tally["swapped"] += o.box[0] > o.box[2] or o.box[1] > o.box[3]
        (x0, y0), (x1, y1) = (move(*o.box[:2]), move(*o.box[2:])) if move else (o.box[:2], o.box[2:])
        whole = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        box = max(whole[0], 0.0), max(whole[1], 0.0), min(whole[2], size[0]), min(whole[3], size[1])
        if (box[2] - box[0]) / size[0] < 1e-6 or (box[3] - box[1]) / size[1] < 1e-6:  # would be written as 0
            tally["degenerate"] += 1
            continue
        tally["clipped"] += any(abs(a - b) > 1e-5 * max(size) for a, b in zip(box, whole))  # six digits were rounded
        objects.append(o._replace(box=box, polygons=tuple(_outline(p, move, size) for p in o.polygons)))
    return objects, tally


def _outline(polygon: tuple[float, ...], move: Point | None, size: Size) -> tuple[float, ...]:
    """Return a polygon moved into the image and cut at its border."""
    points = [move(x, y) if move else (x, y) for x, y in zip(polygon[::2], polygon[1::2])]
    return tuple(min(max(v, 0.0), s) for point in points for v, s in zip(point, size))


def yolo_text(record: Record, names: Names, save_conf: bool) -> str:
    """Return one row for each object: `class x y w h`, or `class x1 y1 x2 y2 ...` for a polygon, normalised."""
    rows = []
    for found, o in zip(record["objects"], detected(record, names)):
        row = yolo_row(o, found["class"], tuple(record["size"]), "segment" if o.polygons else "detect")
        rows.append(f"{row} {o.confidence:.4f}\n" if save_conf else f"{row}\n")
    return "".join(rows)


def voc_annotation(record: Record, names: Names, save_conf: bool) -> str:
    """Return a VOC annotation whose objects carry a `confidence`."""
    return voc_text(Path(record["image"]).name, tuple(record["size"]), detected(record, names))


class Format(NamedTuple):
    """One label format: where its files lie, and how the record of an image becomes its label."""

    suffix: str  # of a label file
    labels: str  # folder of the labels, empty where one file holds all of them
    images: str  # folder of the images beside it
    render: Callable[[Record, Names, bool], Any]  # of a record, the class names and "write confidences"


FORMATS = {
    "yolo": Format(".txt", "labels", "images", yolo_text),
    "voc": Format(".xml", "Annotations", "JPEGImages", voc_annotation),
    "coco": Format(".json", "", "images", coco_entry),
}
