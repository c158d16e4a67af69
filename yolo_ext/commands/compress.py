# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands that change a model: compress, train, prune, distill, quantize, and demo, which shows them all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolo_ext.commands import (  # isort: skip
    EXPORTS, PLACE, Count, Limits, Natural, Resume, Share, Technique, Weights, check_native, command, need, tell_idle,
)  # fmt: skip
from yolo_ext.core.config import CONFIGS, TARGETS, PruneConfig, cfg_dir, changed, parse, without_effect
from yolo_ext.core.log import LOGGER

SPEEDUP = 2.0  # by pruning where no target is given
SHAPES: dict[str, Any] = {"imgsz": 128, "batch": 8, "nbs": 8}  # all trainings of the demo
BASE: dict[str, Any] = {"epochs": 50, "optimizer": "AdamW", "lr0": 0.002, "cos_lr": True, "warmup_epochs": 1.0,
                        "close_mosaic": 15, "plots": False, **SHAPES}  # fmt: skip


@command("Prune, fine-tune with distillation, quantize, export, verify, measure and report")
def compress(
    model: Weights, data: str | Path | None = None, *, imgsz: Count | None = None, epochs: Natural | None = None,
    sparsity: Technique = None, prune: Technique = True, distill: Technique = True, quant: Technique = True,
    max_drop: Share | None = None, contract: Limits = None, confidence: Share | None = None, resume: Resume = False,
    save_optimizer: bool = False, **native: Any,
) -> dict[str, Any]:  # fmt: skip
    """Compress a trained YOLO and prove the result; a technique is switched off by None.

    Args:
        model: Base ``.pt``.
        data: Dataset YAML; may be left out only when there is no training and no quantization.
        epochs: Fine-tune epochs, 0 for none; 30 by default.
        sparsity: Options of a sparsity training that comes first.
        prune: Options of pruning; True removes half of the FLOPs.
        distill: Options of the distillation while fine-tuning.
        max_drop: Loss of any metric of the task (box, mask and keypoint mAP50-95, top-1, top-5) that the delivered file
            may have against the base, above 0; exit status 1 where it lost more.
        save_optimizer: Keep the state of the optimizer in ``best.pt`` and ``last.pt``.

    Returns: The contents of ``summary.json`` plus ``run_dir`` and ``checks``.
    Raises: `UsageError` if the input is wrong; nothing has been written then.
    """
    return _compress("compress", **locals())


