# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The formats: where their files lie, and how datasets of Pascal VOC and YOLO are found, read and written."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_label, class_names, keypoints, load_yaml, read_yaml, split_places
from yolo_ext.data.coco import coco_entry, detected, is_coco
from yolo_ext.data.find import has_rows, image_files, is_voc, list_files, match, members, read_lists

from yolo_ext.data.records import (  # isort: skip
    SPLITS, Annotation, Item, Object, Size, Source, decode, is_image, list_images, quote, read_text, unique_ids,
    walk_files,
)  # fmt: skip
from yolo_ext.stock.load import img2label_paths, merge_multi_segment

Record = Mapping[str, Any]  # of a detection, see `label`
Names = Mapping[int, str]  # class names by class index
CORNERS = ("xmin", "ymin", "xmax", "ymax")
Point = Callable[[float, float], tuple[float, float]]
YOLO = "Give a data.yaml, or a folder with images/ and labels/."


def scan_voc(source: Path, images: Path | None = None, annotations: Path | None = None) -> Source:
    """Find VOC annotations, their images and lists anywhere in a folder, or in those that are given."""
    files = [f for f in walk_files(annotations or source, {"xml"}) if is_voc(f)]
    pictures = image_files(source, images)
    for kind, key, there in (("annotations, .xml files,", "annotations", files), ("images", "images", pictures)):
        if not there:
            raise UsageError(f"No VOC {kind} in '{source}'. Give {key}=FOLDER, or the folder that holds both.")
    listed = list_files(source)
    found, lists, problems = unique_ids(members(pictures, images or source, by_folder=not listed))
    lists.pop("", None)
    labels, wrong, alone, farther = match(files, found)  # the path is the id: <filename> is often stale
    items = {i: Item(i, image, labels.get(i)) for i, image in found.items()}
    items |= {f.stem: Item(f.stem, None, f) for f in alone}
    problems += [f"{f} has no image, one of that name has a nearer annotation" for f in farther]

    def read(item: Item, _: Size) -> Annotation:
        if item.id in wrong:
            raise ValueError(wrong[item.id])
        return read_voc(item.label)

    annotated = [i for i, item in items.items() if item.label or i in wrong]
    lists = read_lists(listed, items, found) if listed else lists
    return Source(items, read, annotated, files, lists, problems=problems)


