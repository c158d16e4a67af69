# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Check data.yaml, images and labels before anything expensive starts, and choose and feed calibration images."""

import difflib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from ultralytics.utils import DATASETS_DIR, LOGGER, NUM_THREADS, ROOT, TQDM, YAML
from ultralytics.utils.checks import check_file
from ultralytics.utils.patches import imread

from yolo_ext.core.errors import UsageError
from yolo_ext.data.records import jpeg_is_whole, list_images, quote
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
    info = _check_folder(Path(data)) if task == "classify" else _check_yaml(str(data))
    info["images"] = {split: _check_images(split, info, str(data)) for split in need}
    total = [image for images in info["images"].values() for image in images]
    if shared := len(total) - len(set(total)):
        LOGGER.warning(f"{data}: {' and '.join(need)} share {shared} images, so accuracy is overstated.")
    if labels and task in {"detect", "segment", "pose", "obb"}:
        columns = pose_columns(info, str(data)) if task == "pose" else 0
        for split, images in info["images"].items():
            info["images"][split] = _check_labels(split, images, info["nc"], columns)
    return info


def image_probe(file: Path) -> tuple[tuple[int, int], int]:
    """Return (width, height) in pixels after EXIF rotation, and that orientation; ValueError if training skips it."""
    try:
        with load.open_image(file) as im:
            im.verify()
            size = load.exif_size(im)
            orientation = im.getexif().get(274, 1) if im.format in {"JPEG", "MPO"} else 1
        if im.format not in {"JPEG", "MPO", "PNG"} or not jpeg_is_whole(file):
            with load.open_image(file) as im:
                im.load()  # verify() sees the end of no other format
    except Exception as e:  # PIL raises many kinds
        raise ValueError("cannot be read as an image" if "cannot identify" in str(e) else str(e)) from e
    if min(size) < 10:
        raise ValueError(f"size {size[0]}x{size[1]} is below 10 pixels")
    return size, orientation


def attempt(read: Callable[[Path], T], file: Path) -> tuple[T | None, str]:
    """Return what `read(file)` returns and an empty text, or None and what is wrong with the file."""
    try:
        return read(file), ""
    except (ValueError, OSError) as e:
        return None, str(e) or repr(e)


def load_yaml(file: Path) -> Any:
    """Return the content of a data.yaml; UsageError where it is no YAML."""
    try:
        return YAML.load(file)
    except Exception as e:
        raise UsageError(f"Data file '{file}' is not valid YAML: {' '.join(str(e).split())}. Mend the file.") from e


def class_names(given: Any) -> list[str]:
    """Return the class names of a data.yaml's `names`, a list or numbers from 0 to names; UsageError if neither."""
    if isinstance(given, dict) and sorted(given) == list(range(len(given))):
        given = [given[i] for i in range(len(given))]
    if not isinstance(given, list) or not given:
        raise UsageError(f"Class names '{given}' are illegal. Legal: a list, or one name for each number from 0.")
    return [str(n) for n in given]


def _check_yaml(data: str) -> dict[str, Any]:
    """Resolve and parse a data.yaml with Ultralytics, every failure as one UsageError."""
    file = _find_yaml(data)
    content = load_yaml(file)
    if not content:
        raise UsageError(f"Data file '{file}' holds no keys. It needs path, train, val and names.")
    absent = [k for k in ("train", "val") if not content.get(k) and not (k == "val" and content.get("validation"))]
    if content.get("names") is None and content.get("nc") is None:
        absent.append("names")
    if absent:
        told = f"Data file '{file}' lacks {quote(absent)}; it holds {quote(list(content), 20)}."
        raise UsageError(f"{told} Add train and val (image folders relative to path) and names (one name per class).")
    try:
        return load.check_det_dataset(str(file), autodownload=False)
    except FileNotFoundError as e:
        if content.get("download"):
            how = f"from ultralytics.data.utils import check_det_dataset; check_det_dataset('{file}')"
            told = f"The images of '{file}' are not here and nothing is fetched unasked."
            raise UsageError(f'{told} Fetch them: python -c "{how}"') from e
        told = str(e).split("\n")[0].replace("❌", "").strip()
        raise UsageError(f"{told}. Set path, train and val in '{file}' to folders (relative to path).") from e
    except Exception as e:
        reason = " ".join(str(e).replace("❌", "").split()) or type(e).__name__
        raise UsageError(f"Data file '{file}' is not usable: {reason.rstrip('.')}. Mend that key.") from e


def _find_yaml(data: str) -> Path:
    """Return the data.yaml meant by a path, a folder or a bundled name."""
    if "://" in data or data.endswith((".zip", ".tar", ".gz")):
        raise UsageError(f"Data '{data}' would have to be fetched or unpacked. Do that first, then give its data.yaml.")
    if Path(data).is_dir():
        try:
            return load.find_dataset_yaml(Path(data))
        except Exception as e:
            raise UsageError(f"Folder '{data}' holds no single data.yaml. Give the path of the file.") from e
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
    try:
        return load.check_cls_dataset(root)
    except Exception as e:
        raise UsageError(f"Data folder '{root}' is not usable: {e}") from e


