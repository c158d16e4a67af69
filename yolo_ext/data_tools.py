# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands around datasets: convert, split, data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER

from yolo_ext import runs
from yolo_ext.core.errors import UsageError
from yolo_ext.reporting.tables import align

SPLITS = ("train", "val", "test")


def convert(source: str, out: str, **options: Any) -> Any:
    """Convert a dataset between YOLO, Pascal VOC and COCO without touching the source.

    Args:
        source: Folder of a VOC dataset, COCO JSON file or folder, data.yaml or folder of a YOLO dataset.
        out: New folder.
        options: `format` of the source (voc, coco, yolo; voc by default) and `to` (yolo by default); `train`, `val`,
            `test`: which list of the source feeds which split; or `ratio`, shares of train, val and test such as
            ``0.8,0.2``, or `folds`, a number, with `stratify` and `seed`; `classes`, names with commas or a text file;
            `task=segment` for polygons; `difficult=skip`; `broken=skip` leaves out and counts what else is refused;
            `files=copy` instead of links; `images`, the folder of those of a COCO file.

    Returns:
        What was converted.

    Raises:
        UsageError: If the source or an option is wrong; nothing has been written then.
    """
    from yolo_ext.data.convert import convert as run

    lists = {s: str(options.pop(s)) for s in SPLITS if options.get(s) not in (None, "")}
    ratios, classes = _ratios(options.pop("ratio", None)), _classes(options.pop("classes", None))
    if options.get("images"):
        options["images"] = Path(options["images"])
    for key in ("seed", "folds"):
        options[key] = int(options.get(key) or 0)
    return run(Path(source), Path(out), classes=classes, splits=lists or None, ratios=ratios, **options)


def split(source: str, out: str, **options: Any) -> Any:
    """Split a YOLO dataset anew, without touching the source.

    Args:
        source: data.yaml or folder of a YOLO dataset.
        out: New folder.
        options: `ratio`, `folds`, `stratify`, `seed`, `broken`, `classes` and `files` of `convert`.

    Returns:
        What was written.

    Raises:
        UsageError: If the source or an option is wrong; nothing has been written then.
    """
    if not options.get("folds"):
        options["ratio"] = options.get("ratio") or (0.8, 0.2)
    return convert(source, out, **{**options, "format": "yolo", "to": "yolo"})


def data(check: str, near: int | None = None, **place: Any) -> dict[str, Any]:
    """Summarise a YOLO dataset: classes, box sizes, duplicates, leaks and broken files; print and write it.

    Args:
        check: data.yaml, or the folder of one.
        near: How many of 256 bits may differ between the fingerprints of two images that are called nearly the same.
        place: `project`, `name`, `exist_ok`, `save_dir`.

    Returns:
        The contents of ``data.json``; `passed` is False where files are broken or splits share images.

    Raises:
        UsageError: If the data.yaml is unusable.
    """
    from yolo_ext.data.summary import NEAR, summarise

    found = summarise(check, NEAR if near is None else near)
    show(found)
    folder = runs.folder(place, task="detect", mode="data")
    runs.write_json(folder / "data.json", found)
    plot(found, folder / "boxes.png")
    LOGGER.info(f"Results saved to {folder}")
    return found


def show(found: Mapping[str, Any]) -> None:
    """Print what `summarise` found as tables, a histogram and warnings."""
    from yolo_ext.data.records import quote
    from yolo_ext.data.summary import AREAS, KINDS

    splits, classes = found["splits"], found["classes"]
    columns = list(next(iter(splits.values())))
    LOGGER.info(align([[s, *row.values()] for s, row in splits.items()], ["Split", *columns]))
    header = ["Boxes of class", *splits, *AREAS]
    LOGGER.info("\n" + align([[n, *(row[k] for k in header[1:])] for n, row in classes.items()], header))
    most = max(found["sizes"].values(), default=0)
    bars = [[side, n, "#" * round(40 * n / most)] for side, n in found["sizes"].items()]
    if bars:
        width = max(len(side) for side, _, _ in bars)
        LOGGER.info("\nBoxes by square root of area in pixels")
        LOGGER.info("\n".join(f"{side:>{width}} {n:>8} {bar}" for side, n, bar in bars))
    for kind, text in KINDS.items():
        if files := found[kind]:
            LOGGER.warning(f"{len(files)} {text}: {quote([f'{f} ({why})' for f, why in files.items()])}")
    if absent := [n for n, row in classes.items() if not row.get("train")]:
        LOGGER.warning(f"{len(absent)} classes have no box in train: {quote(absent)}")
    for suffix, how in (("", "the same images"), ("_near", "images that look nearly the same, look at these")):
        for where, pairs in {"inside a split": found[f"duplicates{suffix}"], **found[f"leaks{suffix}"]}.items():
            if pairs:
                LOGGER.warning(f"{where}: {len(pairs)} pairs of {how}: {quote([' = '.join(p) for p in pairs], 3)}")
    LOGGER.info(
        "Passed: no broken file, no leak" if found["passed"] else "Failed: broken files or leaks between splits"
    )


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Draw the boxes by class and by size.

    Args:
        found: What `summarise` returned.
        file: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes, sizes = found["classes"], found["sizes"]
    figure = Figure(figsize=(10, max(3.0, 1 + 0.25 * len(classes))), layout="constrained")
    left, right = figure.subplots(1, 2)
    start = [0] * len(classes)
    for split in found["splits"]:
        counts = [row[split] for row in classes.values()]
        left.barh(list(classes), counts, left=start, label=split)
        start = [a + b for a, b in zip(start, counts)]
    left.invert_yaxis()
    left.set(title="Boxes by class", xlabel="boxes")
    left.legend()
    right.bar(list(sizes), list(sizes.values()))
    right.tick_params(axis="x", rotation=45)
    right.set(title="Boxes by size", xlabel="square root of area in pixels", ylabel="boxes")
    FigureCanvasAgg(figure).print_figure(file, dpi=120)


def _ratios(given: Any) -> dict[str, float] | None:
    """Read shares of train, val and test."""
    if given is None:
        return None
    shares = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else []
    try:
        ratios = dict(zip(SPLITS, (float(r) for r in shares)))
    except ValueError:
        ratios = {}
    if not ratios or len(shares) > len(SPLITS):
        raise UsageError(f"'ratio={given}' is illegal. Give one share for each split, such as ratio=0.8,0.2.")
    return ratios


def _classes(given: Any) -> list[str] | None:
    """Read class names from a list, from text with commas, or from a text file with one name per line."""
    if not given:
        return None
    if isinstance(given, str) and Path(given).is_file():
        given = Path(given).read_text(encoding="utf-8-sig").splitlines()
    names = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
    return [n for n in (str(name).strip() for name in names) if n]
