# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Check data.yaml, images and labels before anything expensive starts, and choose and feed calibration images."""

import difflib
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from ultralytics.utils import DATASETS_DIR, LOGGER, NUM_THREADS, ROOT, TQDM, YAML
from ultralytics.utils.checks import check_file

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.options import listed
from yolo_ext.data.records import SPLITS, is_image, list_images, quote
from yolo_ext.stock import load

T = TypeVar("T")


def check_data(
    data: str | Path, *, need: Sequence[str] = ("train", "val"), task: str = "detect", labels: bool = True
) -> dict[str, Any]:
    """Check a dataset and list its images, downloading and changing nothing.

    Args:
        data: Path or bundled name of a data.yaml; for `task="classify"` a folder with one sub-folder per split.
        need: Splits that must hold readable images.
        task: Ultralytics task, which decides the label format.
        labels: Whether label files are checked too; calibration, for one, needs images only.
    Returns: What Ultralytics' own check returns, plus `images`: {split: readable image paths} of the needed splits.
    Raises: `UsageError` if the file, a key, a path, a whole split or a label is unusable.
    """
    info = _check_folder(Path(data)) if task == "classify" else read_yaml(str(data))
    shape = keypoints(info, str(data)) if task == "pose" else tuple(info.get("kpt_shape") or (0, 0))
    info["images"] = {split: _check_images(split, info, str(data)) for split in need}
    total = [image for images in info["images"].values() for image in images]
    if shared := len(total) - len(set(total)):
        LOGGER.warning(f"{data}: {' and '.join(need)} share {shared} images, so accuracy is overstated.")
    if labels and task in {"detect", "segment", "pose", "obb"}:
        for split, images in info["images"].items():
            info["images"][split] = _check_labels(split, images, info["nc"], shape, task)
    return info


def image_probe(file: Path) -> tuple[tuple[int, int], int]:
    """Return (width, height) in pixels after EXIF rotation, and that orientation; ValueError if training skips it."""
    try:
        height, width = load.check_image(file)[1]
        with load.open_image(file) as im:
            orientation = im.getexif().get(274, 1) if im.format in {"JPEG", "MPO"} else 1
    except Exception as e:  # PIL raises many kinds
        raise ValueError("cannot be read as an image" if "cannot identify" in str(e) else str(e)) from e
    return (width, height), orientation


def attempt(read: Callable[[Path], T], file: Path) -> tuple[T | None, str]:
    """Return what `read(file)` returns and an empty text, or None and what is wrong with the file."""
    try:
        return read(file), ""
    except (ValueError, OSError) as e:
        return None, str(e) or repr(e)


def load_yaml(file: Path) -> Any:
    """Return the content of a data.yaml; UsageError where it is no YAML in UTF-8."""
    try:
        file.read_text(encoding="utf-8")  # Ultralytics drops what it cannot decode, and so parts of names and paths
        return YAML.load(file)
    except UnicodeDecodeError as e:
        raise UsageError(f"Data file '{file}' is not in UTF-8 ({e}). Save it as UTF-8.") from e
    except Exception as e:
        raise UsageError(f"Data file '{file}' is not valid YAML: {' '.join(str(e).split())}. Mend the file.") from e


def class_names(given: Any) -> list[str]:
    """Return the class names of a data.yaml's `names`, a list or numbers from 0 to names; UsageError if neither."""
    with refused(f"Class names '{given}' are illegal. Legal: a list, or one name for each number from 0."):
        names = load.check_class_names(given)
        return [names[i] for i in range(len(names))]


def read_yaml(data: str, need: Sequence[str] = ("train", "val")) -> dict[str, Any]:
    """Return what Ultralytics reads in a data.yaml, with resolved paths, where splits that are not needed may lack."""
    file = _find_yaml(data)
    content = load_yaml(file)
    if not content:
        raise UsageError(f"Data file '{file}' holds no keys. It needs path, train, val and names.")
    given = {k: content.get(k) or (content.get("validation") if k == "val" else None) for k in SPLITS}
    place = next(filter(None, given.values()), None)
    absent = [k for k in (*need, *([] if place else ["train", "val"])) if not given[k]]
    if content.get("names") is None and content.get("nc") is None:
        absent.append("names")
    if absent:
        told = f"Data file '{file}' lacks {quote([*dict.fromkeys(absent)])}; it holds {quote(list(content), 20)}."
        raise UsageError(f"{told} Add train and val (image folders relative to path) and names (one name per class).")
    info = _read_stock(file, {**content, **{k: given[k] or place for k in ("train", "val")}})
    for split in [k for k in SPLITS if not given[k]]:
        info.pop(split, None)
    return info


