# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What every dataset format is read into and written from: images with objects in pixels, splits, and files."""

import codecs
import glob
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from ultralytics.utils import NUM_THREADS, TQDM

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.lock import left_over
from yolo_ext.stock.load import IMG_FORMATS

K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")
Size = tuple[int, int]
Splits = dict[str, list[str]]  # ids by split
Kinds = Mapping[str, Collection[str]]  # classes in an image, by its id
SPLITS = ("train", "val", "test")
MANY = 1000  # items from which processes pay: XML and image headers are read under the interpreter's lock
SOURCES = "Give an image, a folder, a glob or a text file of paths."
_task: tuple[Callable[[Any], Any], Sequence[Any]]  # of forked processes


class Object(NamedTuple):
    """One object of an image, in pixels counted from 0."""

    name: str  # of its class
    box: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
    polygons: tuple[tuple[float, ...], ...] = ()  # outlines, each x1, y1, x2, y2, ...
    difficult: bool = False  # VOC flag: left out of the evaluation
    truncated: bool = False  # VOC flag: goes on outside the image
    row: str = ""  # the YOLO label row behind its class, to be written as it was read
    confidence: float | None = None  # where a model detected it


class Annotation(NamedTuple):
    """The annotation of one image."""

    size: tuple[float, float] | None = None  # (width, height) that the objects refer to, where the source says it
    objects: tuple[Object, ...] = ()
    notes: Mapping[str, int] = {}  # how often a kind of `convert.NOTES` occurred in reading it


@dataclass
class Source:
    """A dataset that was found but not yet read; an id is the path of an image below its folder without suffix."""

    images: Mapping[str, Path]  # by id
    labels: Mapping[str, Path]  # annotation file by id, of COCO the image
    reader: Callable[[Path, Size], Annotation]  # of such a file and the size of its image; ValueError if broken
    annotated: Collection[str]  # ids to be split where there are no lists
    files: Sequence[Path] = ()  # with the annotations
    lists: Splits = field(default_factory=dict)  # ids by name of a split or list
    names: list[str] | None = None  # classes in label order, None where they are found by reading
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a data.yaml to be kept
    wrong: Mapping[str, str] = field(default_factory=dict)  # why an annotation cannot be used, by id
    problems: list[str] = field(default_factory=list)  # what is wrong already, with no image of the source in question
    notes: dict[str, list[str]] = field(default_factory=dict)  # names of what is left out, by kind of `convert.NOTES`

    def read(self, i: str, size: Size) -> Annotation:
        """Return the annotation of an image of that size; ValueError where it is broken."""
        if i in self.wrong:
            raise ValueError(self.wrong[i])
        return self.reader(self.labels[i], size) if i in self.labels else Annotation()


class Store(NamedTuple):
    """Where the labels of a model are kept."""

    read: Callable[[str], Any]  # gives what an image is labelled with, None where there is nothing
    write: Callable[[str, Any], None]  # sets it
    close: Callable[[], None] = lambda: None  # ends the run


def unique_ids(rows: Sequence[tuple[str, str, Path]]) -> tuple[dict[str, Path], Splits, list[str]]:
    """Return image by id, ids by split and clashes within a split, from the (split, wanted id, image) of each image."""
    owner, images, lists, problems = dict[str, Path](), dict[str, Path](), Splits(), list[str]()
    clash = any(owner.setdefault(i, f) != f for _, i, f in rows) and len({split for split, *_ in rows}) > 1
    for split, i, file in rows:
        i = f"{split}_{i}" if clash else i
        if images.setdefault(i, file) != file:
            problems.append(f"{images[i].name} and {file.name} have the same id")
        lists.setdefault(split, []).append(i)
    return images, lists, problems


