# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands around datasets: convert, split, data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from yolo_ext.commands import LOGGER, Natural, command, numbers
from yolo_ext.core.config import comma_list
from yolo_ext.core.errors import UsageError

SPLITS = ("train", "val", "test")
Folds = Annotated[int, 2]


@command("Convert a dataset between YOLO, Pascal VOC and COCO")
def convert(
    source: str | Path, out: str | Path, format: str = "voc", to: str = "yolo", *, train: Any = None, val: Any = None,
    test: Any = None, ratio: Any = None, folds: Folds | None = None, stratify: bool = False, seed: Natural = 0,
    classes: Any = None, task: str = "detect", difficult: str = "keep", broken: str = "refuse", files: str = "link",
    images: str | Path | None = None,
) -> Any:  # fmt: skip
    """Convert a dataset between YOLO, Pascal VOC and COCO without touching the source.

    Args:
        source: Folder of a VOC dataset, COCO JSON file or folder, data.yaml or folder of a YOLO dataset.
        out: New folder.
        format: Format of the source: voc, coco or yolo.
        to: Format to write: yolo, voc or coco.
        train: List of the source that feeds the split train, such as trainval.
        val: List of the source that feeds the split val.
        test: List of the source that feeds the split test.
        ratio: Instead of lists: shares of train, val and test, such as ``0.8,0.2``.
        folds: Instead of lists: number of folds.
        stratify: Spread the classes evenly over shares or folds.
        seed: Seed of shares and folds.
        classes: Names with commas or a text file, which choose classes and their order; all by default.
        task: `detect`, or `segment` for polygons.
        difficult: `keep` or `skip` objects that are marked as difficult.
        broken: `refuse` broken files, or `skip` and count them.
        files: `link` or `copy` images; YOLO to YOLO also `list`, which leaves them where they are.
        images: Folder of the images of a COCO file.

    Returns: What was converted.
    Raises: `UsageError` if the source or an option is wrong; nothing has been written then.
    """
    from yolo_ext.data.convert import convert as run

    lists = {k: str(v) for k, v in zip(SPLITS, (train, val, test)) if v not in (None, "")}
    return run(Path(source), Path(out), format=format, to=to, splits=lists or None, ratios=_ratios(ratio),
               folds=folds or 0, stratify=stratify, seed=seed, classes=_classes(classes), task=task,
               difficult=difficult, broken=broken, files=files, images=Path(images) if images else None)  # fmt: skip


@command("Split a YOLO dataset anew: shares or folds, at random or by class", like=convert)
def split(
    source: str | Path, out: str | Path, ratio: Any = None, folds: Folds | None = None, *, stratify: bool = False,
    seed: Natural = 0, classes: Any = None, broken: str = "refuse", files: str = "link",
) -> Any:  # fmt: skip
    """Split a YOLO dataset anew, without touching the source; keys without help here are those of `convert`.

    Args:
        source: data.yaml or folder of a YOLO dataset.
        out: New folder.
        ratio: Shares of train, val and test; ``0.8,0.2`` by default.
        folds: Number of folds instead.

    Returns: What was written.
    Raises: `UsageError` if the source or an option is wrong; nothing has been written then.
    """
    shares = ratio or (None if folds else (0.8, 0.2))
    return convert(source, out, "yolo", "yolo", ratio=shares, folds=folds, stratify=stratify, seed=seed,
                   classes=classes, broken=broken, files=files)  # fmt: skip


@command("Summarise a dataset; exit status 1 for leaks between splits or broken files")
def data(check: str | Path, near: Natural | None = None, **place: Any) -> dict[str, Any]:
    """Summarise a YOLO dataset: classes, box sizes, duplicates, leaks and broken files; print and write it.

    Args:
        check: data.yaml, or the folder of one.
        near: How many of 256 bits may differ between the fingerprints of two images that are called nearly the same.

    Returns: The contents of ``data.json``; `passed` is False where files are broken or splits share images.
    Raises: `UsageError` if the data.yaml is unusable.
    """
    from yolo_ext import runs
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
    from yolo_ext.reporting.tables import align

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
    verdict = "Passed: no broken file, no leak" if found["passed"] else "Failed: broken files or leaks between splits"
    LOGGER.info(verdict)


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Draw the boxes by class and by size, as `summarise` found them, into a PNG."""
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
    hint = "one share for each split, such as ratio=0.8,0.2"
    shares = numbers("ratio", given, float, lambda r: isinstance(given, (str, list, tuple)), hint)
    if len(shares) > len(SPLITS):
        raise UsageError(f"'ratio={given}' is illegal. Give {hint}.")
    return dict(zip(SPLITS, shares))


def _classes(given: Any) -> list[str] | None:
    """Read class names from a list, from text with commas, or from a text file with one name per line."""
    if not given:
        return None
    if isinstance(given, str) and Path(given).is_file():
        given = Path(given).read_text(encoding="utf-8-sig").splitlines()
    return comma_list(given)