def read_voc(file: Path | None) -> Annotation:
    """Read one VOC annotation, None for background; ValueError if not XML, with a document type, or incomplete."""
    if file is None:
        return Annotation()
    raw = file.read_bytes()
    try:
        root = _parse(raw)
    except DefusedXmlException as e:  # entities can expand to gigabytes or read other files; no VOC tool writes them
        raise ValueError("holds a document type declaration, which is refused") from e
    except (ParseError, LookupError, ValueError) as e:  # the last for an encoding that expat does not know
        raise ValueError(f"is not valid XML ({e})") from e
    size = tuple(_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    objects = []
    for i, node in enumerate(root.iterfind("object"), 1):
        name = (node.findtext("name") or "").strip()
        corners = node.find("bndbox")
        box = tuple(_number(corners.findtext(k)) for k in CORNERS) if corners is not None else (math.nan,)
        if not name or not np.isfinite(box).all():
            raise ValueError(f"has no name or no complete box in object {i}")
        outline = tuple(_number(point.text) for point in node.iterfind("polygon/*"))
        polygons = (outline,) if len(outline) >= 6 and len(outline) % 2 == 0 and np.isfinite(outline).all() else ()
        flags = {k: _number(node.findtext(k)) > 0 for k in ("difficult", "truncated")}
        objects.append(Object(name, box, polygons, **flags))  # type: ignore[arg-type]
    known = np.isfinite(size).all() and min(size) > 0
    return Annotation(size if known else None, tuple(objects))  # type: ignore[arg-type]


def _parse(raw: bytes) -> Any:
    """Parse XML, also in an encoding of several bytes that it declares, or in what `decode` knows without a word."""
    try:
        return fromstring(raw, forbid_dtd=True)
    except DefusedXmlException:
        raise
    except (ParseError, ValueError) as e:
        declared = re.search(rb"""^<\?xml[^>]*encoding=["'](gb\w+|big5|euc-\w+|shift_jis)["']""", raw, re.IGNORECASE)
        try:
            text = raw.decode(declared[1].decode()) if declared else decode(raw)
        except ValueError:
            raise e from None
        return fromstring(re.sub(r"^\s*<\?xml.*?\?>", "", text), forbid_dtd=True)


def _number(text: str | None) -> float:
    """Return text as a number, NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


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


def scan_yolo(
    source: Path, images: Path | None = None, annotations: Path | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Find images, labels and splits of a data.yaml or its folder, or of a folder with class names or `classes`."""
    info = {} if images else _data_yaml(source)
    if info:
        names, listed = [info["names"][i] for i in range(info["nc"])], []
        there = {s: split_places(s, info, info["yaml_file"]) for s in SPLITS if s in info}
        placed = {s: [m for path in paths for m in _members(path)] for s, paths in there.items()}
    else:
        names, listed = list(classes or _class_names(source)), list_files(source)
        placed = members(image_files(source, images), images or source, by_folder=not listed)
    found, lists, problems = unique_ids(placed)
    if not found:
        raise UsageError(f"'{source}' holds no images. {YOLO}")
    lists = read_lists(listed, found, found) if listed else {s: ids for s, ids in lists.items() if s}
    lists = lists or {"train": [*found]}
    folder = annotations or (source if source.is_dir() else source.parent)
    labels, wrong, files, orphans = _label_files(found, folder, bool(annotations))
    items = {i: Item(i, image, labels[i]) for i, image in found.items()}
    extra: dict[str, Any] = {k: info[k] for k in ("kpt_shape", "flip_idx", "kpt_names") if k in info}
    if info.get("channels", 3) != 3:
        extra["channels"] = info["channels"]
    shape = keypoints(extra, str(source)) if "kpt_shape" in extra else (0, 0)
    if len({*names}) < len(names):  # numbers tell them apart
        extra["names"] = dict(enumerate(names))
        names = [n if names.count(n) == 1 else f"{n} #{i}" for i, n in enumerate(names)]
    read = partial(_read_yolo_item, names=names, shape=shape, wrong=wrong)
    return Source(items, read, found.keys(), files, lists, names, extra, problems, {"orphan": orphans})


def _data_yaml(source: Path) -> dict[str, Any]:
    """Return what the data.yaml of a source holds, nothing where there is none."""
    yamls = [source] if source.is_file() else _yamls(source)
    if len(yamls) > 1:
        raise UsageError(f"'{source}' holds {len(yamls)} YAML files of datasets. Give source= one of them.")
    return read_yaml(str(yamls[0]), need=()) if yamls else {}


def _yamls(folder: Path) -> list[Path]:
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    return [f for f in files if {"names", "nc", "train", "val"} & {*load_yaml(f)}]


def _class_names(source: Path) -> list[str]:
    """Return the class names, one a line, that tools for labelling put beside labels, or else those of a data.yaml."""
    legal = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")
    files = [f for f in walk_files(source, {"txt", "names", "labels"}) if f.name in legal]
    found = {tuple(filter(None, map(str.strip, read_text(f).splitlines()))): f for f in files}
    found = found or {tuple(class_names(n)): f for f in _yamls(source) if (n := load_yaml(f).get("names"))}
    if len(found) != 1:
        why = f"has class names that differ: {quote([*found.values()])}" if found else f"has no data.yaml, {legal[0]}"
        raise UsageError(f"'{source}' {why}. Give classes=a,b in label order.")
    return list(*found)


def _label_files(
    images: Mapping[str, Path], folder: Path, chosen: bool
) -> tuple[dict[str, Path], dict[str, str], list[Path], list[str]]:
    """Return where labels are or would be, what is wrong with some, which are there, and those without an image.

    Labels are where training looks, or else below a folder, and below a chosen one only there.
    """
    labels = dict(zip(images, map(Path, img2label_paths([*map(str, images.values())]))))
    there = {f for f in labels.values() if f.is_file()}
    folders, wrong = set() if chosen else {f.parent for f in there}, dict[str, str]()
    if lost := {i: image for i, image in images.items() if labels[i].parent not in folders}:
        texts = [f for f in walk_files(folder, {"txt"}) if chosen or f not in there]
        found, wrong, *_ = match([f for f in texts if has_rows(f) or not f.stat().st_size], lost)
        labels |= found
        there = {f for f in labels.values() if f.is_file()}
    stems = {f.stem for folder in {i.parent for i in images.values()} for f in folder.glob("*.*") if is_image(f)}
    beside = {f for folder in {f.parent for f in there} for f in folder.glob("*.txt")} - there
    orphans = [str(f) for f in sorted(beside) if f.stem not in stems and has_rows(f)]
    return labels, wrong, sorted(there), orphans


def _members(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield images with their path below the folder `path`, or below `images` for those of a list file."""
    for file in list_images(path):
        home = next((p for p in file.parents if p.name == "images"), file.parent)
        yield file.relative_to(path if path.is_dir() else home).with_suffix("").as_posix(), file


def _read_yolo_item(
    item: Item, size: Size, names: Sequence[str], shape: tuple[int, int], wrong: Mapping[str, str]
) -> Annotation:
    """Read a YOLO label file; a missing one means background, as in training."""
    if item.id in wrong:
        raise ValueError(wrong[item.id])
    if item.label is None or not item.label.is_file():
        return Annotation()
    try:
        rows = check_label(item.label, len(names), shape, bool(shape[0]))
    except ArithmeticError as e:
        raise ValueError(f"has a label outside the image: {e}") from e
    return Annotation(objects=tuple(_yolo_object(row, size, names, bool(shape[0])) for row in rows))


def _yolo_object(row: Sequence[str], size: Size, names: Sequence[str], pose: bool) -> Object:
    """Return the object of a YOLO label row; of a pose the box."""
    cls, *values = map(float, row)
    name, text = names[int(cls)], " ".join(row[1:])
    if pose or len(row) == 5:
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
    tally = Counter(annotation.notes)
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


def format_of(source: Path) -> str:
    """Return the format of a dataset by what its files hold."""
    if source.is_file():
        return "coco" if source.suffix == ".json" else "yolo"
    if any(map(is_voc, walk_files(source, {"xml"}))):
        return "voc"
    if any(map(is_coco, walk_files(source, {"json"}))):
        return "coco"
    if not walk_files(source, {"txt", "yaml", "yml"}):
        raise UsageError(f"'{source}' holds neither VOC, COCO nor YOLO annotations. Give annotations=FOLDER.")
    return "yolo"


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