def by_ratio(ids: Collection[str], ratios: Mapping[str, float], seed: int, classes: Kinds | None = None) -> Splits:
    """Return a seeded random split by shares that sum to 1, the `classes` of each image spread alike if given."""
    legal = {"train", "val"} <= ratios.keys() <= set(SPLITS) and all(r > 0 for r in ratios.values())
    if not legal or abs(sum(ratios.values()) - 1) > 1e-6:
        raise UsageError(f"Ratios {dict(ratios)} are not legal. Give positive shares that sum to 1, e.g. 0.8,0.2.")
    names = [s for s in SPLITS if s in ratios]
    chosen = dict(zip(names, deal(ids, [ratios[s] for s in names], seed, classes)))
    if empty := [s for s, members in chosen.items() if not members]:
        raise UsageError(f"Ratios {dict(ratios)} leave {quote(empty)} empty with {len(ids)} images. Raise the share.")
    return chosen


def by_folds(ids: Collection[str], folds: int, seed: int, classes: Kinds | None = None) -> list[Splits]:
    """Return `folds` seeded splits into train and val, in which every image is validated once."""
    if not 2 <= folds <= len(ids):
        raise UsageError(f"'folds={folds}' is illegal with {len(ids)} images. Legal: 2 to {max(len(ids), 2)}.")
    parts = deal(ids, [1 / folds] * folds, seed, classes)
    return [{"train": sorted(i for p in parts if p is not part for i in p), "val": part} for part in parts]


def deal(ids: Collection[str], shares: Sequence[float], seed: int, classes: Kinds | None = None) -> list[list[str]]:
    """Return the sorted ids of parts of the given shares, at random or stratified class by class."""
    order = sorted(ids)
    random.Random(seed).shuffle(order)
    stops = [round(sum(shares[: k + 1]) * len(order)) for k in range(len(shares))]
    free = [stop - start for start, stop in zip([0, *stops], stops)]
    if classes is None:
        return [sorted(order[stop - n : stop]) for stop, n in zip(stops, free)]
    # Iterative stratification (Sechidis et al., 2011): an image of the rarest class goes first, to the part that lacks
    # most images of that class.
    counts = Counter(name for i in order for name in classes.get(i, ()))
    rarest = {i: min(((counts[n], n) for n in classes.get(i, ())), default=(math.inf, "")) for i in order}
    lack = [Counter({n: share * count for n, count in counts.items()}) for share in shares]  # type: ignore[misc]
    parts: list[list[str]] = [[] for _ in shares]
    for i in sorted(order, key=lambda i: rarest[i]):
        name = rarest[i][1]
        k = max((k for k, n in enumerate(free) if n), key=lambda k: (lack[k][name], free[k]))
        parts[k].append(i)
        free[k] -= 1
        lack[k].subtract(classes.get(i, ()))
    return [sorted(part) for part in parts]