@command("Train with any technique in the loop", like=compress)
def train(
    model: Weights, data: str | Path | None = None, *, imgsz: Count | None = None, epochs: Count | None = None,
    sparsity: Technique = None, prune: Technique = None, distill: Technique = None, quant: Technique = None,
    max_drop: Share | None = None, contract: Limits = None, confidence: Share | None = None, resume: Resume = False,
    save_optimizer: bool = False, **native: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a YOLO with our trainer of its task.

    Args:
        model: ``.pt`` or ``.yaml``.
        data: Dataset YAML.
        imgsz: Side of the images in pixels, rounded up to the stride; that of the training of the model by default.
        epochs: Epochs of the training; 100 by default.
        sparsity: Options of sparsity training.
        prune: Options of pruning while training.
        distill: Options of distillation.
        quant: Options of quantization-aware training.
        contract: Limits by figure, such as contract.recall.person=-0.02, or a YAML file of them; none by default.

    Returns: The contents of ``summary.json``.
    Raises: `UsageError` if the input is wrong.
    """
    given = dict(locals())
    from yolo_ext.training import train as run

    if not resume:
        need("train", given, "data")
    check_native("train", model, given.pop("native"))
    tell_idle(without_effect(parse({k: given[k] for k in CONFIGS}), stages=False))
    return run(**_asked(given), **native)


@command("Prune and fine-tune; epochs=0 prunes without data or training", like=compress)
def prune(
    model: Weights, data: str | Path | None = None, *, imgsz: Count | None = None, epochs: Natural | None = None,
    sparsity: Technique = None, prune: Technique = True, distill: Technique = None, quant: Technique = None,
    max_drop: Share | None = None, contract: Limits = None, confidence: Share | None = None, resume: Resume = False,
    save_optimizer: bool = False, **native: Any,
) -> dict[str, Any]:  # fmt: skip
    """Do what `compress` does, whose keys these are, with no technique but pruning on by default.

    Args:
        model: Base ``.pt``; with ``epochs=0`` a ``.yaml`` will do.
        data: Dataset YAML; may be left out with ``epochs=0``.
    """
    return _compress("prune", **locals())


@command("Train a student with a teacher", like=train)
def distill(
    model: Weights, data: str | Path | None = None, *, imgsz: Count | None = None, epochs: Count | None = None,
    sparsity: Technique = None, prune: Technique = None, distill: Technique = True, quant: Technique = None,
    max_drop: Share | None = None, contract: Limits = None, confidence: Share | None = None, resume: Resume = False,
    save_optimizer: bool = False, **native: Any,
) -> dict[str, Any]:  # fmt: skip
    """Do what `train` does, whose keys these are, with distillation on by default.

    Args:
        model: Student, ``.pt`` or ``.yaml``.
        distill: Options of distillation, such as `distill.teacher`.
    """
    given = dict(locals())
    if not resume:
        need("distill", given, "data")
    return train(**{"name": "distill", **given.pop("native"), **given})


@command("INT8 by PTQ or QAT, as ONNX", like=compress)
def quantize(
    model: Weights, data: str | Path | None = None, *, imgsz: Count | None = None, epochs: Natural = 0,
    sparsity: Technique = None, prune: Technique = None, distill: Technique = None, quant: Technique = True,
    max_drop: Share | None = None, contract: Limits = None, confidence: Share | None = None, resume: Resume = False,
    save_optimizer: bool = False, **native: Any,
) -> dict[str, Any]:  # fmt: skip
    """Do what `compress` does, whose keys these are, with no technique but quantization on by default.

    Args:
        model: Float ``.pt``.
        data: Dataset YAML, for calibration, accuracy and QAT.
        epochs: Fine-tune epochs of the float model; those of QAT are `quant.epochs`.
    """
    return _compress("quantize", **locals())


@command("Generate data, train a small YOLO and compress it; needs no network")
def demo(seed: Natural = 0, **place: Any) -> dict[str, Any]:
    """Generate the `shapes` set, train a small YOLO on it and compress it.

    Args:
        seed: Seed of the data and of the trainings.

    Returns: What `compress` returns.
    """
    from ultralytics import YOLO
    from ultralytics.utils import colorstr

    from yolo_ext import runs
    from yolo_ext.data.shapes import make_shapes

    folder = runs.folder(place, task="detect", mode="demo")
    LOGGER.info(f"{colorstr('bold', 'demo: ')}generating images, training a base model, compressing it in {folder}")
    data = make_shapes(folder / "shapes", seed=seed)
    base = YOLO(str(cfg_dir() / "models" / "yolov8n-shapes.yaml"))
    base.train(data=str(data), seed=seed, save_dir=str(folder / "base"), exist_ok=True, **BASE)
    found = compress(str(base.trainer.best), data, seed=seed, epochs=20, save_dir=str(folder / "compress"),
                     exist_ok=True, prune={"speedup": 2.0}, **SHAPES)  # fmt: skip
    LOGGER.info(f"{colorstr('bold', 'demo: ')}open {found.report}")
    LOGGER.info("Now try your model: yolo-ext compress model=best.pt data=data.yaml")
    return found


def _compress(mode: str, native: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Run the pipeline under the name of a command; pruning without a target halves the FLOPs."""
    from yolo_ext.pipeline import compress as run

    options = {} if given["prune"] is True else given["prune"]
    options = changed(options) if isinstance(options, PruneConfig) else options
    aims = (*TARGETS, "ratios", "kind")
    aimed = not isinstance(options, Mapping) or any(options.get(k) not in (None, {}, "structured") for k in aims)
    if not aimed:
        given["prune"] = {**options, "speedup": SPEEDUP}
    configs = parse({k: given[k] for k in CONFIGS})
    check_native(mode, given["model"], native, also=EXPORTS if configs["quant"] else ())
    if not aimed:
        LOGGER.info(f"prune: no target given: prune.speedup={SPEEDUP:g}")
    tell_idle([*without_effect(configs), *_untrained(configs, given["epochs"], native)])
    return run(**{**native, **_asked(given), "mode": mode})


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that are not off."""
    return {k: v for k, v in given.items() if v is not None and v is not False}


def _untrained(configs: Mapping[str, Any], epochs: int | None, native: Mapping[str, Any]) -> list[str]:
    """Name the keys that are for trainings which this run does not have, and why."""
    distill, quant = configs["distill"], configs["quant"]
    qat, tunes = quant and quant.mode != "ptq", epochs != 0 and (configs["prune"] or distill)
    before = tunes or configs["sparsity"]  # a training before QAT
    taught = before or (qat and quant.supervision != "features")
    found = {
        "nothing is trained": () if before or qat else sorted({*native} - {*PLACE, *EXPORTS, "freeze", "modules"}),
        "quant.lr0 is that of QAT": {"lr0"} & {*native} if qat and not before else (),
        "nothing is fine-tuned without prune or distill": ("epochs",) if epochs and not tunes else (),
        "no training to distill in": () if taught or not distill else [f"distill.{k}" for k in changed(distill)],
    }
    return [f"{', '.join(keys)} ({why})" for why, keys in found.items() if keys]
