# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands around datasets: convert, split, data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from yolo_ext.commands import LOGGER, Names, Natural, command, each, tell_idle, whole
from yolo_ext.core.config import comma_list, number
from yolo_ext.core.errors import UsageError

SPLITS = ("train", "val", "test")
Folds = Annotated[int, lambda v: whole(v, 2), "a whole number of at least 2"]
Shares = Annotated[Any, lambda v: each(v, float, number) and not number(v), "a share for each split, such as 0.8,0.2"]
Text = str | Path


@command("Convert a dataset between YOLO, Pascal VOC and COCO")
def convert(
    source: Text, out: Text, format: str = "auto", to: str = "yolo", *, train: Text | None = None,
    val: Text | None = None, test: Text | None = None, ratio: Shares = None, folds: Folds | None = None,
    stratify: bool = False, seed: Natural = 0, classes: Names = None, task: str = "detect", difficult: str = "keep",
    broken: str = "refuse", files: str = "link", images: Text | None = None, annotations: Text | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Convert a dataset between YOLO, Pascal VOC and COCO without touching the source.

    Args:
        source: Folder of a dataset as it lies, a COCO JSON file or a data.yaml.
        out: New folder.
        format: Format of the source: voc, coco or yolo; by default what its files hold.
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
        images: Folder of the images, where they are not found in the source.
        annotations: Folder of the annotations, or a COCO JSON file, where they are not found in the source.

    Returns: ``out``, ``names``, ``images``, ``boxes``, ``notes``, and ``data``: a data.yaml for each fold, none of VOC
        and COCO.
    Raises: `UsageError` if the source or an option is wrong; nothing has been written then.
    """
    from yolo_ext.data.convert import convert as run
    from yolo_ext.data.records import read_text

    shares = [] if ratio is None else comma_list(ratio, float)
    if len(shares) > len(SPLITS):
        raise UsageError(f"'ratio={ratio}' is illegal. Give one share for each split, such as ratio=0.8,0.2.")
    if isinstance(classes, str) and Path(classes).is_file():
        classes = read_text(Path(classes)).splitlines()
    tell_idle([difficult != "keep" and format != "voc" and "difficult (only VOC marks objects as difficult)",
               seed and not (shares or folds) and "seed (only with ratio or folds)",
               task != "detect" and to != "yolo" and "task (only with to=yolo)"])  # fmt: skip
    lists = {k: str(v) for k, v in zip(SPLITS, (train, val, test)) if v not in (None, "")}
    return run(Path(source), Path(out), format=format, to=to, splits=lists or None,
               ratios=dict(zip(SPLITS, shares)) or None, folds=folds or 0, stratify=stratify, seed=seed,
               classes=comma_list(classes) if classes else None, task=task, difficult=difficult, broken=broken,
               files=files, images=Path(images) if images else None,
               annotations=Path(annotations) if annotations else None)  # fmt: skip


@command("Split a YOLO dataset anew: shares or folds, at random or by class", like=convert)
def split(
    source: Text, out: Text, ratio: Shares = None, folds: Folds | None = None, *, stratify: bool = False,
    seed: Natural = 0, classes: Names = None, broken: str = "refuse", files: str = "link",
) -> dict[str, Any]:  # fmt: skip
    """Split a YOLO dataset anew, without touching the source; keys without help here are those of `convert`.

    Args:
        source: data.yaml or folder of a YOLO dataset.
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
    from yolo_ext.reporting.figures import plot_boxes

    found = summarise(check, NEAR if near is None else near)
    _show(found)
    folder = runs.folder(place, task="detect", mode="data")
    runs.write_json(folder / "data.json", found)
    plot_boxes(found, folder / "boxes.png")
    runs.saved(folder, f"yolo-ext compress model=best.pt data={check}" if found["passed"] else "")
    return found


def _show(found: Mapping[str, Any]) -> None:
    """Print what `summarise` found as tables, a histogram and warnings."""
    from yolo_ext.data.records import quote
    from yolo_ext.data.summary import AREAS, KINDS
    from yolo_ext.reporting.tables import TEXT

    LOGGER.info(TEXT.get_template("data.txt.j2").render(found, areas=AREAS).rstrip())
    for kind, text in KINDS.items():
        if files := found[kind]:
            LOGGER.warning(f"{len(files)} {text}: {quote([f'{f} ({why})' for f, why in files.items()])}")
    if absent := [n for n, row in found["classes"].items() if not row.get("train")]:
        LOGGER.warning(f"{len(absent)} classes have no box in train: {quote(absent)}")
    for suffix, how in (("", "the same images"), ("_near", "images that look nearly the same, look at these")):
        for where, pairs in {"inside a split": found[f"duplicates{suffix}"], **found[f"leaks{suffix}"]}.items():
            if pairs:
                LOGGER.warning(f"{where}: {len(pairs)} pairs of {how}: {quote([' = '.join(p) for p in pairs], 3)}")
    failed = "Failed: broken files or leaks between splits"
    LOGGER.info("Passed: no broken file, no leak" if found["passed"] else failed)
