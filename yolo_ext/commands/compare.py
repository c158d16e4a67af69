# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The command compare: any two models over the same images, by class and size, with intervals and limits."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from yolo_ext.commands import LOGGER, Count, Natural, Share, Weights, command
from yolo_ext.core.errors import UsageError


@command("Compare two models by class and size, with intervals; exit status 1 for a broken limit")
def compare(
    model: Weights, other: Weights, data: str | None = None, imgsz: Count | None = None, conf: Share | None = None,
    within: Share = 0.005, contract: Any = None, confidence: Share | None = None, resamples: Count = 1000,
    seed: Natural = 0, **place: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure two models over the val split, print what differs and how sure that is, and keep the evidence.

    Args:
        model: Base: ``.pt``, ``.onnx``, ``*_openvino_model`` folder, or ``.npz`` with the evidence of an evaluation.
        other: The one to judge, of any of these kinds.
        data: Dataset YAML, or the folder of a classification set; not needed for evidence.
        imgsz: Side of the square input in pixels; that of each model by default.
        conf: Confidence that is deployed, for recall and precision; that with the best F1 of the base by default.
        within: Difference that matters: what is surely smaller is the same.
        contract: Limits by figure, such as `contract.recall.person=-0.02`, or a YAML file of them; by default no class
            may surely lose more than 0.05 of its recall or mAP50-95, and the model no more than 0.02.
        confidence: Hold the limits with this confidence, such as 0.95; by the measured change itself by default.
        resamples: Draws of the images that the intervals come from.
        seed: Seed of the draws.

    Returns: ``verdict``, ``changes`` (figure, before, after, low, high, verdict), ``checks``, ``conf``, ``same_recall``
        (confidence at which `other` finds as much) and ``calibration`` (error of both).
    Raises: `UsageError` if the two were not measured on the same images and labels, or a limit names no figure.
    """
    from yolo_ext import runs
    from yolo_ext.checkpoint import atomic_write
    from yolo_ext.deployment import contract as judge
    from yolo_ext.reporting.tables import align

    limits = _limits(contract)
    base, new = (_evidence(m, data, imgsz) for m in (model, other))
    boxes = "top" not in base.hits
    conf = judge.best_confidence(base) if conf is None and boxes else conf
    found = judge.changes(base, new, conf=conf, within=within, n=resamples, confidence=confidence or 0.95, seed=seed)
    checks = judge.broken(found, limits, sure=confidence is not None) if limits else judge.surely_broken(found)
    rows = [[c.name, f"{c.before:.4f}", f"{c.after:.4f}", f"{c.change:+.4f}", f"{c.low:+.4f}", f"{c.high:+.4f}",
             c.verdict] for c in found]  # fmt: skip
    LOGGER.info(align(rows, ["Figure", "Base", "Other", "Change", "Low", "High", "Verdict"]))
    verdict = f"{found[0].name} {found[0].change:+.4f}: {found[0].words(within, len(base.images))}"
    told: dict[str, Any] = {"verdict": verdict, "conf": conf}
    if boxes and conf is not None:
        told["same_recall"] = judge.same_recall(base, new, conf)
        told["calibration"] = {"base": judge.calibration_error(base), "other": judge.calibration_error(new)}
        moved = "" if told["same_recall"] is None else f"; the other finds as much at {told['same_recall']:.3f}"
        LOGGER.info(f"Recall and precision at confidence {conf:.3f} and IoU 0.5{moved}.")
    folder = runs.folder(place, task=base.about["task"], mode="compare")
    for name, evidence in (("base", base), ("other", new)):
        atomic_write(folder / f"{name}.npz", evidence.data())
    told |= {"changes": [asdict(c) for c in found], "checks": checks}
    LOGGER.info(f"{len(base.images)} images: {verdict}")
    for c in (c for c in checks if not c["passed"]):
        LOGGER.warning(f"{c['name']}: {c['value']:+.4f} (limit {c['limit']:g})")
    runs.write_json(folder / "compare.json", told)
    runs.saved(folder)
    return told


def _evidence(model: str | Path, data: str | None, imgsz: int | None) -> Any:
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
    accuracy(model, data, size, keep=found.append)
    return found[0]


def _limits(given: Any) -> dict[str, float]:
    """Return the limits of a contract by figure, of nested options or of a YAML file."""
    from ultralytics.utils import YAML

    if isinstance(given, (str, Path)):
        if not Path(given).is_file():
            raise UsageError(f"'contract={given}' does not exist. Give a YAML file, or contract.map=-0.01 and so on.")
        given = YAML.load(given)
    flat: dict[str, float] = {}
    for key, value in (given or {}).items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