def around(points: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the box (xmin, ymin, xmax, ymax) around the points x1, y1, x2, y2, ..."""
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def numbers(values: Any, least: int = 2) -> tuple[float, ...]:
    """Return values as numbers, nothing where they are too few or one is none."""
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError):
        return ()
    return found if len(found) >= least and all(map(math.isfinite, found)) else ()


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the items by what `key` says of them, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


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


def quote(items: Sequence[object], shown: int = 5) -> str:
    """Return the first items as text, followed by how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, in UTF-16 with its mark, or in GB2312, as Chinese Windows may write it."""
    with refused(f"'{file}' cannot be read as text: it {{e}}. Save it as UTF-8.", ValueError):
        return decode(file.read_bytes())


def decode(raw: bytes) -> str:
    """Return the text of bytes, see `read_text`; GB2312 takes pairs of high bytes only, so hardly any Latin text."""
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for codec in ("utf-16",) if marked else ("utf-8-sig", "gb2312"):
        with suppress(UnicodeDecodeError):  # the next may fit
            if "\0" not in (text := raw.decode(codec)):
                return text
    raise ValueError("is neither UTF-8, UTF-16 nor GB2312")


def list_images(source: Any) -> list[Path]:
    """Return the images of an image file, folder, glob or text file of paths, each sorted, or of a list of such."""
    if isinstance(source, (list, tuple)):
        return [image for s in source for image in list_images(s)]
    path = Path(str(source))
    with refused(f"'{source}' cannot be read ({{e}}). {SOURCES}", OSError):
        if path.is_dir():
            return walk_files(path, IMG_FORMATS)
        if not path.is_file():
            files = [Path(f) for f in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        elif is_image(path):
            files = [path]
        else:
            lines = map(str.strip, read_text(path).splitlines())  # Ultralytics reads ./ likewise
            listed = (path.parent / line[2:] if line.startswith("./") else Path(line) for line in lines)
            files = [f.resolve() if ".." in f.parts else f for f in listed]  # what is written takes their names
    if not files and not path.is_file():
        raise UsageError(f"Cannot find '{source}', which does not exist. {SOURCES}")
    return sorted(filter(is_image, files))


def is_image(file: Path) -> bool:
    """Return whether a file is called like an image that Ultralytics reads."""
    return file.suffix[1:].lower() in IMG_FORMATS


def walk_files(folder: str | Path, suffixes: Collection[str]) -> list[Path]:
    """Return the sorted files below a folder with these suffixes, but hidden ones; UsageError where it cannot."""

    def fail(error: OSError) -> None:
        raise UsageError(f"'{error.filename}' cannot be read ({error.strerror}). Give a folder that can be.")

    found: list[Path] = []
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for link in filter(Path.is_symlink, [Path(path, f) for f in folders]):
            if (real := link.resolve()) in [above.resolve() for above in link.absolute().parents]:
                raise UsageError(f"'{link}' links back to its own parent '{real}'. Remove the link.")
        named = [Path(path, f) for f in files if not f.startswith(".") and f.rpartition(".")[2].lower() in suffixes]
        found += [f for f in named if f.is_file() or not f.exists()]  # dead links, to be named, but no pipe: it blocks
    return sorted(found)


def parallel(work: Callable[[T], R], items: Sequence[T], text: str) -> Iterator[R]:
    """Yield `work(item)`, which must not touch torch, of every item, in order and with a progress bar called `text`."""
    global _task
    pool: Any
    if len(items) < MANY or sys.platform != "linux":
        pool = ThreadPool(NUM_THREADS)
        results = pool.imap(work, items)
    else:
        _task = work, items  # forked: no work is pickled, but torch's threads do not survive it
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # or a worker that just starts loses one
        try:
            pool = multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), _as_worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        results = pool.imap(_call, range(len(items)), chunksize=32)
    with pool, TQDM(desc=text, total=len(items)) as bar:
        for found in results:
            bar.update()  # before anybody takes it: nobody may ask for what follows the last one
            yield found


def _as_worker() -> None:
    """Leave Ctrl-C to the parent and end by its SIGTERM, for which a handler in Python could wait behind a lock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _call(index: int) -> Any:
    return _task[0](_task[1][index])


@contextmanager
def staged_folder(out: Path, ours: str = "") -> Iterator[Path]:
    """Yield a new folder beside `out` that becomes `out` on success and vanishes on failure.

    It replaces one whose files all have names, within it, of the pattern `ours`; UsageError where others are there.
    """
    stage = out.with_name(f".{out.name}.{os.getpid()}.{uuid4().hex[:8]}.tmp")
    stage.mkdir(parents=True)
    for killed in filter(left_over, out.parent.glob(f".{glob.escape(out.name)}.*.tmp")):
        shutil.rmtree(killed)
    try:
        yield stage
        files = [f.relative_to(out).as_posix() for f in out.rglob("*") if not f.is_dir()]
        if theirs := [name for name in files if not re.fullmatch(ours, name)]:
            raise UsageError(f"'{out}' would be replaced, but holds other files: {quote(theirs)}. Move them.")
        old = stage.with_suffix(".old")
        if out.exists():
            out.rename(old)
        stage.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def link_or_copy(source: Path, target: Path, link: bool = True) -> None:
    """Hard-link an image, or copy it where the file system cannot link or `link` is False."""
    with source.open("rb") as f:
        whole = f.read(2) != b"\xff\xd8" or (f.seek(-2, os.SEEK_END) and f.read() == b"\xff\xd9")
    if link and whole:  # a JPEG without its end marker would be rewritten at training, and so the source
        try:
            return os.link(os.path.realpath(source), target)
        except FileExistsError:  # another image has this name: nothing may be lost
            raise
        except OSError:
            pass
    shutil.copy2(source, target)
