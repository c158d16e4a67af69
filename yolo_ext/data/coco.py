# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""COCO: one JSON file of boxes and polygons for each split, and the one that a model's labels are kept in."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError
from yolo_ext.data.records import Annotation, Item, Object, Source, Store, unique_ids, walk_files


def scan_coco(source: Path, images: Path | None = None) -> Source:
    """Read the instances of a COCO JSON file, or of a folder of them, whose images lie in `images` or beside them."""
    files = [source] if source.is_file() else walk_files(source, {"json"})
    files = [f for f in files if f.stem.startswith("instances")] or files  # others: captions and the like
    if not files:
        raise UsageError(f"'{source}' holds no JSON files. Give a COCO JSON file, or the folder of a COCO dataset.")
    found, labels = dict[str, list[tuple[str, Path]]](), dict[Path, Annotation]()
    names, problems = dict[str, None](), list[str]()
    for file in files:
        content = _load(file)
        try:
            classes = {int(c["id"]): str(c["name"]) for c in content["categories"]}  # ids may have gaps
        except (KeyError, TypeError, ValueError) as e:
            raise UsageError(f"'{file}' has a category without id or name. Mend the file.") from e
        names.update(dict.fromkeys(classes[c] for c in sorted(classes)))
        folder = images or _image_folder(file, [str(i.get("file_name")) for i in content["images"][:1]])
        members = found.setdefault(_split_of(file), [])
        for image, annotation in _group(content, classes, problems):
            name = PurePosixPath(str(image["file_name"]).replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts:
                problems.append(f"{file.name}: file name '{name}' leads out of the image folder")
                continue
            members.append((name.with_suffix("").as_posix(), folder / name))
            if labels.setdefault(folder / name, annotation) != annotation:
                problems.append(f"{name} is annotated twice, in different ways")
    unique, lists, same = unique_ids(found)
    items = {i: Item(i, image, None) for i, image in unique.items()}
    annotations = {i: labels[image] for i, image in unique.items()}
    problems += same
    return Source(items, lambda item, _: annotations[item.id], items.keys(), lists, [*names], problems=problems)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UsageError(f"'{file}' is not a COCO file: not valid JSON ({e}). Mend the file.") from e
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        raise UsageError(f"'{file}' is not a COCO file: it needs the lists {', '.join(keys)}. Give a COCO file.")
    return content


def _split_of(file: Path) -> str:
    """Return the split that a file or its folder is called after, else its name."""
    for text in (file.stem.lower(), file.parent.name.lower()):
        if hits := {split for split in ("train", "val", "test") if split in text}:
            return hits.pop() if len(hits) == 1 else file.stem
    return file.stem


def _image_folder(file: Path, first: Sequence[str]) -> Path:
    """Return the folder that the file names of a COCO file start from."""
    part = file.stem.rpartition("_")[2]
    tails = ("", part, f"images/{part}", f"images/{_split_of(file)}", "images", "JPEGImages", "data")
    for folder in (root / tail for root in (file.parent, file.parent.parent) for tail in tails):
        if first and (folder / first[0]).is_file():
            return folder
    raise UsageError(f"Cannot find the image '{(first or ['?'])[0]}' of '{file}'. Give images=FOLDER.")


def _group(content: Mapping[str, Any], classes: Mapping[Any, str], problems: list[str]) -> list[tuple[Any, Annotation]]:
    """Return each image with its annotation, noting what is broken."""
    objects, crowds = dict[Any, list[Object]](), Counter[Any]()
    for a in content["annotations"]:
        try:
            if a.get("iscrowd"):
                crowds[a["image_id"]] += 1
            else:
                objects.setdefault(a["image_id"], []).append(_object(a, classes))
        except (KeyError, TypeError, ValueError, AttributeError) as e:  # noqa: PERF203  the sound ones count as well
            problems.append(f"annotation {a.get('id') if isinstance(a, dict) else a}: {e!r} is wrong or absent")
    grouped = []
    for image in content["images"]:
        try:
            i, size, _ = image["id"], (float(image["width"]), float(image["height"])), image["file_name"]
        except (KeyError, TypeError, ValueError) as e:
            problems.append(f"image {image.get('id') if isinstance(image, dict) else image}: {e!r} is wrong or absent")
            continue
        known = size if _finite(size) and min(size) > 0 else None
        grouped.append((image, Annotation(known, tuple(objects.pop(i, ())), crowds.pop(i, 0))))
    problems += [f"{len(found)} annotations belong to no image: image_id {i}" for i, found in objects.items()]
    return grouped


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _object(a: Mapping[str, Any], classes: Mapping[Any, str]) -> Object:
    """Return the object of a COCO annotation; of a mask only the box is taken."""
    x, y, w, h = map(float, a["bbox"])
    parts = a.get("segmentation")
    polygons = tuple(tuple(map(float, p)) for p in parts) if isinstance(parts, list) else ()
    if not _finite((x, y, w, h)) or w < 0 or h < 0 or not all(len(p) >= 6 and _finite(p) for p in polygons):
        raise ValueError(f"box {a['bbox']} or its polygon")
    return Object(classes[a["category_id"]], (x, y, x + w, y + h), polygons)


def coco_object(o: Object) -> dict[str, Any]:
    """Return the COCO annotation of an object inside its image, without any id."""
    x0, y0, x1, y1 = o.box
    area = sum(_area(p) for p in o.polygons) if o.polygons else (x1 - x0) * (y1 - y0)
    box, *outlines = ([round(v, 3) for v in values] for values in ((x0, y0, x1 - x0, y1 - y0), *o.polygons))
    found = {"bbox": box, "area": round(area, 3), "iscrowd": 0, "segmentation": outlines}
    return found if o.confidence is None else {**found, "score": o.confidence}


def _area(polygon: Sequence[float]) -> float:
    """Return the area of a polygon in square pixels by the shoelace formula."""
    points = list(zip(polygon[::2], polygon[1::2]))
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]))) / 2


