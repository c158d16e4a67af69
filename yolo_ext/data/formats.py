# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The formats, and Pascal VOC and YOLO: found by what files hold, read and written."""

import codecs
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape  # nosec B406  # for writing; defusedxml reads

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring
from jinja2 import Template

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.data.check import check_label, class_names, keypoints, label_places, load_yaml, read_yaml, split_places
from yolo_ext.data.coco import coco_entry, detected, is_coco

from yolo_ext.data.records import (  # isort: skip
    SPLITS, Annotation, Object, Size, Source, Splits, around, decode, grouped, is_image, list_images, match, numbers,
    quote, read_text, shared, unique_ids, walk_files,
)  # fmt: skip
from yolo_ext.stock.load import IMG_FORMATS, merge_multi_segment

Record = Mapping[str, Any]  # of a detection, see `label`
Names = Mapping[int, str]  # class names by class index
IMAGES = ({"jpegimages", "images", "image", "imgs", "img"}, {"jpegimages"})  # names of image folders, then sure ones
SPLIT = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}  # what splits are called besides
SPLIT |= {name: name for name in SPLIT.values()}
Point = Callable[[float, float], tuple[float, float]]
TEXT = Path(__file__).with_name("voc.xml.j2").read_text(encoding="utf-8")
VOC = Template(TEXT, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


def images_by_id(source: Path, images: Path | None = None) -> tuple[dict[str, Path], Splits, list[str]]:
    """Return images by id, the path below their folder, the ids of each list or split, and clashes of ids.

    Images are those below `images`, else those of the source in folders called after images, if any, else all. Lists
    are those in ImageSets/Main, else those called after splits beside the folders.
    """
    sets = sorted([*source.glob("ImageSets/Main/*.txt"), *source.glob("*/ImageSets/Main/*.txt")])
    beside = sorted(f for f in source.glob("*.txt") if f.stem.lower() in SPLIT and not has_rows(f))
    lists = [(f.stem, f) for f in sets] or [(SPLIT[f.stem.lower()], f) for f in beside]
    base = images or source
    files = walk_files(base, IMG_FORMATS)
    for names in () if images else IMAGES:
        files = [f for f in files if names & {d.lower() for d in f.relative_to(base).parts[:-1]}] or files
    folders = [f.relative_to(base).parts[:-1] for f in files]
    common = max(folders, default=())[: shared(min(folders, default=()), max(folders, default=()))]
    inside = next((k for k, d in enumerate(common, 1) if d.lower() in IMAGES[0]), 0)
    rows = []
    for file, parts in zip(files, folders):
        rest = list(parts[inside or len(common) :])
        split = "" if lists else next((d for d in parts if d.lower() in SPLIT), "")
        folder = "" if inside else next((d for d in rest if d.lower() in IMAGES[0]), "")
        for word in {split, folder} & {*rest}:
            rest.remove(word)
        rows.append((SPLIT.get(split.lower(), ""), "/".join([*rest, file.stem]), file))
    found, splits, problems = unique_ids(rows)
    splits.pop("", None)
    return found, read_lists(lists, found) if lists else splits, problems


def read_lists(files: Sequence[tuple[str, Path]], images: Mapping[str, Path]) -> Splits:
    """Return the image ids of lists, without the flags of per-class lists and without file suffixes."""
    by_name = grouped(images, lambda i: images[i].stem)
    lists: dict[str, dict[str, None]] = {}
    for name, file in files:
        chosen = lists.setdefault(name, {})
        for line in filter(None, map(str.strip, read_text(file).splitlines())):
            entry = line if line in images else re.sub(r"\s+(-1|0|1)$", "", line)
            stem, _, suffix = entry.rpartition(".")
            i = stem if entry not in images and suffix.lower() in IMG_FORMATS else entry
            alone = by_name.get(i.replace("\\", "/").rpartition("/")[2], ())
            chosen[alone[0] if i not in images and len(alone) == 1 else i] = None
    return {name: list(found) for name, found in lists.items()}


def is_voc(file: Path) -> bool:
    """Return whether an XML file is a VOC annotation by its root, or cannot be told from one."""
    try:
        with file.open("rb") as f:
            root = re.search(rb"<([A-Za-z][\w.:-]*)", f.read(4096).replace(b"\0", b""))
    except OSError:
        return True
    return root is None or root[1] == b"annotation"


def has_rows(file: Path) -> bool:
    """Return whether a text file starts with a YOLO label row."""
    with file.open("rb") as f:
        words = f.readline().removeprefix(codecs.BOM_UTF8).split()
    return len(words) > 4 and all(re.fullmatch(rb"[-+.\deE]+", w) for w in words)


def scan_voc(source: Path, images: Path | None = None, annotations: Path | None = None) -> Source:
    """Find VOC annotations, their images and lists anywhere in a folder, or in those that are given."""
    files = [f for f in walk_files(annotations or source, {"xml"}) if is_voc(f)]
    found, lists, problems = images_by_id(source, images)
    for kind, key, there in (("annotations, .xml files,", "annotations", files), ("images", "images", [*found])):
        if not there:
            raise UsageError(f"No VOC {kind} in '{source}'. Give {key}=FOLDER, or the folder that holds both.")
    labels, wrong, alone, farther = match(files, found)  # the path is the id: <filename> is often stale
    labels |= {f.stem: f for f in alone}
    problems += [f"{f} has no image, one of that name has a nearer annotation" for f in farther]
    return Source(found, labels, lambda file, _: read_voc(file), {*labels, *wrong}, files, lists, wrong=wrong,
                  problems=problems)  # fmt: skip


def read_voc(file: Path) -> Annotation:
    """Read one VOC annotation; ValueError if not XML, with a document type, or incomplete."""
    try:
        root = _parse(file.read_bytes())
    except DefusedXmlException as e:  # entities can expand to gigabytes or read other files; no VOC tool writes them
        raise ValueError("holds a document type declaration, which is refused") from e
    except (ParseError, LookupError, ValueError) as e:  # the last for an encoding that expat does not know
        raise ValueError(f"is not valid XML ({e})") from e
    size: Any = numbers([root.findtext(f"size/{side}") for side in ("width", "height")])
    objects = []
    for i, node in enumerate(root.iterfind("object"), 1):
        name = (node.findtext("name") or "").strip()
        box: Any = numbers([node.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")])
        if not name or not box:
            raise ValueError(f"has no name or no complete box in object {i}")
        outline = numbers([point.text for point in node.iterfind("polygon/*")], 6)
        difficult, truncated = (sum(numbers([node.findtext(k)], 1)) > 0 for k in ("difficult", "truncated"))
        objects.append(Object(name, box, () if len(outline) % 2 or not outline else (outline,), difficult, truncated))
    return Annotation(size if min(size, default=0) > 0 else None, tuple(objects))


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


def voc_text(image: str, size: Size, objects: Sequence[Object]) -> str:
    """Return the VOC annotation of an image file of (width, height) in whole pixels, which most VOC readers expect."""
    boxes = [[_whole(o.box[k], o.box[k + 2], size[k]) for k in (0, 1)] for o in objects]
    return VOC.render(image=image, size=size, objects=zip(objects, boxes), escape=escape)


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
    yamls = [] if images else [source] if source.is_file() else _yamls(source)
    if len(yamls) > 1:
        raise UsageError(f"'{source}' holds {len(yamls)} YAML files of datasets. Give source= one of them.")
    if info := read_yaml(str(yamls[0]), need=()) if yamls else {}:
        names = [info["names"][i] for i in range(info["nc"])]
        rows = []
        for split in filter(info.get, SPLITS):
            for place in split_places(split, info, info["yaml_file"]):
                for file in list_images(place):  # a list file names images, which lie below a folder of this name
                    home = next((p for p in file.parents if p.name == "images"), file.parent)
                    inside = file.relative_to(place if place.is_dir() else home)
                    rows.append((split, inside.with_suffix("").as_posix(), file))
        found, lists, problems = unique_ids(rows)
    else:
        names = list(classes or _class_names(source))
        found, lists, problems = images_by_id(source, images)
    if not found:
        raise UsageError(f"'{source}' holds no images. Give a data.yaml, or a folder with images/ and labels/.")
    folder = annotations or (source if source.is_dir() else source.parent)
    labels, wrong, orphans = _label_files(found, folder, bool(annotations))
    extra: dict[str, Any] = {k: info[k] for k in ("kpt_shape", "flip_idx", "kpt_names") if k in info}
    if info.get("channels", 3) != 3:
        extra["channels"] = info["channels"]
    shape = keypoints(extra, str(source)) if "kpt_shape" in extra else (0, 0)
    if len({*names}) < len(names):  # numbers tell them apart
        extra["names"] = dict(enumerate(names))
        names = [n if names.count(n) == 1 else f"{n} #{i}" for i, n in enumerate(names)]
    read, lists = partial(_read_yolo, names=names, shape=shape), lists or {"train": [*found]}
    return Source(found, labels, read, found.keys(), sorted({*labels.values()}), lists, names, extra, wrong, problems,
                  {"orphan": orphans})  # fmt: skip


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
) -> tuple[dict[str, Path], dict[str, str], list[str]]:
    """Return label files and what is wrong with some by id of the image, and the files without an image.

    Labels are where training looks, or else below a folder, and below a chosen one only there.
    """
    places = dict(zip(images, label_places(images.values())))
    labels = {i: f for i, f in places.items() if f.is_file()}
    there, wrong = {*labels.values()}, dict[str, str]()
    folders = set() if chosen else {f.parent for f in there}
    if lost := {i: image for i, image in images.items() if places[i].parent not in folders}:
        texts = [f for f in walk_files(folder, {"txt"}) if chosen or f not in there]
        found, wrong, *_ = match([f for f in texts if has_rows(f) or not f.stat().st_size], lost)
        labels |= found
        there = {*labels.values()}
    stems = {f.stem for folder in {i.parent for i in images.values()} for f in folder.glob("*.*") if is_image(f)}
    beside = {f for folder in {f.parent for f in there} for f in folder.glob("*.txt")} - there
    orphans = [str(f) for f in sorted(beside) if f.stem not in stems and has_rows(f)]
    return labels, wrong, orphans


def _read_yolo(file: Path, size: Size, names: Sequence[str], shape: tuple[int, int]) -> Annotation:
    """Read a YOLO label file, of poses the boxes."""
    with refused("has a label outside the image: {e}", ArithmeticError, error=ValueError):
        rows = check_label(file, len(names), shape, bool(shape[0]))
    objects = []
    for cls, *words in rows:
        points = tuple(float(v) * side for v, side in zip(words, cycle(size)))
        x, y, w, h = points[:4]
        is_box = shape[0] or len(words) == 4
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2) if is_box else around(points)
        objects.append(Object(names[int(float(cls))], box, () if is_box else (points,), row=" ".join(words)))
    return Annotation(objects=tuple(objects))


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
    sx, sy = size[0] / w, size[1] / h
    turns: dict[int, Point] = {6: lambda x, y: (h - y, x), 8: lambda x, y: (y, w - x)}
    turned = (w, h) != size == (h, w) and orientation in turns  # by EXIF, and annotated on the stored pixels
    move: Point = turns[orientation] if turned else lambda x, y: (x * sx, y * sy)
    tally["rotated" if turned else "resized"] += (w, h) != size
    objects = []
    for o in annotation.objects:
        tally["swapped"] += o.box[0] > o.box[2] or o.box[1] > o.box[3]
        whole = around((*move(*o.box[:2]), *move(*o.box[2:])))
        box = max(whole[0], 0.0), max(whole[1], 0.0), min(whole[2], size[0]), min(whole[3], size[1])
        if (box[2] - box[0]) / size[0] < 1e-6 or (box[3] - box[1]) / size[1] < 1e-6:  # would be written as 0
            tally["degenerate"] += 1
            continue
        tally["clipped"] += any(abs(a - b) > 1e-5 * max(size) for a, b in zip(box, whole))  # six digits were rounded
        outlines = [[v for x, y in zip(p[::2], p[1::2]) for v in move(x, y)] for p in o.polygons]
        polygons = tuple(tuple(min(max(v, 0.0), side) for v, side in zip(p, cycle(size))) for p in outlines)
        objects.append(o._replace(box=box, polygons=polygons))
    return objects, tally


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
