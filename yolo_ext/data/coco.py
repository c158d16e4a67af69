# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""COCO: one JSON file of boxes and polygons for each split, and the one that a model's labels are kept in."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from ultralytics.utils import LOGGER

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import UsageError, refused

from yolo_ext.data.records import (  # isort: skip
    SPLITS, Annotation, Object, Source, Store, around, decode, grouped, is_image, nearest, numbers, quote, shared,
    unique_ids, walk_files,
)  # fmt: skip
from yolo_ext.stock.load import IMG_FORMATS

KEYS = ("images", "annotations", "categories")
Pictures = Callable[[], Mapping[str, list[Path]]]  # returns images by name


def scan_coco(source: Path, images: Path | None = None, annotations: Path | None = None) -> Source:
    """Read the instances of COCO JSON files, whose images lie in `images`, beside them or anywhere in the source."""
    files = _coco_files(annotations or source)
    rows, labels = list[tuple[str, str, Path]](), dict[Path, Any]()  # annotation, or why there is none, by image
    names, problems = dict[str, None](), list[str]()
    root = images or (source if source.is_dir() else source.parent)
    # only where a file name does not lead to an image
    pictures = cache(lambda: grouped(walk_files(root, IMG_FORMATS), lambda found: found.name))
    for file in files:
        content = _load(file)
        classes = _classes(content, file)
        names.update(dict.fromkeys(classes.values()))
        before, absent = len(rows), list[str]()
        folder = _image_folder(file, content["images"], images)
        for name, annotation in _group(content, classes, problems):
            path = PurePosixPath(name.replace("\\", "/"))
            image, inside = _image(path, file, folder, root, pictures)
            if image is None:
                absent.append(f"no image '{path.name}' in '{folder or root}'")
                continue
            rows.append((_split_of(file), inside.with_suffix("").as_posix(), image))
            if labels.setdefault(image, annotation) != annotation:
                labels[image] = "is annotated twice, in different ways"
        if absent and len(rows) == before:
            raise UsageError(f"Cannot find the images of '{file}', {absent[0]}. Give images=FOLDER.")
        problems += absent
    if not labels:
        raise UsageError(f"'{source}' lists no images. Give another file, or the folder of a COCO dataset.")
    unique, lists, same = unique_ids(rows)
    wrong = {i: told for i, image in unique.items() if isinstance(told := labels[image], str)}
    beside = {f for folder in {image.parent for image in labels} for f in folder.iterdir() if is_image(f)}
    notes = {"unannotated": [str(f) for f in sorted(beside - labels.keys())]}
    return Source(unique, unique, lambda image, _: labels[image], unique.keys(), files, lists, [*names], {}, wrong,
                  problems + same, notes)  # fmt: skip


