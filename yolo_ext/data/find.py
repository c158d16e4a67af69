# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Where images, annotations and splits of a dataset lie: found by what files hold, matched by name, then by folder."""

import codecs
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import no_labels
from yolo_ext.data.records import Source, Splits, grouped, quote, read_text, walk_files
from yolo_ext.stock.load import IMG_FORMATS, img2label_paths

T = TypeVar("T")
Members = dict[str, list[tuple[str, Path]]]  # (id, image) by split
IMAGES = ({"jpegimages"}, {"jpegimages", "images", "image", "imgs", "img"})  # names of image folders, sure ones first
SPLIT = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}  # what splits are called besides
SPLIT |= {name: name for name in SPLIT.values()}


def image_files(source: Path, images: Path | None = None) -> list[Path]:
    """Return the images below `images`; else of the source those in folders called after images, if any, else all."""
    files = walk_files(images or source, IMG_FORMATS)
    for names in IMAGES if images is None else ():
        if named := [f for f in files if names & {d.lower() for d in f.relative_to(source).parts[:-1]}]:
            return named
    return files


def members(files: Sequence[Path], base: Path, by_folder: bool = True) -> Members:
    """Return the images by the split that a folder is called after, or "", with ids: paths below the image folder."""
    folders = [f.relative_to(base).parts[:-1] for f in files]
    common = max(folders, default=())[: shared(min(folders, default=()), max(folders, default=()))]
    inside = next((k for k, d in enumerate(common, 1) if d.lower() in IMAGES[1]), 0)
    found: Members = {}
    for file, parts in zip(files, folders):
        rest = list(parts[inside or len(common) :])
        place = next((d for d in parts if d.lower() in SPLIT), "") if by_folder else ""
        folder = "" if inside else next((d for d in rest if d.lower() in IMAGES[1]), "")
        for word in {place, folder} & {*rest}:
            rest.remove(word)
        found.setdefault(SPLIT.get(place.lower(), ""), []).append(("/".join([*rest, file.stem]), file))
    return found


def match(
    files: Sequence[Path], images: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, str], list[Path], list[Path]]:
    """Match files and images by name, then folder; return file and what is wrong by id, files without image, others."""
    by_stem = grouped(images.items(), lambda named: named[1].stem)
    found, alone = dict[str, list[Path]](), list[Path]()
    for file in files:
        near = nearest(file.parent.parts, by_stem.get(file.stem, []))
        if len(near) == 1:
            found.setdefault(near[0], []).append(file)
        else:
            alone.append(file)
    for i, several in found.items():
        if len(several) > 1:
            found[i] = nearest(images[i].parent.parts, [(f, f) for f in several])
            alone += [f for f in several if f not in found[i]]
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


def list_files(source: Path) -> list[tuple[str, Path]]:
    """Return name and file of the lists in ImageSets/Main, or of those called after splits beside the folders."""
    sets = [*source.glob("ImageSets/Main/*.txt"), *source.glob("*/ImageSets/Main/*.txt")]
    beside = [f for f in source.glob("*.txt") if f.stem.lower() in SPLIT and not has_rows(f)]
    return [(f.stem, f) for f in sorted(sets)] or [(SPLIT[f.stem.lower()], f) for f in sorted(beside)]


def read_lists(files: Sequence[tuple[str, Path]], items: Collection[str], images: Mapping[str, Path]) -> Splits:
    """Return the image ids of lists, without the flags of per-class lists and without file suffixes."""
    by_name = grouped(images, lambda i: images[i].stem)
    lists: dict[str, dict[str, None]] = {}
    for name, file in files:
        chosen = lists.setdefault(name, {})
        for line in filter(None, map(str.strip, read_text(file).splitlines())):
            entry = line if line in items else re.sub(r"\s+(-1|0|1)$", "", line)
            stem, _, suffix = entry.rpartition(".")
            i = stem if entry not in items and suffix.lower() in IMG_FORMATS else entry
            alone = by_name.get(i.replace("\\", "/").rpartition("/")[2], ())
            chosen[alone[0] if i not in items and len(alone) == 1 else i] = None
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
        looked = no_labels([item.label for item in data.items.values() if item.label])
        raise UsageError(f"'{source}' has {len(data.items)} images: {looked}. Give annotations=FOLDER.")

    def where(files: Sequence[Path]) -> str:
        folder = os.path.commonpath([f.parent for f in files])
        return f"{len(files)} in '{os.path.relpath(folder, source if source.is_dir() else source.parent)}'"

    images = [item.image for item in data.items.values() if item.image]
    parts = [f"images: {where(images)}", f"{format} annotation files: {where(data.files)}"]
    lists = [f"lists: {quote(sorted(data.lists), 20)}"] if len(data.lists) > 1 else []
    LOGGER.info(f"Found in '{source}': {', '.join([*parts, *lists])}")


def check_places(data: Source) -> None:
    """Refuse labels that training would not find, where images and labels are to stay."""
    pairs = [(item.image, item.label) for item in data.items.values() if item.label and item.label.is_file()]
    places = img2label_paths([str(image) for image, _ in pairs])
    if lost := [f"'{label}'" for (_, label), place in zip(pairs, places) if label != Path(place)]:
        told = f"{len(lost)} labels lie where training does not look, such as {lost[0]}"
        raise UsageError(f"{told}. Give files=link, which makes a dataset of them.")
