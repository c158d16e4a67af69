# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pascal VOC: one XML file for each image, lists of images in ImageSets/Main."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from ultralytics.data.utils import IMG_FORMATS

from yolo_ext.core.errors import UsageError
from yolo_ext.data.files import walk_files
from yolo_ext.data.records import Annotation, Item, Object, Size, Source, finite

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def scan_voc(source: Path) -> Source:
    """Find the images, annotations and lists of a VOC folder, also in nested folders.

    An annotation belongs to the image with the same path below its folder, else to the only image with its name.

    Args:
        source: Folder with Annotations/**.xml, JPEGImages|images/** and ImageSets/Main/*.txt.

    Raises:
        UsageError: There are no annotations or no image folder.
    """
    labels = source / "Annotations"
    if not labels.is_dir():
        raise UsageError(f"'{source}' is not a VOC folder: it has no 'Annotations'. Give the folder that holds it.")
    folder = next((source / n for n in ("JPEGImages", "images", "Images") if (source / n).is_dir()), None)
    if folder is None:
        raise UsageError(f"'{source}' has no image folder. Legal names: JPEGImages, images.")
    images: dict[str, Path] = {}
    by_name: dict[str, list[str]] = {}
    problems = []
    for file in walk_files(folder, IMG_FORMATS):
        i = file.relative_to(folder).with_suffix("").as_posix()
        if i in images:
            problems.append(f"{images[i].name} and {file.name} have the same id")
            continue
        images[i] = file
        by_name.setdefault(file.stem, []).append(i)
    items = {i: Item(i, file, None) for i, file in images.items()}
    annotated = set()
    for file in walk_files(labels, {"xml"}):  # the path is the id: <filename> is often stale
        i = file.relative_to(labels).with_suffix("").as_posix()
        if i not in images and len(by_name.get(file.stem, ())) == 1:
            i = by_name[file.stem][0]
        if i in annotated:
            problems.append(f"{items[i].label} and {file} annotate the same image")
        items[i] = Item(i, images.get(i), file)
        annotated.add(i)
    if not annotated:
        raise UsageError(f"'{labels}' holds no XML files. Give the folder of a VOC dataset.")
    lists = {f.stem: _read_list(f, items, by_name) for f in walk_files(source / "ImageSets/Main", {"txt"})} if (
        source / "ImageSets/Main").is_dir() else {}  # fmt: skip
    return Source(items, _read_item, annotated, lists, problems=problems)


def _read_item(item: Item, size: Size) -> Annotation:
    return read_voc(item.label) if item.label else Annotation()


def read_voc(file: Path) -> Annotation:
    """Read one VOC annotation file.

    Args:
        file: XML file.

    Raises:
        ValueError: The file is not XML, holds a document type, or an object lacks its name or box.
    """
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
        if not name or not finite(box):
            raise ValueError(f"has no name or no complete box in object {i}")
        flags = {k: _number(node.findtext(k)) > 0 for k in ("difficult", "truncated")}
        objects.append(Object(name, box, **flags))  # type: ignore[arg-type]
    known = finite(size) and min(size) > 0
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
    """Return a VOC annotation file, corners as whole pixels because most VOC readers expect them.

    Args:
        image: File name of the image.
        size: Its (width, height) in pixels.
        objects: Objects inside the image.
    """
    lines = [
        "<annotation>",
        f"  <filename>{escape(image)}</filename>",
        f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>",
        "  <segmented>0</segmented>",
    ]
    for o in objects:
        (x0, x1), (y0, y1) = (_whole(o.box[k], o.box[k + 2], size[k]) for k in (0, 1))
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(CORNERS, (x0, y0, x1, y1)))
        lines += [
            "  <object>",
            f"    <name>{escape(o.name)}</name>",
            f"    <pose>Unspecified</pose><truncated>{o.truncated:d}</truncated><difficult>{o.difficult:d}</difficult>",
            f"    <bndbox>{corners}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _whole(low: float, high: float, side: int) -> tuple[int, int]:
    """Return both ends of a side in whole pixels, at least one apart."""
    if round(low) < round(high):
        return round(low), round(high)
    start = min(int(low), side - 1)
    return start, start + 1
