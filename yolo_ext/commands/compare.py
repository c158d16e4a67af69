# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The command compare: any two models over the same images, by class and size, with intervals and limits."""

from pathlib import Path
from typing import Any

from yolo_ext.commands import LOGGER, Count, Device, Limits, Natural, Share, Weights, command
from yolo_ext.core.errors import UsageError


@command("Compare two models by class and size, with intervals; exit status 1 for a broken limit")
def compare(
    model: Weights, other: Weights, data: str | None = None, imgsz: Count | None = None, conf: Share | None = None,
    within: Share = 0.005, contract: Limits = None, confidence: Share | None = None, resamples: Count = 1000,
    seed: Natural = 0, device: Device = None, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure two models over the val split, print what differs and how sure that is, and keep the evidence.

    Args:
        model: Base: ``.pt``, ``.onnx``, ``*_openvino_model`` folder, or ``.npz`` with the evidence of an evaluation.
        other: The one to judge, of any of these kinds.
        data: Dataset YAML, or the folder of a classification set; not needed for evidence.
        imgsz: Side of the square input in pixels; that of each model by default.
        conf: Confidence that is deployed, for recall and precision; that with the best F1 of the base by default.
        within: Difference that matters: what is surely smaller is the same.
        resamples: Draws of the images that the intervals come from.
        seed: Seed of the draws.

    Returns: ``verdict``, ``changes`` (figure, before, after, low, high, verdict), ``checks``, ``images``, ``conf``,
        ``same_recall`` (confidence at which `other` finds as much) and ``calibration`` (error before and after).
    Raises: `UsageError` if the two were not measured on the same images and labels, or a limit names no figure.
    """
    from yolo_ext import runs
    from yolo_ext.checkpoint import atomic_write
    from yolo_ext.deployment.contract import judged, read_limits
    from yolo_ext.reporting.tables import TEXT
    from yolo_ext.stock.accuracy import about

    if Path(model).suffix != ".npz":  # before anything is measured
        read_limits(contract, *about(model)[:2], confidence)
    base = _evidence(model, data, imgsz, device)
    limits = read_limits(contract, base.about["task"], base.about["names"], confidence)
    new = _evidence(other, data, imgsz, device)
    found = judged(base, new, limits, conf=conf, within=within, n=resamples, confidence=confidence, seed=seed)
    LOGGER.info(TEXT.get_template("compare.txt.j2").render(found))
    folder = runs.folder(place, task=base.about["task"], mode="compare")
    for name, evidence in (("base", base), ("other", new)):
        atomic_write(folder / f"{name}.npz", evidence.data())
    runs.write_json(folder / "compare.json", found)
    runs.saved(folder)
    return found


def _evidence(model: str | Path, data: str | None, imgsz: int | None, device: Any) -> Any:
    """Return the evidence of a model, measured now or as it lies in a file."""
    from yolo_ext import stock
    from yolo_ext.stock.accuracy import accuracy
    from yolo_ext.stock.evidence import Evidence

    if Path(model).suffix == ".npz":
        return Evidence.read(model)
    if not data:
        raise UsageError(f"'data' is missing, which measuring '{model}' needs. Give data=path/to/data.yaml.")
    size = stock.image_size(*stock.load_model(model), imgsz) if Path(model).suffix == ".pt" else imgsz
    found: list[Evidence] = []
    accuracy(model, data, size, keep=found.append, device=device)
    return found[0]
