# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where images, annotations and splits of a dataset lie: found by what files hold, matched by name, then by folder."""

import codecs
import re
from collections.abc import Mapping, Sequence
from os.path import commonpath, relpath
from pathlib import Path
from typing import TypeVar

from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import label_places, no_labels
from yolo_ext.data.records import Source, Splits, grouped, quote, read_text, unique_ids, walk_files
from yolo_ext.stock.load import IMG_FORMATS

T = TypeVar("T")
IMAGES = ({"jpegimages", "images", "image", "imgs", "img"}, {"jpegimages"})  # names of image folders, then sure ones
SPLIT = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}  # what splits are called besides
SPLIT |= {name: name for name in SPLIT.values()}


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


def match(
    files: Sequence[Path], images: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, str], list[Path], list[Path]]:
    """Match files and images by name, then folder; return file and what is wrong by id, files without image, others."""
    by_stem = grouped(images.items(), lambda named: named[1].stem)
    near = {file: nearest(file.parent.parts, by_stem.get(file.stem, [])) for file in files}
    several = grouped((file for file in files if len(near[file]) == 1), lambda file: near[file][0])
    found = {i: nearest(images[i].parent.parts, [(f, f) for f in those]) for i, those in several.items()}
    alone = [file for file in files if not any(file in found.get(i, ()) for i in near[file])]
    wrong = {i: f"annotates the same image as {quote(same[1:])}" for i, same in found.items() if same[1:]}
    bare = {stem: [i for i, _ in those if i not in found] for stem, those in by_stem.items()}
    wrong |= {i: f"{f} fits several images" for f in alone for i in bare.get(f.stem, ())}
    orphans = sorted(f for f in alone if f.stem not in by_stem)
    farther = sorted(f for f in alone if f.stem in by_stem and not bare[f.stem])
    return {i: same[0] for i, same in found.items()}, wrong, orphans, farther


def nearest(folders: Sequence[str], files: Sequence[tuple[T, Path]]) -> list[T]:
    """Return the keys of the files whose folders differ least from these."""
    if len(files) < 2:
        return [key for key, _ in files]

    def apart(other: Sequence[str]) -> int:
        start = shared(folders, other)
        return len(folders) + len(other) - 2 * (start + shared(folders[start:][::-1], other[start:][::-1]))

    costs = [apart(file.parent.parts) for _, file in files]
    return [key for (key, _), cost in zip(files, costs) if cost == min(costs)]


def shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Return with how many equal parts two paths begin."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


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


def tell(data: Source, format: str, source: Path) -> None:
    """Say what was found where; no annotation at all is an error."""
    if not data.files:
        looked = no_labels(label_places(data.images.values()))
        raise UsageError(f"'{source}' has {len(data.images)} images: {looked}. Give annotations=FOLDER.")
    start, places = source if source.is_dir() else source.parent, []
    for kind, files in (("images", [*data.images.values()]), (f"{format} annotation files", data.files)):
        places.append(f"{kind}: {len(files)} in '{relpath(commonpath([f.parent for f in files]), start)}'")
    lists = [f"lists: {quote(sorted(data.lists), 20)}"] if len(data.lists) > 1 else []
    LOGGER.info(f"Found in '{source}': {', '.join([*places, *lists])}")


def check_places(data: Source) -> None:
    """Refuse labels that training would not find, where images and labels are to stay."""
    places = label_places(data.images[i] for i in data.labels)
    if lost := [f"'{label}'" for label, place in zip(data.labels.values(), places) if label != place]:
        told = f"{len(lost)} labels lie where training does not look, such as {lost[0]}"
        raise UsageError(f"{told}. Give files=link, which makes a dataset of them.")