def _classes(content: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return class names by category id, in the order of these, which may have gaps."""
    with refused(f"'{file}' has a category without id or name. Mend the file."):
        known = sorted(content["categories"], key=lambda c: int(c["id"]))
        classes = {str(c["id"]): str(c["name"]) for c in known}
    if twice := [n for n, k in Counter(classes.values()).items() if k > 1]:
        LOGGER.warning(f"{file.name}: categories of the same name become one class: {quote(twice)}")
    return classes


def _coco_files(source: Path) -> list[Path]:
    """Return the JSON files that hold instances; others hold captions, keypoints besides and the like."""
    if source.is_file():
        return [source]
    files = walk_files(source, {"json"})
    files = [f for f in files if f.stem.startswith("instances")] or [f for f in files if is_coco(f)]
    if not files:
        raise UsageError(f"'{source}' holds no COCO JSON file. Give one, or the folder of a COCO dataset.")
    return files


def is_coco(file: Path) -> bool:
    """Return whether a JSON file has the keys of COCO instances."""
    raw = file.read_bytes()
    return all(f'"{key}"'.encode() in raw for key in KEYS)


def _image(
    path: PurePosixPath, file: Path, folder: Path | None, root: Path, pictures: Pictures
) -> tuple[Path | None, PurePath]:
    """Return the image that a COCO file names, in the folder of its images or elsewhere by name, and its path there."""
    safe = not path.is_absolute() and ".." not in path.parts
    if folder is not None and safe and (folder / path).is_file():
        return folder / path, path
    ends = [(shared(path.parts[::-1], p.parts[::-1]), p) for p in pictures().get(path.name, ())]
    most = max((n for n, _ in ends), default=0)
    best = [(p, p) for n, p in ends if n == most]  # the name may start on another machine
    found = nearest((*file.parent.parts, file.stem.rpartition("_")[2]), best)
    return (found[0], found[0].relative_to(root)) if len(found) == 1 else (None, path)


def _load(file: Path) -> dict[str, Any]:
    with refused(f"'{file}' is not a COCO file: not valid JSON ({{e}}). Mend the file.", ValueError, RecursionError):
        content = json.loads(decode(file.read_bytes()))
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in KEYS):
        raise UsageError(f"'{file}' is not a COCO file: it needs the lists {', '.join(KEYS)}. Give a COCO file.")
    return content


def _split_of(file: Path) -> str:
    """Return the split that a file or its folder is called after, else its name."""
    for text in (file.stem.lower(), file.parent.name.lower()):
        if hits := {split for split in SPLITS if split in text}:
            return hits.pop() if len(hits) == 1 else file.stem
    return file.stem


def _image_folder(file: Path, images: Sequence[Any], given: Path | None) -> Path | None:
    """Return the folder that the file names of a COCO file start from, None where they have to be looked for."""
    names = (str(i["file_name"]).replace("\\", "/") for i in images if isinstance(i, dict) and i.get("file_name"))
    first = next(names, "")
    part = file.stem.rpartition("_")[2]
    tails = ("", part, f"images/{part}", f"images/{_split_of(file)}", "images", "JPEGImages", "data")
    places = [given] if given else [root / tail for root in (file.parent, file.parent.parent) for tail in tails]
    return next((p for p in places if p and first and (p / first).is_file()), given)


def _group(content: Mapping[str, Any], classes: Mapping[str, str], problems: list[str]) -> list[tuple[str, Any]]:
    """Return the file name of each image with its annotation, or with what is wrong in it."""
    rows, grouped = dict[str, list[Any]](), list[tuple[str, Any]]()
    for a in content["annotations"]:
        if isinstance(a, dict) and "image_id" in a:
            rows.setdefault(str(a["image_id"]), []).append(a)
        else:
            problems.append(f"annotation {a.get('id') if isinstance(a, dict) else a} has no image_id")
    for image in content["images"]:
        if not isinstance(image, dict) or "id" not in image or not image.get("file_name"):
            problems.append(f"image {image.get('id') if isinstance(image, dict) else image} has no id or no file_name")
            continue
        size, own = numbers([image.get("width"), image.get("height")]), rows.pop(str(image["id"]), ())
        counts = Counter(crowd=sum(bool(a.get("iscrowd")) for a in own))
        known: Any = size if min(size, default=0) > 0 else None
        try:
            objects = tuple(_object(a, classes, counts) for a in own if not a.get("iscrowd"))
            grouped.append((str(image["file_name"]), Annotation(known, objects, dict(+counts))))
        except ValueError as e:
            grouped.append((str(image["file_name"]), str(e)))
    lost = {i: sum(not a.get("iscrowd") for a in own) for i, own in rows.items()}
    problems += [f"{n} annotations belong to no image: image_id {i}" for i, n in lost.items() if n]
    return grouped


def _object(a: Mapping[str, Any], classes: Mapping[str, str], counts: Counter[str]) -> Object:
    """Return the object of a COCO annotation by its box, or else its polygons; of a mask only the box is taken."""
    name = classes.get(str(a.get("category_id")))
    if name is None:
        raise ValueError(f"annotation {a.get('id')}: its category_id {a.get('category_id')} is in no category")
    parts = a.get("segmentation")
    given = [numbers(p, 6) for p in parts] if isinstance(parts, list) else []
    polygons = tuple(p for p in given if len(p) % 2 == 0 and _area(p) > 0)
    points = isinstance(a.get("keypoints"), list) and any(a["keypoints"])
    gone = {"flat": len(given) > len(polygons), "mask": isinstance(parts, dict), "keypoints": points}
    counts.update(kind for kind, found in gone.items() if found)
    box = numbers(a.get("bbox"), 4)
    if len(box) == 4 and (box[2] * box[3] or not polygons):
        x, y, w, h = box
        return Object(name, (x, y, x + w, y + h), polygons)
    if not polygons:
        told = f"its bbox {a.get('bbox')} is not four numbers, and it has no polygon"
        raise ValueError(f"annotation {a.get('id')}: {told}")
    return Object(name, around([v for p in polygons for v in p]), polygons)


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
    """Write a COCO file from (file name, (width, height), annotations), whose annotations are never all in memory."""
    categories = [{"id": i, "name": n, "supercategory": ""} for i, n in enumerate(names, 1)]  # from 1, as COCO does
    ids, content = count(1), {"categories": categories, "images": list[dict[str, Any]]()}
    file.parent.mkdir(exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        out.write('{"annotations": [')
        for i, (name, (w, h), objects) in enumerate(images, 1):
            content["images"].append({"id": i, "file_name": name, "width": w, "height": h})
            for o in objects:
                row = {"id": next(ids), "image_id": i, **o}
                out.write(("," if row["id"] > 1 else "") + "\n" + json.dumps(row))
        out.write("\n],\n" + json.dumps(content, ensure_ascii=False).removeprefix("{") + "\n")


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
    data: dict[str, Any] = _load(file) if file.is_file() else {key: [] for key in KEYS}
    try:
        categories = {c["name"]: c["id"] for c in data["categories"]}
        named = {i: name for name, i in categories.items()}
        images = {str(i["file_name"]): i for i in data["images"]}
        rows = {i["id"]: list[Any]() for i in data["images"]}
        for a in data["annotations"]:
            row = dict(a)
            _, image, category = (row.pop(k) for k in ("id", "image_id", "category_id"))
            rows.get(image, []).append({**row, "category": named.get(category)})
        sizes = {name: {side: i.get(side) for side in ("width", "height")} for name, i in images.items()}
        held = {name: {**size, "annotations": rows[images[name]["id"]]} for name, size in sizes.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UsageError(f"'{file}' is not a COCO file ({e!r}). Mend it, or give another out=.") from e
    for index, name in names.items():  # from 1, as in COCO itself and as Ultralytics' converter expects
        if name not in categories:
            taken = categories.values()
            categories[name] = index + 1 if index + 1 not in taken else max(taken) + 1
            data["categories"].append({"id": categories[name], "name": name})
    changed: dict[str, dict[str, Any]] = {}

    def close() -> None:
        if not changed:
            return
        gone = {images[name]["id"] for name in changed if name in images}
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] not in gone]
        new, ids = (count(max((row["id"] for row in data[k]), default=0) + 1) for k in ("images", "annotations"))
        for name, found in sorted(changed.items()):
            if name not in images:
                images[name] = {"id": next(new), "file_name": name}
                data["images"].append(images[name])
            images[name].update(width=found["width"], height=found["height"])
            for row in found["annotations"]:
                numbers = {"id": next(ids), "image_id": images[name]["id"], "category_id": categories[row["category"]]}
                data["annotations"].append({**numbers, **{k: row[k] for k in sorted(row) if k != "category"}})
        atomic_write(file, json.dumps(data))

    return Store(held.get, changed.__setitem__, close)