def _read_stock(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Have Ultralytics read the content of a data.yaml, every failure as one UsageError."""
    try:
        return load.det_dataset(file, content)
    except FileNotFoundError as e:
        if content.get("download"):
            how = f"from ultralytics.data.utils import check_det_dataset; check_det_dataset('{file}')"
            told = f"The images of '{file}' are not here and nothing is fetched unasked."
            raise UsageError(f'{told} Fetch them: python -c "{how}"') from e
        told = str(e).split("\n")[0].replace("❌", "").strip()
        hint = f"Set path, train and val in '{file}' to folders (relative to path)."
        if content.get("path") and not Path(content["path"]).is_absolute():
            hint += f" 'path: {content['path']}' counts from '{Path.cwd()}' where that exists; without path, all"
            hint += " count from the file."
        hint += " `yolo-ext convert source=FOLDER images=FOLDER out=NEW` makes a dataset of what lies elsewhere."
        raise UsageError(f"{told}. {hint}") from e
    except Exception as e:
        reason = " ".join(str(e).replace("❌", "").split()) or type(e).__name__
        raise UsageError(f"Data file '{file}' is not usable: {reason.rstrip('.')}. Mend that key.") from e


def _find_yaml(data: str) -> Path:
    """Return the data.yaml meant by a path, a folder or a bundled name."""
    if "://" in data or data.endswith((".zip", ".tar", ".gz")):
        raise UsageError(f"Data '{data}' would have to be fetched or unpacked. Do that first, then give its data.yaml.")
    if Path(data).is_dir():
        with refused(f"Folder '{data}' holds no single data.yaml. Give the path of the file."):
            return load.find_dataset_yaml(Path(data))
    names = [data] if Path(data).suffix else [f"{data}.yaml", f"{data}.yml", data]
    if found := [f for f in (check_file(n, download=False, hard=False) for n in names if n.strip()) if f]:
        return Path(found[0])
    folder = Path(data).parent
    known = [p for d in (folder, ROOT / "cfg/datasets") if d.is_dir() for p in (*d.glob("*.yaml"), *d.glob("*.yml"))]
    by_name = {p.name: str(p if p.parent == folder else p.name) for p in reversed(known)}
    near = [by_name[n] for n in difflib.get_close_matches(Path(names[0]).name, by_name, cutoff=0.6)]
    hint = f"Did you mean {quote(near)}?" if near else "Give the path of an existing data.yaml."
    raise UsageError(f"Data file '{data}' does not exist. {hint}")


def _check_folder(folder: Path) -> dict[str, Any]:
    """Check a classification folder; Ultralytics alone would download it, or split it into a new one."""
    root = next((d for d in (folder, DATASETS_DIR / folder) if d.is_dir()), folder)
    if not (root / "train").is_dir():
        why = "has no 'train' folder" if root.is_dir() else "does not exist"
        raise UsageError(f"Data folder '{root}' {why}. Legal: train/<class>/, val/<class>/.")
    with refused(f"Data folder '{root}' is not usable: {{e}}"):
        return load.check_cls_dataset(root)


def keypoints(info: dict[str, Any], data: str) -> tuple[int, int]:
    """Return count and dimensions of the keypoints of a pose dataset, after a look at its `flip_idx`."""
    shape, flip = info.get("kpt_shape"), info.get("flip_idx")
    if not (isinstance(shape, list) and [*map(type, shape)] == [int, int] and shape[0] > 0 and shape[1] in (2, 3)):
        raise UsageError(f"Data file '{data}' has kpt_shape {shape}. A pose set needs e.g. [17, 3], or 2 for x and y.")
    if flip and sorted(map(str, flip)) != sorted(map(str, range(shape[0]))):
        raise UsageError(f"Data file '{data}' has flip_idx {flip}. Legal: each number below {shape[0]} once.")
    return shape[0], shape[1]


def split_places(split: str, info: Mapping[str, Any], data: Any) -> list[Path]:
    """Return the folders and list files of a split, which must be there."""
    places = [Path(p) for p in listed(info[split])]
    if missing := [p for p in places if not p.exists()]:
        raise UsageError(f"Split '{split}' of '{data}' points to '{missing[0]}', which does not exist. Mend the path.")
    return places


def _check_images(split: str, info: dict[str, Any], data: str) -> list[Path]:
    """Return the readable images of a split; warn about the others."""
    if not info.get(split):
        raise UsageError(f"Data '{data}' has no '{split}' split. Add the key '{split}' with its image folder.")
    places = split_places(split, info, data)
    for file in (p for p in places if p.is_file() and not is_image(p)):
        told = f"List '{file}' of split '{split}' is not in UTF-8 ({{e}}). Save it as UTF-8."
        with refused(told, UnicodeDecodeError):
            file.read_text(encoding="utf-8-sig")
    images = sorted(list_images(places))
    if not images:
        raise UsageError(f"Split '{split}' of '{data}' holds no images. Legal: {', '.join(sorted(load.IMG_FORMATS))}.")
    with ThreadPool(NUM_THREADS) as pool:
        results = pool.imap(lambda file: attempt(image_probe, file)[1], images)
        found = list(TQDM(results, f"Checking {split}", len(images), disable=len(images) < 2000))
    bad = [f"{f} ({why})" for f, why in zip(images, found) if why]
    if len(bad) == len(images):
        raise UsageError(f"No image of split '{split}' of '{data}' can be read: {quote(bad)}. Restore the images.")
    if bad:
        LOGGER.warning(f"{split}: {len(bad)} of {len(images)} images cannot be read and are left out: {quote(bad)}")
    return [f for f, why in zip(images, found) if not why]


def _check_labels(split: str, images: list[Path], nc: int, shape: tuple[int, int], task: str) -> list[Path]:
    """Return the images of a split whose labels Ultralytics will accept, see `check_label`."""
    files = label_places(images)
    rows, kept, wrong, outside, boxes = 0, list[Path](), list[str](), list[str](), list[Path]()
    for image, file in zip(images, files):
        try:
            found = check_label(file, nc, shape, task == "pose") if file.is_file() else []
        except (ArithmeticError, ValueError) as e:
            (outside if isinstance(e, ArithmeticError) else wrong).append(f"{file}: {e}")
            continue
        rows += len(found)
        kept.append(image)
        if found and all(len(row) in (5, 5 + shape[0] * shape[1]) for row in found):
            boxes.append(file)
    if wrong:
        raise UsageError(f"Split '{split}' has {len(wrong)} malformed label files: {quote(wrong)}. Mend these files.")
    if outside:
        LOGGER.warning(f"{split}: {len(outside)} images are left out, labels outside 0..1: {quote(outside)}")
    if not rows:
        raise UsageError(f"Split '{split}' has no labels in {len(images)} images: {no_labels(files)}.")
    if boxes and task in {"segment", "obb"}:
        told = f"{len(boxes)} label files of split '{split}' hold boxes, such as '{boxes[0]}'"
        raise UsageError(f"{told}; the task '{task}' needs polygons in all of them. Give such labels, or task detect.")
    return kept


def label_places(images: Iterable[Path]) -> list[Path]:
    """Return where Ultralytics looks for the labels of images."""
    return [Path(p) for p in load.img2label_paths([*map(str, images)])]


def no_labels(files: Sequence[Path]) -> str:
    """Say where labels were looked for, or that those which are there are empty."""
    if there := [f for f in files if f.is_file()]:
        return f"{len(there)} label files are there and empty, '{there[0]}' for one"
    places = quote([f"'{p}'" for p in dict.fromkeys(f.parent for f in files)], 3)
    return f"no label file found, looked in {places} for '{files[0].name}' and so on"


def check_label(file: Path, nc: int, shape: tuple[int, int] = (0, 0), pose: bool = False) -> list[list[str]]:
    """Return the words of each label row; ArithmeticError where only a value is outside its range, else ValueError."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if why := load.label_problem(file, nc, shape, pose):
        infinite = re.search(r"\b(nan|inf|infinity)\b", text, re.IGNORECASE)
        outside = why.startswith(("non-normalized", "negative")) and not re.search(r"^\s*-", text, re.MULTILINE)
        told = "a value is not finite" if infinite else why
        raise (ArithmeticError if outside and not infinite else ValueError)(told)
    return [line.split() for line in text.splitlines() if line.strip()]


def calibration_images(
    data: dict[str, Any] | Sequence[str | Path] | str | Path, n: int | None = None, seed: int = 0, at_most: int = 300
) -> list[Path]:
    """Choose calibration images.

    Args:
        data: A checked Ultralytics data dict (its train split is used), or what `list_images` takes.
        n: How many images; None takes what is there, up to `at_most`.
        seed: Seed of the choice, which does not depend on the order of the files on disk.
        at_most: Most images where `n` is None; TensorRT and Ultralytics advise as many as the default.
    Returns: Sorted image files, none of them from the validation split of a data dict: INT8 figures would be flattered.
    Raises: `UsageError` if there are no such images, or fewer than `n`.
    """
    wanted = at_most if n is None else n
    if wanted < 1:
        raise UsageError(f"Calibration needs at least 1 image, got {wanted}. 128 to 512 are usual.")
    source, held_out = (data.get("train"), data.get("val")) if isinstance(data, dict) else (data, None)
    if not source:
        raise UsageError("The data has no train split to calibrate on. Give 'train' in the data YAML, or images.")
    files = set(list_images(source))
    if not files:
        raise UsageError(f"No calibration images in '{source}'. Legal: {', '.join(sorted(load.IMG_FORMATS))}.")
    val = {p.resolve() for p in list_images(held_out)} if held_out else set()
    pool = sorted(p for p in files if p.resolve() not in val)
    if not pool:
        told = f"All {len(files)} train images of '{source}' are validation images too, which flatter INT8"
        hint = "Give others with quant.source=FOLDER, or split the set: yolo-ext split source=data.yaml out=NEW"
        raise UsageError(f"{told}. {hint}.")
    if len(pool) < len(files):
        LOGGER.warning(f"Calibration leaves out {len(files) - len(pool)} train images that are validation images too")
    if n is not None and n > len(pool):
        told = f"{n} calibration images are wanted, but '{source}' has {len(pool)}. Ask for {len(pool)} or fewer"
        raise UsageError(f"{told}, give no number to take up to {at_most}, or give more images. 128 to 512 are usual.")
    return sorted(random.Random(seed).sample(pool, min(wanted, len(pool))))


def check_calibration(source: Any, n: int | None = None, seed: int = 0) -> None:
    """Refuse what `calibration_images` and `letterbox_batches` refuse; in most cases one image is read."""
    images = calibration_images(source, n, seed)
    if not any((image := load.read_image(path)) is not None and image.min() < image.max() for path in images):
        for _ in letterbox_batches(images, 32):  # says what is wrong
            pass


def letterbox_batches(
    paths: list[Path], imgsz: int, batch: int = 16, crop: bool = False, channels: int = 3
) -> Iterator[torch.Tensor]:
    """Yield float32 (batch, channels, imgsz, imgsz), 0 to 1, as ONNX is fed, letterboxed, or cropped to the middle."""
    letterbox = partial(load.LetterBox((imgsz, imgsz), auto=False), None)  # it could take labels first
    squares = _squares(paths, load.CenterCrop(imgsz) if crop else letterbox, channels)
    while images := list(islice(squares, batch)):
        yield torch.from_numpy(np.ascontiguousarray(images)).float() / 255


def _squares(paths: list[Path], fit: Callable[[np.ndarray], np.ndarray], channels: int) -> Iterator[np.ndarray]:
    """Yield each image as the square (channels, H, W) that `fit` makes; some may be broken, all blank is an error."""
    broken = blank = 0
    for path in paths:
        if (image := load.read_image(path, channels)) is not None:
            blank += int(image.min() == image.max())
            yield load.planes(np.asarray(fit(image)))
            continue
        broken += 1
        if 2 * broken > len(paths):
            told = f"At least {broken} of the {len(paths)} calibration images cannot be read, such as '{path}'."
            raise UsageError(f"{told} `yolo-ext data check` names them all.")
        LOGGER.warning(f"Skipping calibration image '{path}', which cannot be read")
    if blank == len(paths) - broken:
        told = f"Each of the {blank} calibration images is of a single value, '{paths[0]}' for one."
        raise UsageError(f"{told} Give real images.")


def list_hash(paths: list[Path]) -> str:
    """Return a short hash of names and contents of the calibration images, for the record of what was used."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