def pose_columns(info: dict[str, Any], data: str) -> int:
    """Return how many columns a label row of a pose dataset has, from its kpt_shape, (count, dimensions)."""
    shape = info.get("kpt_shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(x, int) for x in shape)):
        raise UsageError(f"Data file '{data}' has kpt_shape {shape}. A pose set needs two integers, e.g. [17, 3].")
    return 5 + shape[0] * shape[1]


def _check_images(split: str, info: dict[str, Any], data: str) -> list[Path]:
    """Return the readable images of a split; warn about the others."""
    if not info.get(split):
        raise UsageError(f"Data '{data}' has no '{split}' split. Add the key '{split}' with its image folder.")
    places = info[split] if isinstance(info[split], list) else [info[split]]
    if missing := [p for p in places if not Path(p).exists()]:
        raise UsageError(f"Split '{split}' of '{data}' points to '{missing[0]}', which does not exist. Mend the path.")
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


def _check_labels(split: str, images: list[Path], nc: int, columns: int) -> list[Path]:
    """Return the images of a split whose labels Ultralytics will accept, see `check_label`."""
    files = [Path(p) for p in load.img2label_paths([*map(str, images)])]
    rows, kept, wrong, outside = 0, list[Path](), list[str](), list[str]()
    for image, file in zip(images, files):
        try:
            rows += len(check_label(file, nc, columns)) if file.is_file() else 0
            kept.append(image)
        except (ArithmeticError, ValueError) as e:  # noqa: PERF203  the good ones count as well
            (outside if isinstance(e, ArithmeticError) else wrong).append(f"{file}: {e}")
    if wrong:
        raise UsageError(f"Split '{split}' has {len(wrong)} malformed label files: {quote(wrong)}. Mend these files.")
    if outside:
        LOGGER.warning(f"{split}: {len(outside)} images are left out, labels outside 0..1: {quote(outside)}")
    if not rows:
        raise UsageError(f"Split '{split}' has no labels in {len(images)} images. Expected files like '{files[0]}'.")
    return kept


def check_label(file: Path, nc: int, columns: int = 0) -> list[list[str]]:
    """Return the words of each label row; ValueError if malformed, ArithmeticError if over 1 % outside the image."""
    try:
        rows = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        values = [[float(x) for x in row] for row in rows]
    except ValueError as e:  # a word where a number belongs, or bytes that are not text
        raise ValueError(f"not numbers ({e})") from e
    for i, row in enumerate(values, 1):
        n = len(row)
        if n != columns if columns else n != 5 and (n < 7 or n % 2 == 0):
            raise ValueError(f"row {i} has {n} columns, legal: {columns or '5, or 7, 9, ... for polygons'}")
        if not (row[0].is_integer() and 0 <= row[0] < nc):
            raise ValueError(f"row {i} has class {rows[i - 1][0]}, legal: 0 to {nc - 1}")
        if not np.isfinite(row).all():
            raise ValueError(f"row {i} has a value that is not finite")
    if len({len(row) == 5 for row in values}) > 1:
        raise ValueError("box and polygon rows are mixed")
    for row in values:
        coords = row[1:5] if columns else row[1:]  # keypoints out of sight may lie anywhere
        if max(coords) > 1.01 or min(coords) < -0.01:
            raise ArithmeticError(f"class {row[0]:g} at {quote([f'{x:g}' for x in coords])}")
    return rows


def calibration_images(
    data: dict[str, Any] | Sequence[str | Path] | str | Path, n: int | None = None, seed: int = 0, at_most: int = 300
) -> list[Path]:
    """Choose calibration images.

    Args:
        data: A checked Ultralytics data dict (its train split is used), or what `list_images` takes.
        n: How many images; None takes what is there, up to `at_most`.
        seed: Seed of the choice, which does not depend on the order of the files on disk.
        at_most: Most images where `n` is None; TensorRT and Ultralytics advise as many as the default.
    Returns: Sorted image files, none of them from the validation split: INT8 figures would be flattered.
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
        raise UsageError(f"All {len(files)} of '{source}' are validation images, which flatter INT8. Give others.")
    if len(pool) < len(files):
        LOGGER.warning(f"Calibration leaves out {len(files) - len(pool)} train images that are validation images too")
    if n is not None and n > len(pool):
        told = f"{n} calibration images are wanted, but '{source}' has {len(pool)}. Ask for {len(pool)} or fewer"
        raise UsageError(f"{told}, give no number to take up to {at_most}, or give more images. 128 to 512 are usual.")
    return sorted(random.Random(seed).sample(pool, min(wanted, len(pool))))


def check_calibration(source: Any, n: int | None = None, seed: int = 0) -> None:
    """Refuse what `calibration_images` and `letterbox_batches` refuse; in most cases one image is read."""
    images = calibration_images(source, n, seed)
    if not any((image := imread(path)) is not None and image.min() < image.max() for path in images):
        for _ in letterbox_batches(images, 32):  # says what is wrong
            pass


def letterbox_batches(paths: list[Path], imgsz: int, batch: int = 16, crop: bool = False) -> Iterator[torch.Tensor]:
    """Yield float32 (batch, 3, imgsz, imgsz), RGB, 0 to 1, as ONNX is fed, letterboxed, or cropped to the middle."""
    letterbox = partial(load.LetterBox((imgsz, imgsz), auto=False), None)  # it could take labels first
    squares = _squares(paths, load.CenterCrop(imgsz) if crop else letterbox)
    while images := list(islice(squares, batch)):
        yield torch.from_numpy(np.ascontiguousarray(images)).float() / 255


def _squares(paths: list[Path], fit: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each image as the square RGB (3, H, W) that `fit` makes; some may be broken, all blank is an error."""
    broken = blank = 0
    for path in paths:
        if (image := imread(path)) is not None:
            blank += int(image.min() == image.max())
            yield np.asarray(fit(image))[..., ::-1].transpose(2, 0, 1)
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
        digest.update(Path(path).name.encode() + Path(path).read_bytes())
    return digest.hexdigest()[:16]