def write_coco(file: Path, names: Sequence[str], images: Iterable[tuple[str, tuple[int, int], list[Any]]]) -> None:
    """Write a COCO file from (file name, (width, height), annotations), so that no split is ever whole in memory."""
    categories = [{"id": i, "name": n, "supercategory": ""} for i, n in enumerate(names, 1)]  # from 1, as COCO does
    ids = count(1)
    with file.open("w", encoding="utf-8") as out, TemporaryFile("w+", encoding="utf-8") as boxes:
        out.write(f'{{"categories": {json.dumps(categories, ensure_ascii=False)},\n"images": [')
        for i, (name, (w, h), objects) in enumerate(images, 1):
            image = {"id": i, "file_name": name, "width": w, "height": h}
            out.write(("," if i > 1 else "") + "\n" + json.dumps(image, ensure_ascii=False))
            for o in objects:
                number = {"id": next(ids), "image_id": i}
                boxes.write(("," if number["id"] > 1 else "") + "\n" + json.dumps({**number, **o}))
        out.write('\n],\n"annotations": [')
        boxes.seek(0)
        shutil.copyfileobj(boxes, out)
        out.write("\n]}\n")


def detected(record: Mapping[str, Any], names: Mapping[int, str]) -> list[Object]:
    """Return the objects of the record of a detection, see `label`."""
    found = []
    for o in record["objects"]:
        polygons = (tuple(o["polygon"]),) if "polygon" in o else ()
        found.append(Object(names[o["class"]], tuple(o["box"]), polygons, confidence=o["confidence"]))
    return found


def coco_entry(record: Mapping[str, Any], names: Mapping[int, str], save_conf: bool) -> dict[str, Any]:
    """Return what COCO says of one image, with a `score`, without the numbers that only the whole file can give."""
    w, h = record["size"]
    rows = [{**coco_object(o), "category": o.name} for o in detected(record, names)]
    return {"width": w, "height": h, "annotations": rows}


def coco_store(file: Path, names: Mapping[int, str]) -> Store:
    """Return the store of one COCO file; what it already holds keeps its numbers and its further keys."""
    data: dict[str, Any] = _load(file) if file.is_file() else {"images": [], "annotations": [], "categories": []}
    try:
        categories = {c["name"]: c["id"] for c in data["categories"]}
        named = {i: name for name, i in categories.items()}
        rows = {i["id"]: list[Any]() for i in data["images"]}
        for a in data["annotations"]:
            row = dict(a)
            _, image, category = (row.pop(k) for k in ("id", "image_id", "category_id"))
            if image in rows:
                rows[image].append({**row, "category": named.get(category)})
        held: dict[str, dict[str, Any]] = {}
        for i in data["images"]:
            size = {side: i.get(side) for side in ("width", "height")}
            held[str(i["file_name"])] = {**size, "annotations": rows[i["id"]]}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UsageError(f"'{file}' is not a COCO file ({e!r}). Mend it, or give another out=.") from e
    for index, name in names.items():  # from 1, as in COCO itself and as Ultralytics' converter expects
        free = index + 1 if index + 1 not in categories.values() else max(categories.values()) + 1
        categories.setdefault(name, free)
    changed: dict[str, dict[str, Any]] = {}

    def close() -> None:
        if changed:
            _update(data, categories, changed)
            atomic_write(file, json.dumps(data))

    return Store(held.get, changed.__setitem__, close)


def _update(data: dict[str, Any], categories: Mapping[str, int], changed: Mapping[str, dict[str, Any]]) -> None:
    """Replace the annotations of the changed images in a COCO file's content, and number what is new."""
    present = {c["name"] for c in data["categories"]}
    data["categories"] += [{"id": i, "name": n} for n, i in categories.items() if n not in present]
    images = {str(i["file_name"]): i for i in data["images"]}
    gone = {images[name]["id"] for name in changed if name in images}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] not in gone]
    image_ids = count(max((i["id"] for i in data["images"]), default=0) + 1)
    ids = count(max((a["id"] for a in data["annotations"]), default=0) + 1)
    for name, found in sorted(changed.items()):
        if name not in images:
            images[name] = {"id": next(image_ids), "file_name": name}
            data["images"].append(images[name])
        images[name].update(width=found["width"], height=found["height"])
        for row in found["annotations"]:
            numbers = {"id": next(ids), "image_id": images[name]["id"], "category_id": categories[row["category"]]}
            data["annotations"].append({**numbers, **{k: row[k] for k in sorted(row) if k != "category"}})
